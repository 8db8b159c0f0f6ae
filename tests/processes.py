"""Several processes that have imported everything already: what torchrun does, without a minute of imports."""

from __future__ import annotations

import gc
import multiprocessing
import os
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch.distributed as dist
from filelock import FileLock

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    ["tests.training.conftest", "transformers.trainer", "transformers.models.mamba2.modeling_mamba2"]
)


def launch(
    folder: Path, count: int, target: Callable[..., Any], *args: Any, timeout: float = 280.0, codes: bool = False
) -> list[int | None]:
    """Call a function of a module in several processes, with the environment that torchrun gives.

    Args:
        folder: for their output, a file for each.
        count: of processes.
        target, args: what to call.
        timeout: after which they are killed, in seconds.
        codes: return the exit codes (None: it had to be killed); else a process that failed is an error with its output.
    """
    os.environ["OMP_NUM_THREADS"] = "1"  # before the server of processes starts
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    outputs = [folder / f"output-{rank}.txt" for rank in range(count)]
    started = [
        _CONTEXT.Process(target=_run, args=(rank, count, port, outputs[rank], target, *args), daemon=True)
        for rank in range(count)
    ]
    for process in started:
        process.start()
    until = time.monotonic() + timeout
    for process in started:
        process.join(max(0.0, until - time.monotonic()))
    found = [process.exitcode for process in started]
    for process in started:
        process.kill()
    if not codes and any(code != 0 for code in found):
        raise AssertionError("\n".join([str(found), *(path.read_text()[-3000:] for path in outputs)]))
    return found


def once(factory: Any, name: str, make: Callable[[Path], None]) -> Path:
    """A folder that one of pytest's workers fills, for all of them.

    Args:
        factory: the fixture `tmp_path_factory`.
        name: of the folder.
        make: fills it.
    """
    mine = factory.getbasetemp()
    folder = (mine.parent if os.environ.get("PYTEST_XDIST_WORKER") else mine) / name
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            folder.mkdir()
            make(folder)
            (folder / "whole").touch()
    if not (folder / "whole").exists():
        raise AssertionError(f"{name} could not be made: see the first error")
    return folder


def _run(rank: int, count: int, port: int, output: Path, target: Callable[..., Any], *args: Any) -> None:
    for name in [name for name in os.environ if name.startswith("ACCELERATE_")]:
        del os.environ[name]
    where = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "LOCAL_WORLD_SIZE": count, "MASTER_PORT": port}
    if count > 1:
        os.environ.update({name: str(value) for name, value in where.items()} | {"MASTER_ADDR": "127.0.0.1"})
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        gc.freeze()  # a collection, which each cut and each Trainer makes, takes a second for what was imported
        target(*args)
        sys.stdout.flush()
    if dist.is_initialized():
        # Else gloo's threads are still running when the process ends, and may abort it.
        dist.destroy_process_group()
