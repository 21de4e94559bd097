"""TVConv-MobileNetV2 and TVConv-ShuffleNetV2: small networks for aligned faces, a kernel for every place.

Two mobile networks for 96-pixel crops, whose stems keep every pixel and whose depthwise convolutions are
translation variant (see `ops/tvconv`): much of a face's layout is known beforehand, so narrow ones suffice.
The answer is an embedding of 512 values, to be compared by distance; `num_classes` adds a classifier for
training. `fuse()` drops the generators of the kernels, by far most of the parameters.

Shapes:
    `(N, 3, 96, 96)` -> stem at 96 x 96 -> maps of 48 (pooled, in the ShuffleNet), 24, 12 and 6 pixels -> 512
    (1024) x 6 x 6 -> pooled -> embedding `(N, 512)`. The kernels belong to places of that size; at other
    sizes they are interpolated.

Differs:
    Any image size works, by interpolated kernels, where the released code takes one. Dropout is before the
    classifier, not before the pooling. `width` scales the published width, `stem_stride=2` halves all maps.
    The plain depthwise networks of the same shape are there to compare with.

References: Chen et al., "TVConv", CVPR 2022, arXiv 2203.10489, section 4.1; arXiv 1801.04381; arXiv
1807.11164.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from torch import Tensor, nn

from featherweight.blocks.classifier import Classifier
from featherweight.blocks.conv import ConvNormAct, make_divisible
from featherweight.blocks.layouts import rename
from featherweight.errors import UsageError
from featherweight.ops.replace import replace_convs
from featherweight.ops.tvconv import TVConv2d, fuse_tvconvs
from featherweight.registry import create_model, register_model

EMBEDDING = 512
SIDE = 96
GENERATOR = {"maps": 4, "hidden": 64, "layers": 3}
"""Sizes of the networks that generate the kernels, as published for faces."""


class FaceNet(Classifier):
    """The body of a mobile network, its depthwise convolutions translation variant, and the embedding.

    Args:
        host: a network of the house, built for the same images.
        last: the last convolution.
        norm: batch norm behind it, before the pooling.
        variant: replace the depthwise convolutions; else leave them.
        generator: `maps`, `hidden` and `layers` of `TVConv2d`.
        input_size: `(C, H, W)` that the kernels belong to.
        **kwargs: see `Classifier`.

    Raises:
        UsageError: the embedding was asked to work on a map that is not pooled.
    """

    def __init__(
        self,
        host: Classifier,
        last: ConvNormAct,
        *,
        variant: bool,
        generator: Mapping[str, int] = GENERATOR,
        input_size: tuple[int, int, int] = (3, SIDE, SIDE),
        in_chans: int = 3,
        **kwargs: Any,
    ) -> None:
        features = last.conv.out_channels
        body = nn.Sequential(*host.body[:-1], last, nn.BatchNorm2d(features))
        head = nn.Sequential(nn.Flatten(), nn.Linear(features, EMBEDDING), nn.BatchNorm1d(EMBEDDING))
        super().__init__(
            body,
            _levels(host, features),
            features,
            head=head,
            head_hidden_size=EMBEDDING,
            in_chans=in_chans,
            input_size=input_size,
            **kwargs,
        )
        if not self.global_pool:
            raise UsageError("The embedding needs pooled features: global_pool='avg' or 'max'.")
        if variant:
            size = (in_chans, *input_size[1:])
            replace_convs(self.body, TVConv2d, input_size=size, resize=True, **generator)
        self.apply(_init_weights)

    def fuse(self) -> Self:
        """Drop the generators in place: the same answers from the kernels alone."""
        return fuse_tvconvs(self)

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename the keys of the released networks to ours."""
        mobile = any(key.startswith("features.") for key in state)
        return _drop_constants(rename(rename(state, MOBILE if mobile else _shuffle_rules()), OPERATOR))


def _levels(host: Classifier, features: int) -> list[tuple[int, int]]:
    """Return channels and reduction after each module of the body, the new ones included."""
    levels = []
    stages = [(int(info["module"].removeprefix("body.")), info) for info in host.feature_info]
    for index in range(len(host.body) + 1):
        info = next((info for end, info in stages if end >= index), host.feature_info[-1])
        channels = features if index >= len(host.body) - 1 else info["num_chs"]
        levels.append((channels, info["reduction"]))
    return levels


