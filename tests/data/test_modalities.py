"""Sound, points, series and video as maps: naive oracles, and networks that learn through them."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from featherweight.data.modalities import (
    VIEWS,
    PointsToImages,
    SeriesScale,
    SeriesToMap,
    Spectrogram,
    mask_spectrogram,
    mel_bands,
    near_square,
    pixel_of_points,
    splat,
    tile_frames,
    time_marks,
    turn_points,
)
from featherweight.errors import DataError, UsageError
from featherweight.models.unireplknet import UniRepLKNet

SHARED = Path(__file__).resolve().parents[2].parent / "shared" / "data"


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def trunk(**kwargs) -> UniRepLKNet:
    """A small UniRepLKNet of four stages, every one but the first with large kernels."""
    return UniRepLKNet(16, ((3,), (13,), (13, 13), (11,)), in_chans=kwargs.pop("in_chans", 1), **kwargs)


def test_log_energies_equal_a_naive_transform():
    spec = Spectrogram(8000, bins=20, frames=10)
    samples = torch.rand(1000, generator=generator()) - 0.5
    length, hop = 200, 80
    found = spec.log_energies(samples)
    assert found.shape == (1 + (1000 - length) // hop, 20)
    piece = samples.numpy()[hop : hop + length].astype(np.float64)
    piece = piece - piece.mean()
    piece = piece - 0.97 * np.concatenate((piece[:1], piece[:-1]))
    piece *= 0.5 - 0.5 * np.cos(2 * np.pi * np.arange(length) / (length - 1))
    waves = np.exp(-2j * np.pi * np.outer(np.arange(128), np.arange(length)) / 256)
    energies = mel_bands(20, 256, 8000).numpy() @ np.abs(waves @ piece) ** 2
    assert np.allclose(found[1].numpy(), np.log(energies), atol=1e-3)


def test_a_tone_lights_the_band_of_its_pitch():
    time = torch.arange(8000) / 8000
    mels = [1127 * math.log(1 + hertz / 700) for hertz in (20, 4000)]
    for hertz in (500, 1500, 3000):
        found = Spectrogram(8000, bins=40)(0.5 * torch.sin(2 * math.pi * hertz * time))[0, :, 10].argmax()
        expected = (1127 * math.log(1 + hertz / 700) - mels[0]) / (mels[1] - mels[0]) * 41 - 1
        assert abs(int(found) - expected) <= 1


def test_bands_share_every_frequency_between_two_neighbours():
    total = mel_bands(30, 512, 16000).sum(0)
    assert torch.allclose(total[8:230], torch.ones(222), atol=1e-5)


def test_sound_is_cut_or_padded_and_must_be_one_row():
    spec = Spectrogram(8000, bins=16, frames=12, mean=0.0, std=0.5)
    assert spec(torch.zeros(10)).shape == spec(torch.rand(50_000)).shape == (1, 16, 12)
    padded = spec(torch.rand(400))
    assert padded[..., 3:].eq(0).all() and not padded[..., :3].eq(0).any()
    with pytest.raises(DataError, match="one channel"):
        spec(torch.zeros(2, 100))


def test_masks_hide_one_run_of_bands_and_frames_and_repeat_with_the_seed():
    maps = torch.ones(8, 1, 30, 40)
    masked = mask_spectrogram(maps, 10, 12, generator())
    assert torch.equal(masked, mask_spectrogram(maps, 10, 12, generator()))
    bands, frames = masked.eq(0).all(3).sum(2), masked.eq(0).all(2).sum(2)
    assert bands.max() <= 11 and frames.max() <= 13 and bands.sum() > 0 and frames.sum() > 0
    assert torch.equal(mask_spectrogram(maps, 0, 0, generator()), maps)


def test_frames_lie_in_a_grid_or_as_the_memory_is_read():
    video = torch.arange(2 * 3 * 16 * 4 * 5).view(2, 3, 16, 4, 5)
    image = tile_frames(video)
    assert image.shape == (2, 3, 16, 20)
    for frame in range(16):
        row, column = divmod(frame, 4)
        part = image[:, :, row * 4 : row * 4 + 4, column * 5 : column * 5 + 5]
        assert torch.equal(part, video[:, :, frame])
    raw = tile_frames(video, "raw")
    assert torch.equal(raw, video.view(2, 3, 16, 20))
    assert torch.equal(raw[0, 0, 0], video[0, 0, 0].flatten())
    assert tile_frames(video[:, :, :8]).shape == (2, 3, 8, 20)
    with pytest.raises(UsageError, match="order"):
        tile_frames(video, "spiral")
    with pytest.raises(DataError, match="Expected"):
        tile_frames(video[0])


def test_marks_of_known_times():
    marks = time_marks(np.array([0, 1_709_247_600]))  # Thursday 1 Jan 1970, 0 h; Thursday 29 Feb 2024, 23 h
    expected = [[-0.5, 3 / 6 - 0.5, -0.5, -0.5], [0.5, 3 / 6 - 0.5, 28 / 30 - 0.5, 59 / 365 - 0.5]]
    assert torch.allclose(marks, torch.tensor(expected))


def test_scale_is_undone_and_series_become_one_map():
    scale = SeriesScale(3)
    torch.nn.init.uniform_(scale.weight, 0.5, 2, generator=generator())
    torch.nn.init.uniform_(scale.bias, -1, 1, generator=generator())
    x = 5 + 3 * torch.randn(2, 24, 3, generator=generator())
    scaled, statistics = scale(x)
    assert torch.allclose(scale.restore(scaled, statistics), x, atol=1e-4)
    embed = SeriesToMap(3, 96, marks=4, place=2)
    marks, place = torch.rand(2, 24, 4), torch.rand(2, 2)
    image = embed(scaled, marks, place)
    assert image.shape == (2, 1, 48, 48) == (2, 1, *near_square(24 * 96))
    around = torch.cat((scaled[:, -1:], scaled, scaled[:, :1]), 1)
    first = torch.einsum("nkd,wdk->nw", around[:, :3], embed.value.weight)
    first = first + embed.time(marks)[:, 0] + embed.place(place)
    assert torch.allclose(image.flatten(1)[:, :96], first, atol=1e-4)


def test_views_turn_points_rigidly_and_keep_clouds_together():
    points = torch.randn(2, 30, 3, generator=generator()).double()
    turned = turn_points(points, VIEWS)
    assert turned.shape == (2 * len(VIEWS), 30, 3) and len(set(VIEWS)) == len(VIEWS) == 10
    for cloud in range(2):
        for view in range(len(VIEWS)):
            found = turned[cloud * len(VIEWS) + view]
            assert torch.allclose(
                torch.cdist(found, found), torch.cdist(points[cloud], points[cloud]), atol=1e-4
            )
    quarter = turn_points(torch.tensor([[[1.0, 0, 0], [0, 1, 0]]]), [(0, 0, math.pi / 2)])
    assert torch.allclose(quarter[0], torch.tensor([[0.0, 1, 0], [-1, 0, 0]]), atol=1e-6)


@pytest.mark.parametrize("size", [32, 33])
def test_points_fill_the_image_and_leave_a_border(size):
    points = torch.rand(3, 500, 3, generator=generator()) * torch.tensor([4.0, 1.0, 9.0])
    pixels = pixel_of_points(points, size)
    assert pixels.min() >= 1 and pixels.max() <= size - 2
    assert (pixels[..., 0].amax(1) - pixels[..., 0].amin(1)).min() >= size - 4
    assert pixel_of_points(torch.zeros(1, 5, 3), size).unique().numel() == 1


def test_splat_equals_a_loop():
    features = torch.randn(2, 20, 3, generator=generator())
    pixels = torch.randint(1, 7, (2, 20, 2), generator=generator())
    expected = torch.zeros(2, 3, 8, 8)
    for cloud in range(2):
        for point, (row, column) in enumerate(pixels[cloud].tolist()):
            expected[cloud, :, row - 1 : row + 2, column - 1 : column + 2] += features[
                cloud, point, :, None, None
            ]
    assert torch.allclose(splat(features, pixels, 8), expected, atol=1e-5)


def test_clouds_become_images_whatever_the_order_of_points():
    encoder = PointsToImages(32, neighbours=8, channels=16).eval()
    points = torch.randn(2, 60, 3, generator=generator())
    image = encoder(points)
    order = torch.randperm(60, generator=generator())
    assert image.shape == (2, 3, 32, 32)
    assert torch.allclose(encoder(points[:, order]), image, atol=1e-4)
    views = encoder(points.repeat_interleave(4, 0), turn_points(points))
    assert views.shape == (8, 3, 32, 32)
    views.sum().backward()
    assert all(p.grad.isfinite().all() for p in encoder.parameters())


def test_one_network_takes_every_kind_of_input():
    inputs = {
        1: Spectrogram(8000, bins=64, frames=40)(torch.rand(3000))[None],
        3: tile_frames(torch.rand(1, 3, 16, 16, 16)),
    }
    for channels, image in inputs.items():
        assert trunk(in_chans=channels, num_classes=4).eval()(image).shape == (1, 4)
    assert trunk(num_classes=14).eval()(SeriesToMap(7, 64)(torch.rand(1, 36, 7))).shape == (1, 14)
    clouds = PointsToImages(32, 4, 8).eval()(torch.rand(1, 40, 3))
    assert trunk(in_chans=3, num_classes=2).eval()(clouds).shape == (1, 2)


def hourly() -> tuple[torch.Tensor, torch.Tensor]:
    """ETTh1 if it is there, else seven daily and weekly waves with noise; values and marks."""
    path = SHARED / "ett_hourly" / "ett_hourly.npz"
    if path.exists():
        stored = np.load(path)
        return torch.from_numpy(stored["etth1"]), time_marks(stored["etth1_time"])
    hours = torch.arange(14_400.0)
    waves = [
        torch.sin(2 * math.pi * (hours / 24 + k / 7)) + torch.sin(hours / 26.7) * k / 7 for k in range(7)
    ]
    return torch.stack(waves, 1) + 0.3 * torch.randn(14_400, 7, generator=generator()), time_marks(
        hours.long().numpy() * 3600
    )


@pytest.mark.slow
def test_the_trunk_forecasts_hourly_series_better_than_their_last_value():
    past, future, width = 48, 24, 48
    values, marks = hourly()
    values = (values - values[:8640].mean(0)) / values[:8640].std(0)
    torch.manual_seed(0)
    scale, embed = SeriesScale(7), SeriesToMap(7, width, marks=4)
    model = torch.nn.ModuleList([scale, embed, trunk(num_classes=future * 7)])

    def forecast(starts: torch.Tensor) -> torch.Tensor:
        steps = starts[:, None] + torch.arange(past)
        scaled, statistics = scale(values[steps])
        return scale.restore(model[2](embed(scaled, marks[steps])).view(-1, future, 7), statistics)

    def target(starts: torch.Tensor) -> torch.Tensor:
        return values[starts[:, None] + past + torch.arange(future)]

    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    for step in range(150):
        starts = torch.randint(0, 8640 - past - future, (32,), generator=generator(step))
        loss = F.mse_loss(forecast(starts), target(starts))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.eval()
    starts = torch.arange(11_520, 14_400 - past - future, 16)
    with torch.no_grad():
        error = F.mse_loss(forecast(starts), target(starts))
        last = F.mse_loss(values[starts + past - 1][:, None].expand(-1, future, -1), target(starts))
    assert error < 0.7 * last, f"mean squared error {error:.3f}, of the last value {last:.3f}"


@pytest.mark.slow
def test_the_trunk_tells_shapes_of_points_apart():
    def clouds(count: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
        source = generator(seed)
        labels = torch.arange(count) % 3
        ball = F.normalize(torch.randn(count, 128, 3, generator=source), dim=2)
        box = torch.rand(count, 128, 3, generator=source) * 2 - 1
        box = box / box.abs().amax(2, keepdim=True)
        tube = torch.cat((F.normalize(ball[..., :2], dim=2), box[..., 2:]), 2)
        points = torch.stack((ball, box, tube))[labels, torch.arange(count)]
        return points * (0.8 + 0.4 * torch.rand(count, 1, 1, generator=source)), labels

    torch.manual_seed(0)
    model = torch.nn.Sequential(PointsToImages(48, 16, 16), trunk(in_chans=3, num_classes=3))
    optimizer = torch.optim.AdamW(model.parameters(), 2e-3)
    for step in range(60):
        points, labels = clouds(24, step)
        loss = F.cross_entropy(model(points), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    points, labels = clouds(90, 1000)
    model.eval()
    with torch.no_grad():
        share = (model(points).argmax(1) == labels).float().mean()
    assert share > 0.9, f"accuracy {share:.1%}"
