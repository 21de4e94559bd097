"""Rewrites of the graph, one file each; `run_passes` applies them in their order."""

from __future__ import annotations

from featherweight.compiler.convert import Border
from featherweight.compiler.graph import Graph
from featherweight.compiler.passes.cleanup import clean_up
from featherweight.compiler.passes.fold_norm import fold_norms
from featherweight.compiler.passes.group import fuse_epilogues, group_elementwise
from featherweight.compiler.passes.layout import choose_layout, wanted_borders


def run_passes(graph: Graph) -> tuple[frozenset[str], dict[str, Border]]:
    """Rewrite the graph in place and choose the layouts.

    Returns:
        The tensors that lie in the pixel layout, and the borders of zeros to keep around some of them.
    """
    clean_up(graph)
    fold_norms(graph)
    group_elementwise(graph)
    fuse_epilogues(graph)
    pixel = choose_layout(graph)
    return pixel, wanted_borders(graph, pixel)
