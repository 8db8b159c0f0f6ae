"""hf-compressm analyze: how many states each layer needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .app import command
from .console import (
    CalibrationFile,
    Json,
    Model,
    calibration_batches_of,
    check_figure,
    exit_codes,
    load,
    measuring,
    note,
    progress_bar,
)


@command
def analyze(
    model: Model,
    figure: Annotated[Path | None, typer.Option(metavar="FILE.png", help="Draw the spectra to this file.")] = None,
    tolerance: Annotated[float, typer.Option(help="Show the sizes that this share of Hankel energy asks for.")] = 0.05,
    calibration: CalibrationFile = None,
    as_json: Json = False,
) -> None:
    """Measure the Hankel singular values of every layer; nothing is cut."""
    import torch

    from ..compress import hankel_singular_values
    from ..config import CompreSSMConfig
    from ..hankel.ranks import energy_rank

    with exit_codes():
        # Before the long part.
        CompreSSMConfig(tolerance=tolerance)
        if figure is not None:
            check_figure(figure)
        with progress_bar() as progress:
            loaded, tokenizer = load(model, progress)
            batches = calibration_batches_of(loaded, tokenizer, calibration, progress)
            with measuring(loaded, batches, progress):
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
        note(f"figure in {escape(str(figure))}")
