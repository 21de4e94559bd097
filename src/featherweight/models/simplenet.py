"""SimpleNet: thirteen plain convolutions, and nothing else.

A stack of 3x3 convolutions with batch norm, ReLU and 2x2 max pooling, without skips or branches: few groups
of equal layers, widths that grow gradually, resolution kept as long as affordable, 1x1 kernels only near the
end. It is cheap where plain convolutions are all the hardware runs, and every batch norm folds away.

Shapes:
    ImageNet nets `(N, 3, 224, 224)` -> maps of 1/2, 1/4, 1/8 by the strides of `mode`, then two pools -> 1/32
    -> logits `(N, 1000)`. CIFAR nets `(N, 3, 32, 32)` -> 32, pool 16, pool 8, pool 4, pool 2 -> logits `(N,
    10)`; the extra pool takes one more halving, so it needs a side of at least 32 pixels.

Differs:
    Dropout is one rate before the classifier (`drop_rate`) and one after each pool (`pool_drop_rate`) instead
    of a table by layer. `simplenet_cifar_460k` has the Caffe kernels, and no batch norm on its last three
    layers, but conv 7 is normalised before its pool, where Caffe normalises after. `simplenet_cifar_385k` is
    what the PyTorch file calls 460k. The extra `width` rounds to multiples of 8. `stem_stride=2` on a CIFAR
    net halves every map.

Reference: Hasanpour et al., "Let's keep it simple, using simple architectures to outperform deeper and more
complex architectures", arXiv 1608.06037.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from featherweight.blocks.classifier import Classifier
from featherweight.blocks.conv import ConvNormAct, make_divisible
from featherweight.errors import UsageError
from featherweight.registry import register_model

Layer = tuple[str, int]
"""("c3", channels) a 3x3 convolution, ("c1", channels) a 1x1 one, ("p", 0) a pool; "n" means no norm."""


def parse_layers(text: str) -> list[Layer]:
    """Read a row of layers: a number is a 3x3 convolution, `k1` makes it 1x1, `n` drops the norm, P pools.

    >>> parse_layers("64 P 2048k1 100k1n")
    [('c3', 64), ('p', 0), ('c1', 2048), ('c1n', 100)]
    """
    layers = []
    for word in text.split():
        channels, kernel, _ = word.partition("k1")
        plain = "n" if word.endswith("n") else ""
        layers.append(
            ("p", 0) if word == "P" else (f"c{'1' if kernel else '3'}{plain}", int(channels.rstrip("n")))
        )
    return layers


NETS = {
    "5m": "64 128 128 128 128 128 P 256 256 256 512 P 2048k1 256k1 256",
    "9m": "128 192 192 192 192 192 P 320 320 320 640 P 2560k1 320k1 320",
    "cifar_5m": "64 128 128 128 P 128 128 256 P 256 256 P 512 2048k1 256k1 P 256",
    "cifar_5m_extra_pool": "64 128 128 128 P 128 128 256 P 256 256 P 512 P 2048k1 256k1 P 256",
    "cifar_310k": "64 32 32 32 P 32 32 64 P 64 64 P 128 256k1 64k1 P 64",
    "cifar_385k": "32 32 32 64 P 64 64 64 P 64 64 P 96 96k1 96k1 P 100",
    "cifar_460k": "32 32 32 64 P 64 64 64 P 64 64 P 96 96n 96n P 100k1n",
}

MODES = {
    "": (),
    "m1": (2, 2, 2),
    "m2": (2, 2, 1, 2),
    "m3": (2, 2, 1, 1, 2),
    "m4": (2, 1, 2, 1, 2),
}
"""Strides of the first convolutions; a later mode keeps resolution longer: slower, more accurate."""


class SimpleNet(Classifier):
    """A SimpleNet from a row of layers.

    Args:
        layers: the layers, see `parse_layers`.
        width: multiplies every channel count.
        mode: which strides the first convolutions have, a key of `MODES`.
        stem_stride: replaces the stride of the first convolution, in pixels.
        in_chans: channels of the image.
        global_pool: the published nets pool by maximum, not by mean.
        pool_drop_rate: dropout of whole channels after each pool.
        drop_path_rate: accepted for a common signature; there is no residual branch to drop.
        **kwargs: see `Classifier`.

    Raises:
        UsageError: the mode is unknown.
    """

    def __init__(
        self,
        layers: Sequence[Layer],
        width: float = 1.0,
        mode: str = "",
        stem_stride: int = 1,
        in_chans: int = 3,
        global_pool: str = "max",
        pool_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        **kwargs: Any,
    ) -> None:
        del drop_path_rate
        if mode not in MODES:
            raise UsageError(
                f"No stride mode '{mode}'. Expected one of {', '.join(filter(None, MODES))} or ''."
            )
        strides = iter((stem_stride, *MODES[mode][1:]))
        body: list[nn.Module] = []
        levels = []
        channels, reduction = in_chans, 1
        for kind, base in layers:
            if kind == "p":
                body.append(nn.Sequential(nn.MaxPool2d(2), nn.Dropout2d(pool_drop_rate)))
                reduction *= 2
            else:
                stride, out = next(strides, 1), _scale(base, width)
                norm = None if kind.endswith("n") else nn.BatchNorm2d
                body.append(
                    ConvNormAct(channels, out, int(kind[1]), stride, bias=True, norm=norm, momentum=0.05)
                )
                channels, reduction = out, reduction * stride
            levels.append((channels, reduction))
        super().__init__(
            nn.Sequential(*body), levels, channels, in_chans=in_chans, global_pool=global_pool, **kwargs
        )
        self.apply(_init_weights)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the official keys, whose numbers depend on how many dropouts the file's version had.

        Convolutions and norms are therefore taken in order of their numbers. The classifier keeps its name.
        """
        numbers = sorted({int(key.split(".")[1]) for key in state if key.startswith("features.")})
        convs = [n for n in numbers if state[f"features.{n}.weight"].ndim == 4]
        units = [f"body.{i}" for i, module in enumerate(self.body) if isinstance(module, ConvNormAct)]
        names = {}
        for unit, number in zip(units, convs, strict=True):
            names |= {f"features.{number}": f"{unit}.conv", f"features.{number + 1}": f"{unit}.norm"}
        renamed = {}
        for key, value in state.items():
            module, _, leaf = key.rpartition(".")
            renamed[f"{names.get(module, module)}.{leaf}"] = value
        return renamed


