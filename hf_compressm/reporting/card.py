"""The model card of a slimmed model: what was cut, what it cost, how to load it, whom to cite.

The card is a section between two comments, so that a README.md with a text of its own keeps that text. A third tells
what the section brought to the metadata, which goes with it.
"""

from __future__ import annotations

import io
import json
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel
from transformers.utils import logging

from ..data.texts import STATE_SPACES_TOKENIZER as TOKENIZER
from .files import write_files_whole
from .record import RECORD, Cut, base_model, history_of
from .report import CompressionReport

logger = logging.get_logger(__name__)

CARD, FIGURE = "README.md", "spectra.png"
BEGIN, END = "<!-- compressm: this section is written anew at each save -->", "<!-- /compressm -->"
_BROUGHT = re.compile("<!-- compressm metadata: (.*) -->")
TAGS = ["compressm", "model-compression", "state-space-models"]

# In the card that transformers gives a model without one; nothing in it is worth keeping.
_TEMPLATE = (
    "a 🤗 transformers model that has been pushed on the Hub. This model card has been automatically generated."
)

_CITATION = """@inproceedings{chahine2026compressm,
  title = {The Curious Case of In-Training Compression of State Space Models},
  author = {Chahine, Makram and Nazari, Philipp and Rus, Daniela and Rusch, T. Konstantin},
  booktitle = {International Conference on Learning Representations},
  year = {2026},
  eprint = {2510.02823},
  archivePrefix = {arXiv}
}"""


def has_card(model: PreTrainedModel) -> bool:
    """Whether there is something to tell: the model was cut, in this process or before it was saved."""
    return bool(history_of(model))


def model_card(model: PreTrainedModel, repo_id: str | None = None) -> ModelCard:
    """The card of a model that was cut.

    Args:
        model: that was cut, in this process or before it was saved.
        repo_id: the repository that it is for, if known.

    Raises:
        ValueError: if the model was never cut.
    """
    if not has_card(model):
        raise ValueError("The model was not cut, so there is nothing to tell: call compress_ first.")
    return _card(model, repo_id)


def _card(model: PreTrainedModel, repo_id: str | None, old: ModelCard | None = None) -> ModelCard:
    """The card of a model, with the text and metadata of an old one, if there is one."""
    title = (repo_id or "A slim " + model.config.model_type).split("/")[-1]
    card = ModelCard(f"---\n{_data(model, title).to_yaml()}\n---\n\n# {title}\n\n")
    theirs: dict[str, Any] = {}
    if old is not None:
        _take_back_(old)
        theirs = old.data.to_dict()
        _keep_metadata(old, card)
    section = _section(model, repo_id, _brought(card, theirs))
    card.text = _merge(card.text if old is None or _TEMPLATE in old.text else old.text, section)
    return card


def write_model_card(model: PreTrainedModel, folder: str | Path, repo_id: str | None = None) -> None:
    """Write `README.md` and `spectra.png` for a model that was cut; nothing for any other. See `card_files`."""
    write_files_whole(folder, card_files(model, folder, repo_id))


def card_files(model: PreTrainedModel, folder: str | Path, repo_id: str | None = None) -> dict[str, bytes]:
    """`README.md` and `spectra.png` of a model that was cut, by their names; nothing for any other.

    A card that is in the folder already keeps its text and metadata, but for what an earlier save brought, and the section is
    put in its place or at the end. A README.md without metadata is no model card and stays as it is.

    Args:
        model: that was cut, or not.
        folder: where the model is, or is to be, saved.
        repo_id: the repository that it is for, if known.

    Raises:
        ValueError: if there is a README.md that can't be read.
    """
    history = history_of(model)
    if not history:
        return {}
    path = Path(folder) / CARD
    try:
        old = _read(path) if path.exists() else None
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is no text in UTF-8 ({error}), so that the model card can't go there: convert it, or save to another folder. "
            "Nothing was written."
        ) from error
    if old is not None and not old.data.to_dict():
        return {}
    return {CARD: str(_card(model, repo_id, old)).encode(), FIGURE: _drawn(history[-1].report)}


