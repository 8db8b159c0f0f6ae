"""The application: its help, and how a function becomes a command of it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Annotated, Any

import typer

from .console import exit_codes, interruptible


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

    Exit codes: 0 done, 1 can't be done (the message says why), 2 the command line can't be read, 3 there was nothing
    to cut, so nothing was written, 130 stopped by Ctrl-C. Whatever stops it, an output folder is complete or not there, and so is what is pushed. Results go to stdout, all else to stderr."""),
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Make a function a command, with exit codes."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> None:
        with exit_codes(), interruptible():
            function(*args, **kwargs)

    return app.command(help=_paragraphs(function.__doc__))(run)


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
    """Take the options of the program itself."""
