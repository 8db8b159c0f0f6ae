"""The command line: compress, analyze, export, benchmark, demo."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table


def _paragraphs(text: str | None) -> str:
    """Each paragraph on one line: typer keeps the line breaks of all but the first."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in (text or "").split("\n\n"))


app = typer.Typer(
    help=_paragraphs("""Make the SSM state of a Mamba or Mamba-2 model smaller, guided by Hankel singular values.

    1. [bold cyan]hf-compressm demo[/bold cyan] slims two small models that the package ships: a minute on a CPU.

    2. [bold cyan]hf-compressm analyze state-spaces/mamba-130m[/bold cyan] shows how many states each layer needs.

    3. [bold cyan]hf-compressm compress state-spaces/mamba-130m --dry-run[/bold cyan] shows what would be cut and what it
    would cost.

    4. [bold cyan]hf-compressm compress state-spaces/mamba-130m slim --push-to-hub me/slim[/bold cyan] cuts, saves and
    publishes.

    The slim model loads with from_pretrained like any other: after [bold]import hf_compressm[/bold], or anywhere with
    trust_remote_code=True. With --uniform it is a stock checkpoint that needs neither.

    Exit codes: 0 done, 1 can't be done (the message says why), 2 unknown option, 130 stopped by Ctrl-C. Whatever stops it,
    an output folder is complete or not there, and so is what is pushed. Results go to stdout, all else to stderr."""),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def _command(function: Callable[..., None]) -> Callable[..., None]:
    return app.command(help=_paragraphs(function.__doc__))(function)


def _show_version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"hf_compressm {version('hf_compressm')}")
        raise typer.Exit


