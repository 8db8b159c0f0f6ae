"""Load, save, push and exchange slimmed models. Importing it teaches transformers to save all that belongs to them."""

from .export import export_mamba_ssm
from .pretrained import default_device_map, load_model
from .publish import check_login, publish
from .saving import install
from .source import write_companions
from .state_spaces import is_state_spaces_checkpoint, load_state_spaces_model
from .tokenizer import load_tokenizer

install()

__all__ = [
    "check_login",
    "default_device_map",
    "export_mamba_ssm",
    "is_state_spaces_checkpoint",
    "load_model",
    "load_state_spaces_model",
    "load_tokenizer",
    "publish",
    "write_companions",
]
