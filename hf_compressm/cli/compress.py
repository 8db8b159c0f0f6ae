"""hf-compressm compress: write a slim model."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from .app import command
from .console import (
    CalibrationFile,
    Device,
    Json,
    Model,
    calibration_text,
    empty_folder,
    fail,
    healing_text_of,
    load,
    measuring,
    new_folder,
    note,
    progress_bar,
    timed_evaluation,
)


@command
def compress(
    model: Model,
    output: Annotated[
        Path | None,
        typer.Argument(help="A new folder for the slim model; may be left out with --push-to-hub or --dry-run."),
    ] = None,
    max_divergence: Annotated[
        float | None,
        typer.Option(
            help="Let the predictions diverge by this much at most, in nats per token on held-out text; 0.01 raises the "
            "perplexity by about 1%. The smallest state that keeps it is found. The default target, at 0.01."
        ),
    ] = None,
    tolerance: Annotated[
        float | None, typer.Option(help="Give up this share of each layer's Hankel energy, in [0, 1).")
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
    engine: Annotated[
        str | None,
        typer.Option(
            help="What shall run it: llama.cpp, llama.cpp-cuda, mlx, vllm, sglang, tensorrt-llm or transformers. The sizes are "
            "those that it runs fast, and one for all layers where it reads no others."
        ),
    ] = None,
    realization: Annotated[
        str,
        typer.Option(
            help="select: keep some of the states. project (Mamba-2 only): mix them into fewer, which loses less. "
            "project_heads (Mamba-2 only): another mix, of another size, in each head, which loses least. "
            "auto: select for Mamba, project for Mamba-2."
        ),
    ] = "auto",
    multiple_of: Annotated[
        int | None,
        typer.Option(
            help="Round the sizes that are chosen for you up to a multiple of this; by default to one of 8 for Mamba-2, but by head."
        ),
    ] = None,
    refit: Annotated[
        int,
        typer.Option(help="Rounds of refitting the selected layers to the full ones; 0 is quicker."),
    ] = 3,
    heal: Annotated[
        int,
        typer.Option(
            metavar="TOKENS",
            help="After the cut, learn from the full model's predictions on so many tokens of the text, some millions; on a GPU "
            "that is about a minute for a small model. What is best on held-out text is kept. 0 is off.",
        ),
    ] = 0,
    heal_parameters: Annotated[
        str,
        typer.Option(help="cut: train what the cut changed. all: every parameter, with a second copy of the model."),
    ] = "cut",
    calibration: CalibrationFile = None,
    device: Device = None,
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
            help="Take the perplexity before and after, on text that the package ships. By default with --push-to-hub, "
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

    Give one target at most: --max-divergence, --tolerance, --state-size or --ratio. The table shows for each layer the states before and
    after, the Hankel energy kept, and the share of the layer's output that the cut loses, on text that nothing was fitted to.

    hf-compressm compress state-spaces/mamba-130m slim --max-divergence 0.02
    """
    from ..backends import launched
    from ..compress import compress_and_evaluate_
    from ..config import CompreSSMConfig
    from ..cutting.nothing_to_cut import why_nothing
    from ..hub import check_login, publish, write_companions
    from ..layers import find_layers

    if launched() > 1:
        raise fail(
            "Several processes would write the same model: start one, or call compress_pretrained in a script of yours."
        )
    if output is None and push_to_hub is None and not dry_run:
        raise fail("Name a folder for the slim model, or give --push-to-hub NAME or --dry-run.")
    if private and push_to_hub is None:
        raise fail("--private is for a new repository on the Hub: give --push-to-hub NAME, or drop it.")
    if output is not None and not dry_run:
        empty_folder(output)
    config = CompreSSMConfig(
        max_divergence=max_divergence,
        tolerance=tolerance,
        state_size=state_size,
        ratio=ratio,
        uniform=uniform,
        engine=engine,
        realization=realization,
        multiple_of=multiple_of,
        refit=refit,
        heal=heal,
        heal_parameters=heal_parameters,  # type: ignore[arg-type]
    )
    if heal_parameters != "cut" and not heal:
        raise fail("--heal-parameters tells what --heal trains: give --heal TOKENS, or drop it.")
    if push_to_hub is not None and not dry_run:
        check_login()
    with progress_bar() as progress:
        slim, tokenizer = load(model, progress, device)
        data = healing_text_of(tokenizer, calibration) if heal else calibration_text(slim, tokenizer, calibration)
        with measuring(progress):
            report = compress_and_evaluate_(
                slim,
                config,
                data,
                tokenizer=tokenizer,
                evaluate=evaluate,
                by_default=dry_run or push_to_hub is not None,
                evaluation=partial(timed_evaluation, progress=progress, description="perplexity"),
            )
        nothing_cut = report.states_after == report.states_before
        if output is not None and not dry_run and not nothing_cut:
            progress.add_task("saving", total=None)
            with new_folder(output) as folder:
                slim.save_pretrained(folder)
                write_companions(slim, folder, tokenizer)
    if nothing_cut:
        reason = why_nothing(config, find_layers(slim), report.realization)
        note(escape(f"nothing to cut: {reason or 'the target asks for none.'} Nothing was written."))
        output = push_to_hub = None
    elif dry_run:
        note("dry run: nothing was written")
        output = push_to_hub = None
    elif tokenizer is None:
        note("[yellow]The model has no tokenizer; none was saved.[/yellow]")
    if output is not None:
        note(f"saved in {escape(str(output))}")
    if push_to_hub is not None:
        with progress_bar() as progress:
            progress.add_task(f"pushing to {escape(push_to_hub)}", total=None)
            push_to_hub = publish(slim, push_to_hub, tokenizer=tokenizer, private=private or None)
        note(f"pushed to {escape(push_to_hub)}")
    if not as_json:  # once all is done: whoever reads it may have left
        Console().print(report)
    else:
        where = {"saved_in": str(output) if output is not None else None, "pushed_to": push_to_hub}
        typer.echo(json.dumps(report.to_dict() | where, indent=2))
    if nothing_cut:
        raise typer.Exit(3)
