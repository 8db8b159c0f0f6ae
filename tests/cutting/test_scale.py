"""Memory that a cut takes beside the model is bounded, and what lies beyond a bound changes no result."""

from __future__ import annotations

import copy
import itertools
import weakref
from typing import Any

import pytest
import torch
from torch import nn

from hf_compressm import CompreSSMConfig, compress_, measure
from hf_compressm.cutting import divergence as divergence_module
from hf_compressm.cutting import measuring, observing, trials
from hf_compressm.cutting.divergence import Divergence
from hf_compressm.cutting.inputs import Inputs
from hf_compressm.cutting.measuring import empty_statistics
from hf_compressm.cutting.observing import observe_by_loss
from hf_compressm.cutting.progress import listening
from hf_compressm.cutting.snapshot import Snapshot
from hf_compressm.cutting.trials import cut_for_a_while
from hf_compressm.data import calibration
from hf_compressm.hankel import budgets, factorisations
from hf_compressm.layers import find_layers
from tests.conftest import VOCABULARY, tiny_mamba, tiny_mamba2
from tests.layers.models import build

IDS = torch.randint(0, VOCABULARY, (8, 24), generator=torch.Generator().manual_seed(2))
LINALG = "eigh eigvalsh eig svd svdvals qr cholesky cholesky_ex lstsq solve solve_ex inv inv_ex pinv lu lu_factor ldl_factor"
FACTORISATIONS = [(torch.linalg, name) for name in LINALG.split()] + [(torch, "cholesky_inverse")]
MODELS: dict[str, Any] = {
    "mamba": lambda: tiny_mamba(layers=3),
    "mamba2": lambda: tiny_mamba2(layers=3, groups=2),
    "falcon_mamba": lambda: build("falcon_mamba"),
    "zamba": lambda: build("zamba"),
}


@pytest.mark.parametrize(
    ("name", "options"),
    [("mamba", {}), ("mamba2", {}), ("mamba2", {"realization": "select"}), ("falcon_mamba", {}), ("zamba", {})],
)
def test_no_factorisation_gets_more_than_its_part(monkeypatch, name, options):
    """Of models with more layers x channels than fit in one."""
    most: dict[str, int] = {}

    def recording(name: str, factorise: Any) -> Any:
        def recorded(X, *args, **kwargs):
            most[name] = max(most.get(name, 0), X.shape[:-2].numel())
            return factorise(X, *args, **kwargs)

        return recorded

    monkeypatch.setattr(factorisations, "TOGETHER", 5)
    for owner, function in FACTORISATIONS:
        monkeypatch.setattr(owner, function, recording(function, getattr(owner, function)))
    model = MODELS[name]()
    layers = find_layers(model)
    assert sum(layer.channels for layer in layers) > 5
    measurement = measure(model, IDS, CompreSSMConfig(max_divergence=0.05, **options))
    measurement.report()
    measurement.plan(CompreSSMConfig(ratio=0.5, **options))
    assert max(most.values()) == 5, most
    assert name == "mamba2" or {"eigh", "svdvals", "cholesky_ex", "solve_ex", "cholesky_inverse"} <= set(most)


@pytest.mark.parametrize(("n", "together"), [(3, 1024), (16, 1024), (32, 256), (100, 26), (1000, 1)])
def test_a_part_holds_fewer_matrices_the_larger_they_are(n, together):
    taken = []
    X = torch.empty(1, 1, 1).expand(2, 600, n * n).unflatten(2, (n, n))  # takes no memory

    def factorise(part):
        taken.append(len(part) if part.dim() == 3 else part.shape[:-2].numel())
        return (part[..., :1, :1],)

    assert factorisations.in_parts(factorise, X)[0].shape == (2, 600, 1, 1)
    assert max(taken) == min(together, 1200)
    assert sum(taken) == 1200


