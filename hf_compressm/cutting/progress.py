"""Say how far the long loops of a cut have come: to a bar of transformers', or to whoever listens, such as the command line."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, TypeVar

from transformers.utils import logging

from ..interrupts import restoring

Listener = Callable[[str, int, int], object]
"""Gets what is done, how many steps of it are done, and how many there are."""

T = TypeVar("T")
_listener: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tell a listener, in place of showing bars."""
    before = _listener.get()
    with restoring(lambda: _listener.set(before)):
        _listener.set(listener)
        yield


def followed(description: str, items: Sequence[T]) -> Generator[T]:
    """The items, one after the other, as steps of what is described; a bar is shown where they take over a second.

    transformers' `disable_progress_bar` switches it off.
    """
    listener = _listener.get()
    if listener is None:
        bar: Any = logging.tqdm(items, desc=f"hf_compressm: {description}", delay=1, leave=False)
        yield from bar
        return
    for done, item in enumerate(items):
        listener(description, done, len(items))
        yield item
    listener(description, len(items), len(items))
