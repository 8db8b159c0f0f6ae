"""A healed model is nearer to the full one, only what was cut was trained, and the weights that are kept are the best."""

from __future__ import annotations

import copy
import gc
import json
from dataclasses import replace
from typing import Any

import pytest
import torch

from hf_compressm import CompressionReport, CompreSSMConfig, compress_, get_report, measure
from hf_compressm.cutting.divergence import Divergence
from hf_compressm.cutting.progress import listening
from hf_compressm.data.healing import HealingText
from hf_compressm.healing import heal
from hf_compressm.healing.full import FullModel
from hf_compressm.healing.optimizer import MasterAdamW
from hf_compressm.healing.rate import NOISE, learning_rate
from hf_compressm.healing.trainer import HealingTrainer
from hf_compressm.layers import find_layers
from tests.conftest import tiny_mamba, tiny_mamba2
from tests.layers.models import TYPES, build, tokens

# Of three tokens only, so that some hundreds of them tell much about the others.
IDS = torch.randint(0, 3, (48, 24), generator=torch.Generator().manual_seed(1))
SYSTEM = {
    "mamba": ("A_log", "D", "x_proj.weight", "dt_proj.weight", "dt_proj.bias"),
    "mamba2": ("A_log", "D", "dt_bias", "in_proj.weight", "conv1d.weight", "conv1d.bias", "BC_projection"),
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(heal, "STEP_TOKENS", 200)
    monkeypatch.setattr(gc, "collect", lambda *generation: 0)  # which a Trainer does twice


def mean_divergence(full: Any, slim: Any, ids: torch.Tensor) -> float:
    """Of the next-token distributions in float64, one sequence after another."""
    with torch.no_grad():
        pairs = [[model(row[None]).logits.double().log_softmax(-1) for model in (full, slim)] for row in ids]
    return float(torch.stack([(p.exp() * (p - q)).sum(-1).mean() for p, q in pairs]).mean())


def cut_alone(model: Any, config: CompreSSMConfig) -> tuple[CompressionReport, torch.Tensor]:
    """The cut that is healed, without the healing; and what is held out."""
    measurement = measure(model, HealingText(IDS, model, None, config.heal).measured, config)
    report = measurement.plan(replace(config, heal=0)).apply_(model)
    return report, torch.cat([batch["input_ids"] for batch in measurement.held_out])


CUTS = {
    "mamba": (tiny_mamba, {"state_size": 2, "refit": 0}),
    "mamba2, projected": (tiny_mamba2, {"state_size": {0: 1}}),
    "mamba2, by head": (tiny_mamba2, {"state_size": 2, "realization": "project_heads"}),
    "mamba2, selected": (lambda: tiny_mamba2(groups=2), {"state_size": 4, "realization": "select", "refit": 0}),
    "all": (tiny_mamba, {"state_size": 2, "refit": 0, "heal_parameters": "all"}),
}


@pytest.mark.parametrize("name", CUTS)
def test_healing_brings_the_predictions_nearer_and_trains_what_was_cut(name):
    make, options = CUTS[name]
    model, cut = make(), make()
    full = copy.deepcopy(model)
    config = CompreSSMConfig(**options, heal=2400)
    plain, held_out = cut_alone(cut, config)
    report = compress_(model, config, IDS)
    healing = report.healing
    assert report.sizes == plain.sizes
    assert 2200 < healing.tokens < 2600
    assert healing.after < 0.98 * healing.before
    assert healing.held_out_tokens == held_out.numel()
    assert healing.before == pytest.approx(mean_divergence(full, cut, held_out), rel=1e-3)
    assert healing.after == pytest.approx(mean_divergence(full, model, held_out), rel=1e-3)

    before = dict(cut.named_parameters())
    changed = {key for key, parameter in model.named_parameters() if not torch.equal(parameter, before[key])}
    expected = set(before)
    if name != "all":
        mixers = [f"backbone.layers.{row.index}.mixer" for row in report.layers if row.new_size < row.old_size]
        named = {f"{mixer}.{parameter}" for mixer in mixers for parameter in SYSTEM[model.config.model_type]}
        expected = named & set(before)
    assert changed == expected


@pytest.mark.parametrize("model_type", TYPES)
def test_every_architecture_learns_from_the_full_model(model_type):
    """Which gives its old predictions bit for bit, once the model was cut and everything in its mixers was changed."""
    model, ids = build(model_type), tokens(8, 16)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    expected = model(**batch, use_cache=False).logits.float().log_softmax(-1)
    changed = {layer.name: {*layer.system_parameters(), *layer.changed_by_a_cut()} for layer in find_layers(model)}
    full = FullModel(model, changed)
    for mixer, names in changed.items():  # only these are there twice
        copies = dict(full.mixers[mixer].named_parameters())
        assert {name for name in copies if copies[name] is not model.get_parameter(f"{mixer}.{name}")} == names
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    report = compress_(model, CompreSSMConfig(state_size=8, realization="select", refit=0, heal=300), ids)
    assert report.healing.after <= report.healing.before
    after = dict(model.named_parameters())
    mixers = {f"{mixer}.{name}" for mixer, names in changed.items() for name in names}
    assert all(torch.equal(after[name], before[name]) for name in before if name not in mixers)
    with torch.no_grad():
        for name in mixers:
            model.get_parameter(name).add_(0.3)
    assert torch.equal(full(batch), expected)
    assert not torch.allclose(model(**batch, use_cache=False).logits.float().log_softmax(-1), expected, atol=1e-2)


def script(monkeypatch, divergences: list[Any], seen: list[dict[str, torch.Tensor]]) -> None:
    """Let held-out text give these divergences, or raise; and keep the weights that it was asked for."""
    left = iter(divergences)

    def measured(self: Divergence) -> float:
        seen.append({name: parameter.detach().clone() for name, parameter in self.model.named_parameters()})
        value = next(left)
        if isinstance(value, type):
            raise value
        return value

    monkeypatch.setattr(Divergence, "__call__", measured)
    monkeypatch.setattr(heal, "learning_rate", lambda *args: 1e-3)


def weights(model: Any) -> dict[str, torch.Tensor]:
    return {name: parameter.detach() for name, parameter in model.named_parameters()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())


QUICK = CompreSSMConfig(state_size=4, refit=0, heal=2000)


def test_the_best_weights_are_put_back_and_a_rise_ends_it(mamba2, monkeypatch):
    seen: list[dict[str, torch.Tensor]] = []
    script(monkeypatch, [5.0, 6.0, 3.0, 4.0, 3.5, *range(4, 30)], seen)
    report = compress_(mamba2, QUICK, IDS)
    assert (report.healing.before, report.healing.after) == (5.0, 3.0)
    assert same(weights(mamba2), seen[2])
    assert not same(seen[1], seen[2])
    assert len(seen) == 10  # five rises from 3.5 on


@pytest.mark.parametrize("rate", [1.0, float("inf")], ids=["worse", "not finite"])
def test_healing_that_gains_nothing_leaves_the_cut(mamba2, monkeypatch, caplog, rate):
    cut, full = copy.deepcopy(mamba2), copy.deepcopy(mamba2)
    _, held_out = cut_alone(cut, QUICK)
    stock, seen = Divergence.__call__, []
    monkeypatch.setattr(Divergence, "__call__", lambda self: seen.append(stock(self)) or seen[-1])
    monkeypatch.setattr(heal, "learning_rate", lambda *args: rate)
    with caplog.at_level("WARNING"):
        report = compress_(mamba2, QUICK, IDS)
    assert [value == float("inf") for value in seen] == [False] + [rate == float("inf")] * (len(seen) - 1)
    assert report.healing.before == report.healing.after == min(seen)
    assert report.healing.before == pytest.approx(mean_divergence(full, cut, held_out), rel=1e-3)
    assert same(weights(mamba2), weights(cut))
    assert "gained nothing" in caplog.text


def test_an_interrupt_leaves_the_best_so_far_of_a_valid_cut(mamba, monkeypatch, tmp_path):
    seen: list[dict[str, torch.Tensor]] = []
    script(monkeypatch, [5.0, 4.0, 6.0, KeyboardInterrupt], seen)
    optimizer = torch.optim.AdamW(mamba.parameters())
    parameters = list(mamba.parameters())
    with pytest.raises(KeyboardInterrupt):
        compress_(mamba, QUICK, IDS, optimizer=optimizer)
    assert same(weights(mamba), seen[1])
    assert mamba.config.state_size == 4
    assert get_report(mamba).healing.after == 4.0
    assert all(one is other for one, other in zip(mamba.parameters(), parameters, strict=True))
    mamba.save_pretrained(tmp_path)
    reloaded = type(mamba).from_pretrained(tmp_path)
    torch.testing.assert_close(reloaded(IDS).logits, mamba(IDS).logits)
    mamba(IDS, labels=IDS).loss.backward()
    optimizer.step()


def test_an_interrupt_before_the_first_look_leaves_the_cut(mamba, monkeypatch):
    cut = copy.deepcopy(mamba)
    cut_alone(cut, QUICK)
    script(monkeypatch, [KeyboardInterrupt], [])
    with pytest.raises(KeyboardInterrupt):
        compress_(mamba, QUICK, IDS)
    assert same(weights(mamba), weights(cut))
    assert get_report(mamba).healing is None


def test_the_report_goes_with_the_model(mamba, tmp_path):
    told: list[tuple[str, int, int]] = []
    with listening(lambda *step: told.append(step)):
        report = compress_(mamba, QUICK, IDS)
    bar = [step[1:] for step in told if step[0] == "healing"]
    assert bar == [(done, 10) for done in range(11)]  # steps of eight sequences of 24 tokens
    mamba.save_pretrained(tmp_path)
    assert get_report(tmp_path) == report == mamba.compression_report
    record = json.loads((tmp_path / "compressm.json").read_text("utf-8"))["cuts"]
    assert len(record) == 1
    assert record[0]["config"]["heal"] == 2000
    assert CompreSSMConfig.of(record[0]["config"]) == QUICK
    card = (tmp_path / "README.md").read_text("utf-8")
    assert f"on {report.healing.tokens:,} tokens" in card
    assert f"{report.healing.before:.4f} to {report.healing.after:.4f}" in card
    assert f"healed in {report.healing.seconds:,.0f} s on {report.healing.tokens:,} tokens" in str(report)


@torch.no_grad()
def test_it_learns_where_no_gradients_are_wanted(mamba):
    report = compress_(mamba, CompreSSMConfig(state_size=2, refit=0, heal=1000), IDS)
    assert report.healing.after < report.healing.before
    assert not torch.is_grad_enabled()


def test_rows_without_a_token_teach_nothing(mamba, monkeypatch):
    stock, seen = Divergence.__call__, []
    monkeypatch.setattr(Divergence, "__call__", lambda self: seen.append(stock(self)) or seen[-1])
    monkeypatch.setattr(heal, "CLASSES", 1)  # one by one
    mask = torch.ones_like(IDS)
    mask[::4] = 0  # none of those that are held out
    config = CompreSSMConfig(state_size=2, refit=0, heal=1000)
    report = compress_(mamba, config, {"input_ids": IDS, "attention_mask": mask})
    assert report.healing.after < report.healing.before
    assert max(seen) < float("inf")


def test_steps_of_several_parts_are_the_same_steps(monkeypatch):
    """The gradients of the parts are added up before a step is taken."""
    stock, parts = HealingTrainer.compute_loss, [[], []]
    models = [tiny_mamba2(), tiny_mamba2()]
    for model, its_parts, most in zip(models, parts, (8, 2), strict=True):

        def compute_loss(
            self: Any, model: Any, inputs: Any, *args: Any, its_parts: Any = its_parts, **kwargs: Any
        ) -> Any:
            its_parts.append(len(inputs["input_ids"]))
            return stock(self, model, inputs, *args, **kwargs)

        monkeypatch.setattr(heal, "CLASSES", most * 24 * 61)
        monkeypatch.setattr(HealingTrainer, "compute_loss", compute_loss)
        script(monkeypatch, [3.0, 2.0, 1.0], [])
        compress_(model, replace(QUICK, heal=400), IDS)
    assert parts == [[8, 8], [2] * 8]
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0, msg=name)


