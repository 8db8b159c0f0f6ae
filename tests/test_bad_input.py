"""Two hundred inputs that are wrong: each is refused with a message, and nothing is changed or written."""

from __future__ import annotations

import json
import math
import shlex
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import Dataset, DatasetDict
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from transformers import BertConfig, BertForMaskedLM
from typer.testing import CliRunner

from hf_compressm import (
    CompreSSMCallback,
    CompreSSMConfig,
    compress_,
    compress_pretrained,
    hankel_singular_values,
    measure,
)
from hf_compressm.cli import app
from hf_compressm.data.batches import batches_of, check_batches
from tests.conftest import VOCABULARY, tiny_mamba, tiny_mamba2

NAN, INF = math.nan, math.inf

WRONG_NUMBERS = [
    NAN,
    INF,
    -1,
    "3",
    "",
    True,
    None,
    [4],
    (4,),
    {4},
    1j,
    b"4",
    np.array([4, 4]),
    torch.tensor([4, 4]),
    object(),
]
CONFIGS = [
    *(
        {name: value}
        for name in ("refit", "min_state_size", "num_reductions")
        for value in [*WRONG_NUMBERS, 1.5, 2**40]
        if name != "refit" or value is not None
    ),
    *({name: value} for name in ("start", "end", "min_reduction") for value in WRONG_NUMBERS),
    *({name: value} for name in ("tolerance", "ratio", "rollback") for value in WRONG_NUMBERS if value is not None),
    *({"state_size": value} for value in WRONG_NUMBERS if value is not None),
    *({"seed": value} for value in (-1, 0.5, NAN, 10**400)),
    *({"multiple_of": value} for value in (0, 1.5, NAN, False, "8", [8])),
    *({"calibration_batches": value} for value in (0, 0.5, None)),
    *({"state_size": value} for value in ({}, {0.9: 4}, {0: 4.7}, {0: True}, {True: 4}, {"a": 4}, {-1: 4}, {0: None})),
    *({"state_size": value} for value in ({0: 4, "0": 5}, {0: "4"}, {None: 4}, {(0, 1): 4}, [4, 4], {0: 0})),
    *({"estimator": value} for value in ("mean-lti", "LTV", None, 3, ["ltv"])),
    *({"selection": value} for value in ("best", None, np.array(["auto"]))),
    *({"realization": value} for value in ("balanced", None, 2)),
    *({"uniform": value} for value in ("yes", 1, None, [True])),
    {"tolerance": 1},
    {"ratio": 0},
    {"ratio": 1.1},
    {"tolerance": 0.1, "ratio": 0.5},
    {"state_size": 4, "min_state_size": 5},
    {"state_size": {0: 4}, "uniform": True},
    {"realization": "project", "uniform": True},
    {"start": 0.5, "end": 0.2},
    {"start": 20, "end": 10},
]
IDS = torch.arange(24).view(2, 12)
LISTS = IDS.tolist()
DATA = [
    7,
    0.5,
    object(),
    "a text",
    b"bytes",
    Path("calibration.txt"),
    int,
    [],
    (),
    {},
    iter([]),
    [None],
    [[]],
    [7, 8, 9],
    [[1.5, 2.5]],
    [[1, True] * 6],
    [[True] * 12],
    [["a", "b"]],
    [LISTS],
    [[None] * 12],
    [[2**70] * 12],
    [{"input_ids": [1, 2, 3]}],
    [{"labels": IDS}],
    ["a text", 3],
    [IDS, None],
    [IDS, "a text"],
    IDS[0],
    IDS[None],
    IDS.bool(),
    IDS.float(),
    IDS.to(torch.complex64),
    IDS.numpy().astype(float),
    IDS.numpy().astype(bool),
    IDS.numpy()[0],
    np.array(7),
    np.array(["a", "b"]),
    np.array([None, None]),
    np.array([[b"a", b"b"]]),
    torch.zeros(0, 12, dtype=torch.long),
    torch.zeros(2, 0, dtype=torch.long),
    IDS[:, :4],
    IDS + VOCABULARY,
    -IDS,
    {"ids": IDS},
    {"input_ids": None},
    {"input_ids": IDS, "attention_mask": IDS},
    {"input_ids": IDS, "attention_mask": 5 * torch.ones_like(IDS)},
    {"input_ids": IDS, "attention_mask": 0.5 * torch.ones(2, 12)},
    {"input_ids": IDS, "attention_mask": torch.ones(2, 11)},
    {"input_ids": IDS, "attention_mask": torch.ones(2, 1, 12, 12)},
    {"input_ids": IDS, "attention_mask": "ones"},
    {"input_ids": IDS, "attention_mask": torch.zeros_like(IDS)},
    {"input_ids": LISTS, "attention_mask": [[1] * 12]},
    {"input_ids": LISTS, "attention_mask": [[1] * 12, [1] * 11]},
    {"input_ids": LISTS, "attention_mask": [None, None]},
    {"text": "a text"},
    {"text": ["a text", "another"]},
    {"text": [None, "another"]},
    Dataset.from_dict({"tokens": LISTS}),
    Dataset.from_dict({"input_ids": []}),
    Dataset.from_dict({"input_ids": LISTS, "attention_mask": [[5] * 12] * 2}),
    DatasetDict(train=Dataset.from_dict({"input_ids": LISTS})),
    pd.DataFrame({"tokens": LISTS}),
    pd.DataFrame({"input_ids": [0.5, 1.5]}),
    pd.DataFrame({"text": [1, "a"]}),
    DataLoader(TensorDataset(IDS, IDS), batch_size=2),
    DataLoader(IDS[0]),
    {1, 2, 3},
    range(12),
]


SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}


def compiled_around_others() -> nn.Module:
    return torch.compile(nn.Sequential(tiny_mamba(layers=1)))


MODELS = {
    "None": lambda: None,
    "a class": lambda: type(tiny_mamba()),
    "a config": lambda: tiny_mamba().config,
    "weights": lambda: tiny_mamba().state_dict(),
    "a number": lambda: 3,
    "bytes": lambda: b"state-spaces/mamba-130m",
    "no SSM": lambda: BertForMaskedLM(BertConfig(**SMALL)),
    "a wrapper": lambda: nn.Sequential(tiny_mamba(layers=1)),
    "DataParallel": lambda: nn.DataParallel(tiny_mamba(layers=1)),
    "compiled wrapper": compiled_around_others,
    "PEFT": lambda: get_peft_model(tiny_mamba(layers=1), LoraConfig(r=2, target_modules=["embeddings"])),
    "a mixer": lambda: tiny_mamba(layers=1).backbone.layers[0].mixer,
    "a layer": lambda: tiny_mamba(layers=1).backbone.layers[0],
    "linear": lambda: nn.Linear(2, 2),
}
NAMES = [
    "./nosuchfolder",
    "../nosuchfolder/at all",
    "/no/such/folder",
    "~/models/slim",
    "a/b/c",
    "a name",
    "x" * 120,
    "",
]
TARGETS = [8, 100, {0: 8}, {7: 2}]


def check(error: BaseException | None, what: object) -> None:
    """The right kind, with a text of its own."""
    assert isinstance(error, ValueError | TypeError | OSError), (what, error)
    assert len(str(error)) > 25, (what, error)


def refused(function, *args, **kwargs) -> BaseException | None:
    try:
        function(*args, **kwargs)
    except Exception as error:
        return error
    return None


@pytest.fixture(scope="module")
def model():
    return tiny_mamba()


