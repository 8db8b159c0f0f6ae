"""Processes agree before anything is changed: the error of one is raised on all, and who does not answer is named.

By way of the default process group's store and not of collectives, which would wait as long as the group's timeout for a
process that never comes, and then say no more than that.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from itertools import count
from typing import Any, TypeVar

import torch.distributed as dist

from ..compat.processes import process_store

SILENCE = 45.0
"""Seconds after which a process that neither came nor works towards it is given up."""
BEAT = 1.0
"""Seconds between two signs of life of a process that works."""
FAREWELL = 5.0
"""Seconds that a process with an error waits for the others to read it, before it raises and may take the store along."""

T = TypeVar("T")


class ProcessLostError(RuntimeError):
    """Another process did not come, or has ended: nothing can be done together any more."""


_numbers = count()
_times: defaultdict[str, count[int]] = defaultdict(lambda: count(1))
_ERRORS: dict[str, type[Exception]] = {
    "ValueError": ValueError,
    "TypeError": TypeError,
    "ProcessLostError": ProcessLostError,
}


def processes() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def launched() -> int:
    """How many processes a launcher says that it started, whether or not they know each other."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def join(model: Any) -> None:
    """Have the processes that a launcher started find each other, where nothing has yet: by Accelerate, as a `Trainer` does.

    Args:
        model: that this one has. If it is on a GPU, each has one of its own, which becomes its current one.
    """
    known = {"RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"} <= os.environ.keys()
    if known and processes() == 1 and launched() > 1:
        from accelerate import PartialState

        PartialState(cpu=not any(parameter.is_cuda for parameter in model.parameters()))


def together(what: str, part: Callable[[], T], silence: float | None = None) -> T:
    """Do a part of the work on all processes; return when all of them have done theirs.

    Args:
        what: is done, for messages.
        part: what this process has to do.
        silence: seconds after which a process that does not come is given up.

    Returns:
        what `part` returned.

    Raises:
        ValueError, TypeError: what `part` raised, on this process or another.
        RuntimeError: for any other error of another process; a `ProcessLostError` if one does not come or has ended.
    """
    if processes() == 1:
        return part()
    meeting = _Meeting(what, SILENCE if silence is None else silence)
    with meeting.signs_of_life():
        try:
            result = part()
        except Exception as error:
            meeting.fail(error)
            raise
        meeting.wait()
    return result


def agree(what: str, facts: Mapping[str, Any], silence: float | None = None) -> None:
    """Refuse to go on where the processes differ.

    Args:
        what: is begun, for messages.
        facts: that have to be the same on all of them, by name; as JSON takes them.
        silence: seconds without a word of another process; as for `together`.

    Raises:
        ValueError: on all of them, with the first name in which one differs from process 0.
        RuntimeError: as `together`.
    """
    if processes() == 1:
        return
    mine = json.loads(json.dumps(facts, default=str))
    key = f"{_PREFIX}/facts/{next(_numbers)}"
    rank = dist.get_rank()
    together(what, lambda: process_store().set(key, json.dumps(mine)) if rank == 0 else None, silence)

    def compare() -> None:
        theirs = json.loads(process_store().get(key))
        for name, value in mine.items():
            if value != theirs.get(name):
                raise ValueError(
                    f"The processes differ in {name}: it is {value} in process {rank} and {theirs.get(name)} in process 0. "
                    "Start all of them with the same script, arguments and checkpoint. Nothing was changed."
                )

    together(what, compare, silence)


def announce(what: str) -> str:
    """Say that this process takes part in something, before it can be waited for.

    Returns:
        the name to ask `absent` by, with how many times it has: the second time of one is that of the others, too.
    """
    name = f"{what}/{next(_times[what])}"
    if processes() > 1:
        process_store().set(f"{_PREFIX}/{name}/{dist.get_rank()}", "")
    return name


def absent(name: str, patience: float = 0.0) -> list[int]:
    """The processes that have not announced that they take part in something, nor do within some seconds.

    Args:
        name: as `announce` gave it.
        patience: the seconds.
    """
    if processes() == 1:
        return []
    end = time.monotonic() + patience
    while True:
        missing = [rank for rank in range(processes()) if not process_store().check([f"{_PREFIX}/{name}/{rank}"])]
        if not missing or time.monotonic() >= end:
            return missing
        time.sleep(0.05)


