"""Base of every restoration network: an image to an image of `scale` times its sides.

A network is a `stem`, `blocks` run one after another, whatever joins their maps, and an `upsampler` (one
convolution and a pixel shuffle). The methods and attributes are those of `Classifier`, as far as they mean
something without classes: feature maps are those of the stem and of every block, the head is the upsampler.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from featherweight.blocks.layouts import check_fit, clean_state, rename_wrapped
from featherweight.errors import UsageError
from featherweight.weights import read_state_dict

RGB_MEAN = (0.4488, 0.4371, 0.4040)
"""Mean of DIV2K, which several of the networks subtract."""


class Restorer(nn.Module):
    """A network `(N, in_chans, H, W)` with values from 0 to 1 to `(N, in_chans, scale H, scale W)`.

    A subclass adds what joins the maps and defines `join`; `prepare` and `finish` change the range of values.

    Args:
        stem: image to the first map, `(N, channels, ceil(H / stride), ceil(W / stride))`.
        blocks: modules that keep the shape of that map, run one after another.
        channels: channels of every map.
        scale: sides of the output over sides of the input.
        stride: pixels of the input between two positions of the maps.
        in_chans: channels of the input and of the output.
        num_classes: 0, for there are none.
        drop_rate: 0, for there is no layer to drop from.
        drop_path_rate: 0, for no residual branch is dropped.
        global_pool: nothing, for nothing is pooled.

    Raises:
        UsageError: an argument that means nothing here is given.
    """

    def __init__(
        self,
        stem: nn.Module,
        blocks: Iterable[nn.Module],
        channels: int,
        *,
        scale: int,
        stride: int = 1,
        in_chans: int = 3,
        num_classes: int = 0,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        global_pool: str = "",
    ) -> None:
        given = {
            "num_classes": num_classes,
            "drop_rate": drop_rate,
            "drop_path_rate": drop_path_rate,
            "global_pool": global_pool,
        }
        for name, value in given.items():
            if value:
                raise UsageError(
                    f"{type(self).__name__} restores images, so {name}={value!r} means nothing. Leave it out."
                )
        if scale < 1 or in_chans < 1:
            raise UsageError(f"Got scale={scale}, in_chans={in_chans}. Expected whole numbers from 1.")
        super().__init__()
        self.scale, self.stride, self.in_chans = scale, stride, in_chans
        self.num_features, self.num_classes = channels, 0
        self.stem = stem
        self.blocks = nn.ModuleList(blocks)
        factor = scale * stride
        self.upsampler = nn.Sequential(
            nn.Conv2d(channels, in_chans * factor**2, 3, padding=1), nn.PixelShuffle(factor)
        )
        self.grad_checkpointing = False
        names = ["stem", *(f"blocks.{index}" for index in range(len(self.blocks)))]
        self.feature_info = [{"num_chs": channels, "reduction": stride, "module": name} for name in names]
        self.default_cfg: dict[str, Any] = {
            "input_size": (in_chans, 64, 64),
            "num_classes": 0,
            "scale": scale,
            "mean": (0.0,) * in_chans,
            "std": (1.0,) * in_chans,
        }

    def forward(self, x: Tensor) -> Tensor:
        """Restore a batch of images."""
        y = self.forward_head(self.forward_features(x))
        # A stride rounds odd sides up; the rows and columns beyond the image go again.
        return y if self.stride == 1 else _cut(y, *(self.scale * side for side in x.shape[-2:]))

    def prepare(self, x: Tensor) -> Tensor:
        """Bring an image to the range that the stem expects."""
        return x

    def finish(self, x: Tensor) -> Tensor:
        """Bring the upsampler's output to the range of images."""
        return x

    def iterate_maps(self, x: Tensor) -> Iterator[Tensor]:
        """Yield the stem's map and every block's, one after another, without keeping them."""
        x = self.stem(self.prepare(x))
        yield x
        for block in self.blocks:
            x = self.run(block, x)
            yield x

    def join(self, maps: Iterator[Tensor]) -> Tensor:
        """Make the last map from those of the stem and the blocks."""
        raise NotImplementedError

    def run(self, module: Callable[..., Tensor], *args: Tensor) -> Tensor:
        """Run a part of the network, with gradient checkpointing where it is switched on."""
        if self.grad_checkpointing and self.training:
            return checkpoint(module, *args, use_reentrant=False)
        return module(*args)

    def forward_features(self, x: Tensor) -> Tensor:
        """Give the last map before the upsampler, `(N, num_features, h, w)`."""
        return self.join(self.iterate_maps(x))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Turn the last map into an image; `pre_logits` gives the map itself."""
        return x if pre_logits else self.finish(self.upsampler(x))

    def get_classifier(self) -> nn.Module:
        """Return an identity: there are no classes."""
        return nn.Identity()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Accept 0 classes.

        Raises:
            UsageError: classes or a pooling are asked for.
        """
        if num_classes or global_pool:
            raise UsageError(f"{type(self).__name__} restores images; it has no classifier to replace.")

    def feature_extractor(self, out_indices: Sequence[int] | None = None) -> MapExtractor:
        """Return a network that shares these weights and gives the chosen maps, the stem's first."""
        return MapExtractor(self, out_indices)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them: less memory, more time."""
        self.grad_checkpointing = enable

    def fuse(self) -> Self:
        """Merge, in place, everything that is linear in a row or in parallel; here there is nothing."""
        return self

    def from_official(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Rename published weights to our keys; a network with foreign layouts overrides this."""
        return dict(state)

    def match_form(self, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Bring weights of the training and of the merged form together, where a network has both."""
        return dict(state)

    def load_official(self, state: Mapping[str, Any] | str | Path, *, adapt: bool = False) -> None:
        """Load weights in the official or our own layout, every one of them.

        Args:
            state: a file (`.safetensors`, `.pth`), a state dict, or a checkpoint that wraps one; averaged
                weights (`params_ema`, ...) go before plain ones.
            adapt: for `create_model(pretrained=True)`; the first and the last layer both have the image's
                channels, so that nothing can be adapted.

        Raises:
            CheckpointError: the file is unreadable, or keys or shapes are not those of this network.
        """
        state = clean_state(read_state_dict(state) if isinstance(state, str | Path) else state)
        # Every one of our layouts starts with the stem, none of the official ones does.
        if not any(key.startswith("stem.") for key in state):
            state = rename_wrapped(self.from_official, state, type(self).__name__)
        state = self.match_form(state)
        own = self.state_dict()
        check_fit(own, state, type(self).__name__)
        self.load_state_dict({key: state[key] for key in own})


class MapExtractor(nn.Module):
    """The maps of a restoration network: `(N, in_chans, H, W)` to a list of maps in the order of the blocks.

    Args:
        model: the network; its weights are shared, not copied.
        out_indices: positions in `model.feature_info`, negative ones from the end; None takes all.

    Raises:
        UsageError: an index does not exist.
    """

    def __init__(self, model: Restorer, out_indices: Sequence[int] | None = None) -> None:
        super().__init__()
        infos = model.feature_info
        indices = range(len(infos)) if out_indices is None else out_indices
        if any(not -len(infos) <= index < len(infos) for index in indices):
            raise UsageError(f"Feature maps {tuple(indices)} asked for; there are {len(infos)}, from 0.")
        self._chosen = sorted({index % len(infos) for index in indices})
        self.feature_info = [infos[index] for index in self._chosen]
        self.model = model
        self.default_cfg = model.default_cfg

    def forward(self, x: Tensor) -> list[Tensor]:
        """Give the chosen maps."""
        maps = []
        for index, found in enumerate(self.model.iterate_maps(x)):
            if index in self._chosen:
                maps.append(found)
            if index == self._chosen[-1]:
                break
        return maps


def _cut(x: Tensor, height: int, width: int) -> Tensor:
    """Keep the first rows and columns."""
    for axis, length in ((-2, height), (-1, width)):
        if isinstance(length, torch.SymInt):
            # torch.export cannot prove that a slice of symbolic length fits; it need not for an index.
            x = x.index_select(axis, torch.arange(length, device=x.device))
        else:
            x = x.narrow(axis, 0, length)
    return x
