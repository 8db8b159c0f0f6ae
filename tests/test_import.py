"""Importing the package leaves what is slow to import until it is used."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import json, sys
import torch, transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
before = set(sys.modules)
import hf_compressm
print(json.dumps(sorted(set(sys.modules) - before)))
"""


def test_import_is_lazy():
    result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    packages = {name.partition(".")[0] for name in json.loads(result.stdout.splitlines()[-1])}
    assert "hf_compressm" in packages
    assert not packages & {"datasets", "matplotlib", "scipy", "triton", "rich", "typer", "mamba_ssm", "causal_conv1d"}
