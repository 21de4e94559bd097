"""The static memory plan: every storage of the arena gets a fixed offset, packed by lifetime."""

from __future__ import annotations

from dataclasses import dataclass

from featherweight.compiler.program import ALIGNMENT, Program


@dataclass
class _Block:
    """Storages that share memory, alive from step `first` to step `last`."""

    members: list[int]
    size_bytes: int
    first: int
    last: int
    offset: int = -1


def plan_memory(program: Program) -> int:
    """Place every storage of the arena and return the arena's size in bytes.

    Larger blocks go first, each at the lowest offset where nothing alive at the same time lies. A step's
    output takes the place of an input that dies there where the step allows it.
    """
    blocks = _blocks(program)
    placed: list[_Block] = []
    for block in sorted(blocks, key=lambda block: (-block.size_bytes, block.first)):
        offset = 0
        rivals = [other for other in placed if other.first <= block.last and block.first <= other.last]
        for other in sorted(rivals, key=lambda other: other.offset):
            if offset + block.size_bytes <= other.offset:
                break
            offset = max(offset, other.offset + other.size_bytes)
        block.offset = offset
        placed.append(block)
        for member in block.members:
            program.storages[member].offset = offset
    return max((block.offset + block.size_bytes for block in placed), default=0)


def largest_live_bytes(program: Program) -> int:
    """Return the most bytes that are alive in one step: no plan can need less."""
    spans = _spans(program)
    return max(
        (
            sum(
                program.storages[storage].size_bytes
                for storage, (first, last) in spans.items()
                if first <= index <= last
            )
            for index in range(len(program.steps))
        ),
        default=0,
    )


def _spans(program: Program) -> dict[int, tuple[int, int]]:
    """Return the first and the last step that touch each storage of the arena."""
    spans: dict[int, tuple[int, int]] = {}
    for index, step in enumerate(program.steps):
        for storage in step.reads | step.writes:
            first, _ = spans.get(storage, (index, index))
            spans[storage] = (first, index)
    return spans


def _blocks(program: Program) -> list[_Block]:
    spans = _spans(program)
    blocks = {
        storage: _Block(
            [storage], -(-program.storages[storage].size_bytes // ALIGNMENT) * ALIGNMENT, first, last
        )
        for storage, (first, last) in spans.items()
    }
    for index, step in enumerate(program.steps):
        for written, read in step.in_place:
            into, dying = blocks.get(written), blocks.get(read)
            if into is None or dying is None or into is dying:
                continue
            # The reader must be the last to see the old value, the writer the first to see the new one.
            if dying.last != index or into.first != index or dying.size_bytes < into.size_bytes:
                continue
            dying.members += into.members
            dying.last = into.last
            for member in into.members:
                blocks[member] = dying
            break
    return list({id(block): block for block in blocks.values()}.values())
