"""Whatever saves or pushes a slimmed model writes its model card, too, once `install` was called.

`save_pretrained`, `push_to_hub`, and `Trainer`'s own pushes, each of which writes a card of its own over that of the
save before it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from .model_card import write_model_card
from .modeling_compressm import MODULE_NAME, SOURCE, _wrap_once


def install() -> None:
    """Teach `PreTrainedModel` and `Trainer` to write the card. Does nothing the second time."""
    _wrap_once(PreTrainedModel, "save_pretrained", _card_beside)
    _wrap_once(PreTrainedModel, "_upload_modified_files", _card_in_upload)


def _card_beside(stock_save: Callable) -> Callable:
    def save_pretrained(
        self: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        _install_in_trainer()
        result = stock_save(self, save_directory, is_main_process, *args, **kwargs)
        if is_main_process:
            write_model_card(self, save_directory)
        return result

    return save_pretrained


def _card_in_upload(stock_upload: Callable) -> Callable:
    def _upload_modified_files(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        write_model_card(self, working_dir, repo_id)
        return stock_upload(self, working_dir, repo_id, *args, **kwargs)

    return _upload_modified_files


def _install_in_trainer() -> None:
    """Once a Trainer saves: it is slow to import where none is used. Every push of it saves first."""
    module = sys.modules.get("transformers.trainer")
    if module is not None:
        _wrap_once(module.Trainer, "create_model_card", _card_after_trainers)
        _wrap_once(module.Trainer, "_push_from_checkpoint", _all_files_from_checkpoint)


def _card_after_trainers(stock_create: Callable) -> Callable:
    def create_model_card(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_create(self, *args, **kwargs)
        if self.is_world_process_zero():
            write_model_card(self.accelerator.unwrap_model(self.model), self.args.output_dir, self.hub_model_id)

    return create_model_card


def _all_files_from_checkpoint(stock_push: Callable) -> Callable:
    # It copies weights and config from the checkpoint to the folder that it uploads, but not what they need besides.
    def _push_from_checkpoint(self: Any, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            model = self.accelerator.unwrap_model(self.model)
            if getattr(model.config, "is_heterogeneous", False):
                code = Path(self.args.output_dir) / f"{MODULE_NAME}.py"
                code.write_text(SOURCE, encoding="utf-8")
            write_model_card(model, self.args.output_dir, self.hub_model_id)
        stock_push(self, checkpoint_folder)

    return _push_from_checkpoint
