"""Files that are whole or not there, whenever their writing is interrupted."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path


def write_files_whole(folder: str | Path, contents: Mapping[str, bytes]) -> None:
    """Write files to a folder, each in place of an older one only once it is written."""
    for name, content in contents.items():
        partial = Path(folder) / f".{name}.partial"
        partial.write_bytes(content)
        partial.replace(Path(folder) / name)
