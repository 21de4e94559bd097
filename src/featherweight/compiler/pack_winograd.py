"""Transformed weights of 3x3 convolutions as `kernels/winograd.h` reads them."""

from __future__ import annotations

import numpy as np

from featherweight.compiler.pack import Floats, conv_weights

TRANSFORM = np.array(
    [
        [1 / 4, 0, 0],
        [-1 / 6, -1 / 6, -1 / 6],
        [-1 / 6, 1 / 6, -1 / 6],
        [1 / 24, 1 / 12, 1 / 6],
        [1 / 24, -1 / 12, 1 / 6],
        [0, 0, 1],
    ]
)
"""G of F(4, 3): three taps to six products (Lavin and Gray, 2015, section 4.1)."""


def winograd_weights(weight: np.ndarray, lanes: int, tile_vectors: int) -> Floats:
    """Pack the 36 matrices of a layer one behind another, each as `conv.h` wants a 1x1 layer.

    Args:
        weight: (O, I, 3, 3).
        lanes: VL.
        tile_vectors: NR of the product's kernel.

    Returns:
        (36, floats of a matrix).
    """
    wide = np.einsum("ay,oiyx,bx->aboi", TRANSFORM, weight.astype(np.float64), TRANSFORM)
    matrices = wide.reshape(36, *weight.shape[:2], 1, 1).astype(np.float32)
    return np.stack([conv_weights(matrix, lanes, tile_vectors) for matrix in matrices])
