"""The original layout: checkpoints written the way mamba_ssm writes them, against a forward written from its
reference functions."""

import json
import math
import re
from types import SimpleNamespace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, Mamba2ForCausalLM, MambaForCausalLM, PreTrainedTokenizerFast

from hf_compressm.hub import (
    export_mamba_ssm,
    is_state_spaces_checkpoint,
    load_model,
    load_state_spaces_model,
    load_tokenizer,
)
from hf_compressm.modeling.state_sizes import set_state_sizes
from tests.modeling.models import build, mamba2_config, mamba_config, slim

MAMBA = {"d_model": 24, "n_layer": 2, "vocab_size": 29, "ssm_cfg": {}, "rms_norm": True, "fused_add_norm": True}
MAMBA2 = MAMBA | {"ssm_cfg": {"layer": "Mamba2", "headdim": 16}, "pad_vocab_size_multiple": 16}
MAMBA_OPTIONS = MAMBA | {
    "ssm_cfg": {"layer": "Mamba1", "d_state": 5, "d_conv": 3, "expand": 1, "dt_rank": 7, "bias": True},
    "residual_in_fp32": False,
    "tie_embeddings": False,
    "attn_layer_idx": [],
    "attn_cfg": {},
    "d_intermediate": 0,
}
MAMBA2_OPTIONS = MAMBA | {
    "ssm_cfg": {
        "layer": "Mamba2",
        "headdim": 8,
        "d_state": 6,
        "d_conv": 2,
        "ngroups": 3,
        "d_ssm": 48,
        "chunk_size": 8,
        "dt_limit": [0.05, 0.6],
        "bias": True,
        "conv_bias": False,
        "rmsnorm": True,
        "norm_before_gate": False,
        "D_has_hdim": False,
        "use_mem_eff_path": True,
    },
}
CONFIGS = {"mamba": MAMBA, "mamba2": MAMBA2, "mamba_options": MAMBA_OPTIONS, "mamba2_options": MAMBA2_OPTIONS}
INPUT_IDS = torch.randint(0, 29, (2, 13), generator=torch.Generator().manual_seed(0))


def dimensions(config: dict) -> SimpleNamespace:
    """mamba_ssm's own defaults and derived sizes."""
    ssm_cfg = config["ssm_cfg"]
    mamba2 = ssm_cfg.get("layer") == "Mamba2"
    d_model = config["d_model"]
    d_inner = ssm_cfg.get("expand", 2) * d_model
    multiple = config.get("pad_vocab_size_multiple", 8)
    return SimpleNamespace(
        mamba2=mamba2,
        d_model=d_model,
        d_inner=d_inner,
        d_state=ssm_cfg.get("d_state", 128 if mamba2 else 16),
        d_conv=ssm_cfg.get("d_conv", 4),
        dt_rank=ssm_cfg.get("dt_rank", math.ceil(d_model / 16)),
        ngroups=ssm_cfg.get("ngroups", 1),
        nheads=d_inner // ssm_cfg.get("headdim", 64),
        bias=ssm_cfg.get("bias", False),
        conv_bias=ssm_cfg.get("conv_bias", True),
        dt_limit=ssm_cfg.get("dt_limit", (0.0, math.inf)),
        vocab_size=config["vocab_size"] + -config["vocab_size"] % multiple,
        tied=config.get("tie_embeddings", True),
    )


