"""What the commands share: messages, exit codes, progress bars, folders that are whole or absent."""

from __future__ import annotations

import glob
import os
import shutil
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

Model = Annotated[
    str, typer.Argument(help="A name on the Hub, or a folder, in the layout of transformers or of state-spaces/*.")
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.txt",
        help="Measure on this text (64 x 512 tokens spread over it, 16 x 512 on a CPU). By default on text that "
        "the package ships, or, for a model without a tokenizer, on samples of the model itself. Best is text like that of the model's use.",
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        help="cpu, cuda, cuda:1, or auto, which spreads the model over all GPUs and the CPU. By default a GPU, if there is one."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout, and nothing else there.")]


def note(text: str) -> None:
    """On stderr: stdout is for results."""
    Console(stderr=True).print(text)


def fail(message: object) -> typer.Exit:
    """Say what is wrong; the exit to raise."""
    note(f"[red]error:[/red] {escape(str(message))}")
    return typer.Exit(1)


@contextmanager
def exit_codes() -> Iterator[None]:
    """1 with a message for what the user can mend, 130 for Ctrl-C; a traceback is left to bugs."""
    try:
        import torch

        yield
    except KeyboardInterrupt:
        note("stopped")
        raise typer.Exit(130) from None
    except torch.OutOfMemoryError as error:
        raise fail(
            f"The GPU's memory does not hold it: {error}\n--device cpu runs without it. For compress and analyze, --device auto "
            "spreads the model over all GPUs and the CPU."
        ) from error
    except (OSError, TypeError, ValueError) as error:
        raise fail(error) from error


@contextmanager
def interruptible() -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt in here, so that what was begun is tidied up, whatever it does elsewhere."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        yield
        return
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def empty_folder(folder: Path) -> Path:
    """Refuse a folder that holds anything, or that can't be made, and the shell's own, which would be another one then."""
    if folder.resolve() == Path.cwd():
        raise fail(f"{folder} is the current folder, which can't be replaced by a whole one: name a new one in it.")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise fail(f"{folder} is not an empty folder: name a new one.")
    above = next(each for each in folder.resolve().parents if each.exists())
    if not above.is_dir() or not os.access(above, os.W_OK):
        raise fail(
            f"{folder} can't be written, since {above} is {'read-only' if above.is_dir() else 'a file'}: name another."
        )
    return folder


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside it, which takes its name once everything is written and vanishes if something fails.

    What processes that were killed have left of the same output is removed.

    Raises:
        OSError: if it can't be written.
    """
    from safetensors import SafetensorError

    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{glob.escape(folder.name)}.*.partial"):
        if not _is_running(left.name.removeprefix(f".{folder.name}.").removesuffix(".partial")):
            shutil.rmtree(left, ignore_errors=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        if os.name == "nt" and folder.exists():
            folder.rmdir()
        partial.replace(folder)  # of an empty folder, too
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, SafetensorError):  # as where the disk is full
            raise OSError(f"{folder} could not be written, and nothing of it was left: {error}") from error
        raise


def _is_running(process: str) -> bool:
    """Whether another process has this number."""
    if not process.isdecimal() or os.name == "nt":
        return True
    if int(process) == os.getpid():
        return False
    try:
        os.kill(int(process), 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        pass
    return True


def check_figure(path: Path) -> None:
    """Refuse a figure that could not be written.

    Raises:
        OSError, ValueError: with the reason.
    """
    from matplotlib.backend_bases import FigureCanvasBase

    formats = sorted(FigureCanvasBase.get_supported_filetypes())
    if path.suffix.lower().lstrip(".") not in formats:
        raise ValueError(f"A figure is a file in one of the formats {', '.join(formats)}, got {path}: name a .png.")
    if not path.parent.is_dir() or path.is_dir() or not os.access(path.parent, os.W_OK):
        raise OSError(f"{path} can't be written: name a file in a folder that is there.")


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A bar on stderr, with those of other libraries switched off, and what they print, such as DeepSpeed's log, on stderr, too."""
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    # Their bars, of weights, shards and uploads, would break up this one.
    logging.disable_progress_bar()
    disable_progress_bars()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    times = (TimeElapsedColumn(), TextColumn("left:"), TimeRemainingColumn())
    bar = Progress(*columns, *times, console=Console(stderr=True), transient=True)
    with redirect_stdout(sys.stderr), bar as progress:
        yield progress


def find_device(name: str | None) -> Any:
    """The device of that name; by default a GPU, if there is one.

    Raises:
        ValueError: if it is not here.
    """
    import torch

    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    here = ["cpu", *(["cuda"] if gpus else []), *(f"cuda:{index}" for index in range(gpus))]
    if name is not None and name not in here:
        raise ValueError(f"--device must be one of what is here, {', '.join(here)}, got {name}.")
    return torch.device(name or ("cuda" if gpus else "cpu"))


def current(device: Any) -> AbstractContextManager[object]:
    """Makes a GPU the one that is waited for, asked for its memory and recorded in graphs; on a CPU, nothing."""
    import torch

    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def load(model: str, progress: Progress, device: str | None = None) -> tuple[Any, Any]:
    """The model on a device, or "auto" on all of them, by default where `default_device_map` has it; its tokenizer or None."""
    from ..hub import default_device_map, load_model, load_tokenizer

    task = progress.add_task(f"loading {escape(model)}", total=None)
    if device == "auto":
        device_map: Any = "auto"
    else:
        device_map = default_device_map() if device is None else {"": find_device(device)}
    loaded = load_model(model, device_map=device_map)
    try:
        tokenizer = load_tokenizer(model)
    except (OSError, ValueError):
        tokenizer = None
    progress.remove_task(task)
    return loaded, tokenizer


def calibration_text(model: Any, tokenizer: Any, text: Path | None) -> Any:
    """Token ids of a text to measure on; None for the package's own."""
    from ..data.calibration import sequences_for
    from ..data.texts import windows

    return None if text is None else windows(_read(text, tokenizer), tokenizer, sequences_for(model))


def healing_text_of(tokenizer: Any, text: Path | None) -> Any:
    """All of a text in windows; None for what the package has."""
    from ..data.texts import every_window

    return None if text is None else every_window(_read(text, tokenizer), tokenizer)


def _read(text: Path, tokenizer: Any) -> str:
    if tokenizer is None:
        raise ValueError(f"The model has no tokenizer, so it can't read {text}: leave out --calibration.")
    try:
        return text.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{text} is no text in UTF-8 ({error}): give another file to --calibration.") from error


@contextmanager
def measuring(progress: Progress) -> Iterator[None]:
    """A bar over the batches that are measured, then over the layers that sizes are looked for in."""
    from ..cutting.progress import listening

    task = progress.add_task("measuring", total=None)
    with listening(lambda text, done, total: progress.update(task, description=text, completed=done, total=total)):
        try:
            yield
        finally:
            progress.remove_task(task)


def timed_evaluation(model: Any, ids: Any, progress: Progress, description: str) -> Any:
    """The model's perplexity and recall, with a bar over the sequences."""
    from ..data.evaluation import evaluate

    task = progress.add_task(description, total=len(ids))
    found = evaluate(model, ids, lambda count: progress.advance(task, count))
    progress.remove_task(task)
    return found