def _scale(channels: int, width: float) -> int:
    return channels if width == 1.0 else make_divisible(channels * width)


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight, gain=nn.init.calculate_gain("relu"))


def _imagenet(net: str, scale: float, own_mode: str, width: float = 1.0, **kwargs: Any) -> SimpleNet:
    return SimpleNet(
        parse_layers(NETS[net]),
        scale * width,
        **{"mode": own_mode, "stem_stride": 2, "num_classes": 1000, **kwargs},
    )


def _cifar(net: str, **kwargs: Any) -> SimpleNet:
    return SimpleNet(parse_layers(NETS[net]), **{"num_classes": 10, "input_size": (3, 32, 32), **kwargs})


@register_model
def simplenet_small_m1_05(**kwargs: Any) -> SimpleNet:
    """The 5M net at half width, fast strides."""
    return _imagenet("5m", 0.5, "m1", **kwargs)


@register_model
def simplenet_small_m2_05(**kwargs: Any) -> SimpleNet:
    """The 5M net at half width, slower strides."""
    return _imagenet("5m", 0.5, "m2", **kwargs)


@register_model
def simplenet_small_m1_075(**kwargs: Any) -> SimpleNet:
    """The 5M net at width 0.75, fast strides."""
    return _imagenet("5m", 0.75, "m1", **kwargs)


@register_model
def simplenet_small_m2_075(**kwargs: Any) -> SimpleNet:
    """The 5M net at width 0.75, slower strides."""
    return _imagenet("5m", 0.75, "m2", **kwargs)


@register_model
def simplenet_5m_m1(**kwargs: Any) -> SimpleNet:
    """The 5M net, fast strides."""
    return _imagenet("5m", 1.0, "m1", **kwargs)


@register_model
def simplenet_5m_m2(**kwargs: Any) -> SimpleNet:
    """The 5M net, slower strides."""
    return _imagenet("5m", 1.0, "m2", **kwargs)


@register_model
def simplenet_9m_m1(**kwargs: Any) -> SimpleNet:
    """The 9M net, fast strides."""
    return _imagenet("9m", 1.0, "m1", **kwargs)


@register_model
def simplenet_9m_m2(**kwargs: Any) -> SimpleNet:
    """The 9M net, slower strides."""
    return _imagenet("9m", 1.0, "m2", **kwargs)


@register_model
def simplenet_cifar_310k(**kwargs: Any) -> SimpleNet:
    """The slim CIFAR net of 310 thousand parameters."""
    return _cifar("cifar_310k", **kwargs)


@register_model
def simplenet_cifar_385k(**kwargs: Any) -> SimpleNet:
    """What the PyTorch file calls 460k: 1x1 kernels where Caffe has 3x3."""
    return _cifar("cifar_385k", **kwargs)


@register_model
def simplenet_cifar_460k(**kwargs: Any) -> SimpleNet:
    """The slim CIFAR net of 460 thousand parameters, with the Caffe kernels."""
    return _cifar("cifar_460k", **kwargs)


@register_model
def simplenet_cifar_5m(**kwargs: Any) -> SimpleNet:
    """The CIFAR net of the paper."""
    return _cifar("cifar_5m", **kwargs)


@register_model
def simplenet_cifar_5m_extra_pool(**kwargs: Any) -> SimpleNet:
    """The CIFAR net with one pool more, to which the released weights belong."""
    return _cifar("cifar_5m_extra_pool", **kwargs)
