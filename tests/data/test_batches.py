"""Calibration data in every form that people have it: the same batches, or a refusal."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import datasets
import numpy as np
import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader
from transformers import BatchEncoding

from hf_compressm import hankel_singular_values
from hf_compressm.data.batches import BATCH, batches_of
from hf_compressm.data.calibration import calibration_batches, sample
from hf_compressm.data.healing import HealingText
from tests.conftest import VOCABULARY, tiny_mamba, tiny_mamba2

N, L = 10, 12
IDS = torch.randint(1, VOCABULARY, (N, L), generator=torch.Generator().manual_seed(0))
MASK = torch.ones_like(IDS)
MASK[0, :4] = MASK[3, -5:] = MASK[9, :1] = 0
LISTS, MASKS = IDS.tolist(), MASK.tolist()
TABLE = {"input_ids": LISTS, "attention_mask": MASKS}


class Letters:
    """A tokenizer that knows the letters."""

    def __call__(self, text: str, truncation: bool = False, max_length: int | None = None) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) - ord("a") for letter in text][:max_length]}


TEXTS = ["".join(chr(ord("a") + i % 26) for i in row) for row in LISTS]
OF_TEXTS = torch.tensor([[i % 26 for i in row] for row in LISTS])


def same(data, ids: torch.Tensor, mask: torch.Tensor | None = None, tokenizer=None) -> bool:
    batches = batches_of(data, tokenizer)
    assert [len(batch["input_ids"]) for batch in batches] == [BATCH, len(ids) - BATCH]
    found = [torch.cat([batch[name] for batch in batches]) for name in ("input_ids", "attention_mask")]
    assert all(tensor.dtype == torch.int64 for tensor in found)
    return torch.equal(found[0], ids) and torch.equal(found[1], torch.ones_like(ids) if mask is None else mask)


def loader(**columns) -> Iterator:
    return DataLoader(datasets.Dataset.from_dict(columns).with_format("torch"), batch_size=BATCH)


@pytest.mark.parametrize(
    "data",
    [
        IDS,
        IDS.int(),
        IDS.to(torch.uint8),
        IDS.numpy(),
        IDS.numpy().astype(np.uint16),
        IDS.numpy()[:, ::-1][:, ::-1],
        np.asfortranarray(IDS.numpy()),
        LISTS,
        tuple(map(tuple, LISTS)),
        list(IDS),
        list(IDS.numpy()),
        [[np.int32(i) for i in row] for row in LISTS],
        {"input_ids": IDS},
        {"input_ids": LISTS, "labels": LISTS},
        BatchEncoding({"input_ids": IDS}),
        datasets.Dataset.from_dict({"input_ids": LISTS}),
        datasets.Dataset.from_dict({"input_ids": LISTS, "text": TEXTS}).with_format("numpy"),
        pd.DataFrame({"input_ids": LISTS}),
        pd.DataFrame({"input_ids": LISTS})["input_ids"],
        [IDS[:BATCH], IDS[BATCH:]],
        [{"input_ids": IDS[:BATCH]}, {"input_ids": LISTS[BATCH:]}],
        [{"input_ids": row, "labels": row} for row in LISTS],
        tuple({"input_ids": row} for row in IDS),
        [BatchEncoding({"input_ids": [np.int32(i) for i in row]}) for row in LISTS],
        loader(input_ids=LISTS),
        DataLoader(IDS, batch_size=None),
    ],
)
def test_token_ids(data):
    assert same(data, IDS)


@pytest.mark.parametrize("mask", [MASK, MASK.bool(), MASK.float(), MASK.numpy(), MASKS, MASK.bool().tolist()])
@pytest.mark.parametrize("ids", [IDS, LISTS])
def test_masks(ids, mask):
    assert same({"input_ids": ids, "attention_mask": mask}, IDS, MASK)


@pytest.mark.parametrize(
    "data",
    [
        datasets.Dataset.from_dict(TABLE),
        datasets.Dataset.from_dict(TABLE).with_format("torch"),
        datasets.Dataset.from_dict(TABLE).with_format("pandas"),
        pd.DataFrame(TABLE),
        [{"input_ids": row, "attention_mask": mask} for row, mask in zip(LISTS, MASKS, strict=True)],
        loader(**TABLE),
    ],
)
def test_tables_with_masks(data):
    assert same(data, IDS, MASK)


@pytest.mark.parametrize(
    "data",
    [
        TEXTS,
        tuple(TEXTS),
        np.array(TEXTS),
        {"text": TEXTS},
        datasets.Dataset.from_dict({"text": TEXTS, "label": [0] * N}),
        pd.DataFrame({"text": TEXTS}),
        pd.DataFrame({"text": TEXTS})["text"],
        [{"text": text, "label": 0} for text in TEXTS],
        DataLoader(TEXTS, batch_size=BATCH),
    ],
)
def test_texts(data):
    assert same(data, OF_TEXTS, tokenizer=Letters())
    with pytest.raises(TypeError, match="tokenizer"):
        batches_of(data)


def test_other_lengths_are_padded_on_the_left():
    rows, masks = [[1, 2, 3], [4], []], [[1, 0, 1], [1], []]
    expected = {"input_ids": torch.tensor([[1, 2, 3], [0, 0, 4], [0, 0, 0]])}
    for data, mask in ((rows, [1, 1, 1]), ({"input_ids": rows, "attention_mask": masks}, [1, 0, 1])):
        (batch,) = batches_of(data)
        assert torch.equal(batch["input_ids"], expected["input_ids"])
        assert batch["attention_mask"].tolist() == [mask, [0, 0, 1], [0, 0, 0]]


EMPTY = torch.ones_like(IDS)
EMPTY[1::3] = 0


@pytest.mark.parametrize(
    ("data", "ids"),
    [
        ({"input_ids": IDS, "attention_mask": EMPTY}, IDS[EMPTY[:, 0] == 1]),
        ([{"input_ids": IDS[:1], "attention_mask": EMPTY[1:2]}, IDS[:1]], IDS[:1]),
        ([""] * BATCH + TEXTS, OF_TEXTS),
        (DataLoader([""] * BATCH + TEXTS, batch_size=BATCH), OF_TEXTS),
        ([[], *LISTS, []], IDS),
        ([{"input_ids": row} for row in [[], *LISTS, []]], IDS),
    ],
    ids=["masks", "one row", "blank texts", "a stream of them", "empty lists", "of dictionaries"],
)
def test_rows_without_a_token_are_left_out(mamba, data, ids):
    batches = calibration_batches(data, mamba, Letters())
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), ids)
    if len(ids) > 1:
        rows = HealingText(data, mamba, Letters(), 10**4)._rows
        assert torch.equal(torch.cat([row["input_ids"] for row in rows]), ids)


def test_a_padding_sample_of_a_packed_row_is_left_out(monkeypatch):
    monkeypatch.setattr("hf_compressm.data.packing.heeds_seq_idx", lambda *args: True)
    numbers = torch.tensor([[0] * 9 + [-1] * 3]).expand(N, -1)
    data = {"input_ids": IDS, "attention_mask": (numbers == 0).long(), "seq_idx": numbers}
    batches = calibration_batches(data, tiny_mamba())
    assert torch.equal(torch.cat([batch["input_ids"] for batch in batches]), IDS[:, :9])


@pytest.mark.parametrize("make", [tiny_mamba, tiny_mamba2])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_dataset_measures_as_its_dataloader(make, side):
    ids, mask = IDS.clone(), torch.ones_like(IDS)
    padding = slice(None, 5) if side == "left" else slice(-5, None)
    ids[::2, padding] = mask[::2, padding] = 0
    columns = {"input_ids": ids.tolist(), "attention_mask": mask.tolist()}
    model = make()
    reports = [
        hankel_singular_values(model, data) for data in (datasets.Dataset.from_dict(columns), loader(**columns))
    ]
    assert reports[0] == reports[1]
    assert reports[0] != hankel_singular_values(model, ids)


def test_sampling_leaves_all_random_numbers_where_they_were(mamba, monkeypatch):
    state = torch.random.get_rng_state()
    assert torch.equal(sample(mamba, 2, 12), sample(mamba, 2, 12))
    assert torch.equal(torch.random.get_rng_state(), state)

    def fail(*args, **kwargs):
        torch.rand(3)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(mamba, "generate", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        sample(mamba, 2, 12)
    assert torch.equal(torch.random.get_rng_state(), state)


@pytest.mark.parametrize(
    ("stream", "ids", "mask"),
    [
        (lambda: datasets.Dataset.from_dict({"input_ids": LISTS}).to_iterable_dataset(), IDS, None),
        (lambda: datasets.Dataset.from_dict(TABLE).to_iterable_dataset().with_format("torch"), IDS, MASK),
        (lambda: datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset(), OF_TEXTS, None),
        (lambda: ({"input_ids": row, "labels": row} for row in LISTS), IDS, None),
        (lambda: iter(TEXTS), OF_TEXTS, None),
        (lambda: iter(LISTS), IDS, None),
        (lambda: iter(IDS), IDS, None),
        (lambda: iter(IDS.numpy()), IDS, None),
        (lambda: ([np.int32(i) for i in row] for row in LISTS), IDS, None),
        (lambda: iter([np.array(TEXTS[:BATCH]), TEXTS[BATCH:]]), OF_TEXTS, None),  # batches
    ],
)
def test_streams_of_rows(stream, ids, mask):
    assert same(stream(), ids, mask, tokenizer=Letters())


@pytest.mark.parametrize("item", [{"input_ids": IDS[0]}, {"input_ids": IDS}, IDS, "abcdefghijkl"])
def test_of_a_stream_without_an_end_the_first_tokens_are_read(item, monkeypatch):
    monkeypatch.setattr("hf_compressm.data.batches.STREAM_TOKENS", 3 * BATCH * L)
    taken = []

    def stream():
        for number in itertools.count():
            taken.append(number)
            yield item

    batches = batches_of(stream(), Letters())
    tokens = sum(batch["input_ids"].numel() for batch in batches)
    assert 3 * BATCH * L <= tokens < 4 * BATCH * L
    assert len(taken) <= 4 * BATCH


def test_what_was_meant_is_guessed():
    with pytest.raises(TypeError, match=r"one sequence, give \[1, L\]"):
        list(batches_of(torch.arange(12)))
    with pytest.raises(TypeError, match=r"takes a tokenizer, got str: AutoTokenizer"):
        list(batches_of(["a text"], "gpt2"))
