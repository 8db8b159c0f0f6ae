"""The checkpoint that a slim model came from: its config with the sizes changed, and the files that lie beside it.

transformers writes a config anew when it saves: names that it has since changed, infinities as `{"__float__": ...}`, defaults
of its own version. Engines and older versions of transformers that read the original don't read that. So a slim model with
one size for all layers, which is a stock checkpoint, keeps the config that it came with, but for what has changed since.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from huggingface_hub import hf_hub_download, snapshot_download
from safetensors import safe_open
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, logging

from ..compat.pretrained import commit_hash
from ..modeling.modeling_compressm import MODULE_NAME, is_slimmed
from ..reporting.card import CARD, FIGURE
from ..reporting.record import RECORD, base_model, history_of

logger = logging.get_logger(__name__)

# What is made anew, and weights of all formats; and nothing in folders.
_WEIGHTS = ("safetensors", "bin", "pt", "pth", "ckpt", "msgpack", "h5", "onnx", "gguf", "npz")
_NOT_CARRIED = (
    *(CONFIG_NAME, CARD, RECORD, f"{MODULE_NAME}.py", FIGURE, ".*", "*.index.json", "trainer_state.json"),
    *(f"*.{suffix}" for suffix in _WEIGHTS),
    "*/*",
)
_TOKENIZER = ("tokenizer*", "vocab.*", "merges.txt", "special_tokens_map.json", "added_tokens.json", "chat_template*")
_IGNORED = ("transformers_version", "_name_or_path")
_OLD_NAMES = {"dtype": "torch_dtype"}
_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def config_files(model: PreTrainedModel) -> dict[str, bytes]:
    """config.json of a slim model with one size for all layers, by its name: its source's, with what has changed since.

    Nothing for a model that was never cut or has layers of different sizes, or if the source is gone or of another layout.
    """
    found = _config_of_stock(model)
    if found is None:
        return {}
    path, config = found
    before, after = _values(type(model.config).from_json_file(path)), _values(model.config)
    after |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    _edit(config, before, after, model.config.attribute_map)
    return {CONFIG_NAME: f"{json.dumps(config, indent=2, ensure_ascii=False)}\n".encode()}


@dataclass(frozen=True)
class Layout:
    """Where a checkpoint keeps its tensors.

    Attributes:
        files: the shard that holds each tensor, by name; empty if there is one file.
        dtypes: of the tensors that it holds in more bits than the model does.
    """

    files: dict[str, str]
    dtypes: dict[str, torch.dtype]


def source_layout(model: PreTrainedModel) -> Layout:
    """Of the checkpoint that a slim model with one size for all layers came from; empty where `config_files` is.

    transformers loads all tensors in one dtype. Those that the source has in a wider one, such as A_log in float32 among bfloat16,
    are written in it again, if the model still has the dtype that the source's config names. None is written in fewer bits
    than the model has.
    """
    found = _config_of_stock(model)
    if found is None:
        return Layout({}, {})
    path, config = found
    index = path.parent / SAFE_WEIGHTS_INDEX_NAME
    files = json.loads(index.read_text(encoding="utf-8"))["weight_map"] if index.is_file() else {}
    dtypes: dict[str, torch.dtype | None] = {}
    for file in sorted(set(files.values()) or {SAFE_WEIGHTS_NAME}):
        if (path.parent / file).is_file():
            with safe_open(path.parent / file, framework="pt") as tensors:
                dtypes |= {name: _DTYPES.get(tensors.get_slice(name).get_dtype()) for name in tensors.keys()}  # noqa: SIM118
    its_own = config.get("dtype", config.get("torch_dtype")) == str(model.dtype).removeprefix("torch.")
    wider = {name: dtype for name, dtype in dtypes.items() if dtype and dtype.itemsize > model.dtype.itemsize}
    return Layout(files, wider if its_own else {})


def write_companions(model: PreTrainedModel, folder: str | Path, tokenizer: Any = None) -> None:
    """Write what belongs to a model beside weights, config and card: the files of its source, as they are, and a tokenizer.

    Args:
        model: that was saved in the folder.
        folder: where to.
        tokenizer: for the model; if it is the source's, then that one's files stay as they are there.
    """
    source = _folder(model) if _original_config(model) is not None else None
    files = [] if source is None else [path for path in source.iterdir() if path.is_file()]
    files = [path for path in files if not _matches(path, _NOT_CARRIED)]
    saved = {} if tokenizer is None else _saved(tokenizer)
    its_own = source is not None and saved == _saved_of(source)
    if saved and not its_own:
        files = [path for path in files if not _matches(path, _TOKENIZER)]
    for name, content in saved.items():
        if not its_own or Path(name).parent != Path():  # only files of no folder are carried over
            (Path(folder) / name).parent.mkdir(exist_ok=True)
            (Path(folder) / name).write_bytes(content)
    if source is not None and not source.samefile(folder):
        for path in files:
            shutil.copyfile(path, Path(folder) / path.name)


def _config_of_stock(model: PreTrainedModel) -> tuple[Path, dict[str, Any]] | None:
    return None if is_slimmed(model.config) or not history_of(model) else _original_config(model)


def _original_config(model: PreTrainedModel) -> tuple[Path, dict[str, Any]] | None:
    """The config.json that a model came from, and what it says; None if it is gone or of another layout."""
    repository, path = base_model(model), Path(str(getattr(model.config, "name_or_path", "") or "")) / CONFIG_NAME
    try:
        if repository is not None:  # from the cache, as a rule
            path = Path(hf_hub_download(repository, CONFIG_NAME, revision=commit_hash(model.config)))
        config: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return (path, config) if config.get("model_type") == model.config.model_type else None


def _folder(model: PreTrainedModel) -> Path | None:
    """The folder that a model came from, of a repository with all but its weights; None if it can't be read."""
    repository = base_model(model)
    if repository is None:
        return Path(str(model.config.name_or_path))
    try:
        found = snapshot_download(repository, revision=commit_hash(model.config), ignore_patterns=list(_NOT_CARRIED))
    except OSError as error:
        logger.warning(
            f"hf_compressm: {repository} can't be read again ({error}): none of its other files are carried over."
        )
        return None
    return Path(found)


def _values(config: PreTrainedConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return values


def _edit(
    original: dict[str, Any], before: Mapping[str, Any], after: Mapping[str, Any], aliases: Mapping[str, str]
) -> None:
    """Write what differs between two configs in the first one's file, under the names that this uses. In place."""
    names = {canonical: alias for alias, canonical in aliases.items()} | _OLD_NAMES
    names = {
        key: names[key] if key not in original and names.get(key) in original else key for key in (*before, *after)
    }
    for key in before.keys() - after.keys():
        original.pop(names[key], None)
    for key, value in after.items():
        name = names[key]
        if isinstance(value, dict) and isinstance(original.get(name), dict) and isinstance(before.get(key), dict):
            _edit(original[name], before[key], value, {})
        elif value != before.get(key) and key not in _IGNORED:
            original[name] = value


def _matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.name, pattern) for pattern in patterns)


def _saved(tokenizer: Any) -> dict[str, bytes]:
    """Its files by their names, those in folders too."""
    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        files = [path for path in Path(folder).rglob("*") if path.is_file()]
        return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def _saved_of(source: Path) -> dict[str, bytes]:
    """What the source's own tokenizer would be saved as."""
    try:
        return _saved(AutoTokenizer.from_pretrained(source))
    except (OSError, ValueError):
        return {}
