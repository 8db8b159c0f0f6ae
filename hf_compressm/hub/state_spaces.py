"""The original layout of `state-spaces/mamba-*` checkpoints, which mamba_ssm reads and writes: loading it.

Such a checkpoint is a `config.json` with `d_model`, `n_layer` and `ssm_cfg` but no `model_type`, and a
`pytorch_model.bin`. It has no tokenizer. Names and defaults follow mamba_ssm 2.3 (`models/config_mamba.py`,
`models/mixer_seq_simple.py`, `modules/mamba_simple.py`, `modules/mamba2.py`).
"""

import json
import math
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedConfig,
)
from transformers.utils import CONFIG_NAME, WEIGHTS_NAME, cached_file

_HUB_KWARGS = ("cache_dir", "force_download", "proxies", "token", "revision", "local_files_only", "subfolder")
_REFUSED_KWARGS = ("config", "state_dict", "output_loading_info", "variant", "gguf_file", "use_safetensors")

# Original name -> (name in transformers, default in mamba_ssm).
MODEL_FIELDS = {
    "d_model": ("hidden_size", 2560),
    "n_layer": ("num_hidden_layers", 64),
    "residual_in_fp32": ("residual_in_fp32", True),
    "tie_embeddings": ("tie_word_embeddings", True),
}
MIXER_FIELDS: dict[str, dict[str, tuple[str, Any]]] = {
    "Mamba1": {
        "d_state": ("state_size", 16),
        "d_conv": ("conv_kernel", 4),
        "expand": ("expand", 2),
        "dt_rank": ("time_step_rank", "auto"),
        "dt_min": ("time_step_min", 0.001),
        "dt_max": ("time_step_max", 0.1),
        "dt_init": ("time_step_init_scheme", "random"),
        "dt_scale": ("time_step_scale", 1.0),
        "dt_init_floor": ("time_step_floor", 1e-4),
        "conv_bias": ("use_conv_bias", True),
        "bias": ("use_bias", False),
    },
    "Mamba2": {
        "d_state": ("state_size", 128),
        "d_conv": ("conv_kernel", 4),
        "expand": ("expand", 2),
        "headdim": ("head_dim", 64),
        "ngroups": ("n_groups", 1),
        "dt_min": ("time_step_min", 0.001),
        "dt_max": ("time_step_max", 0.1),
        "dt_init_floor": ("time_step_floor", 1e-4),
        "dt_limit": ("time_step_limit", (0.0, math.inf)),
        "bias": ("use_bias", False),
        "conv_bias": ("use_conv_bias", True),
        "chunk_size": ("chunk_size", 256),
    },
}
# Fields that change nothing in a trained model: which kernels run, and how fresh weights are drawn.
_IGNORED = {"vocab_size", "pad_vocab_size_multiple", "ssm_cfg", "attn_cfg", "fused_add_norm"}
_IGNORED_IN_MIXER = {"layer", "use_fast_path", "use_mem_eff_path", "sequence_parallel", "conv_init", "A_init_range"}
# Fields that transformers has no counterpart for, with the only value that can be loaded.
_FIXED = {"d_intermediate": 0, "attn_layer_idx": [], "rms_norm": True}
_FIXED_IN_MIXER = {
    "Mamba1": {},
    "Mamba2": {"d_ssm": None, "D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False},
}


def is_state_spaces_checkpoint(name_or_path: str | Path, **hub_kwargs: Any) -> bool:
    """Whether a folder or Hub repository holds a checkpoint in the original layout.

    False also where there is no readable `config.json`: loading the model in the ordinary way then says why.

    Args:
        name_or_path: a folder or the name of a repository.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` and the like; the rest is ignored.
    """
    try:
        config = _read_config(name_or_path, only_hub(hub_kwargs))
    except OSError:
        return False
    return "model_type" not in config and "d_model" in config and "n_layer" in config


def load_state_spaces_config(name_or_path: str | Path, **hub_kwargs: Any) -> MambaConfig | Mamba2Config:
    """The config of a checkpoint of the original layout, as transformers has it.

    Args:
        name_or_path, hub_kwargs: as for `is_state_spaces_checkpoint`.

    Raises:
        OSError: if it can't be read.
        ValueError: if transformers has no counterpart for the model.
    """
    return _to_transformers_config(_read_config(name_or_path, only_hub(hub_kwargs)), str(name_or_path))


def load_state_spaces_model(
    name_or_path: str | Path, **from_pretrained_kwargs: Any
) -> MambaForCausalLM | Mamba2ForCausalLM:
    """Load a checkpoint of the original layout as a transformers model.

    Args:
        name_or_path: a folder or the name of a repository, such as "state-spaces/mamba-130m".
        from_pretrained_kwargs: as for `from_pretrained`: `dtype`, `device_map`, `revision`, `token`, ...

    Raises:
        OSError: if a file is missing or damaged.
        ValueError: if transformers has no counterpart for the model, the weights do not fit the config, or an argument
            makes no sense for this layout.
    """
    refused = [name for name in _REFUSED_KWARGS if from_pretrained_kwargs.get(name)]
    if refused:
        raise ValueError(
            f"{', '.join(refused)}: not possible for {name_or_path}, whose config.json and {WEIGHTS_NAME} are in the "
            "original layout of state-spaces. Load it without, then `save_pretrained` it and load the result."
        )
    hub_kwargs = only_hub(from_pretrained_kwargs)
    model_kwargs = {k: v for k, v in from_pretrained_kwargs.items() if k not in (*_HUB_KWARGS, *_REFUSED_KWARGS)}
    config = load_state_spaces_config(name_or_path, **hub_kwargs)
    model_class = MambaForCausalLM if isinstance(config, MambaConfig) else Mamba2ForCausalLM
    weights = _read_weights(name_or_path, hub_kwargs)
    weights = {name.replace("backbone.embedding.", "backbone.embeddings."): w for name, w in weights.items()}
    _check_weights(weights, model_class, config, str(name_or_path))
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    model = model_class.from_pretrained(None, config=config, state_dict=weights, **model_kwargs)
    model.config.name_or_path = str(name_or_path)
    return model


def only_hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Of the arguments of `from_pretrained` those that say where to find a file."""
    return {name: kwargs[name] for name in _HUB_KWARGS if kwargs.get(name) is not None}


def _read_config(name_or_path: str | Path, hub_kwargs: dict[str, Any]) -> dict[str, Any]:
    path = _find(name_or_path, CONFIG_NAME, hub_kwargs)
    try:
        config = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise _damaged(path, error) from error
    if not isinstance(config, dict):
        raise _damaged(path, f"a JSON object is expected, not {type(config).__name__}")
    return config


def _read_weights(name_or_path: str | Path, hub_kwargs: dict[str, Any]) -> dict[str, torch.Tensor]:
    path = _find(name_or_path, WEIGHTS_NAME, hub_kwargs)
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.UnpicklingError) as error:
        raise _damaged(path, error) from error
    refuse_nested_weights(path, weights)
    if not isinstance(weights, dict) or not all(isinstance(weight, torch.Tensor) for weight in weights.values()):
        raise _damaged(path, "a dictionary of tensors is expected")
    return weights


def refuse_nested_weights(path: str | Path, loaded: Any) -> None:
    """Refuse the checkpoint of a training run, which holds its weights under a name.

    Raises:
        ValueError: with how to take them out.
    """
    inside = [name for name, value in loaded.items() if isinstance(value, dict)] if isinstance(loaded, dict) else []
    if inside:
        name = next((name for name in ("model", "state_dict", "model_state_dict") if name in inside), inside[0])
        raise ValueError(
            f"{path} holds {', '.join(map(repr, loaded))} and not weights alone: take them out, "
            f"torch.save(torch.load(path, weights_only=True)[{name!r}], path)."
        )


def _find(name_or_path: str | Path, filename: str, hub_kwargs: dict[str, Any]) -> str:
    reason: OSError | str = "there is no such file"
    try:
        path = cached_file(str(name_or_path), filename, **hub_kwargs)
    except OSError as error:
        path, reason = None, error
    if path is None:
        raise OSError(
            f"{filename} of {name_or_path} cannot be read: {reason}\n"
            "Check the name, or complete the download; a folder needs both config.json and the weights."
        )
    return path


def _damaged(path: str, reason: Exception | str) -> OSError:
    return OSError(
        f"{path} is damaged or only half written: {reason}\n"
        "Download it again (`force_download=True` for a Hub repository) or save it again."
    )


def _to_transformers_config(original: dict[str, Any], name: str) -> MambaConfig | Mamba2Config:
    ssm_cfg = original.get("ssm_cfg") or {}
    layer = ssm_cfg.get("layer", "Mamba1")
    if layer not in MIXER_FIELDS:
        raise ValueError(f"{name} has {layer} layers; only Mamba1 and Mamba2 can be loaded.")
    _refuse_unmapped(original, MODEL_FIELDS, _FIXED, _IGNORED, name)
    _refuse_unmapped(
        {field: value for field, value in ssm_cfg.items() if not (field == "d_ssm" and value == _d_inner(original))},
        MIXER_FIELDS[layer],
        _FIXED_IN_MIXER[layer],
        _IGNORED_IN_MIXER,
        name,
    )

    fields = {theirs: original.get(ours, default) for ours, (theirs, default) in MODEL_FIELDS.items()}
    fields |= {theirs: ssm_cfg.get(ours, default) for ours, (theirs, default) in MIXER_FIELDS[layer].items()}
    multiple = original.get("pad_vocab_size_multiple", 8)
    fields["vocab_size"] = math.ceil(original.get("vocab_size", 50277) / multiple) * multiple
    fields["layer_norm_epsilon"] = 1e-5
    # <|endoftext|> of the tokenizer begins, ends and pads.
    fields |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    if layer == "Mamba1":
        return MambaConfig(**fields)
    fields["num_heads"] = _d_inner(original) // fields["head_dim"]
    return Mamba2Config(**fields)


def _d_inner(original: dict[str, Any]) -> int:
    return int((original.get("ssm_cfg") or {}).get("expand", 2) * original.get("d_model", 2560))


def _refuse_unmapped(
    fields: dict[str, Any], mapped: Iterable[str], fixed: dict[str, Any], ignored: set[str], name: str
) -> None:
    for field, value in fields.items():
        if field in fixed and value != fixed[field]:
            raise ValueError(
                f"{name} has {field} = {value!r}, which transformers' Mamba models cannot express (only "
                f"{fixed[field]!r}): load it with mamba_ssm."
            )
        if field not in (*mapped, *fixed, *ignored):
            raise ValueError(f"{name} has the field {field} = {value!r}, whose meaning is not known here.")


def _check_weights(weights: dict[str, torch.Tensor], model_class: Any, config: PreTrainedConfig, name: str) -> None:
    with torch.device("meta"):
        wanted = {key: tuple(weight.shape) for key, weight in model_class(config).state_dict().items()}
    found = {key: tuple(weight.shape) for key, weight in weights.items()}
    if config.tie_word_embeddings and "lm_head.weight" not in found:
        del wanted["lm_head.weight"]  # which is that of the embeddings
    problems = [f"missing {key}" for key in wanted.keys() - found.keys()]
    problems += [f"unexpected {key}" for key in found.keys() - wanted.keys()]
    problems += [
        f"{key} is {list(found[key])} instead of {list(wanted[key])}"
        for key in wanted.keys() & found.keys()
        if found[key] != wanted[key]
    ]
    if problems:
        shown = "\n  ".join(sorted(problems)[:10])
        raise ValueError(
            f"The weights of {name} do not fit its config.json ({len(problems)} differences):\n  {shown}\n"
            "Are both files from the same model?"
        )
    head = weights.get("lm_head.weight")
    if config.tie_word_embeddings and head is not None and not head.equal(weights["backbone.embeddings.weight"]):
        raise ValueError(
            f"{name} has an lm_head of its own, but its config.json ties it to the embeddings: set `tie_embeddings` "
            "to false there."
        )
