"""Load, save and exchange slimmed models. Importing it teaches transformers to build them."""

from .heterogeneous import (
    check_state_sizes,
    get_state_sizes,
    get_unprojected_state_sizes,
    set_state_sizes,
    text_configs,
)
from .model_card import model_card, write_model_card
from .modeling_compressm import ProjectedMamba2Mixer, install, project_
from .pretrained import load_model
from .publish import check_login, publish
from .saving import install as _install_saving
from .state_spaces import (
    export_mamba_ssm,
    is_state_spaces_checkpoint,
    load_state_spaces_model,
    load_tokenizer,
)

_install_saving()

__all__ = [
    "ProjectedMamba2Mixer",
    "check_login",
    "check_state_sizes",
    "export_mamba_ssm",
    "get_state_sizes",
    "get_unprojected_state_sizes",
    "install",
    "is_state_spaces_checkpoint",
    "load_model",
    "load_state_spaces_model",
    "load_tokenizer",
    "model_card",
    "project_",
    "publish",
    "set_state_sizes",
    "text_configs",
    "write_model_card",
]
