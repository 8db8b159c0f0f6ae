"""The command line: compress, analyze, demo."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    help="Make the SSM state of a Mamba or Mamba-2 model smaller, guided by Hankel singular values.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
console = Console()

Model = Annotated[str, typer.Argument(help="A name on the Hub, or a folder.")]


def _fail(message: object) -> typer.Exit:
    Console(stderr=True).print(f"[red]error:[/red] {message}")
    return typer.Exit(1)


def _empty_folder(folder: Path) -> Path:
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise _fail(f"{folder} is not an empty folder: name a new one.")
    return folder


@app.command()
def compress(
    model: Model,
    output: Annotated[Path, typer.Argument(help="A new folder for the slim model.")],
    tolerance: Annotated[float | None, typer.Option(help="Share of each layer's Hankel energy to give up.")] = None,
    state_size: Annotated[int | None, typer.Option(help="States to keep in every layer.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Share of all states to keep.")] = None,
    uniform: Annotated[bool, typer.Option(help="One size for all layers: a stock checkpoint.")] = False,
) -> None:
    """Write a slim model (and its tokenizer) to a folder."""
    from .compress import compress_pretrained
    from .config import CompreSSMConfig
    from .hub import load_tokenizer

    _empty_folder(output)
    try:
        config = CompreSSMConfig(tolerance=tolerance, state_size=state_size, ratio=ratio, uniform=uniform)
        with console.status(f"compressing {model}"):
            slim: Any = compress_pretrained(model, config)
            slim.save_pretrained(output)
    except (OSError, TypeError, ValueError) as error:
        raise _fail(error) from error
    try:
        load_tokenizer(model).save_pretrained(output)
    except OSError:
        console.print("[yellow]The model has no tokenizer; none was saved.[/yellow]")
    console.print(slim.compression_report)
    console.print(f"saved in {output}")


@app.command()
def analyze(
    model: Model,
    figure: Annotated[Path | None, typer.Option(help="Write the spectra to this PNG.")] = None,
    tolerance: Annotated[float, typer.Option(help="Show the sizes that this share of Hankel energy asks for.")] = 0.05,
) -> None:
    """Measure the Hankel singular values of every layer; nothing is cut."""
    import torch

    from .compress import compress_pretrained
    from .config import CompreSSMConfig
    from .hankel.ranks import energy_rank

    try:
        with console.status(f"measuring {model}"):
            report: Any = compress_pretrained(model, CompreSSMConfig(tolerance=0.0)).compression_report
        ranks = [int(energy_rank(torch.tensor(row.hankel_singular_values), tolerance).max()) for row in report.layers]
    except (OSError, TypeError, ValueError) as error:
        raise _fail(error) from error
    table = Table(title=f"States that hold {1 - tolerance:.0%} of the Hankel energy")
    for column in ("layer", "states", "needed"):
        table.add_column(column, justify="right")
    for row, rank in zip(report.layers, ranks, strict=True):
        table.add_row(str(row.index), str(row.old_size), str(rank))
    console.print(table)
    if figure is not None:
        report.plot().savefig(figure, dpi=150)
        console.print(f"figure in {figure}")


@app.command()
def demo(
    output: Annotated[Path, typer.Option(help="A new folder for the slim models and the figures.")] = Path("demo"),
) -> None:
    """Slim the two trained models that the package ships, reload them, and compare perplexities."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from .compress import compress_pretrained
    from .config import CompreSSMConfig

    _empty_folder(output)
    reference = Path(__file__).parent / "reference"
    table = Table(title="Perplexity on held-out text, no fine-tuning", caption="after: reloaded from disk")
    for column in ("model", "states", "before", "after", "state KiB"):
        table.add_column(column, justify="right")
    for name in ("mamba-tiny", "mamba2-tiny"):
        tokenizer = AutoTokenizer.from_pretrained(reference / name)
        text = (reference / "evaluation.txt").read_text(encoding="utf-8")
        ids = torch.tensor(tokenizer(text, verbose=False)["input_ids"][: 16 * 512]).view(16, 512)
        with console.status(f"slimming {name}"):
            before = _perplexity(AutoModelForCausalLM.from_pretrained(reference / name, dtype=torch.float32), ids)
            slim: Any = compress_pretrained(reference / name, CompreSSMConfig(), dtype=torch.float32)
            report = slim.compression_report
            slim.save_pretrained(output / name)
            tokenizer.save_pretrained(output / name)
            report.plot().savefig(output / f"{name}.png", dpi=150)
            after = _perplexity(AutoModelForCausalLM.from_pretrained(output / name, dtype=torch.float32), ids)
        console.print(report)
        sizes = ", ".join(map(str, report.sizes.values()))
        state = f"{report.state_bytes_before / 1024:.0f} -> {report.state_bytes_after / 1024:.0f}"
        table.add_row(name, f"{report.layers[0].old_size} -> {sizes}", f"{before:.2f}", f"{after:.2f}", state)
    console.print(table)
    console.print(f"models and figures in {output}")


def _perplexity(model: Any, ids: Any) -> float:
    import torch

    with torch.no_grad():
        losses = [float(model.eval()(batch, labels=batch, use_cache=False).loss) for batch in ids.split(8)]
    return math.exp(sum(losses) / len(losses))
