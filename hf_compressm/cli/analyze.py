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
    Device,
    Json,
    Model,
    calibration_text,
    check_figure,
    fail,
    load,
    measuring,
    note,
    progress_bar,
)

# Of perplexity, about: what a frontier shows.
BUDGETS = (0.001, 0.003, 0.01, 0.03, 0.1)


@command
def analyze(
    model: Model,
    figure: Annotated[
        Path | None, typer.Option(metavar="FILE.png", help="Draw the spectra, and with --frontier the trade-off.")
    ] = None,
    tolerance: Annotated[
        float | None,
        typer.Option(help="Show the sizes that this share of Hankel energy asks for, in the table; 0.05 by default."),
    ] = None,
    frontier: Annotated[
        bool,
        typer.Option(
            "--frontier",
            help="Show the fewest states for divergences of 0.001 to 0.1 nats per token (0.1 to 10% of perplexity), as "
            "measured on held-out text.",
        ),
    ] = False,
    calibration: CalibrationFile = None,
    device: Device = None,
    as_json: Json = False,
) -> None:
    """Measure the Hankel singular values of every layer, or with --frontier what fewer states cost; nothing is cut."""
    import torch

    from ..compress import hankel_singular_values
    from ..config import TOLERANCE, CompreSSMConfig
    from ..cutting import measure
    from ..hankel.ranks import energy_rank_of_layer

    # Before the long part.
    if tolerance is not None and (frontier or as_json):
        raise fail(
            f"--tolerance is for the table, not for {'--frontier' if frontier else '--json'}: drop one of them."
        )
    tolerance = TOLERANCE if tolerance is None else tolerance
    CompreSSMConfig(tolerance=tolerance)
    if figure is not None:
        check_figure(figure)
    with progress_bar() as progress:
        loaded, tokenizer = load(model, progress, device)
        data = calibration_text(loaded, tokenizer, calibration)
        with measuring(progress):
            if frontier:
                measurement = measure(loaded, data, CompreSSMConfig(), tokenizer=tokenizer)
                reports = [measurement.plan(CompreSSMConfig(max_divergence=b)).report for b in BUDGETS]
            else:
                reports = [hankel_singular_values(loaded, data, tokenizer=tokenizer)]
    if figure is not None:
        reports[len(reports) // 2].plot().savefig(figure, dpi=150)
    if as_json:
        found = [report.to_dict() for report in reports]
        typer.echo(json.dumps(found if frontier else found[0], indent=2))
    elif frontier:
        table = Table(title="The fewest states for a divergence, in nats per token on held-out text")
        for column in ("allowed", "measured", "states", "of", "layer by layer"):
            table.add_column(column, justify="right")
        for report in reports:
            row = report.divergence
            assert row is not None
            sizes = " ".join(map(str, report.sizes.values()))
            of = f"{report.states_before:,}"
            table.add_row(f"{row.asked:g}", f"{row.measured:.4f}", f"{report.states_after:,}", of, sizes)
        Console().print(table)
    else:
        table = Table(title=f"States that hold {1 - tolerance:.0%} of the Hankel energy")
        for column in ("layer", "states", "needed"):
            table.add_column(column, justify="right")
        for layer in reports[0].layers:
            spectrum = torch.tensor(layer.hankel_singular_values)
            rank = energy_rank_of_layer(spectrum, tolerance, layer.head_sizes is not None)
            table.add_row(str(layer.index), str(layer.old_size), str(rank))
        Console().print(table)
    if figure is not None:
        note(f"figure in {escape(str(figure))}")
