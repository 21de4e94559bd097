"""Why fewer MACs can be slower: roofline of each kernel, waterline of a network, efficiency gap.

Latency is `operations / (peak * e)`: a network trades accuracy for operations, its kernels trade the
computational efficiency e, and only the product counts. A kernel's intensity is its operations for each byte
that it moves. The machine's balance, peak over bandwidth, is the waterline: kernels below it wait for memory,
however few their operations are.

One MAC is two operations; intensities are in operations a byte, as the paper gives them. How the plots of the
paper are drawn is not known to us: the definitions here are ours.

Reference: Lavin, "On the Efficiency of Convolutional Neural Networks", arXiv 2404.03617.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

OPS_PER_MAC = 2


@dataclass(frozen=True)
class Kernel:
    """One pass over memory: what is computed, and the bytes that must move, each once (an ideal cache).

    Args:
        name: the layer or block.
        macs: multiply-adds.
        read_bytes: of activations read.
        written_bytes: of activations written.
        weight_bytes: of weights read.
    """

    name: str
    macs: int
    read_bytes: int
    written_bytes: int
    weight_bytes: int = 0

    @property
    def moved_bytes(self) -> int:
        """Bytes read and written."""
        return self.read_bytes + self.written_bytes + self.weight_bytes

    @property
    def intensity(self) -> float:
        """Operations for each byte moved."""
        return OPS_PER_MAC * self.macs / self.moved_bytes


@dataclass(frozen=True)
class Roofline:
    """The two limits of a machine, for one data type and number of threads.

    Args:
        peak_macs_per_s: multiply-adds a second of the best matrix product.
        bandwidth_bytes_per_s: bytes a second to and from memory.

    >>> Roofline(50e9, 20e9).balance
    5.0
    """

    peak_macs_per_s: float
    bandwidth_bytes_per_s: float

    @property
    def balance(self) -> float:
        """The waterline: operations a byte at which arithmetic and memory take equally long."""
        return OPS_PER_MAC * self.peak_macs_per_s / self.bandwidth_bytes_per_s

    def ideal_s(self, macs: float) -> float:
        """Return the seconds that so many MACs take at full efficiency."""
        return macs / self.peak_macs_per_s

    def attainable_s(self, kernel: Kernel) -> float:
        """Return the seconds that a kernel cannot beat: of its arithmetic or of its memory."""
        return max(self.ideal_s(kernel.macs), kernel.moved_bytes / self.bandwidth_bytes_per_s)

    def efficiency(self, macs: float, latency_s: float) -> float:
        """Return the computational efficiency of a measured latency, 1 at the ideal.

        On a logarithmic axis the gap between measured and ideal latency is `log(1 / efficiency)`.
        """
        return self.ideal_s(macs) / latency_s


@dataclass(frozen=True)
class Waterline:
    """A network as a sequence of kernels on one machine."""

    kernels: tuple[Kernel, ...]
    roofline: Roofline

    @property
    def macs(self) -> int:
        """Multiply-adds of all kernels."""
        return sum(kernel.macs for kernel in self.kernels)

    @property
    def moved_bytes(self) -> int:
        """Bytes that all kernels move."""
        return sum(kernel.moved_bytes for kernel in self.kernels)

    @property
    def intensity(self) -> float:
        """Operations for each byte moved, over the whole network."""
        return OPS_PER_MAC * self.macs / self.moved_bytes

    @property
    def ideal_s(self) -> float:
        """Seconds at full efficiency."""
        return self.roofline.ideal_s(self.macs)

    @property
    def attainable_s(self) -> float:
        """Seconds when each kernel meets its own limit."""
        return sum(map(self.roofline.attainable_s, self.kernels))

    @property
    def efficiency(self) -> float:
        """The computational efficiency that kernels of this cut can reach."""
        return self.ideal_s / self.attainable_s

    def rows(self) -> list[dict[str, Any]]:
        """Return one row a kernel, in the order of execution."""
        return [
            {
                "kernel": kernel.name,
                "macs": kernel.macs,
                "moved_bytes": kernel.moved_bytes,
                "intensity": kernel.intensity,
                "bound": "arithmetic" if kernel.intensity >= self.roofline.balance else "memory",
                "attainable_ms": 1e3 * self.roofline.attainable_s(kernel),
            }
            for kernel in self.kernels
        ]


def measure_roofline(threads: int = 1, runs: int = 20, side: int = 1024) -> Roofline:
    """Measure both limits of this machine in float32: a square matrix product, and a copy out of the cache.

    Args:
        threads: processor threads.
        runs: the best of so many counts.
        side: rows and columns of the matrices; the copy moves 64 times as many bytes as one of them holds.
    """
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a, b = torch.rand(side, side), torch.rand(side, side)
        source = torch.rand(32 * side * side)
        target = torch.empty_like(source)
        product = _best_s(lambda: torch.mm(a, b), runs)
        copy = _best_s(lambda: target.copy_(source), runs)
    finally:
        torch.set_num_threads(before)
    return Roofline(side**3 / product, 2 * source.numel() * source.element_size() / copy)


def _best_s(work: Callable[[], Any], runs: int) -> float:
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)
