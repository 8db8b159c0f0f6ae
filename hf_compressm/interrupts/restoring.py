"""Put something back at the end of a block, also where an interrupt strikes between two lines of the putting back."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def restoring(restore: Callable[[], object]) -> Iterator[None]:
    """Call `restore` when the block ends, in whatever way.

    Make the change inside of the block. An interrupt on the way out, before this is told that the block ended, drops its
    generator, which closes it and so restores, too: give other context managers that restore the form of a generator.

    Args:
        restore: undoes as much of the change as was made. It may be called twice.
    """
    try:
        try:
            yield
        finally:
            restore()
    except BaseException:
        restore()
        raise
