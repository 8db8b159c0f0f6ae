"""Importing the package is quick, and leaves what is slow to import until it is used."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import json, sys, time
import torch, transformers
from transformers import AutoModelForCausalLM, PreTrainedModel, TrainerCallback
before = set(sys.modules)
start = time.process_time()
import hf_compressm
print(json.dumps([time.process_time() - start, sorted(set(sys.modules) - before)]))
"""


def test_import_is_quick_and_lazy():
    seconds = []
    for _ in range(2):  # the first run may have to compile the files
        result = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
        spent, modules = json.loads(result.stdout.splitlines()[-1])
        seconds.append(spent)
    assert min(seconds) < 0.3
    packages = {name.partition(".")[0] for name in modules}
    assert "hf_compressm" in packages
    assert not packages & {"datasets", "matplotlib", "scipy", "triton", "rich", "typer", "mamba_ssm", "causal_conv1d"}