def random_weights(config: dict) -> dict[str, torch.Tensor]:
    """Names and shapes as in mamba_ssm's MambaLMHeadModel."""
    s = dimensions(config)
    shapes: dict[str, tuple[int, ...]] = {"backbone.embedding.weight": (s.vocab_size, s.d_model)}
    conv_dim = s.d_inner + (2 * s.ngroups * s.d_state if s.mamba2 else 0)
    mixer: dict[str, tuple[int, ...]] = {
        "in_proj.weight": (s.d_inner + conv_dim + s.nheads if s.mamba2 else 2 * s.d_inner, s.d_model),
        "conv1d.weight": (conv_dim, 1, s.d_conv),
        "out_proj.weight": (s.d_model, s.d_inner),
    }
    if s.mamba2:
        mixer |= {"A_log": (s.nheads,), "D": (s.nheads,), "dt_bias": (s.nheads,), "norm.weight": (s.d_inner,)}
    else:
        mixer |= {"A_log": (s.d_inner, s.d_state), "D": (s.d_inner,), "dt_proj.bias": (s.d_inner,)}
        mixer |= {"x_proj.weight": (s.dt_rank + 2 * s.d_state, s.d_inner), "dt_proj.weight": (s.d_inner, s.dt_rank)}
    if s.bias:
        mixer |= {"in_proj.bias": mixer["in_proj.weight"][:1], "out_proj.bias": (s.d_model,)}
    if s.conv_bias:
        mixer["conv1d.bias"] = (conv_dim,)
    for layer in range(config["n_layer"]):
        shapes[f"backbone.layers.{layer}.norm.weight"] = (s.d_model,)
        shapes |= {f"backbone.layers.{layer}.mixer.{name}": shape for name, shape in mixer.items()}
    shapes["backbone.norm_f.weight"] = (s.d_model,)
    shapes["lm_head.weight"] = (s.vocab_size, s.d_model)

    generator = torch.Generator().manual_seed(0)
    weights = {name: 0.3 * torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    if s.tied:
        weights["lm_head.weight"] = weights["backbone.embedding.weight"]
    return weights


def reference_logits(config: dict, weights: dict[str, torch.Tensor], input_ids: torch.Tensor) -> torch.Tensor:
    """The original model in float64, with the scan as a plain loop over time (mamba_ssm's selective_scan_ref)."""
    s = dimensions(config)
    weights = {name: weight.double() for name, weight in weights.items()}
    hidden = F.embedding(input_ids, weights["backbone.embedding.weight"])
    for layer in range(config["n_layer"]):
        prefix = f"backbone.layers.{layer}.mixer."
        mixer = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        normed = rms_norm(hidden, weights[f"backbone.layers.{layer}.norm.weight"])
        hidden = hidden + (reference_mamba2 if s.mamba2 else reference_mamba)(s, mixer, normed)
    return F.linear(rms_norm(hidden, weights["backbone.norm_f.weight"]), weights["lm_head.weight"])


def rms_norm(x, weight):
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * weight


def causal_conv(x, weight, bias):
    """[b, l, channels] -> [b, l, channels]"""
    x = F.pad(x.mT, (weight.shape[-1] - 1, 0))
    return F.silu(F.conv1d(x, weight, bias, groups=weight.shape[0])).mT


def scan(u, delta, A, B, C, D):
    """u, delta [b, l, d]; A [d, n]; B, C [b, l, d, n]; D [d] -> [b, l, d]"""
    state, outputs = torch.zeros(u.shape[0], *A.shape, dtype=u.dtype), []
    for t in range(u.shape[1]):
        state = torch.exp(delta[:, t, :, None] * A) * state + (delta[:, t] * u[:, t])[..., None] * B[:, t]
        outputs.append((state * C[:, t]).sum(-1) + D * u[:, t])
    return torch.stack(outputs, dim=1)


def reference_mamba(s, mixer, hidden):
    x, z = F.linear(hidden, mixer["in_proj.weight"], mixer.get("in_proj.bias")).chunk(2, dim=-1)
    x = causal_conv(x, mixer["conv1d.weight"], mixer.get("conv1d.bias"))
    delta, B, C = F.linear(x, mixer["x_proj.weight"]).split([s.dt_rank, s.d_state, s.d_state], dim=-1)
    delta = F.softplus(F.linear(delta, mixer["dt_proj.weight"], mixer["dt_proj.bias"]))
    y = scan(x, delta, -torch.exp(mixer["A_log"]), B[:, :, None], C[:, :, None], mixer["D"])
    return F.linear(y * F.silu(z), mixer["out_proj.weight"], mixer.get("out_proj.bias"))


def reference_mamba2(s, mixer, hidden):
    state_rows = s.ngroups * s.d_state
    zxbcdt = F.linear(hidden, mixer["in_proj.weight"], mixer.get("in_proj.bias"))
    z, xBC, dt = zxbcdt.split([s.d_inner, s.d_inner + 2 * state_rows, s.nheads], dim=-1)
    x, B, C = causal_conv(xBC, mixer["conv1d.weight"], mixer.get("conv1d.bias")).split(
        [s.d_inner, state_rows, state_rows], dim=-1
    )
    delta = F.softplus(dt + mixer["dt_bias"]).clamp(*s.dt_limit)
    headdim = s.d_inner // s.nheads
    B, C = (M.unflatten(-1, (s.ngroups, s.d_state)).repeat_interleave(s.d_inner // s.ngroups, dim=2) for M in (B, C))
    delta, A, D = (M.repeat_interleave(headdim, dim=-1) for M in (delta, -torch.exp(mixer["A_log"]), mixer["D"]))
    y = scan(x, delta, A[:, None].expand(-1, s.d_state), B, C, D) * F.silu(z)
    y = y.unflatten(-1, (s.ngroups, -1))
    y = (y * torch.rsqrt(y.square().mean(-1, keepdim=True) + 1e-5)).flatten(-2) * mixer["norm.weight"]
    return F.linear(y, mixer["out_proj.weight"], mixer.get("out_proj.bias"))


def write(folder, config: dict, weights: dict[str, torch.Tensor]):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    torch.save(weights, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_original_model(name, tmp_path):
    config, weights = CONFIGS[name], random_weights(CONFIGS[name])
    assert is_state_spaces_checkpoint(write(tmp_path, config, weights))
    model = load_state_spaces_model(tmp_path)
    assert type(model) is (Mamba2ForCausalLM if "mamba2" in name else MambaForCausalLM)
    assert not model.training
    assert (model.lm_head.weight is model.backbone.embeddings.weight) == ("mamba_options" not in name)
    logits = model(INPUT_IDS).logits
    torch.testing.assert_close(logits.double(), reference_logits(config, weights, INPUT_IDS), atol=1e-5, rtol=1e-5)
    model.save_pretrained(tmp_path / "hf")
    assert torch.equal(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")(INPUT_IDS).logits, logits)


@pytest.mark.parametrize("name", CONFIGS)
def test_export_gives_the_original_model_back(name, tmp_path):
    config, weights = CONFIGS[name], random_weights(CONFIGS[name])
    model = load_state_spaces_model(write(tmp_path / "in", config, weights))
    export_mamba_ssm(model, tmp_path / "out")
    exported = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    assert exported.keys() == weights.keys()
    assert all(torch.equal(exported[key], weights[key]) for key in weights)
    again = load_state_spaces_model(tmp_path / "out")
    assert again.config.to_diff_dict() == model.config.to_diff_dict()
    assert torch.equal(again(INPUT_IDS).logits, model(INPUT_IDS).logits)


def test_export_of_a_slimmed_model(tmp_path):
    """Its config holds nothing that mamba_ssm 1 or 2 would not take, and the smaller state size."""
    model = slim(mamba_config(), [3, 3, 3])
    export_mamba_ssm(model, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    fields = "d_model n_layer vocab_size ssm_cfg rms_norm residual_in_fp32 fused_add_norm pad_vocab_size_multiple"
    assert config.keys() == {*fields.split(), "tie_embeddings"}
    assert config["ssm_cfg"] == {"layer": "Mamba1", "d_state": 3, "dt_rank": 1}
    assert "Infinity" not in (tmp_path / "config.json").read_text()
    weights = torch.load(tmp_path / "pytorch_model.bin", weights_only=True)
    ids = INPUT_IDS
    torch.testing.assert_close(
        model(ids).logits.double(), reference_logits(config, weights, ids), atol=1e-5, rtol=1e-5
    )


def test_export_refuses_what_mamba_ssm_cannot_hold(tmp_path):
    model = build(mamba2_config())
    for cut, projected, cure in (
        ({0: 3}, None, "uniform=True"),
        ({0: 3, 1: 3, 2: 3}, {0: 8}, "no projected states: compress with uniform=True"),
    ):
        set_state_sizes(model.config, cut, projected)
        with pytest.raises(ValueError, match=cure):
            export_mamba_ssm(model, tmp_path / "new")
    with pytest.raises(ValueError, match="layer_norm_epsilon"):
        export_mamba_ssm(build(mamba_config(layer_norm_epsilon=1e-6)), tmp_path / "new")
    with pytest.raises(ValueError, match="MambaModel"):
        export_mamba_ssm(build(mamba_config()).backbone, tmp_path / "new")
    assert not (tmp_path / "new").exists()
    (tmp_path / "a file").touch()
    with pytest.raises(FileExistsError, match="not empty"):
        export_mamba_ssm(build(mamba_config()), tmp_path)


def test_from_pretrained_arguments_are_honoured(tmp_path):
    write(tmp_path / "repo", MAMBA, random_weights(MAMBA))
    model = load_state_spaces_model(tmp_path / "repo", dtype=torch.bfloat16, device_map="auto", local_files_only=True)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert {p.device.type for p in model.parameters()} == {"cpu"}
    assert load_state_spaces_model(tmp_path / "repo").dtype == torch.float32
    assert load_state_spaces_model(tmp_path, subfolder="repo", trust_remote_code=True).dtype == torch.float32
    with pytest.raises(ValueError, match="variant"):
        load_state_spaces_model(tmp_path / "repo", variant="fp16")
    with pytest.raises(TypeError, match="no_such_argument"):
        load_state_spaces_model(tmp_path / "repo", no_such_argument=1)


def test_hub_arguments_reach_the_hub(tmp_path, monkeypatch):
    folder, calls = write(tmp_path, MAMBA, random_weights(MAMBA)), []

    def cached_file(name, filename, **kwargs):
        calls.append((name, filename, kwargs))
        return str(folder / filename)

    monkeypatch.setattr("hf_compressm.hub.state_spaces.cached_file", cached_file)
    hub = {"revision": "v1", "token": "secret", "cache_dir": str(tmp_path), "local_files_only": True}
    model = load_state_spaces_model("state-spaces/mamba-130m", **hub, dtype=torch.float16)
    assert model.config.name_or_path == "state-spaces/mamba-130m"
    assert calls == [("state-spaces/mamba-130m", file, hub) for file in ("config.json", "pytorch_model.bin")]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"attn_layer_idx": [1]}, "attn_layer_idx"),
        ({"d_intermediate": 64}, "d_intermediate"),
        ({"rms_norm": False}, "rms_norm"),
        ({"something_new": 1}, "something_new"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "Mamba3"),
        ({"ssm_cfg": {"layer": "Mamba2", "d_ssm": 16}}, "d_ssm"),
        ({"ssm_cfg": {"layer": "Mamba2", "D_has_hdim": True}}, "D_has_hdim"),
        ({"ssm_cfg": {"layer": "Mamba2", "rmsnorm": False}}, "rmsnorm"),
        ({"ssm_cfg": {"layer": "Mamba2", "norm_before_gate": True}}, "norm_before_gate"),
        ({"ssm_cfg": {"headdim": 8}}, "headdim"),
    ],
)
def test_what_transformers_cannot_express_is_refused(change, message, tmp_path):
    write(tmp_path, MAMBA | change, {})
    assert is_state_spaces_checkpoint(tmp_path)
    with pytest.raises(ValueError, match=message):
        load_state_spaces_model(tmp_path)


def test_weights_that_do_not_fit_are_refused(tmp_path):
    weights = random_weights(MAMBA)
    renamed = {("extra" if key.endswith("norm_f.weight") else key): weight for key, weight in weights.items()}
    with pytest.raises(ValueError, match=r"missing backbone.norm_f.weight\n  unexpected extra"):
        load_state_spaces_model(write(tmp_path, MAMBA, renamed))
    with pytest.raises(ValueError, match=r"A_log is \[48, 16\] instead of \[48, 8\]"):
        load_state_spaces_model(write(tmp_path, MAMBA | {"ssm_cfg": {"d_state": 8}}, weights))
    with pytest.raises(ValueError, match="tie_embeddings"):
        load_state_spaces_model(write(tmp_path, MAMBA, weights | {"lm_head.weight": weights["lm_head.weight"] + 1}))


@given(share=st.floats(0, 0.999), file=st.sampled_from(["pytorch_model.bin", "config.json"]))
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_half_written_files_are_named(share, file, tmp_path):
    whole = (write(tmp_path, MAMBA, random_weights(MAMBA)) / file).read_bytes()
    (tmp_path / file).write_bytes(whole[: int(share * len(whole))])
    with pytest.raises(OSError, match=re.escape(str(tmp_path / file)) + " is damaged"):
        load_state_spaces_model(tmp_path)
    assert is_state_spaces_checkpoint(tmp_path) == (file == "pytorch_model.bin")


def test_missing_files_are_named(tmp_path):
    with pytest.raises(OSError, match=r"config.json of .* cannot be read"):
        load_state_spaces_model(tmp_path)
    (write(tmp_path, MAMBA, {}) / "pytorch_model.bin").unlink()
    with pytest.raises(OSError, match=r"pytorch_model.bin of .* cannot be read"):
        load_state_spaces_model(tmp_path)
    torch.save([1, 2], tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="dictionary of tensors"):
        load_state_spaces_model(tmp_path)


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_may_lack_the_head(tmp_path, tied):
    config = MAMBA | {"tie_embeddings": tied}
    weights = random_weights(config)
    del weights["lm_head.weight"]
    write(tmp_path, config, weights)
    if not tied:
        with pytest.raises(ValueError, match=r"missing lm_head\.weight"):
            load_state_spaces_model(tmp_path)
        return
    model = load_state_spaces_model(tmp_path)
    assert model.lm_head.weight is model.backbone.embeddings.weight
    assert torch.equal(model.lm_head.weight, weights["backbone.embedding.weight"])


@pytest.mark.parametrize("name", ["model", "state_dict", "net"])
def test_checkpoints_of_training_runs_say_where_the_weights_are(tmp_path, name):
    original = write(tmp_path / "original", MAMBA, {name: random_weights(MAMBA), "step": 3})
    ours = tmp_path / "transformers"
    build(mamba_config()).save_pretrained(ours)
    (ours / "model.safetensors").unlink()
    torch.save({name: build(mamba_config()).state_dict(), "step": 3}, ours / "pytorch_model.bin")
    for folder in (original, ours):
        with pytest.raises(ValueError, match=rf"holds '{name}', 'step' and not weights alone.*\['{name}'\]"):
            load_model(folder)


def test_code_in_the_weights_is_not_run(tmp_path):
    class Trap:
        def __reduce__(self):
            return print, ("run",)

    write(tmp_path, MAMBA, {"backbone.embedding.weight": Trap()})
    with pytest.raises(OSError, match="is damaged"):
        load_state_spaces_model(tmp_path)


def test_other_checkpoints_are_not_in_the_original_layout(tmp_path):
    assert not is_state_spaces_checkpoint(tmp_path)
    assert not is_state_spaces_checkpoint(tmp_path / "nowhere")
    build(mamba_config()).save_pretrained(tmp_path)
    assert not is_state_spaces_checkpoint(tmp_path, revision="main", dtype="float32")
    (tmp_path / "config.json").write_text("[]")
    assert not is_state_spaces_checkpoint(tmp_path)


@pytest.fixture
def tokenizer_folder(tmp_path):
    from tokenizers import Tokenizer, models

    tokenizer = Tokenizer(models.WordLevel({"<|endoftext|>": 0, "a": 1}, unk_token="a"))
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(tmp_path / "tok")
    return tmp_path / "tok"


def test_tokenizer(tokenizer_folder, tmp_path, monkeypatch):
    original = write(tmp_path / "original", MAMBA, {})
    monkeypatch.setattr("hf_compressm.hub.tokenizer.TOKENIZER", str(tokenizer_folder))
    for tokenizer in (load_tokenizer(original, revision="v1"), load_tokenizer(original, tokenizer=tokenizer_folder)):
        assert tokenizer.padding_side == "left"
        assert tokenizer.pad_token_id == 0
    build(mamba_config()).save_pretrained(tokenizer_folder)
    assert load_tokenizer(tokenizer_folder).padding_side == "right"


def test_no_tokenizer(tmp_path):
    build(mamba_config()).save_pretrained(tmp_path)
    with pytest.raises(OSError, match="tokenizer="):
        load_tokenizer(tmp_path)
