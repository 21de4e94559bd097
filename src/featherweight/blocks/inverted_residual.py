"""The inverted residual: widen, filter depthwise, project back without an activation."""

from __future__ import annotations

from torch import Tensor, nn

from featherweight.blocks.conv import ConvNormAct
from featherweight.blocks.drop_path import DropPath


class InvertedResidual(nn.Module):
    """Thin tensor in, thin tensor out, wide in the middle (arXiv 1801.04381, section 3.3).

    `(N, in_channels, H, W)` to `(N, out_channels, ceil(H / stride), ceil(W / stride))`.

    Args:
        in_channels: channels of the input.
        out_channels: channels of the output.
        stride: stride of the depthwise convolution, in pixels.
        expansion: the middle has `in_channels * expansion` channels; 1 leaves the widening out.
        kernel_size: side of the depthwise kernel, in pixels.
        act: class of the activation.
        drop_path: probability of dropping the branch during training.
        group_width: channels of each group of the filter; 1 makes it depthwise.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        stride: int = 1,
        expansion: int = 6,
        kernel_size: int = 3,
        act: type[nn.Module] = nn.ReLU6,
        drop_path: float = 0.0,
        *,
        group_width: int = 1,
    ) -> None:
        super().__init__()
        hidden = in_channels * expansion
        self.has_skip = stride == 1 and in_channels == out_channels
        self.expand = ConvNormAct(in_channels, hidden, 1, act=act) if expansion != 1 else nn.Identity()
        groups = hidden // group_width
        self.depthwise = ConvNormAct(hidden, hidden, kernel_size, stride, groups, act)
        # A non-linearity on a thin tensor destroys information, so the projection stays linear.
        self.project = ConvNormAct(hidden, out_channels, 1, act=None)
        self.drop_path = DropPath(drop_path) if self.has_skip else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Run the branch and add the input where the shapes agree."""
        y = self.project(self.depthwise(self.expand(x)))
        return x + self.drop_path(y) if self.has_skip else y
