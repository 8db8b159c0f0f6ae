"""What only a GPU can show: `python -m pytest -m gpu -n 0`, a minute or two. (The kernels are in tests/kernels.)"""

from __future__ import annotations

import functools
import gc
import importlib.util
import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from hf_compressm import CompreSSMConfig, compress_, compress_pretrained, hankel_singular_values
from hf_compressm.cli import app
from hf_compressm.data.calibration import sample
from hf_compressm.healing import heal
from hf_compressm.layers import find_layers
from hf_compressm.modeling.modeling_compressm import project_, project_heads_
from tests.conftest import VOCABULARY, cache_of, tiny_mamba, tiny_mamba2
from tests.layers.models import TYPES, build, tokens
from tests.training.conftest import losses, make_trainer, sizes

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device is here"),
]
IDS = tokens(4, 24) % VOCABULARY
KERNELS = importlib.util.find_spec("mamba_ssm") is not None
"""Which transformers calls for tensors on a CPU, too, where they fail; and they multiply in TF32."""
on_a_cpu = pytest.mark.skipif(KERNELS, reason="with mamba_ssm, transformers runs no Mamba on a CPU")
CLOSE = 5e-3 if KERNELS else 1e-4
GREEDY: dict[str, Any] = {"max_new_tokens": 12, "do_sample": False}