def _drawn(report: CompressionReport) -> bytes:
    """The figure, as a PNG.

    By a thread of its own: matplotlib's parser leaves exceptions in cycles with their frames and those of all callers. Of these one
    holds the model that is saved, which would stay, on a GPU too, until Python happens to collect.
    """

    def draw() -> bytes:
        figure = io.BytesIO()
        report.plot().savefig(figure, dpi=150)
        return figure.getvalue()

    with ThreadPoolExecutor(1) as thread:
        return thread.submit(draw).result()


def without_section(folder: str | Path) -> dict[str, bytes]:
    """The README.md in a folder without what it says of a cut, by its name.

    It is empty if nothing else was in it; nothing if it says nothing of one, or can't be read, of which a warning tells.
    """
    path = Path(folder) / CARD
    if not path.is_file() or BEGIN.encode() not in (content := path.read_bytes()) or END.encode() not in content:
        return {}
    try:
        card = _read(path)
    except Exception as error:  # no UTF-8, or no YAML, whose errors are those of a library that is not asked for here
        logger.warning(
            f"hf_compressm: {path} tells of a cut of the model that was here before, and stays as it is, since it can't be read "
            f"({error}): delete what is not true any more."
        )
        return {}
    _take_back_(card)
    card.text = _merge(card.text, "")
    if card.data.to_dict():
        return {CARD: str(card).encode()}
    its_own = re.sub(r"\A# .*", "", card.text.strip())  # but for a title
    return {CARD: card.text.lstrip().encode() if its_own else b""}


def _read(path: Path) -> ModelCard:
    return ModelCard(path.read_text(encoding="utf-8"), ignore_metadata_errors=True)


def _keep_metadata(old: Any, card: Any) -> None:
    """Of the old card, in the new one. In place."""
    if _TEMPLATE not in old.text and old.data.eval_results:  # its own, or the trainer's
        card.data.eval_results, card.data.model_name = old.data.eval_results, old.data.model_name
    for name, value in old.data.to_dict().items():
        if name not in ("tags", "model-index") and value not in (None, [], ""):
            card.data[name] = value
    card.data.tags = list(dict.fromkeys([*(old.data.tags or []), *card.data.tags]))


def _brought(card: Any, theirs: dict[str, Any]) -> dict[str, Any]:
    """The metadata of a card that is not theirs; of the tags, those that are not."""
    brought = {name: value for name, value in card.data.to_dict().items() if value != theirs.get(name)}
    return brought | {"tags": [tag for tag in card.data.tags if tag not in (theirs.get("tags") or [])]}


def _take_back_(card: Any) -> None:
    """Off a card's metadata what its section brought, unless somebody has changed it since. In place."""
    found = _BROUGHT.search(card.text)
    if found is None:
        return
    there = card.data.to_dict()
    for name, value in json.loads(found[1]).items():
        if name == "tags":
            card.data.tags = [tag for tag in there.get(name) or [] if tag not in value] or None
        elif there.get(name) == value:
            for attribute in ("eval_results", "model_name") if name == "model-index" else (name,):
                card.data[attribute] = None


def _merge(text: str, section: str) -> str:
    if BEGIN in text and END in text:
        return text[: text.index(BEGIN)] + section + text[text.index(END) + len(END) :]
    return f"\n{text.strip()}\n\n{section}\n"


def _data(model: PreTrainedModel, title: str) -> ModelCardData:
    history = history_of(model)
    report, results = history[-1].report, None
    if report.perplexity is not None:
        results = [
            EvalResult(
                task_type="text-generation",
                dataset_type="text",
                dataset_name=report.perplexity.data,
                metric_type="perplexity",
                metric_value=round(report.perplexity.after, 4),
            )
        ]
    return ModelCardData(
        base_model=_base(model, history),
        library_name="transformers",
        pipeline_tag="text-generation" if model.can_generate() else None,
        tags=[*TAGS, model.config.model_type],
        model_name=title,
        eval_results=results,
    )


def _base(model: PreTrainedModel, history: Sequence[Cut]) -> str | None:
    """The repository that the model came from, before its first cut if that is known."""
    return history[0].base or base_model(model)


