"""The optimizer's state after a cut, against a small model and a fresh optimizer whose state is written down by hand."""

from __future__ import annotations

import copy
import gc
import weakref

import pytest
import torch
from torch.nn import functional as F
from transformers.optimization import Adafactor

from hf_compressm import CompreSSMConfig, compress_, measure
from hf_compressm.cutting import apply
from hf_compressm.layers import find_layers
from tests.conftest import VOCABULARY, tiny_mamba, tiny_mamba2

KEPT = [1, 4, 6]


class Lion(torch.optim.Optimizer):
    """Chen et al., Symbolic discovery of optimization algorithms (arXiv 2302.06675): one that torch does not have."""

    def __init__(self, params, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                m = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                first, second = group["betas"]
                p.sub_(group["lr"] * m.lerp(p.grad, 1 - first).sign())
                m.lerp_(p.grad, 1 - second)


OPTIMIZERS = {
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=False),
    "adamw-foreach": lambda p: torch.optim.AdamW(p, lr=1e-2, foreach=True),
    "adamw-fused": lambda p: torch.optim.AdamW(p, lr=1e-2, fused=True),
    "amsgrad": lambda p: torch.optim.AdamW(p, lr=1e-2, amsgrad=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-2, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-3, momentum=0.9, centered=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-2),
    "adamax": lambda p: torch.optim.Adamax(p, lr=1e-2),
    "lion": lambda p: Lion(p, lr=1e-3),
}


def batches(n: int, seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (2, 10), generator=generator) for _ in range(n)]


def train(model, optimizer, data) -> list[float]:
    losses = []
    for ids in data:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def groups(model) -> list[dict]:
    decay = [p for n, p in model.named_parameters() if p.dim() > 1 and "A_log" not in n]
    rest = [p for n, p in model.named_parameters() if p.dim() == 1 or "A_log" in n]
    return [{"params": decay, "weight_decay": 0.1}, {"params": rest, "weight_decay": 0.0}]


def sliced(name: str, tensor: torch.Tensor, mixer, rank: int = 4, N: int = 8) -> torch.Tensor:
    """By hand, from the layout that the two mixers document."""
    if name.endswith("A_log") and tensor.dim() == 2:
        return tensor[:, KEPT]
    if name.endswith("x_proj.weight"):
        step, B, C = tensor[:rank], tensor[rank : rank + N], tensor[rank + N :]
        return torch.cat([step, B[KEPT], C[KEPT]])
    return tensor


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_cut_run_is_the_run_of_a_small_model_with_the_sliced_state(monkeypatch, name):
    make = OPTIMIZERS[name]
    model = tiny_mamba()
    optimizer = make(groups(model))
    train(model, optimizer, batches(3))
    full, full_state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())

    # "magnitude" keeps C's own rows; let it keep the states of the by-hand slice.
    score = torch.zeros(1, 8)
    score[0, KEPT] = 1
    monkeypatch.setattr("hf_compressm.layers.mamba.MambaLayer.magnitude", lambda self: score)
    compress_(model, CompreSSMConfig(state_size=3, selection="magnitude"), batches(1)[0], optimizer=optimizer)
    model.train()

    small = tiny_mamba(3)
    small.load_state_dict({key: sliced(key, tensor, None) for key, tensor in full.items()})
    other = make(groups(small))
    names = {id(p): n for n, p in small.named_parameters()}
    order = [names[id(p)] for group in other.param_groups for p in group["params"]]
    for index, state in full_state["state"].items():
        for key, entry in state.items():
            if torch.is_tensor(entry) and entry.dim():
                state[key] = sliced(order[index], entry, None)
    other.load_state_dict(full_state)

    assert train(model, optimizer, batches(4, seed=1)) == train(small, other, batches(4, seed=1))
    for (key, one), two in zip(model.state_dict().items(), small.state_dict().values(), strict=True):
        assert torch.equal(one, two), key


def test_a_gradient_scaler_goes_on_as_if_there_were_none():
    """Its factor is a power of two, so that scaling rounds nothing."""
    runs = []
    for enabled in (False, True):
        model = tiny_mamba().train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8, growth_interval=1, enabled=enabled)
        losses = []
        for step, ids in enumerate(batches(5)):
            loss = model(input_ids=ids, labels=ids).loss
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.item())
            if step == 2:
                compress_(model, CompreSSMConfig(state_size=3, refit=0), batches(1)[0], optimizer=optimizer)
        runs.append(losses)
        assert not enabled or scaler.get_scale() == 2.0**13
    assert runs[0] == runs[1]


