"""`compressm.json`: what was done to a model, kept beside its config.json wherever it is saved.

A model that was cut in this process carries its history as an attribute; one that was loaded has it beside the
checkpoint that it came from. Each cut appends to it.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HFValidationError, LocalEntryNotFoundError
from huggingface_hub.utils import validate_repo_id
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoConfig, PreTrainedModel
from transformers.utils import CONFIG_NAME, logging

from ..compat.pretrained import commit_hash
from ..compat.wrapping import inside
from ..config import CompreSSMConfig
from ..modeling.modeling_compressm import ARCHITECTURES
from ..modeling.state_sizes import get_state_sizes
from .report import CompressionReport
from .rows import Healing

logger = logging.get_logger(__name__)

RECORD = "compressm.json"
SCHEMA_VERSION = 1
_ATTRIBUTES = ("compression_report", "compression_history")


@dataclass(frozen=True)
class Cut:
    """One cut of a model, or all cuts of one training run.

    Attributes:
        report: what was measured and what was cut.
        config: the values of the `CompreSSMConfig` that it was made by.
        base: the repository on the Hub that the model came from, or None.
        versions: of this package, torch and transformers.
    """

    report: CompressionReport
    config: Mapping[str, Any]
    base: str | None
    versions: Mapping[str, str]

    def to_dict(self) -> dict[str, Any]:
        """As JSON can hold it."""
        return {
            "config": dict(self.config),
            "report": self.report.to_dict(),
            "base": self.base,
            "versions": dict(self.versions),
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Cut:
        """From what `to_dict` gives."""
        report = CompressionReport.from_dict(values["report"])
        return cls(report, values["config"], values.get("base"), values.get("versions", {}))


def record_cut_(
    model: PreTrainedModel,
    report: CompressionReport | None,
    config: CompreSSMConfig,
    earlier: tuple[Cut, ...],
) -> None:
    """Make a report that of a model, and append the cut to its history if it cut anything. In place.

    Args:
        model: that was cut.
        report: None if nothing was cut.
        config: of the cut.
        earlier: the history to append to, as `history_of` gave it before the cut.
    """
    history = earlier
    set_report_(model, report)
    if report is not None and report.states_after < report.states_before:
        history = (*history, Cut(report, config.to_dict(), base_model(model), _versions()))
    model.compression_history = history  # type: ignore[assignment]


def record_healing_(model: PreTrainedModel, healing: Healing, config: CompreSSMConfig) -> CompressionReport:
    """Add to a model's report, and to its last cut, that it was healed, and by what config. In place.

    Returns:
        the report.
    """
    *earlier, last = history_of(model)
    report = replace(last.report, healing=healing)
    set_report_(model, report)
    model.compression_history = (*earlier, replace(last, report=report, config=config.to_dict()))  # type: ignore[assignment]
    return report


def set_report_(model: PreTrainedModel, report: CompressionReport | None) -> None:
    """Replace a model's report, and with it that of its last cut. In place."""
    model.compression_report = report  # type: ignore[assignment]


def history_of(model: PreTrainedModel) -> tuple[Cut, ...]:
    """All cuts of a model, the first one first: of this process, and before it those of the checkpoint it came from."""
    known: Any = getattr(model, "compression_history", None)
    history: tuple[Cut, ...] = _of_origin(model) if known is None else known
    if known is None:
        model.compression_history = history  # type: ignore[assignment]
    report: Any = getattr(model, "compression_report", None)
    if history and report is not None and report.resized == history[-1].report.resized:
        last = history[-1]
        history = (*history[:-1], Cut(report, last.config, last.base, last.versions))
    return history