def _init_weights(module: nn.Module) -> None:
    if isinstance(module, nn.Conv2d):
        nn.init.kaiming_normal_(module.weight, mode="fan_out")
    elif isinstance(module, nn.Linear):
        nn.init.normal_(module.weight, std=0.01)
        nn.init.zeros_(module.bias)


EMBEDDING_RULES = [
    (r"output_layer\.layer1\.(0\.)?(?=\D)", "body.19."),
    (r"output_layer\.layer2\.0\.", "head.1."),
    (r"output_layer\.layer2\.1\.", "head.2."),
]
MOBILE = [
    *EMBEDDING_RULES,
    (r"features\.(0|18)\.0\.", r"body.\1.conv."),
    (r"features\.(0|18)\.1\.", r"body.\1.norm."),
    (r"features\.1\.conv\.0\.0\.", "body.1.depthwise.conv."),
    (r"features\.1\.conv\.0\.1\.", "body.1.depthwise.norm."),
    (r"features\.1\.conv\.1\.", "body.1.project.conv."),
    (r"features\.1\.conv\.2\.", "body.1.project.norm."),
    (r"features\.(\d+)\.conv\.0\.0\.", r"body.\1.expand.conv."),
    (r"features\.(\d+)\.conv\.0\.1\.", r"body.\1.expand.norm."),
    (r"features\.(\d+)\.conv\.1\.0\.", r"body.\1.depthwise.conv."),
    (r"features\.(\d+)\.conv\.1\.1\.", r"body.\1.depthwise.norm."),
    (r"features\.(\d+)\.conv\.2\.", r"body.\1.project.conv."),
    (r"features\.(\d+)\.conv\.3\.", r"body.\1.project.norm."),
]
OPERATOR = [
    (r"(.*)\.posi_map$", r"\1.affinity"),
    (r"(.*)\.weight_layers\.", r"\1.generator."),
    (r"(.*)\.bias_layers\.", r"\1.bias_generator."),
]


def _shuffle_rules() -> list[tuple[str, str]]:
    rules = [
        *EMBEDDING_RULES,
        (r"conv1\.0\.", "body.0.conv."),
        (r"conv1\.1\.", "body.0.norm."),
        (r"conv5\.0\.", "body.18.conv."),
        (r"conv5\.1\.", "body.18.norm."),
    ]
    left = {"0": "0.conv", "1": "0.norm", "2": "1.conv", "3": "1.norm"}
    right = {"0": "0.conv", "1": "0.norm", "3": "1.conv", "4": "1.norm", "5": "2.conv", "6": "2.norm"}
    position = 1
    for stage, units in ((2, 4), (3, 8), (4, 4)):
        for unit in range(units):
            position += 1
            old, new = rf"stage{stage}\.{unit}\.", f"body.{position}."
            rules += [(rf"{old}branch1\.{index}\.", f"{new}left.{part}.") for index, part in left.items()]
            rules += [(rf"{old}branch2\.{index}\.", f"{new}right.{part}.") for index, part in right.items()]
    return rules


