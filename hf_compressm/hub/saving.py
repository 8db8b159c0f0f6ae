"""Whatever saves or pushes a slimmed model writes what belongs to it, too, once `install` was called.

That is its model card, its history, `compressm.json`, and the config of its source (the code file comes with the config). A slim model keeps its stock
class, so there is no method of its own to override; what is patched, and why no public hook will do:

- `PreTrainedModel.save_pretrained`: everything that saves a model ends there.
- `PreTrainedModel._upload_modified_files`: pushing writes a template of a card over that of the save before it, and a
  save that pushes has looked which files are new before it comes back.
- `split_torch_state_dict_into_shards`, as `save_pretrained` calls it: the last that sees the tensors under the names that
  they are written with, and the only one that says to which files they go.
- `Trainer.create_model_card`: writes a card of its own over that of the save before it. A callback's `on_push_begin`
  comes before it, and a Trainer of a slim model need not have a callback of ours.
- `Trainer._push_from_checkpoint`: copies weights and config to the folder that it uploads, and nothing else.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel, modeling_utils

from ..compat.pretrained import SPLIT, UPLOAD
from ..compat.trainer import PUSH_FROM_CHECKPOINT
from ..modeling.modeling_compressm import is_slimmed, wrap_once, write_source
from ..reporting.card import FIGURE, card_files, without_section, write_model_card
from ..reporting.files import write_files_whole
from ..reporting.record import RECORD, is_of_another, record_files
from .source import Layout, config_files, source_layout

_LAYOUT: ContextVar[Layout | None] = ContextVar("layout", default=None)
"""That the model which is being saved is written in; None while none is."""


def install() -> None:
    """Teach `PreTrainedModel` and `Trainer` to write them. Does nothing the second time."""
    wrap_once(PreTrainedModel, "save_pretrained", _with_files)
    wrap_once(PreTrainedModel, UPLOAD, _with_files_in_upload)
    wrap_once(modeling_utils, SPLIT, _as_in_source)


def write_files(model: PreTrainedModel, folder: str | Path, repo_id: str | None = None) -> None:
    """Write what belongs to a slimmed model beside its weights, if it was ever cut: config, history and card."""
    write_files_whole(folder, _files(model, folder, repo_id))


def _files(model: PreTrainedModel, folder: str | Path, repo_id: str | None = None) -> dict[str, bytes]:
    return config_files(model) | record_files(model) | card_files(model, folder, repo_id)


def _with_files(stock_save: Callable[..., Any]) -> Callable[..., Any]:
    def save_pretrained(
        self: Any, save_directory: Any, is_main_process: bool = True, *args: Any, **kwargs: Any
    ) -> Any:
        _install_in_trainer()
        # Before anything is written over the checkpoint that it came from, and so that nothing takes time in between.
        files = _files(self, save_directory) if is_main_process else {}
        layout = source_layout(self)
        if args or {"max_shard_size", "variant"} & kwargs.keys():  # the files are the caller's to choose
            layout = Layout({}, layout.dtypes)
        token = _LAYOUT.set(layout)
        try:
            result = stock_save(self, save_directory, is_main_process, *args, **kwargs)
        finally:
            _LAYOUT.reset(token)
        write_files_whole(save_directory, files)
        if is_main_process and is_of_another(save_directory):
            _remove_files_of_another(Path(save_directory))
        return result

    return save_pretrained


def _remove_files_of_another(folder: Path) -> None:
    """What a slim model left that another one was saved over."""
    left = without_section(folder)
    write_files_whole(folder, {name: content for name, content in left.items() if content})
    for name in (RECORD, FIGURE, *(name for name, content in left.items() if not content)):
        (folder / name).unlink(missing_ok=True)


def _as_in_source(stock_split: Callable[..., Any]) -> Callable[..., Any]:
    def split(state_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        layout = _LAYOUT.get() or Layout({}, {})
        for name in layout.dtypes.keys() & state_dict.keys():
            if not state_dict[name].is_meta:
                state_dict[name] = state_dict[name].to(layout.dtypes[name])
        result = stock_split(state_dict, *args, **kwargs)
        if not layout.files or state_dict.keys() - layout.files.keys():
            return result
        files: dict[str, list[str]] = {}
        for name in state_dict:
            files.setdefault(layout.files[name], []).append(name)
        return type(result)(result.metadata, files, {name: layout.files[name] for name in state_dict})

    return split


def _with_files_in_upload(stock_upload: Callable[..., Any]) -> Callable[..., Any]:
    def upload(self: Any, working_dir: Any, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        write_files(self, working_dir, repo_id)
        return stock_upload(self, working_dir, repo_id, *args, **kwargs)

    return upload


def _install_in_trainer() -> None:
    """Once a Trainer saves: it is slow to import where none is used. Every push of it saves first."""
    module = sys.modules.get("transformers.trainer")
    if module is not None:
        wrap_once(module.Trainer, "create_model_card", _card_after_trainers)
        wrap_once(module.Trainer, PUSH_FROM_CHECKPOINT, _all_files_from_checkpoint)


def _card_after_trainers(stock_create: Callable[..., Any]) -> Callable[..., Any]:
    def create_model_card(self: Any, *args: Any, **kwargs: Any) -> None:
        stock_create(self, *args, **kwargs)
        if self.is_world_process_zero():
            write_model_card(self.accelerator.unwrap_model(self.model), self.args.output_dir, self.hub_model_id)

    return create_model_card


def _all_files_from_checkpoint(stock_push: Callable[..., Any]) -> Callable[..., Any]:
    def push_from_checkpoint(self: Any, checkpoint_folder: str) -> None:
        if self.is_world_process_zero():
            model, folder = self.accelerator.unwrap_model(self.model), Path(self.args.output_dir)
            if is_slimmed(model.config):
                write_source(folder)
            write_files(model, folder, self.hub_model_id)
        stock_push(self, checkpoint_folder)

    return push_from_checkpoint
