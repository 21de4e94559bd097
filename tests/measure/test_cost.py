"""Costs of operators, by their own formulas, in whatever network they sit."""

import torch
from torch import nn

from featherweight.blocks.conv_operator import ConvOperator
from featherweight.measure.cost import operator_costs
from featherweight.measure.count import Count, count


class Sums(ConvOperator):
    """Runs without any convolution; the formula alone says what it costs."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        size = self.output_size(x.shape[2:])
        return x.mean((1, 2, 3)).view(-1, 1, 1, 1).expand(-1, self.out_channels, *size) * self.weight.sum()

    def transform_macs(self, input_shape):
        return input_shape[0]


def test_the_formula_replaces_what_runs_inside():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), Sums(4, 6, 3, stride=2, padding=1), nn.Conv2d(6, 2, 1))
    plain, inside, last = 8 * 8 * 12, 4 * 4 * 6 * 4 * 9, 4 * 4 * 12
    assert count(model, (3, 8, 8)) == Count(16 + 2 + 14, plain + inside + last)
    (cost,) = operator_costs(model, (3, 8, 8))
    assert (cost.name, cost.operator, cost.params) == ("1", "Sums", 2)
    assert (cost.macs, cost.transform_macs) == (inside, 4)


class Twice(nn.Module):
    """Looks at values, so that it runs on the CPU after it failed on the meta device."""

    def __init__(self):
        super().__init__()
        self.op = Sums(2, 2, 3, padding=1)

    def forward(self, x):
        y = self.op(x)
        return self.op(y) if float(y.detach().sum()) <= 0 else y


def test_a_network_that_runs_twice_is_listed_once():
    assert [cost.name for cost in operator_costs(Twice(), (2, 5, 5))] == ["op", "op"]
    assert count(Twice(), (2, 5, 5)).macs == 2 * 25 * 2 * 2 * 9
