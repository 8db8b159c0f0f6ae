"""A shipped model and slim ones of it, as folders that a client is given: what the client does to the first is its own."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_compressm
from hf_compressm import CompreSSMConfig, compress_pretrained
from hf_compressm.data.texts import CALIBRATION, EVALUATION
from hf_compressm.hub import write_companions

REFERENCE = Path(hf_compressm.__file__).parent / "reference"
FORMS = {
    "mamba": {"slim": {"state_size": 8, "uniform": True}, "mixed": {"state_size": {0: 8, 3: 4}}},
    "mamba2": {
        "slim": {"state_size": 64, "uniform": True},
        "mixed": {"state_size": {0: 64, 3: 32}, "realization": "select"},
        "projected": {"state_size": 32, "realization": "project"},
    },
}


@pytest.fixture(scope="session")
def tokenizer():
    return AutoTokenizer.from_pretrained(REFERENCE / "mamba-small")


@pytest.fixture(scope="session")
def ids(tokenizer) -> torch.Tensor:
    """[1, 256] of the evaluation text."""
    return torch.tensor([tokenizer(EVALUATION.read_text("utf-8")[:2000])["input_ids"][:256]])


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    """From a family and a form ("original", or of `FORMS`) to a folder with the checkpoint, made once."""
    root, text = tmp_path_factory.mktemp("checkpoints"), CALIBRATION.read_text("utf-8")[:8000]
    calibration = torch.tensor(tokenizer(text)["input_ids"][:1024]).view(8, -1)

    def make(family: str, form: str) -> Path:
        target = root / f"{family}-{form}"
        if target.exists():
            return target
        if form == "original":
            shutil.copytree(REFERENCE / f"{family}-small", target)
            return target
        config = CompreSSMConfig(**FORMS[family][form], refit=0)
        model = compress_pretrained(REFERENCE / f"{family}-small", config, calibration_data=calibration)
        model.save_pretrained(target)
        write_companions(model, target, tokenizer)
        return target

    return make


@pytest.fixture(scope="session")
def logits(ids):
    """From a folder to what transformers says of the text, [256, vocabulary]."""

    def of(folder: Path) -> torch.Tensor:
        with torch.no_grad():
            return AutoModelForCausalLM.from_pretrained(folder)(ids).logits[0]

    return of


def perplexity(logits: torch.Tensor, ids: torch.Tensor) -> float:
    return float(torch.nn.functional.cross_entropy(logits[:-1].double(), ids[0, 1:]).exp())
