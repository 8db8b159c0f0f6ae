"""hf-compressm export: the layout that mamba_ssm reads."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.markup import escape

from .app import command
from .console import Model, empty_folder, load, new_folder, note, progress_bar


@command
def export(
    model: Model,
    output: Annotated[Path, typer.Argument(help="A new folder for the checkpoint in the original layout.")],
) -> None:
    """Write a model in the original layout, for mamba_ssm's MambaLMHeadModel.

    That layout has one state size for all layers: compress with --uniform first. Any other model is refused, with the
    reason.
    """
    from ..hub import export_mamba_ssm

    empty_folder(output)
    with progress_bar() as progress:
        loaded, _ = load(model, progress, "cpu")
        progress.add_task("saving", total=None)
        with new_folder(output) as folder:
            export_mamba_ssm(loaded, folder)
    note(f"saved in {escape(str(output))}")
