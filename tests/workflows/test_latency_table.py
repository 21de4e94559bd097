"""The measured latency table: every piece timed, wider costs more, kept with its machine."""

import json

import pytest
from torch import nn

from featherweight.errors import DataError
from featherweight.train.slimming import EMBED, Design, LatencyTable, Piece, possible_pieces
from featherweight.workflows.latency_table import (
    build_latency_table,
    load_latency_table,
    save_latency_table,
)

TABLE = LatencyTable({Piece(EMBED, 0, 0, 16): 0.25, Piece("conv", 0, 16, 16): 0.5}, 0.125)


def piece_module(piece: Piece) -> tuple[nn.Module, tuple[int, int, int]]:
    if piece.kind == EMBED:
        return nn.Conv2d(3, piece.width, 3, 2, 1), (3, 24, 24)
    return nn.Conv2d(piece.width, piece.width, 3, 1, 1), (piece.width, 12, 12)


def test_times_every_piece_and_wider_costs_more():
    lines = []
    pieces = possible_pieces((128,), (("conv",),), width_step=112)
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(128, 10)), (128, 12, 12)
    table = build_latency_table(piece_module, pieces, head=head, runs=15, progress=lines.append)
    assert set(table.entries) == set(pieces) and len(lines) == 4 and table.fixed_ms > 0
    narrow, wide = (table.entries[Piece("conv", 0, width, width)] for width in (16, 128))
    assert wide > 3 * narrow >= 0
    assert table.latency_ms(Design((128,), (("conv", "identity"),))) > wide


def test_table_survives_the_file_and_belongs_to_its_machine(tmp_path):
    path = tmp_path / "table.json"
    save_latency_table(TABLE, path)
    assert load_latency_table(path) == TABLE
    path.write_text(json.dumps({**json.loads(path.read_text()), "machine_id": "another"}))
    with pytest.raises(DataError, match="measured on machine another"):
        load_latency_table(path)
    assert load_latency_table(path, any_machine=True) == TABLE
    for text in ("{", "{}", '{"pieces": [{}]}'):
        path.write_text(text)
        with pytest.raises(DataError, match="no latency table"):
            load_latency_table(path)