def test_the_learning_rate_is_where_its_noise_costs_a_share_of_the_cut(mamba2):
    """Whatever the size of the cut's cost: ten thousand times that gives a hundred times the rate."""
    model = copy.deepcopy(mamba2)
    batch = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    distance = Divergence(model, [batch])
    before, parameters = copy.deepcopy(model.state_dict()), list(model.backbone.layers.parameters())
    rates = [learning_rate(parameters, lambda cost=cost: cost + distance()) for cost in (1e-6, 1e-4, 1e-2)]
    assert same(model.state_dict(), before)
    assert rates[1] / rates[0] == pytest.approx(10, rel=0.2)
    assert rates[2] / rates[1] == pytest.approx(10, rel=0.2)
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(rates[2] * torch.randn_like(parameter))
    assert distance() == pytest.approx(1e-2 * NOISE, rel=0.5)


def test_activations_may_be_computed_again(monkeypatch):
    models, calls = [tiny_mamba2(), tiny_mamba2()], [[], []]
    for model, its_calls, large in zip(models, calls, (2**28, 1), strict=True):
        monkeypatch.setattr(heal, "LARGE", large)
        script(monkeypatch, [3.0, 2.0, 1.0], [])
        handle = model.backbone.layers[0].norm.register_forward_hook(
            lambda *args, its_calls=its_calls: its_calls.append(1)
        )
        compress_(model, replace(QUICK, heal=400), IDS)
        handle.remove()
        assert model.backbone.layers[0].gradient_checkpointing is False
    assert len(calls[1]) - len(calls[0]) == 2  # in each step once more
    for (name, one), other in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=0, msg=name)


def test_small_steps_of_bfloat16_parameters_add_up():
    plain, parameter = (torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16)) for _ in range(2))
    for optimizer in (torch.optim.AdamW([plain], lr=1e-3), MasterAdamW([parameter], lr=1e-3)):
        for _ in range(100):
            for one in (plain, parameter):
                one.grad = torch.full_like(one, 0.5)
            optimizer.step()
    assert torch.equal(plain, torch.ones_like(plain))
    torch.testing.assert_close(parameter, torch.full_like(parameter, 0.9), atol=0.005, rtol=0)
