"""Pack sparse 1x1 weights as `kernels/sparse.h` reads them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float32]
Ints = NDArray[np.int32]


@dataclass(frozen=True)
class SparseWeights:
    """One packed part of a matrix: the constant arrays of `fw_sparse`.

    Attributes:
        rows_per_block: R of the kernel.
        values: for each row block R biases, then R values a nonzero column.
        offset: bytes from the first input plane to each nonzero column's.
        start: (blocks + 1,) index of each block's first column.
        row: (blocks,) first output channel of each block.
    """

    rows_per_block: int
    values: Floats
    offset: Ints
    start: Ints
    row: Ints


def sparse_weights(
    weight: np.ndarray, bias: np.ndarray | None, plane: int, rows: int = 1
) -> list[SparseWeights]:
    """Pack a matrix: blocks of `rows` outputs that share columns, then what is left over one by one.

    Args:
        weight: (O, I); zeros of either sign are dropped.
        bias: (O,) or None.
        plane: floats from an input channel to the next.
        rows: outputs of a block: 1, 2 or 4. Outputs behind the last whole block are packed one by one.

    Returns:
        One part, or two where rows are left over.

    >>> part, = sparse_weights(np.array([[0.0, 2.0], [0.0, 0.0]]), np.array([5.0, 6.0]), plane=49)
    >>> part.values.tolist(), part.offset.tolist(), part.start.tolist(), part.row.tolist()
    ([6.0, 5.0, 2.0], [196], [0, 0, 1], [1, 0])
    """
    biases = np.zeros(len(weight), np.float32) if bias is None else bias.astype(np.float32)
    whole = len(weight) // rows * rows
    parts = [_part(weight[:whole], biases[:whole], plane, rows, 0)] if whole else []
    if whole < len(weight):
        parts.append(_part(weight[whole:], biases[whole:], plane, 1, whole))
    return parts


def best_rows(weight: np.ndarray, filled: float = 0.9) -> int:
    """Return the block height, 4, 2 or 1, whose blocks are full of nonzeros to the share `filled` or more."""
    nonzero = weight != 0
    for rows in (4, 2):
        whole = len(weight) // rows * rows
        blocks = nonzero[:whole].reshape(-1, rows, weight.shape[1])
        touched = int(blocks.any(1).sum())
        if touched and nonzero.sum() >= filled * rows * touched:
            return rows
    return 1


def _part(weight: np.ndarray, bias: Floats, plane: int, rows: int, first: int) -> SparseWeights:
    """Pack a matrix of whole blocks whose first output channel is `first`."""
    blocks = weight.astype(np.float32).reshape(-1, rows, weight.shape[1])
    touched = (blocks != 0).any(1)
    order = np.argsort(touched.sum(1), kind="stable")
    values, offsets, start = [], [], [0]
    for block in order:
        columns = np.flatnonzero(touched[block])
        values += [bias[block * rows : (block + 1) * rows], blocks[block][:, columns].T.reshape(-1)]
        offsets.append(columns * plane * 4)
        start.append(start[-1] + len(columns))
    return SparseWeights(
        rows,
        np.concatenate(values).astype(np.float32),
        np.concatenate(offsets).astype(np.int32),
        np.array(start, np.int32),
        (first + order * rows).astype(np.int32),
    )
