"""hf-compressm show: what was done to a slim model."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .app import command
from .console import Json, note


@command
def show(
    model: Annotated[str, typer.Argument(help="The folder of a slim model, or its name on the Hub.")],
    as_json: Json = False,
) -> None:
    """Show what was done to a slim model: each of its cuts, by the record that is saved with it."""
    from ..reporting.record import read_record

    cuts = read_record(model)
    if as_json:
        typer.echo(json.dumps([cut.to_dict() for cut in cuts], indent=2))
        return
    for number, cut in enumerate(cuts, 1):
        origin = f" of {cut.base}" if cut.base else ""
        versions = ", ".join(f"{name} {version}" for name, version in cut.versions.items())
        note(f"cut {number} of {len(cuts)}{escape(origin)} ({escape(versions)})")
        Console().print(cut.report)