@pytest.mark.parametrize("refit", [0, 1])
def test_mamba2_moments_follow_rows_and_channels(refit):
    """Also where the weights are fitted, which the moments know nothing of."""
    model = tiny_mamba2(groups=2)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    train(model, optimizer, batches(2))
    layers = find_layers(model)
    mixer = layers[0].mixer
    ids = torch.cat(batches(8))
    config = CompreSSMConfig(state_size=4, realization="select", refit=refit)
    plan = measure(model, ids, config).plan(config)
    assert ("refit" in {row.realization for row in plan.report.layers}) == bool(refit)
    before = {name: optimizer.state[p]["exp_avg"].clone() for name, p in mixer.named_parameters()}
    values = {name: p.detach().clone() for name, p in mixer.named_parameters()}
    plan.apply_(model, optimizer)
    inner, N = mixer.intermediate_size, 16
    states = [group * N + state for group in range(2) for state in plan.kept[0][group]]
    channels = [*range(inner), *(inner + s for s in states), *(inner + 2 * N + s for s in states)]
    rows = [*range(inner), *(inner + c for c in channels), *range(2 * inner + 4 * N, 2 * inner + 4 * N + 8)]
    for name, parameter in mixer.named_parameters():
        index = {"in_proj": rows, "conv1d": channels}.get(name.split(".")[0], list(range(parameter.shape[0])))
        if not refit or name.split(".")[0] not in ("in_proj", "conv1d"):
            assert torch.equal(parameter, values[name][index]), name
        assert torch.equal(optimizer.state[parameter]["exp_avg"], before[name][index]), name


def test_gradients_of_a_fitted_read_out_are_the_kept_rows_of_the_full_ones():
    """dL/dC' = (dL/dC)[S], and not R dL/dC: which is why the moments are sliced and not mixed."""
    generator = torch.Generator().manual_seed(0)
    N, S, tokens = 6, torch.tensor([0, 2, 3]), 50
    h, x = torch.randn(tokens, N, generator=generator), torch.randn(tokens, 4, generator=generator)
    mix = torch.randn(3, 3, generator=generator)
    h[:, [1, 4, 5]] = h[:, S] @ mix  # the dropped states are combinations of the kept ones: the cut is exact
    C = torch.randn(N, 4, generator=generator, requires_grad=True)
    target = torch.randn(tokens, generator=generator)
    F.mse_loss((h * (x @ C.T)).sum(1), target).backward()
    R = torch.zeros(3, N)
    R[:, S] = torch.eye(3)
    R[:, [1, 4, 5]] = mix
    small = (R @ C).detach().requires_grad_()
    F.mse_loss((h[:, S] * (x @ small.T)).sum(1), target).backward()
    torch.testing.assert_close(small.grad, C.grad[S])
    assert not torch.allclose(small.grad, R @ C.grad)


@pytest.mark.parametrize("kind", ["transformers", "torch"])
@pytest.mark.parametrize("make", [tiny_mamba, tiny_mamba2], ids=["mamba", "mamba2"])
def test_factored_second_moments_keep_their_values_on_what_stays(kind, make):
    model = make()
    if kind == "torch":
        optimizer = torch.optim.Adafactor(model.parameters(), lr=1e-2)
        names = ("row_var", "col_var")
    else:
        optimizer = Adafactor(model.parameters(), lr=1e-2, relative_step=False, scale_parameter=False)
        names = ("exp_avg_sq_row", "exp_avg_sq_col")

    def second_moment(parameter):
        row, column = (optimizer.state[parameter][name] for name in names)
        n = parameter.dim()
        row = row.reshape(*parameter.shape[:-1], 1)
        column = column.reshape(*parameter.shape[:-2], 1, parameter.shape[-1])
        return row / row.mean(n - 2, keepdim=True) * column

    train(model, optimizer, batches(2))
    layers = find_layers(model)
    config = CompreSSMConfig(state_size=8 if make is tiny_mamba2 else 3, realization="select", refit=0)
    plan = measure(model, batches(1)[0]).plan(config)
    cuts = plan.realizations[0].parameter_cuts(layers[0])
    parameters = {name: layers[0].mixer.get_parameter(name) for name in cuts}
    factored = {name: p for name, p in parameters.items() if p.dim() > 1}
    expected = {name: cuts[name].gradient(second_moment(p)) for name, p in factored.items()}
    plan.apply_(model, optimizer)
    for name, parameter in factored.items():
        torch.testing.assert_close(second_moment(parameter), expected[name], msg=name)
    assert all(loss == loss for loss in train(model.train(), optimizer, batches(2, seed=1)))