@pytest.mark.parametrize("shape", [(3, 2), (5,), ()])
def test_large_matrices_are_factorised_on_threads(monkeypatch, shape):
    X = torch.randn(*shape, 40, 40, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(factorisations, "_is_large", lambda X: True)
    U, sigma, Vh = factorisations.svd(X)
    torch.testing.assert_close(U * sigma[..., None, :] @ Vh, X)
    values, vectors = factorisations.eigh(X + X.mT)
    torch.testing.assert_close(vectors * values[..., None, :] @ vectors.mT, X + X.mT)
    torch.testing.assert_close(values, torch.linalg.eigvalsh(X + X.mT))


@pytest.mark.parametrize("name", MODELS)
def test_what_goes_beyond_a_budget_changes_no_result(monkeypatch, name):
    """With no budget at all, everything that would wait on a CPU, or be computed anew, does."""
    models = [MODELS[name]() for _ in range(2)]
    # Random heads hardly matter: their costs are rounding.
    target: dict[str, Any] = {"state_size": 8} if name == "zamba" else {"ratio": 0.5}
    config = CompreSSMConfig(**target, weights="gate", refit=2)
    full = compress_(models[0], config, IDS)
    for budget in ("STATISTICS", "INPUTS", "SYSTEMS", "PREDICTIONS", "OUTPUTS", "ACTIVATIONS", "REPLACED"):
        monkeypatch.setattr(budgets, budget, 0)
    bounded = compress_(models[1], config, IDS)
    assert bounded.sizes == full.sizes
    logits = [model(IDS[:2]).logits for model in models]
    torch.testing.assert_close(logits[0], logits[1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", [*MODELS, "falcon_h1", "granitemoehybrid"])
def test_checkpoints_change_no_gradient(monkeypatch, name):
    model = MODELS[name]() if name in MODELS else build(name)
    layers, ids = find_layers(model), IDS[:3, :16]
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    found = []
    for limit in (budgets.CHECKPOINTS, 1):  # beyond it, a sequence at a time, and the blocks' inputs wait on the CPU
        monkeypatch.setattr(budgets, "CHECKPOINTS", limit)
        monkeypatch.setattr(observing, "SEQUENCES", 1)
        for with_checkpoints in (True, False):
            with monkeypatch.context() as patch:
                if not with_checkpoints:
                    patch.setattr(observing, "blocks_of", lambda model, layers: ([], set()))
                inputs, statistics = Inputs(), empty_statistics(layers, CompreSSMConfig())
                observe_by_loss(model, layers, statistics, batch, inputs, seed=3)
                found.append([read[2] for layer in layers for read in inputs[layer.index]])
    assert len(found[0]) == 3 * len(layers)
    for other in found[1:]:
        for one, two in zip(found[0], other, strict=True):
            torch.testing.assert_close(one, two)
    assert all("forward" not in vars(module) for module in model.modules())


def test_a_trial_holds_one_cut_mixer_at_a_time_and_shares_what_it_does_not_cut(monkeypatch):
    model = tiny_mamba2(layers=3)
    layers = find_layers(model)
    plan = measure(model, IDS, CompreSSMConfig(state_size=8)).plan(CompreSSMConfig(state_size=8))
    made: list[weakref.ref] = []
    cut_copy = trials.cut_copy

    def recorded(layer, cut):
        assert not any(copy() is not None for copy in made)
        other = cut_copy(layer, cut)
        same = [n for n, p in other.mixer.named_parameters() if n != "BC_projection"]
        assert all(other.mixer.get_parameter(n).data_ptr() == layer.mixer.get_parameter(n).data_ptr() for n in same)
        made.append(weakref.ref(other.mixer))
        return other

    for module in (trials, divergence_module):
        monkeypatch.setattr(module, "cut_copy", recorded)
    with cut_for_a_while(model, layers, plan.realizations), torch.no_grad():
        slim = model(IDS).logits
    divergence_module.output_errors(
        model, layers, plan.realizations, [{"input_ids": IDS, "attention_mask": IDS * 0 + 1}]
    )
    assert len(made) == 6
    plan.apply_(model)
    torch.testing.assert_close(model(IDS).logits, slim)


@pytest.mark.parametrize("name", ["mamba", "mamba2", "zamba2", "jamba", "falcon_h1", "nemotron_h"])
@torch.no_grad()
def test_passes_that_begin_at_a_layer_give_what_whole_ones_give(monkeypatch, name):
    model = MODELS[name]() if name in MODELS else build(name)
    layers, ids = find_layers(model), IDS[:4]
    config = CompreSSMConfig(ratio=0.5, weights="gate", refit=0, realization="select")
    plan = measure(model, ids, config).plan(config)
    resumed = Divergence(model, [{"input_ids": ids, "attention_mask": torch.ones_like(ids)}], layer_by_layer=True)
    with monkeypatch.context() as patch:  # its predictions are not kept
        patch.setattr(budgets, "PREDICTIONS", 0)
        again = Divergence(model, resumed.parts, mixers_only=True)
    ran: list[nn.Module] = []
    for layer in layers:
        layer.mixer.register_forward_pre_hook(lambda mixer, args: ran.append(mixer))
    for position, layer in enumerate(layers):
        if layer.index in plan.realizations:
            with cut_for_a_while(model, [layer], plan.realizations):
                whole = resumed()
                assert again() == whole
                ran.clear()
                assert resumed(layer) == whole
                assert whole > 0 or name in ("zamba2", "nemotron_h")  # there it is rounding
            assert not any(before.mixer in ran for before in layers[:position])


def test_many_old_weights_wait_on_the_cpu_and_come_back(monkeypatch):
    model = tiny_mamba2()
    monkeypatch.setattr(budgets, "REPLACED", 0)
    before = copy.deepcopy(model.state_dict())
    layers = find_layers(model)
    snapshot = Snapshot(model, layers, [], replaced=[p for layer in layers for p in layer.mixer.parameters()])
    compress_(model, CompreSSMConfig(state_size=8, realization="select"), IDS)
    snapshot.restore_()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_fits_keep_no_more_than_their_share_of_the_memory(monkeypatch):
    inputs, read = Inputs(), (torch.ones(2, 8, 4), None, None)
    monkeypatch.setattr(budgets, "INPUTS", 2 * read[0].nbytes)
    monkeypatch.setattr(budgets, "INPUTS_ON_CPU", read[0].nbytes)
    for index in (0, 1, 0, 1, 0):
        inputs.keep(index, read)
    assert {index: len(kept) for index, kept in inputs.items()} == {0: 2, 1: 1}


@pytest.mark.parametrize("make", [tiny_mamba, tiny_mamba2])
def test_measuring_stops_in_time_and_says_so(make, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(measuring.logger, "warning", said.append)
    monkeypatch.setattr(measuring, "TOKENS", {"cpu": 2 * 24})  # two sequences in a step
    for seconds, sequences in ((0, 2), (1000, 7), (None, 7)):
        measurement = measure(make(), IDS, CompreSSMConfig(tolerance=0.1, calibration_seconds=seconds))
        assert [int(entry.tokens) for entry in measurement.statistics] == [sequences * 24] * 2
    assert len(said) == 1
    assert f"{2 * 24} of {7 * 24} tokens" in said[0]
    monkeypatch.setattr(measuring, "SECONDS", {"cpu": 0, "cuda": 0})
    monkeypatch.setattr(calibration, "CPU_SEQUENCES", 8)
    measure(make(), None, CompreSSMConfig(tolerance=0.1))  # samples of the model itself, not given by anyone
    assert len(said) == 2


def test_progress_is_told_step_by_step():
    told: list[tuple[str, int, int]] = []
    with listening(lambda *step: told.append(step)):
        compress_(tiny_mamba(), CompreSSMConfig(ratio=0.5), IDS)
    by_text = {text: [step[1:] for step in steps] for text, steps in itertools.groupby(told, key=lambda step: step[0])}
    assert list(by_text) == [
        "measuring",
        "trying sizes, layer by layer",
        "refitting layers",
        "judging the cut on held-out text",
    ]
    assert by_text["trying sizes, layer by layer"] == [(0, 2), (1, 2), (2, 2)]