@pytest.fixture
def untouched(model):
    before = {name: (id(tensor), tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    config, attributes = model.config.to_dict(), vars(model).keys()
    yield
    assert model.config.to_dict() == config
    assert vars(model).keys() == attributes
    for name, tensor in model.state_dict(keep_vars=True).items():
        assert (id(tensor), True) == (before[name][0], torch.equal(tensor, before[name][1])), name


def test_configs():
    for values in CONFIGS:
        for make in (lambda v: CompreSSMConfig(**v), CompreSSMCallback):
            check(refused(make, values), values)
    for other in (7, "state_size=4", [("state_size", 4)], {"tau": 0.1}, {"stat_size": 4}, {3: 4}, True):
        check(refused(CompreSSMConfig.of, other), other)


def test_calibration_data(model, untouched):
    for data in DATA:
        check(refused(lambda data=data: check_batches(batches_of(data), model)), data)
    for attempt in (compress_, measure, hankel_singular_values):  # by way of the public functions
        check(
            refused(attempt, model, calibration_data=DATA[45])
            if attempt is not measure
            else refused(measure, model, DATA[45]),
            attempt,
        )


def test_targets(model, untouched):
    for size in TARGETS:
        check(refused(compress_, model, {"state_size": size}, IDS), size)
        check(refused(measure(model, IDS).plan, {"state_size": size}), size)
    check(refused(compress_, model, {"realization": "project"}, IDS), "project")
    check(refused(compress_, model, {"ratio": 0.01}, IDS), "ratio")


def test_weights_that_are_not_finite_are_named():
    model = tiny_mamba(layers=3)
    with torch.no_grad():
        model.backbone.layers[1].mixer.x_proj.weight[0, 0] = NAN
    for attempt in (compress_, hankel_singular_values):
        error = refused(attempt, model, calibration_data=IDS)
        check(error, attempt)
        assert "From backbone.layers.1.mixer on" in str(error)


@pytest.mark.parametrize("name", MODELS)
def test_models(name, model, untouched):
    wrong = MODELS[name]()
    plan = measure(model, IDS, {"tolerance": 0}).plan({"tolerance": 0})
    for attempt in (
        lambda: compress_pretrained(wrong, calibration_data=IDS),
        lambda: compress_(wrong, calibration_data=IDS),
        lambda: measure(wrong, IDS),
        lambda: hankel_singular_values(wrong, IDS),
        lambda: plan.apply_(wrong),
    ):
        check(refused(attempt), name)


def test_a_compiled_model_is_the_model_inside():
    plain, compiled = tiny_mamba(), torch.compile(tiny_mamba())
    report = compress_(plain, {"state_size": 4, "refit": 0}, IDS)
    assert compress_pretrained(compiled, {"state_size": 4, "refit": 0}, calibration_data=IDS) is compiled._orig_mod
    assert compiled.compression_report == report
    assert all(map(torch.equal, plain.parameters(), compiled.parameters()))


@pytest.mark.parametrize("name", NAMES)
def test_names(name, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    error = refused(compress_pretrained, name)
    check(error, name)
    assert isinstance(error, OSError)
    assert "alphanumeric" not in str(error)
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "name the folder" in str(refused(compress_pretrained, "model.safetensors"))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    tiny_mamba().save_pretrained(root / "mamba")
    tiny_mamba2().save_pretrained(root / "mamba2")
    mamba2 = tiny_mamba2()
    compress_(mamba2, {"state_size": 8}, IDS)
    mamba2.save_pretrained(root / "projected")
    (root / "empty").mkdir()
    (root / "no config").mkdir()
    (root / "bad config").mkdir()
    (root / "bad config" / "config.json").write_text("{")
    (root / "other").mkdir()
    (root / "other" / "config.json").write_text(json.dumps({"model_type": "bert"} | SMALL))
    (root / "full").mkdir()
    (root / "full" / "file").write_text("")
    (root / "latin.txt").write_bytes(b"caf\xe9")
    return root


COMMANDS = [
    "",
    "nothing",
    "compress",
    "compress mamba",
    "compress mamba full",
    "compress mamba full/file",
    "compress empty slim",
    "compress nowhere slim",
    "compress ./nowhere slim",
    "compress 'no config' slim",
    "compress 'bad config' slim",
    "compress other slim",
    "compress full/file slim",
    "compress mamba slim --state-size 8",
    "compress mamba slim --state-size 0",
    "compress mamba slim --state-size -3",
    "compress mamba slim --state-size 4.5",
    "compress mamba slim --state-size four",
    "compress mamba slim --ratio 0",
    "compress mamba slim --ratio 2",
    "compress mamba slim --ratio nan",
    "compress mamba slim --ratio 0.01",
    "compress mamba slim --tolerance 1",
    "compress mamba slim --tolerance -0.1",
    "compress mamba slim --tolerance nan",
    "compress mamba slim --tolerance 0.1 --ratio 0.5",
    "compress mamba slim --realization project",
    "compress mamba slim --realization other",
    "compress mamba slim --uniform --realization project",
    "compress mamba slim --multiple-of 0",
    "compress mamba slim --refit -1",
    "compress mamba slim --calibration nowhere.txt",
    "compress mamba slim --calibration latin.txt",
    "compress mamba slim --calibration full",
    "compress mamba slim --evaluate",
    "compress mamba slim --private",
    "compress mamba slim --heal-parameters all",
    "compress mamba .",
    "compress mamba slim --no-such-option",
    "compress mamba slim more",
    "compress mamba slim --tolerance 1e-9",
    "compress mamba slim --ratio 1",
    "compress projected slim --uniform --state-size 4",
    "analyze",
    "analyze nowhere",
    "analyze empty",
    "analyze other",
    "analyze mamba --tolerance 1",
    "analyze mamba --tolerance 0.1 --frontier",
    "analyze mamba --tolerance 0.1 --json",
    "analyze mamba --figure nofolder/spectra.png",
    "analyze mamba --figure spectra.docx",
    "analyze mamba --figure full",
    "analyze mamba --calibration latin.txt",
    "export",
    "export nowhere out",
    "export mamba full",
    "export projected out",
    "export other out",
    "show",
    "show mamba",
    "show nowhere",
    "show ./nowhere",
    "demo --output full",
    "benchmark",
    "benchmark nowhere",
    "benchmark ./nowhere",
    "benchmark other",
    "benchmark mamba --batch 0",
    "benchmark mamba --length 0",
    "benchmark mamba --repeats 0",
    "benchmark mamba --decode-batch 0",
    "benchmark mamba --state-size 0",
    "benchmark mamba --dtype int8",
    "benchmark mamba --device cuda:99",
    "benchmark mamba --device tpu",
    "benchmark mamba --device ''",
]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, folders, monkeypatch):
    monkeypatch.chdir(folders)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = sorted(folders.rglob("*"))
    result = CliRunner().invoke(app, shlex.split(command))
    assert isinstance(result.exception, SystemExit), result.exception
    assert result.exit_code in ((3,) if "1e-9" in command or command.endswith("--ratio 1") else (1, 2)), result.output
    assert "Traceback" not in result.output
    assert "{layer: size}" not in result.output
    assert len(result.output.strip()) > 25
    assert sorted(folders.rglob("*")) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_gpu_that_is_not_there(folders, monkeypatch):
    result = CliRunner().invoke(app, ["benchmark", str(folders / "mamba"), "--device", "cuda"])
    assert result.exit_code == 1
    assert "one of what is here, cpu" in " ".join(result.stderr.split())


def test_a_figure_is_refused_before_the_model_is_loaded(tmp_path):
    result = CliRunner().invoke(app, ["analyze", "./nowhere", "--figure", str(tmp_path / "none" / "spectra.png")])
    assert result.exit_code == 1
    assert "name a file in a folder that is there" in " ".join(result.stderr.split())


def test_there_are_enough_of_them():
    assert len(CONFIGS) + len(DATA) + 5 * len(MODELS) + len(NAMES) + len(COMMANDS) > 200
