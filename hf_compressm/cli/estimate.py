"""hf-compressm estimate: what a cut would take."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .app import command
from .console import Json, current, find_device, note, progress_bar

GIB = 2**30


@command
def estimate(
    model: Annotated[
        str, typer.Argument(help="A name on the Hub, a checkpoint's folder, or a folder with a config.json.")
    ],
    state_size: Annotated[int | None, typer.Option(min=1, help="Of a cut to this many states in every layer.")] = None,
    ratio: Annotated[float | None, typer.Option(help="Of a cut to this share of all states.")] = None,
    realization: Annotated[
        str, typer.Option(help="select, project, project_heads or auto, as for compress.")
    ] = "auto",
    dtype: Annotated[str, typer.Option(help="Of the weights: bfloat16 or float32.")] = "float32",
    device: Annotated[
        str | None, typer.Option(help="cpu, cuda or cuda:1. By default a GPU, if there is one, as for compress.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Say what a cut would gain and take, from the config alone: states and their bytes, memory, seconds.

    No weight is read. The seconds come from one layer and one fit with random weights, timed here, times the passes of a
    cut on the text that the package ships: expect them to be right within a factor of two.

    hf-compressm estimate state-spaces/mamba2-2.7b --ratio 0.5
    """
    import torch

    from ..config import CompreSSMConfig
    from .estimating import estimate as run
    from .speed import load_config

    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"--dtype must be bfloat16 or float32, got {dtype}.")
    options = CompreSSMConfig(state_size=state_size, ratio=ratio, realization=realization).after_training()
    on = find_device(device)
    with progress_bar() as progress, current(on):
        task = progress.add_task("timing one layer", total=None)
        found = run(load_config(model), options, on, getattr(torch, dtype), lambda: progress.advance(task))
    if as_json:
        typer.echo(json.dumps(found.to_dict(), indent=2))
        return
    table = Table(
        title=f"{escape(model)}, {found.parameters / 1e6:,.1f}M parameters, on {on.type} in {dtype}", show_header=False
    )
    table.add_row("layers with a state", f"{found.layers} ({found.family})")
    table.add_row("states", f"{found.states:,}")
    table.add_row("state per sequence (fp32)", f"{found.state_bytes / 1024:,.0f} KiB")
    for label, (states, size) in found.after.items():
        table.add_row(f"  {label}", f"{states:,} states, {size / 1024:,.0f} KiB")
    table.add_row("weights", f"{found.model_bytes / GIB:.2f} GiB")
    table.add_row("memory of a cut, at most", f"{found.peak_bytes / GIB:.2f} GiB")
    for step, seconds in found.seconds.items():
        table.add_row(
            f"seconds to {step}" if step in ("measure", "refit") else f"seconds for {step}", f"about {seconds:,.0f}"
        )
    Console().print(table)
    if options.max_divergence is not None:
        note("How many states a max_divergence leaves depends on the weights: hf-compressm analyze --frontier tells.")
