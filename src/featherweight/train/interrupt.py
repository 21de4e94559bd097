"""Ctrl-C during training waits for the end of the step, so the state written then is a consistent one."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass
class Interrupt:
    """Whether the user asked to stop."""

    requested: bool = False


@contextlib.contextmanager
def deferred_interrupt(enabled: bool = True) -> Iterator[Interrupt]:
    """Turn the first SIGINT into a flag; a second one interrupts at once.

    Only the main thread can own signal handlers; elsewhere the flag just stays False.
    """
    asked = Interrupt()
    if not enabled or threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def handle(signum: int, frame: object) -> None:
        if asked.requested:
            raise KeyboardInterrupt
        asked.requested = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield asked
    finally:
        signal.signal(signal.SIGINT, before)
