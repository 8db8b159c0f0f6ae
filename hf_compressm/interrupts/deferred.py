"""Hold KeyboardInterrupt back while a change runs that must not stop halfway."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from .restoring import restoring


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Let SIGINT (Ctrl-C) wait until the end of the block. Other threads never get it, so that nothing is done there."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    waiting: list[Any] = []
    try:
        with restoring(lambda: signal.signal(signal.SIGINT, handler)):
            signal.signal(signal.SIGINT, lambda *received: waiting.append(received))
            yield
    finally:
        if waiting:
            handler(*waiting[-1])