_PREFIX = "hf_compressm"


class _Meeting:
    """All processes come to one place: in the store, their numbers and signs of life, and the first error."""

    def __init__(self, what: str, silence: float) -> None:
        self.what, self.silence = what, silence
        self.store, self.world, self.rank = process_store(), processes(), dist.get_rank()
        self.key = f"{_PREFIX}/meeting/{next(_numbers)}"

    @contextmanager
    def signs_of_life(self) -> Iterator[None]:
        """Give them from a thread, as long as this process works towards the meeting."""
        ended = threading.Event()

        def beat() -> None:
            try:
                while True:
                    self.store.add(self._life(self.rank), 1)
                    if ended.wait(BEAT):
                        return
            except RuntimeError:
                return  # the store is gone, which the meeting will notice

        thread = threading.Thread(target=beat, name="hf_compressm signs of life", daemon=True)
        thread.start()
        try:
            yield
        except RuntimeError as error:
            if isinstance(error, dist.DistError):
                raise ProcessLostError(
                    f"The processes lost each other in {self.what} ({error}): one of them, or process 0, which keeps what "
                    "they tell each other, has ended. Its log has the cause; a checkpoint from before resumes."
                ) from error
            raise
        finally:
            ended.set()
            thread.join()

    def fail(self, error: Exception) -> None:
        """Tell the others of an error here, and give them time to read it."""
        try:
            self._post_failure(type(error).__name__, f"Process {self.rank}: {error}")
            self._arrive()
            until = time.monotonic() + FAREWELL
            while self.store.add(f"{self.key}/read", 0) < self.world and time.monotonic() < until:
                time.sleep(0.05)
        except dist.DistError:
            pass  # they are gone; the error here is what matters

    def wait(self) -> None:
        """Until all are here.

        Raises:
            ValueError, TypeError, RuntimeError: the error of one of them, or that one does not come.
        """
        self._arrive()
        pause, looked = 0.001, time.monotonic()
        seen: dict[int, tuple[int, float]] = {}
        while True:
            here = self._arrived() == self.world
            self._raise_failure()
            if here:
                return
            time.sleep(pause)
            pause = min(2 * pause, 0.2)
            if time.monotonic() - looked > BEAT:
                looked = time.monotonic()
                silent = self._silent(seen, looked)
                if silent:
                    names = " and ".join(map(str, silent))
                    why = (
                        f"Process {names} of {self.world} did not come to {self.what} within {self.silence:g} s, or ended on "
                        "its way: all processes have to make the same calls (with the same callbacks, config and schedule), "
                        "and wait for each other before if one has much to do alone. Its log has the cause, if it ended."
                    )
                    self._post_failure(ProcessLostError.__name__, why)
                    raise ProcessLostError(why)

    def _silent(self, seen: dict[int, tuple[int, float]], now: float) -> list[int]:
        """The processes that are not here and have given no sign of life for too long."""
        silent = []
        for rank in range(self.world):
            if self.store.check([f"{self.key}/{rank}"]):
                continue
            beats = self.store.add(self._life(rank), 0)
            if rank not in seen or seen[rank][0] != beats:
                seen[rank] = beats, now
            elif now - seen[rank][1] > self.silence:
                silent.append(rank)
        return silent

    def _life(self, rank: int) -> str:
        return f"{_PREFIX}/life/{rank}"

    def _arrive(self) -> None:
        self.store.set(f"{self.key}/{self.rank}", "")
        self.store.add(f"{self.key}/arrived", 1)

    def _arrived(self) -> int:
        arrived: int = self.store.add(f"{self.key}/arrived", 0)
        return arrived

    def _post_failure(self, kind: str, message: str) -> None:
        self.store.set(f"{self.key}/failure", json.dumps([kind, message]))
        self.store.add(f"{self.key}/read", 1)

    def _raise_failure(self) -> None:
        if self.store.check([f"{self.key}/failure"]):
            kind, message = json.loads(self.store.get(f"{self.key}/failure"))
            self.store.add(f"{self.key}/read", 1)
            raise _ERRORS.get(kind, RuntimeError)(message if kind in _ERRORS else f"{message} ({kind})")
