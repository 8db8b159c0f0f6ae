"""Load the tokenizer that belongs to a checkpoint of either layout."""

from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..data.texts import STATE_SPACES_TOKENIZER as TOKENIZER
from .state_spaces import is_state_spaces_checkpoint, only_hub


def load_tokenizer(
    name_or_path: str | Path, *, tokenizer: str | Path | None = None, **hub_kwargs: Any
) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to a checkpoint of either layout.

    The original layout has none of its own: its models were trained with that of EleutherAI/gpt-neox-20b, which is
    set to pad on the left with its end-of-text token.

    Args:
        name_or_path: the model.
        tokenizer: take the tokenizer from here instead.
        hub_kwargs: `revision`, `token`, `cache_dir`, `local_files_only` and the like. `revision` and `subfolder` are
            those of the model, so they are dropped where the tokenizer is not beside it.

    Raises:
        OSError: if there is no tokenizer that can be read.
    """
    hub_kwargs = only_hub(hub_kwargs)
    original = is_state_spaces_checkpoint(name_or_path, **hub_kwargs)
    source = tokenizer or (TOKENIZER if original else name_or_path)
    if source is not name_or_path:
        hub_kwargs = {k: v for k, v in hub_kwargs.items() if k not in ("revision", "subfolder")}
    try:
        loaded = AutoTokenizer.from_pretrained(source, **hub_kwargs)
        # Where the files are missing, transformers returns a tokenizer that makes nothing of any text.
        if loaded.get_vocab().keys() <= set(loaded.all_special_tokens):
            raise OSError("it holds no vocabulary")
    except (OSError, ValueError) as error:
        raise OSError(
            f"No tokenizer for {name_or_path} could be loaded from {source}: {error}\n"
            "Name another folder or repository in `tokenizer=`."
        ) from error
    if original:
        loaded.padding_side = "left"
        loaded.pad_token = loaded.pad_token or loaded.eos_token
    return loaded