def test_an_unknown_state_is_refused_before_anything_changes():
    model = tiny_mamba()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, batches(1))
    last = find_layers(model)[-1].mixer.x_proj.weight
    optimizer.state[last]["state1"] = torch.zeros(last.shape, dtype=torch.uint8)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"state1.*x_proj.*plain optimizer"):
        compress_(model, CompreSSMConfig(state_size=3), batches(1)[0], optimizer=optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.state_size == 8


def groups_of(model):
    """As a Trainer has them: weights that decay, and the others."""
    named = list(model.named_parameters())
    return [{"params": [(n, p) for n, p in named if ("norm" in n) == other]} for other in (False, True)]


@pytest.mark.parametrize("realization", ["project", "project_heads"])
def test_the_maps_of_a_projection_join_the_optimizer(realization):
    """Where that of the slim model has them. At the next cut the same parameter gets other maps, which begin without a state."""
    model = tiny_mamba2()
    optimizer = torch.optim.AdamW(groups_of(model), lr=1e-3)
    train(model, optimizer, batches(1))
    maps: list = []

    def moments():
        named = ((name, optimizer.state.get(p, {})) for name, p in model.named_parameters())
        return {name: state["exp_avg"].clone() for name, state in named if state}

    for size in (8, 4):
        before = moments()
        config = CompreSSMConfig(state_size={0: size}, realization=realization)
        compress_(model, config, batches(1)[0], optimizer=optimizer)
        fresh = torch.optim.AdamW(groups_of(model))
        for mine, new in zip(optimizer.param_groups, fresh.param_groups, strict=True):
            assert mine["param_names"] == new["param_names"]
            assert all(p is q for p, q in zip(mine["params"], new["params"], strict=True))
        maps.append(model.backbone.layers[0].mixer.BC_projection)
        after, of_maps = moments(), "backbone.layers.0.mixer.BC_projection"
        assert after.keys() == before.keys() - {of_maps}
        assert all(torch.equal(moment, before[name]) for name, moment in after.items())
        old = maps[0].detach().clone()
        train(model, optimizer, batches(1))
        assert moments().keys() == after.keys() | {of_maps}
        assert not torch.equal(maps[0], old)
    assert maps[0] is maps[1]


def test_an_optimizer_that_can_not_take_maps_or_a_cut_that_fails_leaves_all_as_it_was(monkeypatch):
    model = tiny_mamba2()
    plan = measure(model, batches(1)[0]).plan(CompreSSMConfig(state_size=8, realization="project_heads"))
    with pytest.raises(ValueError, match=r"Adagrad .*BC_projection would be new"):
        plan.apply_(model, torch.optim.Adagrad(model.parameters()))
    optimizer = torch.optim.AdamW(groups_of(model))
    before = copy.deepcopy(optimizer.state_dict()), [p for group in optimizer.param_groups for p in group["params"]]

    def fail(*args):
        raise MemoryError

    monkeypatch.setattr(apply, "write_sizes_", fail)
    with pytest.raises(MemoryError):
        plan.apply_(model, optimizer)
    assert optimizer.state_dict() == before[0]
    assert all(
        p is q for p, q in zip((p for g in optimizer.param_groups for p in g["params"]), before[1], strict=True)
    )
    assert {id(p) for p in model.parameters()} == {id(p) for p in before[1]}
    assert model.config.state_size == 16


def test_no_tensor_of_the_old_size_is_kept_alive_and_flags_survive():
    model = tiny_mamba()
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, batches(1))
    mixer = find_layers(model)[0].mixer
    mixer.A_log._no_weight_decay = True
    old = [weakref.ref(optimizer.state[mixer.A_log][key]) for key in ("exp_avg", "exp_avg_sq")]
    compress_(model, CompreSSMConfig(state_size=3), batches(1)[0], optimizer=optimizer)
    gc.collect()
    assert all(ref() is None for ref in old)
    assert mixer.A_log._no_weight_decay
    assert optimizer.state[mixer.A_log]["exp_avg"].shape == mixer.A_log.shape == (48, 3)
    assert (optimizer.state[mixer.x_proj.weight]["exp_avg_sq"] >= 0).all()


