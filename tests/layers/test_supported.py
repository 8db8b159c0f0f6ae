"""The table of supported models in tests/gpu/README.md is what the test matrix makes of its list of model types.

REWRITE_README=1 python -m pytest tests/layers/test_supported.py writes it anew.
"""

from __future__ import annotations

import inspect
import os
import re
from pathlib import Path

from hf_compressm import CompreSSMConfig
from hf_compressm.layers import Layer, find_layers, realization_of
from hf_compressm.layers.mamba import MambaLayer
from hf_compressm.layers.normalised import NormalisedMambaLayer
from tests.layers import test_matrix
from tests.layers.models import STATE_SIZE_FIELD, TYPES, build

README = Path(__file__).parents[1] / "gpu" / "README.md"
BEGIN, END = "<!-- supported -->\n", "<!-- /supported -->"


def default_cut(layer: Layer) -> str:
    if isinstance(layer, NormalisedMambaLayer):
        return "selection, refit through the norms on B and C"
    if isinstance(layer, MambaLayer):
        return "selection, refit"
    return {"project": "projection"}[realization_of(CompreSSMConfig(), [layer])]


def chosen_for(layer: Layer) -> str:
    if isinstance(layer, MambaLayer):
        return "head" if layer.groups > 1 else "layer"
    return "group of heads"


def supported(full) -> str:
    lines = [
        "| `model_type` | mixer | family | state size in the config | states are chosen per | default cut |",
        "|---|---|---|---|---|---|",
    ]
    for model_type in TYPES:
        layer = find_layers(full(model_type))[0]
        cells = [
            f"`{model_type}`",
            f"`{type(layer.mixer).__name__}`",
            "Mamba-1" if isinstance(layer, MambaLayer) else "Mamba-2",
            f"`{STATE_SIZE_FIELD[model_type]}`",
            chosen_for(layer),
            default_cut(layer),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    checks = [
        name.removeprefix("test_").replace("_", " ")
        for name, function in inspect.getmembers(test_matrix, inspect.isfunction)
        if name.startswith("test_") and "model_type" in inspect.signature(function).parameters
    ]
    return "\n".join([*lines, "", f"Tested for each of them: {'; '.join(checks)}.", ""])


def test_the_readme_lists_what_is_tested():
    text = README.read_text(encoding="utf-8")
    made = f"{BEGIN}{supported(build)}{END}"
    if os.environ.get("REWRITE_README"):
        text = re.sub(f"{BEGIN}.*?{END}", lambda _: made, text, flags=re.DOTALL)
        README.write_text(text, encoding="utf-8")
    assert made in text
