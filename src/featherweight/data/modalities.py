"""Sound, points, time series and video as maps `(N, C, H, W)`, so that an image network takes them unchanged.

Only the number of input channels and the head of the network differ from one kind of input to another. Sound
and video need a fixed rule; points and time series pass through a small trained module first, whose
parameters train together with the network.

Shapes:
    `Spectrogram`: samples `(T,)` -> `(1, bins, frames)`. `tile_frames`: `(N, C, T, H, W)` -> `(N, C, a H, b
    W)` with a b = T. `SeriesToMap`: `(N, L, d)` -> `(N, 1, H, W)` with H W = L width. `turn_points`, then
    `PointsToImages`: `(N, P, 3)` -> `(N V, P, 3)` -> `(N V, 3, size, size)`.

Differs:
    The published point encoder lets the views attend to one another before the last layer; here each view is
    an image of its own, and the caller averages the answers of a cloud's views. Where a station lies is one
    vector of any length. The published video code lays rows of one frame side by side (`order="raw"`); the
    default puts whole frames into a grid. The published forecaster decodes the map of features with
    auto-correlations; that decoder is no input and is not here: a linear head forecasts too.

Reference: "Scaling Up Your Kernels", arXiv 2410.08049, section on universal perception; points after "P2P:
Tuning Pre-trained Image Models for Point Cloud Analysis", arXiv 2208.02812.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from featherweight.blocks.conv import ConvNormAct
from featherweight.errors import DataError, UsageError

PREEMPHASIS = 0.97
LOWEST_HZ = 20.0

VIEWS = (
    *((quarter * math.pi / 2, 0.0, math.pi / 2) for quarter in range(4)),
    *((turn * math.pi / 4, lift * math.pi / 4, math.pi / 2) for turn in (5, 7) for lift in (-1, 1)),
    *((0.0, lift * math.pi / 2, math.pi / 2) for lift in (-1, 1)),
)
"""Euler angles (around x, y, z, in radians) from which points are looked at: four sides, corners, ends."""

IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
"""Mean and standard deviation of the colours that an image network expects."""


@dataclass(frozen=True)
class Spectrogram:
    """Turn sound into a map of log energies by mel band and time, the way Kaldi does.

    Args:
        sample_rate: of the sound, in Hz.
        bins: mel bands, the height of the map.
        frames: columns of the map; shorter sound is padded with zeros before scaling, longer cut.
        window_s: length of the analysed piece, in seconds.
        hop_s: step between the pieces, in seconds.
        mean: of the log energies over the training set.
        std: their standard deviation; the map is divided by twice of it.

    >>> Spectrogram(8000, bins=64, frames=64)(torch.zeros(4000)).shape
    torch.Size([1, 64, 64])
    """

    sample_rate: int = 16_000
    bins: int = 128
    frames: int = 128
    window_s: float = 0.025
    hop_s: float = 0.01
    mean: float = -6.845978
    std: float = 5.5654526

    def __call__(self, samples: Tensor) -> Tensor:
        """Return `(1, bins, frames)` of the samples `(T,)`, which lie between -1 and 1.

        Raises:
            DataError: the samples are not one row.
        """
        if samples.ndim != 1:
            raise DataError(f"Sound of shape {tuple(samples.shape)}. Expected one channel, shape (T,).")
        energies = self.log_energies(samples - samples.mean())[: self.frames]
        energies = F.pad(energies, (0, 0, 0, self.frames - len(energies)))
        return ((energies - self.mean) / (2 * self.std)).T[None]

    def log_energies(self, samples: Tensor) -> Tensor:
        """Return the log energies `(pieces, bins)`, neither cut, padded nor scaled."""
        length = round(self.window_s * self.sample_rate)
        samples = F.pad(samples, (0, max(0, length - len(samples))))
        pieces = samples.unfold(0, length, round(self.hop_s * self.sample_rate))  # (pieces, length)
        pieces = pieces - pieces.mean(1, keepdim=True)
        before = torch.cat((pieces[:, :1], pieces[:, :-1]), 1)
        pieces = (pieces - PREEMPHASIS * before) * torch.hann_window(length, periodic=False)
        size = 1 << (length - 1).bit_length()
        power = torch.fft.rfft(pieces, size).abs().square()[:, : size // 2]
        floor = torch.finfo(torch.float32).eps
        return (power @ mel_bands(self.bins, size, self.sample_rate).T).clamp_min(floor).log()


def mel_bands(bins: int, size: int, sample_rate: int) -> Tensor:
    """Return `(bins, size // 2)` triangular weights, equally spaced on the mel scale from 20 Hz upwards.

    Args:
        bins: number of bands.
        size: length of the Fourier transform.
        sample_rate: in Hz; the highest band ends at half of it.
    """

    def mel(hertz: Tensor) -> Tensor:
        return 1127 * (1 + hertz / 700).log()

    ends = mel(torch.tensor([LOWEST_HZ, sample_rate / 2], dtype=torch.float64))
    edges = torch.linspace(float(ends[0]), float(ends[1]), bins + 2, dtype=torch.float64)[:, None]
    place = mel(torch.arange(size // 2, dtype=torch.float64) * sample_rate / size)[None]
    rising = (place - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - place) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp_min(0).float()


def mask_spectrogram(maps: Tensor, bands: int, frames: int, generator: torch.Generator) -> Tensor:
    """Blank a random run of mel bands and of frames in each map: SpecAugment, arXiv 1904.08779.

    Args:
        maps: spectrograms `(N, 1, bins, frames)`.
        bands: longest run of bands.
        frames: longest run of frames.
        generator: source of all choices.
    """
    for dim, longest in ((2, bands), (3, frames)):
        side = maps.shape[dim]
        length = torch.rand(len(maps), generator=generator) * min(longest, side)
        start = torch.rand(len(maps), generator=generator) * (side - length)
        place = torch.arange(side)
        hit = (place >= start[:, None].floor()) & (place < (start + length)[:, None].floor())
        shape = (len(maps), 1, side, 1) if dim == 2 else (len(maps), 1, 1, side)
        maps = maps.masked_fill(hit.view(shape).to(maps.device), 0)
    return maps


def near_square(places: int) -> tuple[int, int]:
    """Split a number of places into height and width whose product it is, as nearly square as possible.

    >>> near_square(48 * 768), near_square(16), near_square(24)
    ((192, 192), (4, 4), (4, 6))
    """
    height = next(side for side in range(math.isqrt(places), 0, -1) if places % side == 0)
    return height, places // height


def tile_frames(video: Tensor, order: str = "grid") -> Tensor:
    """Lay the frames of a video out as one image, `(N, C, T, H, W)` to `(N, C, a H, b W)` with a b = T.

    Args:
        video: the frames, in order of time.
        order: `"grid"` puts whole frames row by row; `"raw"` only reads the memory with other sizes, as the
            published code does, so that each row of the image holds rows of one frame side by side.

    Raises:
        UsageError: the order is unknown.
        DataError: the video has no five dimensions.
    """
    if order not in ("grid", "raw"):
        raise UsageError(f"No order of frames '{order}'. Expected 'grid' or 'raw'.")
    if video.ndim != 5:
        raise DataError(f"Video of shape {tuple(video.shape)}. Expected (N, C, T, H, W).")
    batch, channels, frames, height, width = video.shape
    rows, columns = near_square(frames)
    if order == "grid":
        video = video.reshape(batch, channels, rows, columns, height, width).transpose(3, 4)
    return video.reshape(batch, channels, rows * height, columns * width)


def time_marks(seconds: np.ndarray) -> Tensor:
    """Return `(L, 4)` marks between -0.5 and 0.5: hour of day, day of week, of month and of year.

    Args:
        seconds: integer times `(L,)`, in seconds since 1970.
    """
    time = np.asarray(seconds).astype("datetime64[s]")
    day, month, year = (time.astype(f"datetime64[{unit}]") for unit in "DMY")
    hour = (time - day).astype(np.int64) // 3600
    weekday = (day.astype(np.int64) + 3) % 7  # 1970 began on a Thursday
    counts = (
        (hour, 23),
        (weekday, 6),
        ((day - month).astype(np.int64), 30),
        ((day - year).astype(np.int64), 365),
    )
    return torch.from_numpy(np.stack([value / last - 0.5 for value, last in counts], 1)).float()


class SeriesScale(nn.Module):
    """Take level and spread of each series away before the network and give them back after it.

    Args:
        series: series that one sample holds.
    """

    def __init__(self, series: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(series))
        self.bias = nn.Parameter(torch.zeros(series))

    def forward(self, x: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Return the scaled series `(N, L, series)`, and the level and spread that `restore` needs."""
        level = x.mean(1, keepdim=True).detach()
        spread = (x.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt().detach()
        return (x - level) / spread * self.weight + self.bias, (level, spread)

    def restore(self, y: Tensor, scale: tuple[Tensor, Tensor]) -> Tensor:
        """Return `(N, any length, series)` at the level and spread of the input."""
        level, spread = scale
        return (y - self.bias) / (self.weight + 1e-10) * spread + level


class SeriesToMap(nn.Module):
    """Give each step of a series `width` features and lay all of them out as one map of one channel.

    Args:
        series: values of one step.
        width: features of one step; the map has length x width places.
        marks: marks of the time of one step, 0 for none, 4 for those of `time_marks`.
        place: numbers that tell where a sample comes from, 0 for none.

    >>> SeriesToMap(7, 768)(torch.zeros(2, 48, 7)).shape
    torch.Size([2, 1, 192, 192])
    """

    def __init__(self, series: int, width: int, marks: int = 0, place: int = 0) -> None:
        super().__init__()
        self.value = nn.Conv1d(series, width, 3, padding=1, padding_mode="circular", bias=False)
        self.time = nn.Linear(marks, width, bias=False) if marks else None
        self.place = nn.Linear(place, width) if place else None
        nn.init.kaiming_normal_(self.value.weight, nonlinearity="leaky_relu")

    def forward(self, x: Tensor, marks: Tensor | None = None, place: Tensor | None = None) -> Tensor:
        """Embed `(N, L, series)` with marks `(N, L, marks)` and places `(N, place)`."""
        tokens = self.value(x.transpose(1, 2)).transpose(1, 2)  # (N, L, width)
        if self.time is not None and marks is not None:
            tokens = tokens + self.time(marks)
        if self.place is not None and place is not None:
            tokens = tokens + self.place(place)[:, None]
        return tokens.reshape(len(x), 1, *near_square(tokens.shape[1] * tokens.shape[2]))


def turn_points(points: Tensor, views: Sequence[tuple[float, float, float]] = VIEWS[:4]) -> Tensor:
    """Turn each cloud `(N, P, 3)` into every view, `(N V, P, 3)`: all views of the first cloud come first.

    Args:
        points: coordinates.
        views: angles around x, y and z, in radians.
    """
    turns = torch.stack([_rotation(*angles) for angles in views]).to(points)  # (V, 3, 3)
    return torch.einsum("npi,vji->nvpj", points, turns).flatten(0, 1)


def _rotation(x: float, y: float, z: float) -> Tensor:
    def around(first: int, second: int, angle: float) -> Tensor:
        turn = torch.eye(3, dtype=torch.float64)
        turn[first, first] = turn[second, second] = math.cos(angle)
        turn[second, first], turn[first, second] = math.sin(angle), -math.sin(angle)
        return turn

    return around(1, 2, x) @ around(2, 0, y) @ around(0, 1, z)


class PointsToImages(nn.Module):
    """Draw clouds of points as colour images: features of each point, summed over the pixels around it.

    Args:
        size: side of the image, in pixels.
        neighbours: nearest points that a point is compared with.
        channels: features of a point.

    >>> PointsToImages(32, 4)(torch.rand(2, 50, 3)).shape
    torch.Size([2, 3, 32, 32])
    """

    def __init__(self, size: int = 224, neighbours: int = 32, channels: int = 64) -> None:
        super().__init__()
        self.size, self.neighbours = size, neighbours
        self.lift = nn.Linear(3, 8)
        self.compare = nn.Linear(16, channels, bias=False)
        self.norm = nn.GroupNorm(4, channels)
        self.act = nn.LeakyReLU(0.2)
        self.project = nn.Linear(channels, channels)
        self.first = ConvNormAct(channels, channels)
        self.second = ConvNormAct(channels, channels, act=None)
        self.mix = nn.Conv2d(channels, channels, 1)
        self.colour = nn.Conv2d(channels, 3, 1)
        for name, values in zip(("mean", "std"), IMAGENET, strict=True):
            self.register_buffer(name, torch.tensor(values)[:, None, None], persistent=False)

    def forward(self, points: Tensor, turned: Tensor | None = None) -> Tensor:
        """Draw `turned` `(N, P, 3)` along z, with the features of the `points` that they are.

        Args:
            points: the clouds `(N, P, 3)`.
            turned: the same points in the view to draw, None for the view they are in.
        """
        features = self.point_features(points)
        pixels = pixel_of_points(points if turned is None else turned, self.size)
        drawn = splat(features, pixels, self.size)
        drawn = F.relu(drawn + self.second(self.first(drawn)))
        return (self.colour(self.mix(drawn)).sigmoid() - self.mean) / self.std

    def point_features(self, points: Tensor) -> Tensor:
        """Compare each point with its nearest ones, `(N, P, 3)` to `(N, P, channels)`."""
        lifted = self.lift(points)  # (N, P, 8)
        with torch.no_grad():
            near = torch.cdist(points, points).topk(min(self.neighbours, points.shape[1]), largest=False)[1]
        rows = torch.arange(len(points), device=points.device)[:, None, None]
        own = lifted[:, :, None].expand(-1, -1, near.shape[2], -1)
        pairs = self.compare(torch.cat((lifted[rows, near] - own, own), 3))  # (N, P, neighbours, channels)
        pairs = self.act(self.norm(pairs.permute(0, 3, 1, 2)))
        return self.project(pairs.amax(3).transpose(1, 2))


def pixel_of_points(points: Tensor, size: int) -> Tensor:
    """Return row and column `(N, P, 2)` of each point seen along z: the longer side fills `size` - 2 pixels.

    One pixel of border stays free on each side, for the neighbourhood of the outermost points.
    """
    low, high = points[..., :2].amin(1, keepdim=True), points[..., :2].amax(1, keepdim=True)
    step = (high - low).amax(2, keepdim=True).clamp_min(1e-12) / (size - 3)
    place = ((points[..., :2] - low) / step).floor().long()
    middle = place.amax(1, keepdim=True) // 2
    return (place - middle + (size - 1) // 2).clamp(1, size - 2)


def splat(features: Tensor, pixels: Tensor, size: int) -> Tensor:
    """Add each point's features to the 3 x 3 pixels around it.

    `(N, P, C)` at `(N, P, 2)` gives `(N, C, size, size)`; points must keep one pixel away from the border.
    """
    steps = torch.tensor([(y, x) for y in (-1, 0, 1) for x in (-1, 0, 1)], device=pixels.device)
    around = pixels[:, :, None] + steps  # (N, P, 9, 2)
    index = (around[..., 0] * size + around[..., 1]).flatten(1)  # (N, 9 P)
    batch, _, channels = features.shape
    spread = features.repeat_interleave(9, 1)
    image = features.new_zeros(batch, size * size, channels)
    image = image.scatter_add(1, index[..., None].expand(-1, -1, channels), spread)
    return image.transpose(1, 2).reshape(batch, channels, size, size)
