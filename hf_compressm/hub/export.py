"""Write a model in the original layout, for mamba_ssm: the reverse of `state_spaces`."""

import json
from pathlib import Path
from typing import Any

import torch
from transformers import Mamba2ForCausalLM, MambaForCausalLM, PreTrainedModel
from transformers.utils import CONFIG_NAME, WEIGHTS_NAME

from ..modeling.state_sizes import get_state_sizes, get_unprojected_state_sizes
from .state_spaces import MIXER_FIELDS, MODEL_FIELDS


def export_mamba_ssm(model: PreTrainedModel, folder: str | Path) -> None:
    """Write a model in the original layout, for `mamba_ssm`'s `MambaLMHeadModel.from_pretrained(folder)`.

    Args:
        model: a `MambaForCausalLM` or `Mamba2ForCausalLM` whose layers have one unprojected state size.
        folder: a folder that is empty or not there yet.

    Raises:
        ValueError: if the original layout cannot hold the model.
        OSError: if the folder holds anything, or can't be written.
    """
    config = _to_original_config(model)
    weights = {
        name.replace("backbone.embeddings.", "backbone.embedding."): weight.detach().cpu()
        for name, weight in model.state_dict().items()
        if not weight.is_meta
    }
    if len(weights) < len(model.state_dict()):
        raise ValueError("Some weights are offloaded: load the model without offloading and export it again.")

    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise FileExistsError(f"{folder} is not empty: export to a new folder, mamba_ssm reads no other layout there.")
    try:
        torch.save(weights, folder / WEIGHTS_NAME)
    except RuntimeError as error:  # as where the disk is full
        raise OSError(f"{folder / WEIGHTS_NAME} could not be written: {error}") from error
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _to_original_config(model: PreTrainedModel) -> dict[str, Any]:
    config: Any = model.config
    if not isinstance(model, (MambaForCausalLM, Mamba2ForCausalLM)):
        raise ValueError(
            f"Only MambaForCausalLM and Mamba2ForCausalLM have an original layout, this is a {type(model).__name__}."
        )
    if any(get_unprojected_state_sizes(config)):
        raise ValueError(
            "mamba_ssm has no projected states: compress with uniform=True to export it, or use `save_pretrained`."
        )
    sizes = get_state_sizes(config)
    if len(set(sizes)) > 1:
        raise ValueError(
            f"mamba_ssm has one state size for all layers, this model has {sizes}: compress with uniform=True to "
            "export, or use `save_pretrained`."
        )
    if config.layer_norm_epsilon != 1e-5 or config.hidden_act not in ("silu", "swish"):
        raise ValueError(
            "mamba_ssm has layer_norm_epsilon 1e-5 and hidden_act 'silu' built in, this model has "
            f"{config.layer_norm_epsilon} and {config.hidden_act!r}: use `save_pretrained`."
        )
    layer = "Mamba1" if isinstance(model, MambaForCausalLM) else "Mamba2"
    original = {ours: getattr(config, theirs) for ours, (theirs, _) in MODEL_FIELDS.items()}
    ssm_cfg = {
        ours: getattr(config, theirs)
        for ours, (theirs, default) in MIXER_FIELDS[layer].items()
        if ours == "d_state" or getattr(config, theirs) != default
    }
    # Its default is infinite, which JSON cannot hold.
    if tuple(ssm_cfg.get("dt_limit", ())) == MIXER_FIELDS["Mamba2"]["dt_limit"][1]:
        del ssm_cfg["dt_limit"]
    return original | {
        "vocab_size": config.vocab_size,
        "pad_vocab_size_multiple": 1,
        "rms_norm": True,
        "fused_add_norm": True,
        "ssm_cfg": {"layer": layer} | ssm_cfg,
    }
