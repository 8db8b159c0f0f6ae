"""Push everything that belongs to a slimmed model in one commit: all of it arrives, or nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import HfApi
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, HTTPError
from transformers import PreTrainedModel

from ..reporting.card import CARD
from .saving import write_files
from .source import write_companions


def check_login(token: str | bool | None = None) -> None:
    """Ask the Hub who this is, before hours of work for a push that it would refuse.

    Raises:
        OSError: if there is no token, the Hub does not know it, or the Hub can't be reached.
    """
    with _explained("the Hub"):
        HfApi(token=token).whoami()


def publish(
    model: PreTrainedModel,
    repo_id: str,
    *,
    tokenizer: Any = None,
    private: bool | None = None,
    token: str | bool | None = None,
) -> str:
    """Push all that belongs to a slim model to the Hub, in one commit.

    That is weights, configs, the code file if one is needed, tokenizer and model card, and what else lies beside the checkpoint
    that it came from, as it is there.

    A push that was interrupted left nothing in the repository; the next one does not send again the large files that
    had arrived.

    Args:
        model: slimmed or not.
        repo_id: "name" or "owner/name"; made if it is not there. A model card in it keeps its own text.
        tokenizer: pushed with the model; if it is the source's, as the files that it has there.
        private: make a new repository private.
        token: as for `from_pretrained`; by default that of `hf auth login`.

    Returns:
        the full name of the repository.

    Raises:
        OSError: if the Hub refuses or the push was interrupted; the message says which.
    """
    api = HfApi(token=token)
    with _explained(repo_id), TemporaryDirectory() as folder:
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        model.save_pretrained(folder)
        write_companions(model, folder, tokenizer)
        _keep_card(api, repo_id, Path(folder))
        write_files(model, folder, repo_id)
        api.upload_folder(repo_id=repo_id, folder_path=folder, commit_message="Upload slim model")
    return repo_id


def _keep_card(api: HfApi, repo_id: str, folder: Path) -> None:
    try:
        old = api.hf_hub_download(repo_id, CARD, force_download=True)
    except EntryNotFoundError:
        (folder / CARD).unlink(missing_ok=True)
    else:
        (folder / CARD).write_bytes(Path(old).read_bytes())


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """Every way in which a push fails as an OSError that says what to do."""
    try:
        yield
    except HfHubHTTPError as error:
        status = error.response.status_code if error.response is not None else None
        if status == 401:
            reason = (
                "the Hub does not accept the token, or there is none: log in with `hf auth login`, or set HF_TOKEN"
            )
        elif status == 403:
            reason = "the token may not write there: take one with write access, and a repository of yours"
        else:
            reason = str(error)
        raise OSError(f"{what}: {reason}. Nothing was pushed.") from error
    except (HTTPError, RuntimeError) as error:
        cause = error.__cause__ or error
        raise OSError(
            f"{what}: the connection failed ({cause}). Nothing was published there: push again to complete it."
        ) from error