def _section(model: PreTrainedModel, repo_id: str | None, brought: dict[str, Any]) -> str:
    history = history_of(model)
    report, base = history[-1].report, _base(model, history)
    origin = f"[{base}](https://huggingface.co/{base})" if base else f"A {model.config.model_type} model"
    how = {
        "select": "some of the states were kept",
        "project": "the states were projected to fewer ones",
        "balance": "by balanced truncation",
        "project_heads": "the states of each head were projected to fewer ones, sizes are means over heads",
    }.get(report.realization, report.realization)
    parts = [
        BEGIN,
        f"<!-- compressm metadata: {_in_comment(brought)} -->",
        "## A smaller state",
        f"{origin} with **{report.states_after:,} of {history[0].report.states_before:,} SSM states** ({how}), chosen by their Hankel "
        "singular values with hf_compressm, after CompreSSM ([arXiv 2510.02823](https://arxiv.org/abs/2510.02823)).",
        _totals(report),
        *_healing(report),
        *_earlier(history),
        f"![Hankel singular values of every layer]({FIGURE})",
        "Each line is a layer: how much each of its states matters to its output, from the most to the least, before the "
        "cut. Dots show where it was cut.",
        f"<details><summary>Every layer{', at the last cut' if history[1:] else ''}</summary>\n",
        _layers(report),
        "</details>\n",
        "### How to load it",
        _how_to_load(model, base, repo_id or "PATH_OR_NAME"),
        "### Citation",
        f"```bibtex\n{_CITATION}\n```",
        END,
    ]
    return "\n\n".join(parts)


def _in_comment(values: dict[str, Any]) -> str:
    return json.dumps(values).replace(">", r"\u003e")  # by which it might end


def _healing(report: CompressionReport) -> list[str]:
    healing = report.healing
    if healing is None:
        return []
    what = "all parameters" if healing.parameters == "all" else "what the cut changed"
    return [
        f"After the cut {what} was trained to predict as the full model does, on {healing.tokens:,} tokens in "
        f"{healing.seconds:,.0f} s: on held-out text the divergence from it went from {healing.before:.4f} to "
        f"{healing.after:.4f} nats per token."
    ]


def _earlier(history: Sequence[Cut]) -> list[str]:
    if len(history) == 1:
        return []
    states = " -> ".join(f"{cut.report.states_before:,}" for cut in history)
    return [
        f"It was cut {len(history)} times, with {states} -> {history[-1].report.states_after:,} SSM states: `{RECORD}`."
    ]


def _totals(report: CompressionReport) -> str:
    rows = [
        "| | before | after |",
        "|---|---|---|",
        f"| SSM states, all layers | {report.states_before:,} | {report.states_after:,} |",
        f"| recurrent state per sequence (fp32) | {report.state_bytes_before / 1024:,.0f} KiB | "
        f"{report.state_bytes_after / 1024:,.0f} KiB |",
        f"| parameters | {report.parameters_before:,} | {report.parameters_after:,} |",
    ]
    if report.perplexity is None:
        return "\n".join(rows)
    rows.append(f"| perplexity | {report.perplexity.before:.2f} | {report.perplexity.after:.2f} |")
    return "\n".join(rows) + f"\n\nPerplexity right before and right after the cut, on {report.perplexity.data}."


def _layers(report: CompressionReport) -> str:
    rows = [
        "| layer | states before | after | Hankel energy kept | output lost |",
        "|---|---|---|---|---|",
    ]
    rows += [
        f"| {row.index} | {row.old_size} | {row.new_size} | {row.energy_kept:.2%} | {row.output_error:.2%} |"
        for row in report.layers
    ]
    where = "text that nothing was fitted to" if report.held_out_tokens else "the calibration data"
    note = f"Output lost: the share of the layer's output energy that the cut takes away on {where}."
    return "\n".join(rows) + f"\n\n{note}"


def _how_to_load(model: PreTrainedModel, base: str | None, name: str) -> str:
    load = f'model = AutoModelForCausalLM.from_pretrained("{name}")'
    first = "from transformers import AutoModelForCausalLM\n\n"
    if model.config.is_heterogeneous:
        trusted = load.replace(")", ", trust_remote_code=True)")
        text = (
            "Its layers differ from the stock ones, so either let hf_compressm teach transformers about them, or trust "
            f"the code file in this repository:\n\n```python\nimport hf_compressm\n{first}{load}\n```\n\n"
            f"```python\n{first}{trusted}\n```"
        )
    else:
        text = f"All layers have one size, so that it is a stock checkpoint:\n\n```python\n{first}{load}\n```"
    if base is not None and base.startswith("state-spaces/"):
        text += f"\n\nThe tokenizer is that of [{TOKENIZER}](https://huggingface.co/{TOKENIZER})."
    return text