@app.callback()
def main(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    pass


Model = Annotated[
    str, typer.Argument(help="A name on the Hub, or a folder, in the layout of transformers or of state-spaces/*.")
]
CalibrationFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE.txt",
        help="Measure on this text (its first 8 x 512 tokens). By default on prose that the package ships, or, for a "
        "model without a tokenizer, on samples of the model itself. Best is text like that of the model's use.",
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print the report as JSON on stdout, and nothing else there.")]


def _note(text: str) -> None:
    """On stderr: stdout is for results."""
    Console(stderr=True).print(text)


def _fail(message: object) -> typer.Exit:
    _note(f"[red]error:[/red] {escape(str(message))}")
    return typer.Exit(1)


@contextmanager
def _exit_codes() -> Iterator[None]:
    """1 with a message for what the user can mend, 130 for Ctrl-C; a traceback is left to bugs."""
    try:
        yield
    except KeyboardInterrupt:
        _note("stopped")
        raise typer.Exit(130) from None
    except (OSError, TypeError, ValueError) as error:
        raise _fail(error) from error


def _empty_folder(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise _fail(f"{folder} is not an empty folder: name a new one.")
    return folder


@contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder beside it, which takes its name once everything is written and vanishes if something fails."""
    folder = folder.resolve()
    folder.parent.mkdir(parents=True, exist_ok=True)
    partial = folder.with_name(f".{folder.name}.{os.getpid()}.partial")
    partial.mkdir()
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


@contextmanager
def _progress() -> Iterator[Progress]:
    from huggingface_hub.utils import disable_progress_bars
    from transformers.utils import logging

    # Their bars, of weights, shards and uploads, would break up this one.
    logging.disable_progress_bar()
    disable_progress_bars()
    columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True) as progress:
        yield progress


def _load(model: str, progress: Progress) -> tuple[Any, Any]:
    """The model, and its tokenizer or None."""
    from .hub import load_model, load_tokenizer

    task = progress.add_task(f"loading {escape(model)}", total=None)
    loaded = load_model(model)
    try:
        tokenizer = load_tokenizer(model)
    except (OSError, ValueError):
        tokenizer = None
    progress.remove_task(task)
    return loaded, tokenizer


def _batches(model: Any, tokenizer: Any, text: Path | None, progress: Progress) -> list[dict[str, Any]]:
    from .calibration import BATCH, calibration_batches, windows

    data = None
    if text is not None:
        if tokenizer is None:
            raise ValueError(f"The model has no tokenizer, so it can't read {text}: leave out --calibration.")
        data = windows(text.read_text(encoding="utf-8"), tokenizer)
    task = progress.add_task("preparing calibration data", total=None)
    batches = calibration_batches(data, model, tokenizer)
    progress.remove_task(task)
    # Small ones, for a bar that moves.
    size = max(1, BATCH // 4)
    return [
        {name: tensor[start : start + size] for name, tensor in batch.items()}
        for batch in batches
        for start in range(0, len(batch["input_ids"]), size)
    ]


@contextmanager
def _measuring(model: Any, batches: list[Any], progress: Progress, then: str = "") -> Iterator[None]:
    """A bar over the model's forward passes on the batches, and a spinner for what follows."""
    task = progress.add_task("measuring", total=len(batches))

    def advance(*_: Any) -> None:
        progress.advance(task)
        if progress.tasks[progress.task_ids.index(task)].finished and then:
            progress.update(task, description=then)

    handle = model.base_model.register_forward_hook(advance)
    try:
        yield
    finally:
        handle.remove()
        progress.remove_task(task)


def _perplexity(model: Any, ids: Any, progress: Progress, description: str) -> float:
    from .evaluation import perplexity

    task = progress.add_task(description, total=len(ids))
    value = perplexity(model, ids, lambda count: progress.advance(task, count))
    progress.remove_task(task)
    return value


@_command
def compress(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Argument(help="A new folder for the slim model; may be left out with --push-to-hub or --dry-run."),
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Give up this share of each layer's Hankel energy, in [0, 1). The default target, at 0.05."),
    ] = None,
    state_size: Annotated[int | None, typer.Option(help="Keep this many states in every layer, exactly.")] = None,
    ratio: Annotated[
        float | None,
        typer.Option(help="Keep this share of all states, more in the layers where a cut costs more."),
    ] = None,
    uniform: Annotated[
        bool,
        typer.Option(
            "--uniform", help="One size for all layers: a checkpoint that loads anywhere without this package."
        ),
    ] = False,
    realization: Annotated[
        str,
        typer.Option(
            help="select: keep some of the states. project (Mamba-2 only): mix them into fewer, which loses less. "
            "auto: select for Mamba, project for Mamba-2."
        ),
    ] = "auto",
    multiple_of: Annotated[
        int | None,
        typer.Option(
            help="Round the sizes that are chosen for you up to a multiple of this. By default not for Mamba, and to "
            "a power of two from 16 up for Mamba-2, whose kernels are made for these."
        ),
    ] = None,
    refit: Annotated[
        int,
        typer.Option(help="Rounds of refitting the cut layers of a Mamba model to the full ones; 0 is quicker."),
    ] = 3,
    calibration: CalibrationFile = None,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="NAME", help="Push the slim model and its tokenizer to this repository.")
    ] = None,
    private: Annotated[
        bool, typer.Option("--private", help="Make that repository a private one, if it is new.")
    ] = False,
    evaluate: Annotated[
        bool | None,
        typer.Option(
            "--evaluate/--no-evaluate",
            help="Take the perplexity before and after, on prose that the package ships. By default with --push-to-hub, "
            "for the model card, and with --dry-run.",
            show_default=False,
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be cut and what it would cost; write nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Write a slim model (and its tokenizer) to a folder, to the Hub, or both.

    Give one target at most: --tolerance, --state-size or --ratio. The table shows for each layer the states before and
    after, the Hankel energy kept, and the share of the layer's output that the cut loses on the calibration text.

    hf-compressm compress state-spaces/mamba-130m slim --tolerance 0.02
    """
    from .compress import compress_
    from .config import CompreSSMConfig
    from .evaluation import describe, evaluation_ids
    from .hub import check_login, publish
    from .report import Perplexity

    if output is None and push_to_hub is None and not dry_run:
        raise _fail("Name a folder for the slim model, or give --push-to-hub NAME or --dry-run.")
    if output is not None and not dry_run:
        _empty_folder(output)
    with _exit_codes():
        config = CompreSSMConfig(
            tolerance=tolerance,
            state_size=state_size,
            ratio=ratio,
            uniform=uniform,
            realization=realization,  # type: ignore[arg-type]
            multiple_of=multiple_of,
            refit=refit,
        )
        if push_to_hub is not None and not dry_run:
            check_login()
        with _progress() as progress:
            slim, tokenizer = _load(model, progress)
            batches = _batches(slim, tokenizer, calibration, progress)
            if evaluate and tokenizer is None:
                raise ValueError("The perplexity is taken on text, and the model has no tokenizer: drop --evaluate.")
            if evaluate is None:
                evaluate = tokenizer is not None and (dry_run or push_to_hub is not None)
            ids = evaluation_ids(tokenizer) if evaluate else None
            before = _perplexity(slim, ids, progress, "perplexity before") if ids is not None else 0.0
            with _measuring(slim, batches, progress, then="choosing the states to keep"):
                report = compress_(slim, config, batches)
            if ids is not None:
                after = _perplexity(slim, ids, progress, "perplexity after")
                report = slim.compression_report = replace(report, perplexity=Perplexity(before, after, describe(ids)))
            if output is not None and not dry_run:
                progress.add_task("saving", total=None)
                with _new_folder(output) as folder:
                    slim.save_pretrained(folder)
                    if tokenizer is not None:
                        tokenizer.save_pretrained(folder)
    if not as_json:
        Console().print(report)
    if dry_run:
        _note("dry run: nothing was written")
        output = push_to_hub = None
    elif tokenizer is None:
        _note("[yellow]The model has no tokenizer; none was saved.[/yellow]")
    if output is not None:
        _note(f"saved in {escape(str(output))}")
    if push_to_hub is not None:
        with _exit_codes(), _progress() as progress:
            progress.add_task(f"pushing to {escape(push_to_hub)}", total=None)
            push_to_hub = publish(slim, push_to_hub, tokenizer=tokenizer, private=private or None)
        _note(f"pushed to {escape(push_to_hub)}")
    if as_json:
        where = {"saved_in": str(output) if output is not None else None, "pushed_to": push_to_hub}
        typer.echo(json.dumps(report.to_dict() | where, indent=2))


@_command
def analyze(
    model: Model,
    figure: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the spectra to this file.")] = None,
    tolerance: Annotated[float, typer.Option(help="Show the sizes that this share of Hankel energy asks for.")] = 0.05,
    calibration: CalibrationFile = None,
    as_json: Json = False,
) -> None:
    """Measure the Hankel singular values of every layer; nothing is cut."""
    import torch

    from .compress import hankel_singular_values
    from .config import CompreSSMConfig
    from .hankel.ranks import energy_rank

    with _exit_codes():
        CompreSSMConfig(tolerance=tolerance)  # refuses what is no share, before the long part
        with _progress() as progress:
            loaded, tokenizer = _load(model, progress)
            batches = _batches(loaded, tokenizer, calibration, progress)
            with _measuring(loaded, batches, progress):
                report = hankel_singular_values(loaded, batches)
        if figure is not None:
            report.plot().savefig(figure, dpi=150)
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        table = Table(title=f"States that hold {1 - tolerance:.0%} of the Hankel energy")
        for column in ("layer", "states", "needed"):
            table.add_column(column, justify="right")
        for row in report.layers:
            rank = int(energy_rank(torch.tensor(row.hankel_singular_values), tolerance).max())
            table.add_row(str(row.index), str(row.old_size), str(rank))
        Console().print(table)
    if figure is not None:
        _note(f"figure in {escape(str(figure))}")


@_command
def export(
    model: Model,
    output: Annotated[Path, typer.Argument(help="A new folder for the checkpoint in the original layout.")],
) -> None:
    """Write a model in the original layout, for mamba_ssm's MambaLMHeadModel.

    That layout has one state size for all layers: compress with --uniform first. Any other model is refused, with the
    reason.
    """
    from .hub import export_mamba_ssm

    _empty_folder(output)
    with _exit_codes(), _progress() as progress:
        loaded, _ = _load(model, progress)
        progress.add_task("saving", total=None)
        with _new_folder(output) as folder:
            export_mamba_ssm(loaded, folder)
    _note(f"saved in {escape(str(output))}")


@_command
def benchmark(
    model: Annotated[
        str, typer.Argument(help="A name on the Hub, a checkpoint's folder, or a folder with a config.json.")
    ],
    state_size: Annotated[
        list[int] | None,
        typer.Option(help="Compare with this state size; may be given several times. By default an eighth of it."),
    ] = None,
    realization: Annotated[
        str, typer.Option(help="How Mamba-2 gets there: project, select, or auto, which is project.")
    ] = "auto",
    length: Annotated[int, typer.Option(help="Tokens of a sequence in training and prefill.")] = 1024,
    batch: Annotated[int, typer.Option(help="Sequences in training and prefill.")] = 8,
    decode_batch: Annotated[
        list[int] | None, typer.Option(help="Sequences that are decoded together; may be given several times.")
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed steps, of which the median counts.")] = 10,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cuda or cpu. By default cuda, if there is one.")] = None,
    as_json: Json = False,
) -> None:
    """Time a model at its own and at smaller state sizes: training, prefill, decoding, memory.

    Speed depends on shapes alone: the weights are random, and only the config is read.

    hf-compressm benchmark state-spaces/mamba2-130m --state-size 16 --state-size 64
    """
    import torch

    from .benchmark import Workload, load_config, missing_kernels
    from .benchmark import benchmark as run

    with _exit_codes():
        if dtype not in ("bfloat16", "float32"):
            raise ValueError(f"--dtype must be bfloat16 or float32, got {dtype}.")
        on = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        work = Workload(length, batch, batch, tuple(decode_batch or (1, 64, 512)), getattr(torch, dtype), repeats)
        config = load_config(model)
        columns: list[dict[str, float]] = []
        with _progress() as progress:
            task = progress.add_task("building the model", total=None)

            def time_all(size: int | None) -> None:
                columns.append({})
                for row, value in run(config, size, realization, on, work):
                    columns[-1][row] = value
                    progress.update(task, description=f"state size {columns[-1]['state size']:.0f}: {row} done")

            time_all(None)
            for size in state_size or [max(1, int(columns[0]["state size"]) // 8)]:
                time_all(size)
    missing = missing_kernels(on)
    if as_json:
        typer.echo(json.dumps({"device": str(on), "missing_kernels": missing, "results": columns}, indent=2))
        return
    own, *slim = columns
    table = Table(
        title=f"{escape(model)} on {_device_name(on)}, {dtype}", caption="tokens/s, where no other unit is named"
    )
    for column in ("", "present", *("slim (ratio)" for _ in slim)):
        table.add_column(column, justify="right")
    for row, full in own.items():
        table.add_row(row, f"{full:,.0f}", *(f"{column[row]:,.0f} ({column[row] / full:.2f}x)" for column in slim))
    Console().print(table)
    if missing:
        _note(
            f"[yellow]On the slow path: transformers scans in plain torch without {' and '.join(missing)}.[/yellow] These "
            "figures say nothing of the fast one; on a CUDA GPU, install hf_compressm\\[cuda]."
        )


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"


@_command
def demo(
    output: Annotated[Path, typer.Option(help="A new folder for the slim models and the figure, spectra.png.")] = Path(
        "demo"
    ),
) -> None:
    """Slim two small trained models that the package ships, reload them, and compare perplexities.

    Takes about a minute on two CPU cores and needs no network.
    """
    from .compress import compress_
    from .config import CompreSSMConfig
    from .evaluation import evaluation_ids
    from .figures import plot_spectra

    _empty_folder(output)
    reference = Path(__file__).parent / "reference"
    table = Table(title="Perplexity on held-out text, no fine-tuning", caption="after: reloaded from disk")
    for column in ("model", "states", "before", "after", "state KiB"):
        table.add_column(column, justify="right")
    reports = {}
    with _exit_codes(), _new_folder(output) as folder, _progress() as progress:
        # Without the refit rounds, which take a minute on a CPU; the Mamba-2 model needs all its states at tolerance 0.05.
        cuts = {"mamba-tiny": CompreSSMConfig(refit=0), "mamba2-tiny": CompreSSMConfig(state_size=32)}
        for name, cut in cuts.items():
            model, tokenizer = _load(str(reference / name), progress)
            ids = evaluation_ids(tokenizer)
            before = _perplexity(model, ids, progress, f"{name}: perplexity before")
            batches = _batches(model, tokenizer, None, progress)
            with _measuring(model, batches, progress, then="choosing the states to keep"):
                report = compress_(model, cut, batches)
            model.save_pretrained(folder / name)
            tokenizer.save_pretrained(folder / name)
            reloaded, _ = _load(str(folder / name), progress)
            after = _perplexity(reloaded, ids, progress, f"{name}: perplexity after")
            sizes = ", ".join(map(str, report.sizes.values()))
            state = f"{report.state_bytes_before / 1024:.0f} -> {report.state_bytes_after / 1024:.0f}"
            table.add_row(name, f"{report.layers[0].old_size} -> {sizes}", f"{before:.2f}", f"{after:.2f}", state)
            reports[name] = report
        plot_spectra(reports).savefig(folder / "spectra.png", dpi=160)
    console = Console()
    for report in reports.values():
        console.print(report)
    console.print(table)
    _note(f"models and figure in {escape(str(output))}")