def _drop_constants(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the numbers that the released operator keeps as buffers beside its maps."""
    operators = [key.removesuffix("affinity") for key in state if key.endswith(".affinity")]
    parts = ("affinity", "generator.", "bias_generator.")
    return {
        key: value
        for key, value in state.items()
        if not any(key.startswith(op) and not key.removeprefix(op).startswith(parts) for op in operators)
    }


def _mobilenet(
    width: float, variant: bool, stem_stride: int = 1, drop_path_rate: float = 0.0, **kwargs: Any
) -> FaceNet:
    in_chans = kwargs.get("in_chans", 3)
    shared = {"in_chans": in_chans, "num_classes": 0, "drop_path_rate": drop_path_rate}
    host = create_model("mobilenetv2_100", width=width, stem_stride=stem_stride, **shared)
    channels = make_divisible(EMBEDDING * max(1.0, width))
    last = ConvNormAct(host.body[-1].conv.in_channels, channels, 1, act=nn.ReLU6)
    return FaceNet(host, last, variant=variant, **kwargs)


def _shufflenet(name: str, width: float, variant: bool, stem_stride: int = 1, **kwargs: Any) -> FaceNet:
    kwargs.pop("drop_path_rate", None)
    host = create_model(name, width=width, in_chans=kwargs.get("in_chans", 3), num_classes=0)
    if stem_stride == 1:
        # The pooling stays, which the host's own stem_stride=1 would leave out.
        host.body[0].conv.stride = (1, 1)
        for info in host.feature_info:
            info["reduction"] //= 2
    return FaceNet(host, host.body[-1], variant=variant, **kwargs)


@register_model
def tvconv_mobilenetv2_010(width: float = 1.0, **kwargs: Any) -> FaceNet:
    """The face MobileNetV2 at width 0.1, with translation variant convolutions."""
    return _mobilenet(0.1 * width, True, **kwargs)


@register_model
def face_mobilenetv2_010(width: float = 1.0, **kwargs: Any) -> FaceNet:
    """The face MobileNetV2 at width 0.1, with plain depthwise convolutions."""
    return _mobilenet(0.1 * width, False, **kwargs)


@register_model
def tvconv_mobilenetv2_020(width: float = 1.0, **kwargs: Any) -> FaceNet:
    """The face MobileNetV2 at width 0.2, with translation variant convolutions."""
    return _mobilenet(0.2 * width, True, **kwargs)


@register_model
def face_mobilenetv2_020(width: float = 1.0, **kwargs: Any) -> FaceNet:
    """The face MobileNetV2 at width 0.2, with plain depthwise convolutions."""
    return _mobilenet(0.2 * width, False, **kwargs)


@register_model
def tvconv_mobilenetv2_030(width: float = 1.0, **kwargs: Any) -> FaceNet:
    """The face MobileNetV2 at width 0.3, with translation variant convolutions."""
    return _mobilenet(0.3 * width, True, **kwargs)


@register_model
def face_mobilenetv2_030(width: float = 1.0, **kwargs: Any) -> FaceNet:
    """The face MobileNetV2 at width 0.3, with plain depthwise convolutions."""
    return _mobilenet(0.3 * width, False, **kwargs)


@register_model
def tvconv_mobilenetv2_050(width: float = 1.0, **kwargs: Any) -> FaceNet:
    """The face MobileNetV2 at width 0.5, with translation variant convolutions."""
    return _mobilenet(0.5 * width, True, **kwargs)


@register_model
def face_mobilenetv2_050(width: float = 1.0, **kwargs: Any) -> FaceNet:
    """The face MobileNetV2 at width 0.5, with plain depthwise convolutions."""
    return _mobilenet(0.5 * width, False, **kwargs)


@register_model
def tvconv_mobilenetv2_100(width: float = 1.0, **kwargs: Any) -> FaceNet:
    """The face MobileNetV2 at width 1, with translation variant convolutions."""
    return _mobilenet(1.0 * width, True, **kwargs)


@register_model
def face_mobilenetv2_100(width: float = 1.0, **kwargs: Any) -> FaceNet:
    """The face MobileNetV2 at width 1, with plain depthwise convolutions."""
    return _mobilenet(1.0 * width, False, **kwargs)


@register_model
def tvconv_shufflenetv2_050(width: float = 1.0, **kwargs: Any) -> FaceNet:
    """The face ShuffleNetV2 at width 0.5, with translation variant convolutions."""
    return _shufflenet("shufflenetv2_050", width, True, **kwargs)


@register_model
def face_shufflenetv2_050(width: float = 1.0, **kwargs: Any) -> FaceNet:
    """The face ShuffleNetV2 at width 0.5, with plain depthwise convolutions."""
    return _shufflenet("shufflenetv2_050", width, False, **kwargs)


@register_model
def tvconv_shufflenetv2_100(width: float = 1.0, **kwargs: Any) -> FaceNet:
    """The face ShuffleNetV2 at width 1, with translation variant convolutions."""
    return _shufflenet("shufflenetv2_100", width, True, **kwargs)


@register_model
def face_shufflenetv2_100(width: float = 1.0, **kwargs: Any) -> FaceNet:
    """The face ShuffleNetV2 at width 1, with plain depthwise convolutions."""
    return _shufflenet("shufflenetv2_100", width, False, **kwargs)
