"""hf-compressm demo: slim the models that the package ships."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .app import command
from .console import (
    empty_folder,
    load,
    measuring,
    new_folder,
    note,
    progress_bar,
    timed_evaluation,
)


@command
def demo(
    output: Annotated[Path, typer.Option(help="A new folder for the slim models and the figure, spectra.png.")] = Path(
        "demo"
    ),
) -> None:
    """Slim two small trained models that the package ships, reload them, and compare perplexities.

    Takes about a minute on two CPU cores and needs no network.
    """
    from ..compress import compress_
    from ..config import CompreSSMConfig
    from ..data.evaluation import evaluation_ids
    from ..hub import write_companions
    from ..reporting.figures import plot_spectra

    empty_folder(output)
    reference = Path(__file__).parents[1] / "reference"
    table = Table(title="Perplexity on held-out text, no fine-tuning", caption="after: reloaded from disk")
    for column in ("model", "states", "before", "after", "state KiB"):
        table.add_column(column, justify="right")
    reports = {}
    with new_folder(output) as folder, progress_bar() as progress:
        cut = CompreSSMConfig(refit=0)  # the refit rounds take minutes on a CPU
        for name in ("mamba-small", "mamba2-small"):
            model, tokenizer = load(str(reference / name), progress)
            ids = evaluation_ids(tokenizer)
            before = timed_evaluation(model, ids, progress, f"{name}: perplexity before")
            with measuring(progress):
                report = compress_(model, cut, tokenizer=tokenizer)
            model.save_pretrained(folder / name)
            write_companions(model, folder / name, tokenizer)
            reloaded, _ = load(str(folder / name), progress)
            after = timed_evaluation(reloaded, ids, progress, f"{name}: perplexity after")
            sizes = ", ".join(map(str, report.sizes.values()))
            state = f"{report.state_bytes_before / 1024:.0f} -> {report.state_bytes_after / 1024:.0f}"
            table.add_row(
                name,
                f"{report.layers[0].old_size} -> {sizes}",
                f"{before.perplexity:.2f}",
                f"{after.perplexity:.2f}",
                state,
            )
            reports[name] = report
        plot_spectra({name: report.layers for name, report in reports.items()}).savefig(
            folder / "spectra.png", dpi=160
        )
    console = Console()
    for report in reports.values():
        console.print(report)
    console.print(table)
    note(f"models and figure in {escape(str(output))}")
