"""hf-compressm benchmark: what a smaller state gains."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .app import command
from .console import Json, current, find_device, note, progress_bar


@command
def benchmark(
    model: Annotated[
        str, typer.Argument(help="A name on the Hub, a checkpoint's folder, or a folder with a config.json.")
    ],
    state_size: Annotated[
        list[int] | None,
        typer.Option(
            min=1, help="Compare with this state size; may be given several times. By default an eighth of it."
        ),
    ] = None,
    realization: Annotated[
        str, typer.Option(help="How Mamba-2 gets there: project, project_heads, select, or auto, which is project.")
    ] = "auto",
    length: Annotated[int, typer.Option(min=1, help="Tokens of a sequence in training and prefill.")] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Sequences in training and prefill.")] = 8,
    decode_batch: Annotated[
        list[int] | None, typer.Option(min=1, help="Sequences that are decoded together; may be given several times.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Timed steps, of which the median counts.")] = 10,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
    device: Annotated[str | None, typer.Option(help="cpu, cuda or cuda:1. By default a GPU, if there is one.")] = None,
    as_json: Json = False,
) -> None:
    """Time a model at its own and at smaller state sizes: training, prefill, decoding, memory.

    Speed depends on shapes alone: the weights are random, and only the config is read. Each size is run once, briefly,
    before any is timed.

    hf-compressm benchmark state-spaces/mamba2-130m --state-size 16 --state-size 64
    """
    from dataclasses import replace

    import torch

    from .speed import Workload, load_config, missing_kernels
    from .speed import benchmark as run

    if dtype not in ("bfloat16", "float32"):
        raise ValueError(f"--dtype must be bfloat16 or float32, got {dtype}.")
    on = find_device(device)
    work = Workload(length, batch, batch, tuple(decode_batch or (1, 64, 512)), getattr(torch, dtype), repeats)
    config = load_config(model)
    with progress_bar() as progress, current(on):
        task = progress.add_task("building the model", total=None)

        def time_all(size: int | None, work: Workload, doing: str) -> dict[str, float]:
            column: dict[str, float] = {}
            for row, value in run(config, size, realization, on, work):
                column[row] = value
                progress.update(task, description=f"{doing} state size {column['state size']:.0f}: {row} done")
            return column

        # What a process runs first is quicker, CUDA graphs by up to a fifth: of what is reported nothing is first.
        brief = replace(work, repeats=1)
        present = time_all(None, brief, "warming up,")["state size"]
        sizes = state_size or [max(1, int(present) // 8)]
        for size in sizes:
            time_all(size, brief, "warming up,")
        columns = [time_all(size, work, "timing,") for size in (None, *sizes)]
    missing = missing_kernels(on)
    if as_json:
        results = [{row: None if math.isnan(value) else value for row, value in column.items()} for column in columns]
        typer.echo(json.dumps({"device": str(on), "missing_kernels": missing, "results": results}, indent=2))
        return
    own, *slim = columns
    table = Table(
        title=f"{escape(model)} on {_device_name(on)}, {dtype}", caption="tokens/s, where no other unit is named"
    )
    for column in ("", "present", *("slim (ratio)" for _ in slim)):
        table.add_column(column, justify="right")
    for row, full in own.items():
        table.add_row(row, _cell(full), *(_cell(column[row], full) for column in slim))
    Console().print(table)
    if missing:
        note(
            f"[yellow]On the slow path: transformers scans in plain torch without {' and '.join(missing)}.[/yellow] These "
            "figures say nothing of the fast one; on a CUDA GPU, install hf_compressm\\[cuda]."
        )


def _cell(value: float, full: float = math.nan) -> str:
    """A dash for what the memory does not hold; the ratio if it holds both."""
    if math.isnan(value):
        return "-"
    return f"{value:,.0f}" if math.isnan(full) else f"{value:,.0f} ({value / full:.2f}x)"


def _device_name(device: Any) -> str:
    import torch

    return torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
