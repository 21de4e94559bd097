"""The preprocessing specification: from an image to the tensor that a network reads.

One frozen record, stored as JSON inside the exported model, so that training, onnxruntime and the
browser compute the same tensor: open (`featherweight.data.images`), convert the mode, resize (antialiased),
divide by 255, subtract the mean, divide by the standard deviation. Imports numpy and Pillow only.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from featherweight.data.images import open_image
from featherweight.errors import DataError

VERSION = 1
_FILTERS = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}


@dataclass(frozen=True)
class Preprocess:
    """How an image becomes the input of a network.

    Args:
        size: height and width in pixels.
        mean: per channel, of pixels in [0, 1].
        std: per channel, of pixels in [0, 1].
        mode: `"RGB"` (3 channels) or `"L"` (1 channel).
        resize: `"squash"` stretches to `size`; `"crop"` scales to cover `size`, then cuts the centre.
        interpolation: `"bilinear"`, `"bicubic"` or `"nearest"`, with Pillow's antialiasing.
        version: of this rule; a reader refuses a newer one.

    Raises:
        DataError: a field is out of range, or the lengths do not fit the mode.

    >>> spec = Preprocess(size=(2, 2), mean=(0.5,), std=(0.5,), mode="L")
    >>> spec.apply(np.full((4, 4), 255, np.uint8)).ravel().tolist()
    [1.0, 1.0, 1.0, 1.0]
    >>> Preprocess.from_json(spec.to_json()) == spec
    True
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    mode: str = "RGB"
    resize: str = "squash"
    interpolation: str = "bilinear"
    version: int = VERSION

    def __post_init__(self) -> None:
        for field, cast in (("size", int), ("mean", float), ("std", float)):
            object.__setattr__(self, field, tuple(cast(value) for value in getattr(self, field)))
        _check_choice("mode", self.mode, ("RGB", "L"))
        _check_choice("resize", self.resize, ("squash", "crop"))
        _check_choice("interpolation", self.interpolation, tuple(_FILTERS))
        if self.version > VERSION:
            raise DataError(
                f"Preprocess version is {self.version}; this release reads up to {VERSION}. Update it."
            )
        if len(self.size) != 2 or min(self.size) < 1:
            raise DataError(f"Preprocess size is {self.size}. Expected (height, width), each at least 1.")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise DataError(
                f"Preprocess has {len(self.mean)} means and {len(self.std)} deviations. "
                f"Expected {self.channels} of each for mode {self.mode}."
            )
        if not np.isfinite([*self.mean, *self.std]).all() or min(self.std) <= 0:
            raise DataError(
                f"Preprocess mean {self.mean} or std {self.std} is not usable. Expected std above 0."
            )

    @property
    def channels(self) -> int:
        """Channels of the tensor: 3 or 1."""
        return 3 if self.mode == "RGB" else 1

    def apply(self, image: Image.Image | np.ndarray | str | Path | bytes) -> np.ndarray:
        """Return the float32 input of one image, of shape (C, H, W).

        Raises:
            DataError: the image cannot be opened (see `open_image`).
        """
        pixels = resize_image(open_image(image), self.size, self.mode, self.resize, self.interpolation)
        return np.ascontiguousarray(self.normalize(pixels).transpose(2, 0, 1))

    def normalize(self, pixels: np.ndarray) -> np.ndarray:
        """Return uint8 pixels (..., H, W, C) as float32 with mean and deviation applied."""
        scaled = pixels.astype(np.float32) / np.float32(255)
        return (scaled - np.float32(self.mean)) / np.float32(self.std)

    def to_json(self) -> str:
        """Return the specification as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)

    @classmethod
    def from_json(cls, text: str) -> Preprocess:
        """Read a specification back.

        Raises:
            DataError: the text is not JSON, or a field is missing, unknown or out of range.
        """
        try:
            fields = json.loads(text)
            return cls(**fields)
        except (ValueError, TypeError) as error:
            raise DataError(
                f"Not a preprocessing specification: {error}. Expected preprocess.json."
            ) from error


def resize_image(
    image: Image.Image,
    size: tuple[int, int],
    mode: str = "RGB",
    resize: str = "squash",
    interpolation: str = "bilinear",
) -> np.ndarray:
    """Return the uint8 pixels (H, W, C) of a plain image in `mode` at `size` (height, width).

    This one function serves training data and `Preprocess.apply`, so both see the same pixels.
    """
    if image.mode != mode:
        image = image.convert(mode)
    height, width = size
    if image.size != (width, height):
        box = None if resize == "squash" else _centre_box(image.size, size)
        image = image.resize((width, height), _FILTERS[interpolation], box=box)
    pixels = np.asarray(image)
    return pixels[:, :, None] if pixels.ndim == 2 else pixels


def _centre_box(image_size: tuple[int, int], size: tuple[int, int]) -> tuple[float, float, float, float]:
    """Return the largest centred box of the target's shape, in source pixels (left, top, right, bottom)."""
    (source_w, source_h), (height, width) = image_size, size
    scale = min(source_w / width, source_h / height)
    left, top = (source_w - width * scale) / 2, (source_h - height * scale) / 2
    return (
        max(left, 0.0),
        max(top, 0.0),
        min(left + width * scale, source_w),
        min(top + height * scale, source_h),
    )


def _check_choice(field: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise DataError(f"Preprocess {field} is {value!r}. Expected one of {', '.join(choices)}.")