class Recorded:
    """A model's report and history as they are now, to be put back by `restore_`."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.values = {name: getattr(model, name) for name in _ATTRIBUTES if hasattr(model, name)}

    def restore_(self) -> None:
        """Give the model back what it had."""
        for name in _ATTRIBUTES:
            if name in self.values:
                setattr(self.model, name, self.values[name])
            elif hasattr(self.model, name):
                delattr(self.model, name)


def record_files(model: PreTrainedModel) -> dict[str, bytes]:
    """`compressm.json` of a model that was ever cut, by its name; nothing for any other."""
    history = history_of(model)
    if not history:
        return {}
    record = {"schema_version": SCHEMA_VERSION, "cuts": [cut.to_dict() for cut in history]}
    return {RECORD: f"{json.dumps(record, indent=1)}\n".encode()}


def read_record(name_or_path: str | Path, **hub_kwargs: Any) -> tuple[Cut, ...]:
    """The cuts of a saved model, the first one first.

    Args:
        name_or_path: a folder, or the name of a repository on the Hub.
        hub_kwargs: as for `hf_hub_download`: `revision`, `token`, `subfolder`, ...

    Raises:
        OSError: if there is no record, none that can be read, or one of other sizes than those of the model beside it.
    """
    path = Path(name_or_path) / RECORD
    if not Path(name_or_path).is_dir():
        try:
            path = Path(hf_hub_download(str(name_or_path), RECORD, **hub_kwargs))
        except HFValidationError as error:
            raise OSError(f"{name_or_path} is neither a folder nor the name of a repository on the Hub.") from error
        except LocalEntryNotFoundError as error:  # a kind of the next
            raise OSError(
                f"There is no folder {name_or_path}, and the Hub is out of reach: check the path, or try again online."
            ) from error
        except EntryNotFoundError as error:
            raise _no_record(name_or_path) from error
    if not path.is_file():
        raise _no_record(name_or_path)
    cuts = _parsed(path)
    if not _is_of(cuts[-1], path.parent):
        raise OSError(
            f"{path} is of other sizes than the {CONFIG_NAME} beside it: another model was saved there. Delete it."
        )
    return cuts


def is_of_another(folder: str | Path) -> bool:
    """Whether there is a record in a folder that is of other sizes than the model there."""
    path = Path(folder) / RECORD
    try:
        return path.is_file() and not _is_of(_parsed(path)[-1], path.parent)
    except OSError:
        return False


def _parsed(path: Path) -> tuple[Cut, ...]:
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        if record["schema_version"] > SCHEMA_VERSION:
            raise OSError(f"{path} was written by a newer hf_compressm: upgrade to read it.")
        cuts = tuple(Cut.from_dict(cut) for cut in record["cuts"])
        if not cuts:
            raise ValueError("it has no cut")
        return cuts
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(
            f"{path} is damaged ({type(error).__name__}: {error}): save or download the model again."
        ) from error


def _is_of(cut: Cut, folder: Path) -> bool:
    """Whether a folder's model may have the sizes that a cut left."""
    try:
        config = AutoConfig.from_pretrained(folder).get_text_config()
    except (OSError, ValueError, KeyError):  # none, as of a plain module, or one that loading it complains of
        return True
    return _left_sizes_of(cut, config)


def _left_sizes_of(cut: Cut, config: Any) -> bool:
    """Whether the sizes that a cut left are those in a config, which may be of a model that has none."""
    try:
        sizes = get_state_sizes(config)
    except ValueError:
        return False
    return all(index < len(sizes) and sizes[index] == size for index, size in cut.report.sizes.items())


def get_report(source: PreTrainedModel | str | Path, **hub_kwargs: Any) -> CompressionReport:
    """The report of a slim model's last cut, in any process.

    Args:
        source: the model, also as DDP or torch.compile wraps it, its folder, or its name on the Hub.
        hub_kwargs: as for `hf_hub_download`, for a name.

    Raises:
        ValueError: if the model was never cut.
        TypeError: if it is none of these.
        OSError: if a folder or repository has no record that can be read.
    """
    if isinstance(source, str | Path):
        return read_record(source, **hub_kwargs)[-1].report
    if not isinstance(source, nn.Module):
        raise TypeError(
            f"A report is that of a model, its folder or its name on the Hub, got {source!r}: give one of these."
        )
    model = inside(source)
    history = history_of(inside(model.module) if isinstance(model, DistributedDataParallel) else model)
    if not history:
        raise ValueError(f"This {type(source).__name__} was not cut, so there is no report: call compress_ first.")
    return history[-1].report


def base_model(model: PreTrainedModel) -> str | None:
    """The repository on the Hub that a model was loaded from, or None if it came from elsewhere."""
    name = str(getattr(getattr(model, "config", None), "name_or_path", "") or "")
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return None if "/" not in name or Path(name).exists() else name


def _of_origin(model: Any) -> tuple[Cut, ...]:
    """The history beside the checkpoint that a model was loaded from, if it is that of layers of these sizes."""
    if not isinstance(model, PreTrainedModel):
        return ()
    name, config = str(getattr(model.config, "name_or_path", "") or ""), model.config.get_text_config()
    if Path(name).is_dir():
        there = (Path(name) / RECORD).is_file()
    else:
        # The Hub is not asked about models without a state.
        there = base_model(model) is not None and config.model_type in ARCHITECTURES
        there = there and _is_on_hub(name, commit_hash(model.config))
    if not name or not there:
        return ()
    try:
        history = read_record(name, revision=commit_hash(model.config))
    except OSError as error:
        logger.warning(f"hf_compressm: the history of earlier cuts is lost, since it can't be read: {error}")
        return ()
    return history if _left_sizes_of(history[-1], config) else ()


def _is_on_hub(name: str, revision: str | None) -> bool:
    if isinstance(try_to_load_from_cache(name, RECORD, revision=revision), str):
        return True
    try:
        hf_hub_download(name, RECORD, revision=revision)
    except LocalEntryNotFoundError:  # a kind of the next
        logger.warning(
            f"hf_compressm: the Hub is out of reach, so that it is not known whether {name} was cut before: if it was, the record of "
            "those cuts is not carried on."
        )
        return False
    except (OSError, EntryNotFoundError):
        return False
    return True


def _no_record(name: str | Path) -> OSError:
    return OSError(f"{name} has no {RECORD}: it was not cut by hf_compressm, or by a version before 0.2.")


def _versions() -> dict[str, str]:
    versions = {}
    for name in ("hf_compressm", "torch", "transformers"):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that is not installed
            versions[name] = "unknown"
    return versions
