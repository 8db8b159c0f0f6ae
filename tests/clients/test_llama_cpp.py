"""Checkpoints that llama.cpp's own converter converts, and that it then runs on a CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.clients.conftest import perplexity

llama_cpp = pytest.importorskip("llama_cpp")
SOURCE = os.environ.get("LLAMA_CPP", "")
pytestmark = [
    pytest.mark.clients,
    pytest.mark.skipif(not Path(SOURCE, "convert_hf_to_gguf.py").is_file(), reason="LLAMA_CPP names no source of it"),
]

# It knows tokenizers by a hash, and not the shipped one; the test gives it token ids.
CONVERT = """
import runpy, sys
sys.path.insert(0, sys.argv[1])
import conversion.base
conversion.base.TextModel.get_vocab_base_pre = lambda *_: "gpt-2"
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0] + "/convert_hf_to_gguf.py", run_name="__main__")
"""


def convert(folder: Path, to: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", CONVERT, SOURCE, str(folder), "--outfile", str(to), "--outtype", "f32"]
    return subprocess.run(command, capture_output=True, text=True)


def run(path: Path, ids: torch.Tensor, together: int) -> torch.Tensor:
    """Its logits, some tokens at a time."""
    model = llama_cpp.Llama(str(path), n_ctx=len(ids[0]), logits_all=True, verbose=False, n_threads=1)
    for part in ids[0].split(together):
        model.eval(part.tolist())
    return torch.from_numpy(np.array(model.scores[: len(ids[0])]))


@pytest.mark.parametrize("form", ["original", "slim"])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
def test_it_says_what_transformers_says(folder, logits, ids, tmp_path, family, form):
    result = convert(folder(family, form), tmp_path / "model.gguf")
    assert result.returncode == 0, result.stderr
    expected = logits(folder(family, form))
    read, decoded = run(tmp_path / "model.gguf", ids, len(ids[0])), run(tmp_path / "model.gguf", ids, 1)
    for found in (read, decoded):
        assert float((found - expected).norm() / expected.norm()) < 1e-3
        assert f"{perplexity(found, ids):.3g}" == f"{perplexity(expected, ids):.3g}"
    print(f"\n{family} {form}: {perplexity(expected, ids):.4f}, llama.cpp {perplexity(read, ids):.4f}, "
          f"decoding {perplexity(decoded, ids):.4f}")  # fmt: skip


@pytest.mark.parametrize(("family", "form"), [("mamba", "mixed"), ("mamba2", "mixed"), ("mamba2", "projected")])
def test_its_converter_refuses_what_it_can_not_run(folder, tmp_path, family, form):
    result = convert(folder(family, form), tmp_path / "model.gguf")
    assert result.returncode != 0
    assert "BC_projection" in result.stderr if form == "projected" else "struct.error" in result.stderr
