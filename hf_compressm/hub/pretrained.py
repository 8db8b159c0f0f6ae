"""Load a checkpoint of either layout exactly as it is on disk, or say what is wrong with it."""

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.utils import CONFIG_NAME, WEIGHTS_NAME, logging

from ..backends import launched
from .state_spaces import is_state_spaces_checkpoint, load_state_spaces_model, only_hub, refuse_nested_weights

logger = logging.get_logger(__name__)


def load_model(name_or_path: str | Path, **from_pretrained_kwargs: Any) -> PreTrainedModel:
    """Load a causal language model from the Hub or a folder, in the layout of transformers or of `state-spaces/*`.

    Stricter than `from_pretrained`: a weight that is not in the checkpoint is an error, where transformers warns and
    draws it at random, and so is one that the model has no place for, where transformers leaves it out.

    Args:
        name_or_path: a name on the Hub or a local folder.
        from_pretrained_kwargs: as for `from_pretrained`.

    Raises:
        OSError: if there is no such checkpoint, or a file of it is missing, damaged or half written.
        ValueError: if its weights don't fit its config or are quantised, or it is no causal language model.
    """
    check_name(name_or_path)
    hub_kwargs = only_hub(from_pretrained_kwargs)
    if is_state_spaces_checkpoint(name_or_path, **hub_kwargs):
        return load_state_spaces_model(name_or_path, **from_pretrained_kwargs)
    _check_folder(Path(name_or_path), hub_kwargs.get("subfolder", ""))
    # What does not fit is told with the rest, and refused below.
    kwargs = from_pretrained_kwargs | {"output_loading_info": True, "ignore_mismatched_sizes": True}
    config = kwargs.get("config")
    if not hasattr(config, "to_dict"):
        trust = kwargs.get("trust_remote_code")
        config = AutoConfig.from_pretrained(config or name_or_path, trust_remote_code=trust, **hub_kwargs)
    if kwargs.get("quantization_config") or getattr(config, "quantization_config", None):
        raise ValueError(
            f"{name_or_path} is quantised: load and cut the checkpoint that it was made from, in bf16 or float32, and "
            "quantise the slim one."
        )
    if getattr(config, "rescale_prenorm_residual", False):
        # transformers 5 treats trained weights as fresh ones here: each from_pretrained divides them once more.
        logger.warning(
            f"{name_or_path} has rescale_prenorm_residual=True, by which from_pretrained divides each out_proj.weight by "
            "the square root of the number of layers. It is loaded with False, so that the weights are those on disk."
        )
        if hasattr(kwargs.get("config"), "to_dict"):
            kwargs["config"] = copy.deepcopy(config)
            kwargs["config"].rescale_prenorm_residual = False
        else:
            kwargs["rescale_prenorm_residual"] = False
    weights = Path(name_or_path) / hub_kwargs.get("subfolder", "") / WEIGHTS_NAME
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(name_or_path, **kwargs)
    except (SafetensorError, EOFError, pickle.UnpicklingError) as error:
        raise _incomplete(name_or_path, error) from error
    except OSError as error:
        if error.errno is None and not isinstance(error, FileNotFoundError):
            raise  # transformers' own, which explains itself
        raise _incomplete(name_or_path, error) from error
    except RuntimeError as error:
        if "PytorchStreamReader" not in str(error):
            raise
        raise _incomplete(name_or_path, error) from error
    except AttributeError:
        _check_weights(weights)
        raise
    model: PreTrainedModel = loaded[0]
    info = loaded[1]
    missing = sorted(info["missing_keys"])
    if missing:
        _check_weights(weights)
        raise _incomplete(name_or_path, f"{len(missing)} weights are not in it: {_some(missing)}")
    unexpected = sorted(info["unexpected_keys"])
    if unexpected:
        raise ValueError(
            f"{name_or_path} holds {len(unexpected)} weights that the model of its config.json has no place for: "
            f"{_some(unexpected)}. It would be another model without them: are both files from the same one?"
        )
    if info["mismatched_keys"]:
        raise ValueError(
            f"Weights of {name_or_path} have other shapes than its config.json says: "
            f"{sorted(info['mismatched_keys'])[:5]}. Are both from the same model?"
        )
    return model


def default_device_map() -> dict[str, int] | None:
    """Where a model is loaded if nobody says: on this process's GPU, if there is one.

    transformers loads on the CPU. There a cut takes many times as long, and beside an installed mamba_ssm, whose kernels
    are called for any device, no Mamba runs at all.
    """
    if not torch.cuda.is_available():
        return None
    if launched() == 1:
        return {"": torch.cuda.current_device()}
    rank = os.environ.get("LOCAL_RANK")  # which launchers other than torchrun and accelerate may not tell
    return None if rank is None or int(rank) >= torch.cuda.device_count() else {"": int(rank)}


def check_name(name_or_path: str | Path) -> None:
    """Refuse what is neither a folder nor can be the name of a repository.

    Raises:
        OSError: with what to give instead.
    """
    if not isinstance(name_or_path, str | os.PathLike):
        raise TypeError(
            f"A model is given by its name on the Hub or its folder, got {type(name_or_path).__name__}: give one of these."
        )
    if os.path.isdir(name_or_path):
        return
    if os.path.exists(name_or_path):
        raise OSError(f"{name_or_path} is a file: name the folder that holds it, with config.json and the weights.")
    try:
        validate_repo_id(str(name_or_path))
    except HFValidationError as error:
        raise OSError(
            f"There is no folder {str(name_or_path)!r}, and it can't be the name of a repository on the Hub: check the path."
        ) from error


def _check_folder(folder: Path, subfolder: str) -> None:
    if folder.is_dir() and not (folder / subfolder / CONFIG_NAME).is_file():
        raise OSError(
            f"{folder / subfolder} has no {CONFIG_NAME}, so it holds no whole checkpoint: name the folder that "
            "save_pretrained wrote, or save or download it again."
        )


def _check_weights(path: Path) -> None:
    if path.is_file():
        refuse_nested_weights(path, torch.load(path, map_location="cpu", weights_only=True))


def _some(names: list[str]) -> str:
    return ", ".join(names[:5]) + (" and others" if len(names) > 5 else "")


def _incomplete(name: str | Path, reason: object) -> OSError:
    return OSError(
        f"The checkpoint {name} is damaged or only half written: {reason}\n"
        "Download it again (force_download=True for a Hub repository) or save it again."
    )