def the_same(model, before: dict[str, torch.Tensor], optimizers, states: list[dict]) -> bool:
    now = [optimizer.state_dict()["state"] for optimizer in optimizers]
    return (
        model.config.state_size == 8
        and all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
        and all(
            torch.equal(torch.as_tensor(entry), torch.as_tensor(mine[index][key]))
            for mine, old in zip(now, states, strict=True)
            for index, state in old.items()
            for key, entry in state.items()
        )
    )


def test_several_optimizers_are_given_as_a_list():
    """As with Muon for the matrices and AdamW for the rest."""
    model = tiny_mamba()
    matrices = [p for p in model.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if p.dim() != 2]
    optimizers = [torch.optim.RMSprop(matrices, lr=1e-3), torch.optim.AdamW(rest, lr=1e-3)]
    model(input_ids=batches(1)[0], labels=batches(1)[0]).loss.backward()
    for optimizer in optimizers:
        optimizer.step()
    before = copy.deepcopy(model.state_dict())
    states = [copy.deepcopy(optimizer.state_dict()["state"]) for optimizer in optimizers]
    config = CompreSSMConfig(state_size=3)
    for some, missing in ((optimizers[0], "layers.0.norm.weight"), (optimizers[1:], "embeddings")):
        with pytest.raises(ValueError, match=rf"holds \S*{missing}.*Nothing was changed"):
            compress_(model, config, batches(1)[0], optimizer=some)
        assert the_same(model, before, optimizers, states)
    compress_(model, config, batches(1)[0], optimizer=optimizers)
    for name, parameter in model.named_parameters():
        state = optimizers[parameter.dim() != 2].state[parameter]
        key = "square_avg" if parameter.dim() == 2 else "exp_avg"
        assert state[key].shape == parameter.shape, name


def another_models(model):
    return torch.optim.AdamW(tiny_mamba().parameters())


def without_a_log(model):
    return torch.optim.AdamW([p for name, p in model.named_parameters() if "A_log" not in name])


def odd_state_elsewhere(model):
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, batches(1))
    optimizer.state[model.backbone.embeddings.weight]["exp_avg"] = torch.zeros(3)
    return optimizer


def square_matrices(model):
    """As SOAP and Shampoo keep them."""
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, batches(1))
    for parameter in model.parameters():
        optimizer.state[parameter]["GG"] = [torch.eye(n) for n in parameter.shape]
    return optimizer


def in_an_object(model):
    """As a projector of GaLore's."""
    optimizer = torch.optim.AdamW(model.parameters())
    train(model, optimizer, batches(1))
    projector = type("Projector", (), {})()
    projector.ortho_matrix = torch.eye(4)
    optimizer.state[model.backbone.layers[1].mixer.x_proj.weight]["projector"] = projector
    return optimizer


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (another_models, "holds backbone.embeddings.weight and 21 more"),
        (without_a_log, "holds backbone.layers.0.mixer.A_log and 1 more"),
        (odd_state_elsewhere, r"'exp_avg' of backbone.embeddings.weight \[61, 24\] is Tensor \[3\]"),
        (square_matrices, "'GG' of backbone.embeddings.weight .* is a list that holds tensors"),
        (in_an_object, "'projector' of backbone.layers.1.mixer.x_proj.weight .* is a Projector that holds tensors"),
    ],
)
def test_what_an_optimizer_lacks_or_can_not_follow_is_said_before_anything_changes(make, message):
    model = tiny_mamba()
    plan = measure(model, batches(1)[0]).plan(CompreSSMConfig(state_size=3))
    optimizer = make(model)
    before = copy.deepcopy(model.state_dict())
    states = [dict(optimizer.state_dict()["state"])]
    with pytest.raises(ValueError, match=f"{message}.*Nothing was changed"):
        plan.apply_(model, optimizer)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.config.state_size == 8
    assert optimizer.state_dict()["state"] == states[0]


def test_what_is_no_optimizer_is_said(mamba):
    with pytest.raises(TypeError, match="a list of them, got dict"):
        compress_(mamba, CompreSSMConfig(state_size=3), batches(1)[0], optimizer=[{}])
