"""A config that names an engine gets what that engine runs; README's table is the list of engines in the code.

REWRITE_README=1 python -m pytest tests/layers/test_engines.py writes it anew.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from hf_compressm import CompreSSMConfig, compress_, measure
from hf_compressm.cli import app
from hf_compressm.config import ENGINES
from hf_compressm.layers import Engine, Sizes, find_layers, register_engine
from hf_compressm.modeling.modeling_compressm import ARCHITECTURES
from hf_compressm.training.schedule import attempt_config, check_target, training_config
from tests.conftest import VOCABULARY, tiny_mamba, tiny_mamba2
from tests.layers.lti_mixers import LRU, Net
from tests.layers.models import build

README = Path(__file__).parents[2] / "README.md"
BEGIN, END = "<!-- engines -->\n", "<!-- /engines -->"
NAMES = ["llama.cpp", "llama.cpp-cuda", "mlx", "vllm", "sglang", "tensorrt-llm"]


def table() -> str:
    lines = [
        "| `engine` | checked | Mamba | Mamba-2 | any other size | models it does not know |",
        "|---|---|---|---|---|---|",
    ]
    for engine in ENGINES.values():
        limited = any(sizes != Sizes() for sizes in engine.sizes.values())
        cells = [
            f"`{engine.name}`",
            f"{engine.checked}: {engine.version}",
            *(str(engine.sizes.get(family, "-")) for family in ("Mamba", "Mamba-2")),
            f"{engine.otherwise}" if limited else "",
            ", ".join(f"`{name}`" for name in ARCHITECTURES if name not in engine.model_types),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def test_the_readme_has_the_table():
    text, made = README.read_text(encoding="utf-8"), f"{BEGIN}{table()}{END}"
    if os.environ.get("REWRITE_README"):
        text = re.sub(f"{BEGIN}.*?{END}", lambda _: made, text, flags=re.DOTALL)
        README.write_text(text, encoding="utf-8")
    assert made in text


@pytest.fixture(scope="module")
def measured():
    """Measured once: a model of either family, at sizes that every engine takes."""
    ids = torch.randint(0, VOCABULARY, (4, 40), generator=torch.Generator().manual_seed(1))
    config = CompreSSMConfig(max_divergence=0.5, refit=0, weights="gate", realization="select")
    return {
        name: measure(model, ids, config) for name, model in (("mamba", tiny_mamba(16)), ("mamba2", tiny_mamba2(128)))
    }


@pytest.mark.parametrize("target", [{"max_divergence": 5.0}, {"ratio": 0.6}, {"tolerance": 0.4}], ids=str)
@pytest.mark.parametrize(("name", "model"), [(n, m) for n in NAMES for m in ("mamba", "mamba2")])
def test_sizes_are_those_that_it_runs(measured, name, model, target):
    config = CompreSSMConfig(**target, engine=name, refit=0, weights="gate")
    if model not in ENGINES[name].model_types:
        with pytest.raises(ValueError, match=f"can't run {model} models. Take another engine"):
            measured[model].plan(config)
        return
    takes = ENGINES[name].sizes[{"mamba": "Mamba", "mamba2": "Mamba-2"}[model]]
    if (name, model) == ("llama.cpp-cuda", "mamba"):
        with pytest.raises(ValueError, match=r"has 16 states, and engine='llama\.cpp-cuda' takes none fewer"):
            measured[model].plan(config)
        return
    plan = measured[model].plan(config)
    (size,) = set(plan.report.sizes.values())
    assert size in takes
    assert plan.report.states_after < plan.report.states_before
    assert all(made.stock for made in plan.realizations.values())


def test_the_smallest_of_its_sizes_within_the_budget(measured):
    """A list leaves fewer, so the chosen one is that list's next above what any size would do."""
    free = measured["mamba2"].plan(CompreSSMConfig(tolerance=0.2, uniform=True, refit=0, weights="gate"))
    (wanted,) = set(free.report.sizes.values())
    for name in ("llama.cpp-cuda", "mlx"):
        config = CompreSSMConfig(tolerance=0.2, engine=name, refit=0, weights="gate")
        (size,) = set(measured["mamba2"].plan(config).report.sizes.values())
        takes = ENGINES[name].sizes["Mamba-2"]
        assert size == min(n for n in range(wanted, 129) if n in takes)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": "vllm", "state_size": {0: 8}}, "engine='vllm' takes one state_size for all layers"),
        ({"engine": "mlx", "realization": "project"}, "engine='mlx' asks for a stock checkpoint"),
        ({"engine": "vLLM"}, "engine must be one of transformers, llama.cpp, .*, got 'vLLM'"),
    ],
)
def test_contradictions_are_refused_at_once(values, message):
    with pytest.raises(ValueError, match=message):
        CompreSSMConfig(**values)