@pytest.fixture(autouse=True)
def _exact_convolutions(monkeypatch):
    """cuDNN rounds their inputs to TF32 where it may, which is far more than all else that differs from a CPU."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def assert_near(found: Tensor, expected: Tensor, tolerance: float) -> None:
    found, expected = found.detach().double().cpu(), expected.detach().double().cpu()
    error = float((found - expected).norm() / expected.norm())
    assert error <= tolerance, f"relative error {error:.1e}, more than {tolerance:.0e}"


@on_a_cpu
@pytest.mark.parametrize("model_type", TYPES)
def test_a_model_is_cut_as_on_a_cpu(model_type):
    """Measured by the kernels here and by plain torch there."""
    here, there = build(model_type).cuda(), build(model_type)
    assert_near(here(IDS.cuda()).logits, there(IDS).logits, 1e-4)
    config = CompreSSMConfig(state_size=8, weights="gate", refit=0)
    report, expected = (compress_(model, config, IDS.to(model.device)) for model in (here, there))
    assert report.sizes == expected.sizes
    assert report.realization == expected.realization
    for one, other in zip(report.layers, expected.layers, strict=True):
        assert_near(torch.tensor(one.hankel_singular_values), torch.tensor(other.hankel_singular_values), 1e-3)
        assert one.output_error == pytest.approx(other.output_error, rel=1e-2, abs=1e-5)
    assert all(parameter.is_cuda for parameter in here.parameters())
    assert_near(here(IDS.cuda()).logits, there(IDS).logits, 1e-2)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("model_type", TYPES)
def test_tolerance_0_changes_nothing(model_type, dtype):
    """Not a bit of a logit, in training mode either, and not a generated token."""
    model, ids = build(model_type).to("cuda", dtype), IDS.cuda()

    def results() -> list[Tensor]:
        with torch.no_grad():
            trained = model.train()(ids, use_cache=False).logits
            return [trained, model.eval()(ids).logits, model.generate(ids, **GREEDY)]

    before = results()
    report = compress_(model, CompreSSMConfig(tolerance=0), ids)
    assert report.states_after == report.states_before
    assert all(map(torch.equal, before, results()))


def projected() -> Any:
    model, generator = tiny_mamba2(), torch.Generator().manual_seed(0)
    for layer in find_layers(model):
        project_(layer.mixer, torch.randn(2, 16, 8, generator=generator) / 4)
    return model


def by_head() -> Any:
    model, generator = tiny_mamba2(), torch.Generator().manual_seed(0)
    for layer in find_layers(model):
        project_heads_(layer.mixer, [16, 0, 7, 1, 5, 8, 8, 3], torch.randn(2, 16, 48, generator=generator) / 4)
    return model


SLIM = pytest.mark.parametrize("make", [tiny_mamba, tiny_mamba2, projected, by_head])


@SLIM
def test_tokens_one_by_one_are_those_read_at_once(make):
    """With a cache, and by a CUDA graph that is replayed."""
    model, ids = make().cuda().requires_grad_(False), IDS.cuda()
    whole = model(ids).logits
    if not KERNELS:
        assert_near(whole, make()(IDS).logits, CLOSE)
    cache = cache_of(model(ids[:, :8], use_cache=True))
    (states,) = cache.values()
    tensors = [find(i) for find in (states.get_recurrent_state, states.get_conv_state) for i in range(2)]
    before, steps = [tensor.clone() for tensor in tensors], []
    for i in range(8, IDS.shape[1]):
        steps.append(model(ids[:, i : i + 1], use_cache=True, **cache).logits)
    assert_near(torch.cat(steps, dim=1), whole[:, 8:], CLOSE)

    token, graph = ids[:, 8:9].clone(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        output = model(token, use_cache=True, **cache).logits
    for tensor, value in zip(tensors, before, strict=True):
        tensor.copy_(value)
    replayed = []
    for i in range(8, IDS.shape[1]):
        token.copy_(ids[:, i : i + 1])
        graph.replay()
        replayed.append(output.clone())
    assert_near(torch.cat(replayed, dim=1), whole[:, 8:], CLOSE)


@pytest.mark.parametrize("make", [projected, by_head])
def test_compiled_decoding_generates_the_same(make):
    """`generate` compiles the decoding of a static cache on a GPU by itself."""
    model, ids = make().cuda(), IDS.cuda()
    assert torch.equal(model.generate(ids, cache_implementation="static", **GREEDY), model.generate(ids, **GREEDY))
    compiled = torch.compile(model, fullgraph=True)
    assert_near(compiled(ids).logits, model(ids).logits, CLOSE)


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny_mamba, {"state_size": 4, "refit": 0}),
        (tiny_mamba2, {"ratio": 0.5}),
        (tiny_mamba2, {"state_size": 8, "realization": "project_heads"}),
    ],
)
@pytest.mark.parametrize(
    "places", [{0: 0, 1: "cpu"}, {0: 0, 1: torch.cuda.device_count() - 1}], ids=["offloaded", "spread"]
)
def test_a_device_map(make, options, places, tmp_path):
    """Layers on the CPU, between whose passes their weights are moved, or on several GPUs."""
    make().save_pretrained(tmp_path)
    device_map = {"lm_head": 0, "backbone.embeddings": 0, "backbone.norm_f": 0}
    device_map |= {f"backbone.layers.{i}": place for i, place in places.items()}
    spread = AutoModelForCausalLM.from_pretrained(tmp_path, device_map=device_map).eval()
    plain, config = make().cuda(), CompreSSMConfig(**options, weights="gate")
    reports = [compress_(model, config, IDS.cuda()) for model in (spread, plain)]
    assert reports[0].sizes == reports[1].sizes
    assert min(reports[0].sizes.values()) < reports[0].layers[0].old_size
    assert_near(spread(IDS.cuda()).logits, plain(IDS.cuda()).logits, CLOSE)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="no second CUDA device is here")
@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny_mamba, {"state_size": 4}),
        (tiny_mamba2, {"state_size": 8, "realization": "select"}),
        (tiny_mamba2, {"state_size": 8}),
        (tiny_mamba2, {"state_size": 8, "realization": "project_heads"}),
    ],
)
def test_another_device_than_the_current_one(make, options):
    """Nothing is launched on the current one because it is the current one."""
    found = []
    for device in ("cuda:0", "cuda:1"):
        model, ids = make().to(device), IDS.to(device)
        with torch.cuda.device(0):
            report = compress_(model, CompreSSMConfig(**options, refit=0), ids)
            found.append((report, model(ids).logits, model.generate(ids, **GREEDY)))
    (report, logits, generated), (other, other_logits, other_generated) = found
    assert report.sizes == other.sizes
    for here, there in zip(report.layers, other.layers, strict=True):
        assert_near(torch.tensor(there.hankel_singular_values), torch.tensor(here.hankel_singular_values), 1e-4)
    assert other_logits.device == other_generated.device == torch.device("cuda:1")
    assert_near(other_logits, logits, CLOSE)
    assert torch.equal(other_generated.cpu(), generated.cpu())


def test_a_checkpoint_is_loaded_on_the_gpu(tmp_path):
    """All of it, by no hooks, and saved from there; the command does the same."""
    tiny_mamba().save_pretrained(tmp_path / "full")
    config = CompreSSMConfig(state_size=4, refit=0)
    slim = compress_pretrained(tmp_path / "full", config, calibration_data=IDS)
    assert {parameter.device.type for parameter in slim.parameters()} == {"cuda"}
    assert not any(hasattr(module, "_hf_hook") for module in slim.modules())
    slim.save_pretrained(tmp_path / "slim")
    options = ["--state-size", "4", "--refit", "0", "--json"]
    result = CliRunner().invoke(app, ["compress", str(tmp_path / "full"), str(tmp_path / "other"), *options])
    assert result.exit_code == 0, result.output
    for folder in ("slim", "other"):
        assert sizes(AutoModelForCausalLM.from_pretrained(tmp_path / folder)) == [4, 4]


@pytest.mark.parametrize(("make", "size"), [(tiny_mamba, 4), (tiny_mamba2, 8)])
def test_a_cut_in_training(make, size, tmp_path):
    """As on a CPU, and in bfloat16 with a fused optimizer; the run goes on from a checkpoint after the cut."""
    config = CompreSSMConfig(state_size=size, start=0, end=3, num_reductions=1, weights="gate")
    found = {}
    for name, arguments in {
        "cpu": {},
        "cuda": {"use_cpu": False},
        "bf16": {
            "use_cpu": False,
            "bf16": True,
            "optim": "adamw_torch_fused",
            "save_strategy": "steps",
            "save_steps": 4,
        },
    }.items():
        if name == "cpu" and KERNELS:
            continue
        model = make()
        trainer = make_trainer(tmp_path / name, model, config, max_steps=6, **arguments)
        trainer.args._n_gpu = min(1, trainer.args.n_gpu)  # else the model is wrapped in DataParallel
        trainer.train()
        assert model.device.type == name.replace("bf16", "cuda")
        assert sizes(model) == [size, size]
        for parameter in model.parameters():
            state = trainer.optimizer.state[parameter]
            assert state["exp_avg"].shape == parameter.shape
        found[name] = sizes(model), list(losses(trainer).values())
    if not KERNELS:
        assert found["cuda"][1] == pytest.approx(found["cpu"][1], rel=1e-3)
    assert all(map(math.isfinite, found["bf16"][1]))
    resumed = make()
    trainer = make_trainer(tmp_path / "bf16", resumed, config, max_steps=6, **arguments)
    trainer.args._n_gpu = min(1, trainer.args.n_gpu)
    trainer.train(resume_from_checkpoint=str(tmp_path / "bf16" / "checkpoint-4"))
    assert sizes(resumed) == found["bf16"][0]
    assert losses(trainer)[6] == pytest.approx(found["bf16"][1][5], rel=1e-2)


@SLIM
def test_measuring_leaves_nothing_on_the_device(make):
    model, ids = make().cuda(), IDS.cuda()
    hankel_singular_values(model, ids)  # what libraries keep for good

    def held() -> int:
        gc.collect()
        return torch.cuda.memory_allocated()

    before = held()
    hankel_singular_values(model, ids)
    assert held() == before


@pytest.mark.parametrize("model_type", ["mamba", "mamba2", "falcon_h1"])
def test_a_cut_gives_memory_back(model_type):
    model = build(model_type).cuda()
    report = compress_(model, CompreSSMConfig(state_size=4, realization="select", refit=0), IDS.cuda())
    assert set(report.sizes.values()) == {4}
    for parameter in model.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.nbytes  # no view of what it was


@pytest.mark.parametrize(
    ("make", "options"),
    [
        (tiny_mamba, {"state_size": 1}),
        (functools.partial(tiny_mamba2, 128), {"state_size": 8, "realization": "select"}),
        (tiny_mamba2, {"state_size": 2, "realization": "project_heads"}),
    ],
    ids=["refit", "refit of Mamba-2", "by head"],
)
def test_healing(monkeypatch, make, options):
    monkeypatch.setattr(heal, "STEP_TOKENS", 200)
    model, text = make().cuda(), torch.randint(0, 3, (48, 24), generator=torch.Generator().manual_seed(1))
    healing = compress_(model, CompreSSMConfig(**options, heal=2400), text).healing
    assert healing is not None
    assert healing.after < 0.98 * healing.before
    assert all(parameter.is_cuda for parameter in model.parameters())


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=on_a_cpu), "cuda"])
def test_sampling_leaves_a_gpus_random_numbers_where_they_were(device):
    model, state = tiny_mamba().to(device), torch.cuda.get_rng_state()
    sample(model, 2, 12)
    assert torch.equal(torch.cuda.get_rng_state(), state)
