"""Pack sparse 1x1 weights as `kernels/sparse.h` reads them; choose stripes and blocks by their cost."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]

STRIPE_BYTES = 40 * 1024
"""Input channels of a stripe that pass while a group's weights are read: most of a first-level cache."""

BLOCK_FILLED = 0.9
"""Share of nonzeros from which a block of outputs is worth its zeros."""

COLUMN_CYCLES, ROW_CYCLES, VECTOR_CYCLES = 0.6, 12.0, 1.5
"""Measured beyond the multiply-adds: a column's loads, the end of a row, each vector that a row stores."""


@dataclass(frozen=True)
class SparseWeights:
    """One packed part of a matrix: the constant arrays of `fw_sparse_part`.

    Attributes:
        rows_per_block: R of the kernel.
        blocks: row blocks of each group of columns.
        values: for each group and row block R biases (first group only), then R values a nonzero column.
        offset: bytes from the first input plane to each nonzero column's.
        count: (groups * blocks,) columns of each block.
        row: (groups * blocks,) first output channel of each block.
    """

    rows_per_block: int
    blocks: int
    values: Floats
    offset: Ints
    count: Ints
    row: Ints


@dataclass(frozen=True)
class Stripes:
    """How a sparse layer runs: vectors of a stripe, groups of columns, rows of a block, modelled cycles."""

    vectors: int
    groups: int
    rows: int
    cycles: float


def sparse_weights(
    weight: np.ndarray,
    bias: np.ndarray | None,
    plane: int,
    rows: int = 1,
    groups: int = 1,
    parts: int = 1,
    keep_zeros: bool = False,
) -> list[SparseWeights]:
    """Pack a matrix: blocks of `rows` outputs that share columns, then what is left over one by one.

    Args:
        weight: (O, I); zeros of either sign are dropped.
        bias: (O,) or None.
        plane: floats from an input channel to the next.
        rows: outputs of a block: 1, 2 or 4. Outputs behind the last whole block are packed one by one.
        groups: runs of input channels that pass one after another.
        parts: shares of about equal work that the blocks are cut into.
        keep_zeros: pack every weight, for a dense layer.

    Returns:
        The parts of whole blocks, then one of single rows where some are left over.

    >>> part, = sparse_weights(np.array([[0.0, 2.0], [0.0, 0.0]]), np.array([5.0, 6.0]), plane=64)
    >>> part.values.tolist(), part.offset.tolist(), part.count.tolist(), part.row.tolist()
    ([6.0, 5.0, 2.0], [256], [0, 1], [1, 0])
    """
    biases = np.zeros(len(weight), np.float32) if bias is None else bias.astype(np.float32)
    whole = len(weight) // rows * rows
    kept = np.ones_like(weight, bool) if keep_zeros else weight != 0
    touched = kept[:whole].reshape(-1, rows, weight.shape[1]).any(1)
    # A block costs something even where it is empty.
    work = np.cumsum(touched.sum(1) + 4)
    share = np.searchsorted(work, np.arange(1, parts) * (work[-1] / parts)) if whole else []
    bounds = [0, *(int(place) * rows for place in share), whole]
    found = [
        _part(weight, kept, biases, plane, rows, groups, range(low, high, rows))
        for low, high in pairwise(bounds)
        if high > low
    ]
    if whole < len(weight):
        found.append(_part(weight, kept, biases, plane, 1, groups, range(whole, len(weight))))
    return found


def best_rows(weight: np.ndarray) -> int:
    """Return the block height, 4, 2 or 1, whose blocks are full of nonzeros for the most part."""
    nonzero = weight != 0
    for rows in (4, 2):
        whole = len(weight) // rows * rows
        blocks = nonzero[:whole].reshape(-1, rows, weight.shape[1])
        touched = int(blocks.any(1).sum())
        if touched and nonzero.sum() >= BLOCK_FILLED * rows * touched:
            return rows
    return 1


def plan_stripes(weight: np.ndarray, vectors: int, vector: int, registers: int) -> Stripes:
    """Return the cheapest way to run a layer by the model.

    Args:
        weight: (O, I).
        vectors: vectors of pixels of a plane.
        vector: floats of a vector register.
        registers: vector registers of the target.
    """
    rows = best_rows(weight)
    whole = len(weight) // rows * rows
    blocks = whole // rows
    columns = int((weight[:whole] != 0).reshape(-1, rows, weight.shape[1]).any(1).sum())
    most = max(1, min(14, (registers - rows - 1) // rows, vectors))
    found = []
    for wide in range(1, most + 1):
        stripe = weight.shape[1] * wide * vector * 4
        groups = -(-stripe // STRIPE_BYTES) if stripe > 1.2 * STRIPE_BYTES else 1
        passes = -(-vectors // wide)
        cycles = columns * (rows * vectors + COLUMN_CYCLES * passes)
        # Between two groups the sums are stored and loaded again.
        cycles += blocks * (groups * ROW_CYCLES * passes + (2 * groups - 1) * VECTOR_CYCLES * rows * vectors)
        found.append(Stripes(wide, groups, rows, cycles))
    return min(found, key=lambda plan: (plan.cycles, -plan.vectors))


def _part(
    weight: np.ndarray, kept: np.ndarray, bias: Floats, plane: int, rows: int, groups: int, firsts: range
) -> SparseWeights:
    """Pack the blocks whose first output channels are `firsts`, group by group of input channels."""
    values, offsets, count, row = [np.zeros(0, np.float32)], [np.zeros(0, np.int64)], [], []
    own = slice(firsts.start, firsts[-1] + rows)
    chosen = weight[own].astype(np.float32).reshape(len(firsts), rows, -1)
    wanted = kept[own].reshape(len(firsts), rows, -1).any(1)
    bounds = np.linspace(0, weight.shape[1], groups + 1).astype(int)
    for group, (low, high) in enumerate(pairwise(bounds)):
        touched = wanted[:, low:high]
        for block in np.argsort(touched.sum(1), kind="stable"):
            columns = low + np.flatnonzero(touched[block])
            first = firsts[block]
            if group == 0:
                values.append(bias[first : first + rows])
            values.append(chosen[block][:, columns].T.reshape(-1))
            offsets.append(columns * plane * 4)
            count.append(len(columns))
            row.append(first)
    return SparseWeights(
        rows,
        len(firsts),
        np.concatenate(values).astype(np.float32),
        np.concatenate(offsets).astype(np.int32),
        np.array(count, np.int32),
        np.array(row, np.int32),
    )