def test_the_command_takes_it(tmp_path):
    """It is refused before the model is looked for."""
    result = CliRunner().invoke(app, ["compress", "no-such-model", str(tmp_path / "slim"), "--engine", "vLLM"])
    assert result.exit_code == 1
    assert "engine must be one of transformers, llama.cpp" in " ".join(result.stderr.split())
    assert all(name in " ".join(CliRunner().invoke(app, ["compress", "--help"]).stdout.split()) for name in ENGINES)


def test_a_size_that_it_does_not_take_is_refused_before_anything_is_measured(token_ids):
    model = tiny_mamba2(128)
    with pytest.raises(ValueError, match=r"takes 96, 128, 256 as the state size of a Mamba-2 layer.*instead of 64"):
        compress_(model, CompreSSMConfig(state_size=64, engine="llama.cpp-cuda"), object())
    with pytest.raises(ValueError, match=r"takes none fewer that is a multiple of 40: .*drop multiple_of"):
        compress_(model, CompreSSMConfig(ratio=0.5, engine="llama.cpp-cuda", multiple_of=40), object())
    with pytest.raises(ValueError, match="can't run zamba models"):
        compress_(build("zamba"), CompreSSMConfig(engine="vllm"), object())


def test_the_sizes_of_some_layers_are_those_that_it_takes(monkeypatch, token_ids):
    engine = Engine("mine", "1", "run", {"Mamba": Sizes((6,))}, frozenset({"mamba"}), uniform=False)
    monkeypatch.setitem(ENGINES, "mine", engine)
    for size in (4, {0: 4}, {0: 6, 1: 4}):
        with pytest.raises(ValueError, match=r"takes 6 as the state size of a Mamba layer.*instead of 4"):
            compress_(tiny_mamba(), CompreSSMConfig(engine="mine", state_size=size), object())
    assert compress_(tiny_mamba(), CompreSSMConfig(engine="mine", state_size={1: 6}), token_ids).sizes == {0: 8, 1: 6}


def test_no_other_engine_is_named_where_there_is_none():
    with pytest.raises(ValueError, match=r"can't run LRU models\. Drop engine\.$"):
        compress_(Net(VOCABULARY, 6, lambda: LRU(6, 12)), CompreSSMConfig(engine="vllm", state_size=4))


def test_transformers_takes_every_form():
    config = CompreSSMConfig(engine="transformers", state_size={0: 4})
    assert not config.uniform
    assert CompreSSMConfig(engine="vllm").uniform
    assert CompreSSMConfig(**CompreSSMConfig(engine="vllm").to_dict()) == CompreSSMConfig(engine="vllm")


def test_in_training_the_steps_on_the_way_are_sizes_of_it():
    layers = find_layers(tiny_mamba2(128))
    config = training_config(CompreSSMConfig(state_size=96, engine="llama.cpp-cuda", num_reductions=2))
    check_target(config, layers)
    initial = {layer.index: 128 for layer in layers}
    assert attempt_config(config, 0, initial, layers) is None  # 112 is none
    assert attempt_config(config, 1, initial, layers).state_size == {0: 96, 1: 96}
    with pytest.raises(ValueError, match="can't run mamba models"):
        check_target(training_config(CompreSSMConfig(engine="sglang")), find_layers(tiny_mamba()))


def test_the_report_says_where_a_size_is_slow_or_wrong(measured):
    report = (
        measured["mamba2"].plan(CompreSSMConfig(state_size=72, realization="select", refit=0, weights="gate")).report
    )
    assert [line.split(" takes")[0] for line in report.elsewhere] == ["llama.cpp-cuda", "mlx"]
    assert "note: mlx takes multiples of 32 as state sizes, and any other it decodes" in " ".join(str(report).split())
    assert type(report).from_dict(report.to_dict()) == report
    assert (
        not measured["mamba2"].plan(CompreSSMConfig(state_size=72, refit=0, weights="gate")).report.elsewhere
    )  # projected


def test_an_engine_is_one_registration(monkeypatch, token_ids):
    monkeypatch.setattr("hf_compressm.layers.engines.ENGINES", ENGINES)
    register_engine(Engine("mine", "1", "run", {"Mamba": Sizes((3, 5))}, frozenset({"mamba"})))
    try:
        report = compress_(tiny_mamba(), CompreSSMConfig(tolerance=0.3, engine="mine", refit=0), token_ids)
        assert set(report.sizes.values()) <= {3, 5}
    finally:
        del ENGINES["mine"]
