"""What a card says, and what it leaves alone."""

from __future__ import annotations

import gc
import logging
import weakref
from dataclasses import replace

import pytest
from huggingface_hub import ModelCard, ModelCardData

from hf_compressm import CompreSSMConfig, compress_
from hf_compressm.reporting.card import base_model, model_card, write_model_card
from hf_compressm.reporting.record import set_report_
from hf_compressm.reporting.rows import Perplexity
from tests.conftest import tiny_mamba, tiny_mamba2


@pytest.fixture
def slim(mamba, token_ids):
    compress_(mamba, CompreSSMConfig(state_size={0: 3}), token_ids)
    return mamba


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("state-spaces/mamba-130m", "state-spaces/mamba-130m"),
        ("/home/someone/secret", None),
        ("./checkpoint", None),
        ("", None),
        ("gpt2", None),
    ],
)
def test_base_models_are_names_on_the_hub(mamba, name, expected):
    mamba.config.name_or_path = name
    assert base_model(mamba) == expected


def test_a_folder_is_no_base_model(mamba, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "out" / "slim").mkdir(parents=True)
    mamba.config.name_or_path = "out/slim"
    assert base_model(mamba) is None


def test_a_card_names_its_base_and_tokenizer(slim):
    slim.config.name_or_path = "state-spaces/mamba-130m"
    card = model_card(slim, "me/slim")
    assert card.data.base_model == "state-spaces/mamba-130m"
    assert "EleutherAI/gpt-neox-20b" in card.text
    assert "| 0 | 8 | 3 |" in card.text
    assert "| 1 | 8 | 8 |" in card.text


def test_uniform_models_need_no_trust(mamba, token_ids):
    compress_(mamba, CompreSSMConfig(state_size=3), token_ids)
    assert "trust_remote_code" not in str(model_card(mamba))


def test_projected_models(token_ids):
    model = tiny_mamba2()
    compress_(model, CompreSSMConfig(state_size=4), token_ids)
    card = str(model_card(model))
    assert "projected" in card
    assert "trust_remote_code" in card


def test_a_readme_that_is_no_card_is_left_alone(slim, tmp_path):
    (tmp_path / "README.md").write_text("# My project\n")
    slim.save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_text() == "# My project\n"


def test_the_section_is_replaced(slim, tmp_path, token_ids):
    slim.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    path.write_text(path.read_text() + "\nMine.\n")
    compress_(slim, CompreSSMConfig(state_size={1: 2}), token_ids)
    slim.save_pretrained(tmp_path)
    text = path.read_text()
    assert "| 1 | 8 | 2 |" in text
    assert text.count("### Citation") == text.count("Mine.") == 1


@pytest.mark.parametrize("theirs", [{"license": "mit", "tags": ["mine"], "base_model": "a/b"}, {}])
def test_what_a_cut_brought_to_a_card_goes_with_it(theirs, tmp_path, mamba, token_ids):
    """Where an uncut model is saved over it: text and metadata are theirs again, however often ours was written."""
    path = tmp_path / "README.md"
    if theirs:
        path.write_text(str(ModelCard(f"---\n{ModelCardData(**theirs).to_yaml()}\n---\n\n# Mine\n")))
    compress_(mamba, CompreSSMConfig(state_size=4, refit=0), token_ids)
    measured = Perplexity(before=3.0, after=4.0, data="a -> b --> c")
    set_report_(mamba, replace(mamba.compression_report, perplexity=measured))
    for base in ("me/first", "me/second"):
        mamba.compression_history = tuple(replace(cut, base=base) for cut in mamba.compression_history)
        mamba.save_pretrained(tmp_path)
        data = ModelCard.load(path).data
        assert data.base_model == theirs.get("base_model", base)
        assert {"compressm", *theirs.get("tags", [])} <= set(data.tags)
        assert data.eval_results[0].metric_type == "perplexity"
    changed = ModelCard.load(path)
    changed.data.pipeline_tag = "feature-extraction"  # theirs from now on
    path.write_text(f"{changed}\nMine.\n")
    tiny_mamba().save_pretrained(tmp_path)
    card = ModelCard.load(path)
    assert card.data.to_dict() == theirs | {"pipeline_tag": "feature-extraction"}
    assert "Mine." in card.text
    assert "compressm" not in str(card)


def test_no_card_without_a_cut(tmp_path):
    with pytest.raises(ValueError, match="not cut"):
        model_card(tiny_mamba())
    write_model_card(tiny_mamba(), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_readme_that_can_not_be_read_is_named(tmp_path, mamba, token_ids):
    compress_(mamba, CompreSSMConfig(state_size=4, refit=0), token_ids)
    (tmp_path / "README.md").write_bytes("caf\u00e9".encode("latin-1"))
    with pytest.raises(ValueError, match=r"README.md is no text in UTF-8"):
        mamba.save_pretrained(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]


@pytest.mark.parametrize(
    "broken", [lambda text: text.encode("latin-1"), lambda text: text.replace("tags:", "tags: [")]
)
def test_a_card_that_can_not_be_read_is_left_alone_by_an_uncut_model(broken, slim, tmp_path, caplog, monkeypatch):
    slim.save_pretrained(tmp_path)
    path = tmp_path / "README.md"
    content = broken(f"{path.read_text()}\ncaf\u00e9\n")
    content = content if isinstance(content, bytes) else content.encode()
    path.write_bytes(content)
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tiny_mamba().save_pretrained(tmp_path)
    assert "README.md tells of a cut" in caplog.text
    assert path.read_bytes() == content
    assert not (tmp_path / "compressm.json").exists()


def test_a_readme_without_a_word_of_ours_is_left_alone_by_an_uncut_model(slim, tmp_path, caplog, monkeypatch):
    slim.save_pretrained(tmp_path)
    (tmp_path / "README.md").write_bytes("caf\u00e9".encode("latin-1"))
    monkeypatch.setattr(logging.getLogger("transformers"), "propagate", True)
    tiny_mamba().save_pretrained(tmp_path)
    assert (tmp_path / "README.md").read_bytes() == "caf\u00e9".encode("latin-1")
    assert not caplog.records


def test_a_saved_model_is_freed_once_nothing_holds_it(tmp_path, token_ids):
    model = tiny_mamba()
    compress_(model, CompreSSMConfig(state_size=3), token_ids)
    gc.collect()
    gc.disable()
    try:
        model.save_pretrained(tmp_path)
        there = weakref.ref(model)
        del model
        assert there() is None
    finally:
        gc.enable()
