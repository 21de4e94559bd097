"""Rewrites of the graph, one file each; `run_passes` applies them in their order."""

from __future__ import annotations

from dataclasses import dataclass

from featherweight.compiler.alternatives import Alternatives
from featherweight.compiler.convert import Border
from featherweight.compiler.graph import Graph
from featherweight.compiler.passes.blocks import fuse_blocks, fuse_sparse_blocks
from featherweight.compiler.passes.cleanup import clean_up
from featherweight.compiler.passes.fold_norm import fold_norms
from featherweight.compiler.passes.group import fuse_epilogues, group_elementwise
from featherweight.compiler.passes.layout import choose_layout, plan_homes, wanted_borders
from featherweight.compiler.passes.lift import lift_patterns
from featherweight.compiler.passes.merge import merge_parallel
from featherweight.compiler.passes.quantised import lift_quantised
from featherweight.compiler.passes.sparse import mark_planar, planar_tensors
from featherweight.compiler.passes.winograd import mark_winograd


@dataclass(frozen=True)
class Layout:
    """Where tensors lie.

    Attributes:
        pixel: tensors in the pixel layout.
        homes: tensors that are a part of a concatenation: the whole and the first channel in it.
        borders: zeros kept around tensors of the pixel layout.
        planar: row-major tensors whose planes are whole vectors.
    """

    pixel: frozenset[str]
    homes: dict[str, tuple[str, int]]
    borders: dict[str, Border]
    planar: frozenset[str] = frozenset()


def run_passes(graph: Graph, vector: int = 16, alternatives: Alternatives | None = None) -> Layout:
    """Rewrite the graph in place and choose the layouts.

    Args:
        graph: as read.
        vector: floats of a vector register of the target.
        alternatives: what was measured of the forms that parts may take.
    """
    alternatives = alternatives or Alternatives()
    clean_up(graph)
    lift_patterns(graph)
    lift_quantised(graph)
    lift_patterns(graph)
    fold_norms(graph)
    merge_parallel(graph)
    group_elementwise(graph)
    mark_planar(graph, vector, alternatives)
    fuse_epilogues(graph)
    fuse_blocks(graph, alternatives)
    fuse_sparse_blocks(graph, alternatives)
    mark_winograd(graph, vector, alternatives)
    pixel = choose_layout(graph)
    homes = plan_homes(graph, pixel)
    return Layout(pixel, homes, wanted_borders(graph, pixel, homes), planar_tensors(graph))
