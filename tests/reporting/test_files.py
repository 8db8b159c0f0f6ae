"""What is written beside a model's weights is whole or not there, and is ready before the first of them is written."""

from __future__ import annotations

import sys

import pytest

from hf_compressm import CompreSSMConfig, compress_
from hf_compressm.reporting import card
from hf_compressm.reporting.record import RECORD
from hf_compressm.reporting.report import CompressionReport

BESIDE = {RECORD, card.CARD, card.FIGURE}


@pytest.fixture
def slim(mamba, token_ids):
    compress_(mamba, CompreSSMConfig(state_size={0: 3}), token_ids)
    return mamba


@pytest.fixture
def events(tmp_path):
    """(what, name) of each opening and renaming in the folder; `events.stop` raises after so many of them."""
    seen: list[tuple[str, str]] = []

    class Events:
        stop = None
        on = True

    def hook(event: str, arguments: tuple) -> None:
        writes = event == "os.rename" or (event == "open" and "w" in str(arguments[1]))
        if Events.on and writes and str(tmp_path) in str(arguments[0]):
            seen.append((event, str(arguments[event == "os.rename"]).rpartition("/")[2]))
            if Events.stop == len(seen):
                raise KeyboardInterrupt

    sys.addaudithook(hook)
    Events.seen = seen
    yield Events
    Events.on = False


def test_the_figure_is_drawn_before_anything_is_written(slim, tmp_path, events, monkeypatch):
    drawn = []
    plot = CompressionReport.plot
    monkeypatch.setattr(CompressionReport, "plot", lambda self: drawn.append(list(events.seen)) or plot(self))
    slim.save_pretrained(tmp_path)
    assert drawn == [[]]
    names = [name for event, name in events.seen if event == "open"]
    assert names[-3:] == [f".{name}.partial" for name in (RECORD, card.CARD, card.FIGURE)]
    renamed = [name for event, name in events.seen if event == "os.rename"]
    assert set(renamed) >= BESIDE | {"modeling_compressm.py"}
    assert not {name for event, name in events.seen if event == "open"} & (BESIDE | {"modeling_compressm.py"})


def test_a_save_that_is_interrupted_leaves_the_older_files_whole(slim, tmp_path, events, token_ids):
    slim.save_pretrained(tmp_path)
    before = {name: (tmp_path / name).read_bytes() for name in BESIDE}
    compress_(slim, CompreSSMConfig(state_size={1: 3}), token_ids)
    events.seen.clear()
    slim.save_pretrained(tmp_path / "whole")
    moments, after = len(events.seen), {name: (tmp_path / "whole" / name).read_bytes() for name in BESIDE}
    assert all(before[name] != after[name] for name in BESIDE)
    for moment in range(1, moments + 1):
        events.seen.clear()
        events.stop = moment
        with pytest.raises(KeyboardInterrupt):
            slim.save_pretrained(tmp_path)
        for name in BESIDE:
            assert (tmp_path / name).read_bytes() in (before[name], after[name]), (moment, name)
    events.stop = None
    slim.save_pretrained(tmp_path)
    assert not list(tmp_path.glob(".*.partial"))
