"""A cut is made whole or not at all, and measuring leaves nothing behind: an error strikes at one line after the other.

The interpreter tells of every line of this package that it runs. By default the error strikes at each line of the cut, as
it runs for the last time (a third of them in one kind of cut, others in the next two), and in measuring at each line that changes
something for a while and at some of the others; COMPRESSM_EVERY_LINE=1 takes every line each time that it runs (60,000
strikes). `-s` prints the counts.
"""

from __future__ import annotations

import copy
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import hf_compressm
from hf_compressm import CompreSSMConfig, measure
from hf_compressm.backends import OneProcess
from hf_compressm.reporting.record import history_of
from tests.conftest import tiny_mamba, tiny_mamba2

PACKAGE = str(Path(hf_compressm.__file__).parent)
EVERY_LINE = bool(os.environ.get("COMPRESSM_EVERY_LINE"))
pytestmark = pytest.mark.timeout(7200 if EVERY_LINE else 300)
IDS = torch.randint(0, 61, (2, 9), generator=torch.Generator().manual_seed(1))

Place = tuple[str, int, int]
"""File, line, and how often it has run."""


class Strike(BaseException):
    """No `except Exception` catches it."""


def traced(call: Callable[[], Any], files: Callable[[str], bool], on_line: Callable[[str, int], None]) -> None:
    def in_file(frame: Any, kind: str, argument: Any) -> Any:
        if kind == "line":
            on_line(frame.f_code.co_filename, frame.f_lineno)
        return in_file

    before = sys.gettrace()  # that which measures coverage
    sys.settrace(lambda frame, kind, argument: in_file if files(frame.f_code.co_filename) else None)
    try:
        call()
    finally:
        sys.settrace(before)


def places(call: Callable[[], Any]) -> list[Place]:
    """Every line of the package that a call runs, in order."""
    seen: Counter[tuple[str, int]] = Counter()
    found = []

    def on_line(file: str, line: int) -> None:
        seen[file, line] += 1
        found.append((file, line, seen[file, line]))

    traced(call, lambda file: file.startswith(PACKAGE), on_line)
    return found


def strikes_at(place: Place, call: Callable[[], Any]) -> bool:
    """Call, and raise at a place; whether the call came through all the same."""
    file, line, left = place

    def on_line(at_file: str, at_line: int) -> None:
        nonlocal left
        left -= at_line == line
        if left == 0 and at_line == line:
            raise Strike

    try:
        traced(call, lambda at_file: at_file == file, on_line)
    except Strike:
        return False
    return True


def last_runs(all_places: list[Place]) -> list[Place]:
    return all_places if EVERY_LINE else list({place[:2]: place for place in all_places}.values())


def picture(model: Any, optimizer: Any) -> dict[str, Any]:
    """All of it that a cut could change, in values that can be compared."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    modules = {
        name: (
            type(module),
            {key: value for key, value in vars(module).items() if isinstance(value, int | float | str | tuple | None)},
            {key: len(value) for key, value in vars(module).items() if isinstance(value, dict | set)},
        )
        for name, module in model.named_modules()
    }
    modules[""][1].pop("compression_history", None)  # looked up once, and then kept
    tensors = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    tensors |= {f"buffer {name}": tensor.clone() for name, tensor in model.named_buffers()}
    tensors |= {f"gradient of {name}": p.grad.clone() for p, name in names.items() if p.grad is not None}
    if optimizer is not None:
        assert all(parameter in names for parameter in optimizer.state)
        for parameter, state in optimizer.state.items():
            tensors |= {f"{key} of {names[parameter]}": torch.as_tensor(entry).clone() for key, entry in state.items()}
    return {
        "modules": modules,
        "held": [[names[p] for p in group["params"]] for group in getattr(optimizer, "param_groups", ())],
        "config": model.config.to_dict(),
        "history": [cut.report for cut in history_of(model)],
        "report": getattr(model, "compression_report", None),
        "tensors": tensors,
    }


def same(one: dict[str, Any], other: dict[str, Any]) -> bool:
    mine, others = one["tensors"], other["tensors"]
    return (
        all(one[key] == other[key] for key in one if key != "tensors")
        and mine.keys() == others.keys()
        and all(torch.equal(tensor, others[name]) for name, tensor in mine.items())
    )


def duplicate(model: Any, optimizer: Any) -> tuple[Any, Any]:
    """With the gradients, which deepcopy leaves out."""
    copies = copy.deepcopy((model, optimizer))
    for parameter, other in zip(model.parameters(), copies[0].parameters(), strict=True):
        other.grad = None if parameter.grad is None else parameter.grad.clone()
    return copies


def trained(model: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    model.train()
    for _ in range(2):  # the last gradients stay
        optimizer.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        optimizer.step()
    model.backbone.layers[0].eval()  # modes that differ
    return optimizer


def projected() -> Any:
    model = tiny_mamba2()
    measure(model, IDS).plan(CompreSSMConfig(state_size={0: 12, 1: 9})).apply_(model)
    return model


CUTS = {
    "select": (tiny_mamba2, {"state_size": 8, "realization": "select", "refit": 0}, True),
    "select, no optimizer": (
        lambda: tiny_mamba2(groups=2),
        {"state_size": 8, "realization": "select", "refit": 0},
        False,
    ),
    "read-out": (tiny_mamba, {"state_size": {0: 5, 1: 3}, "refit": 0}, True),
    "refit": (tiny_mamba, {"ratio": 0.5, "refit": 1}, True),
    "refit, no optimizer": (tiny_mamba, {"state_size": 4, "uniform": True, "refit": 1}, False),
    "project": (tiny_mamba2, {"state_size": {0: 4, 1: 9}}, True),
    "project_heads": (projected, {"state_size": {0: 4, 1: 3}, "realization": "project_heads"}, True),
    "project again": (projected, {"state_size": 4}, False),
    "select of projected": (projected, {"state_size": 4, "realization": "select"}, True),
}


@pytest.mark.parametrize("name", CUTS)
def test_a_cut_is_made_whole_or_not_at_all(name):
    make, options, with_optimizer = CUTS[name]
    config, model = CompreSSMConfig(**options), make()
    optimizer = trained(model) if with_optimizer else None
    plan = measure(model, IDS, config).plan(config)
    pristine = duplicate(model, optimizer)
    before = picture(*pristine)
    all_places = places(lambda: plan.apply_(model, optimizer))
    after = picture(model, optimizer)
    assert not same(before, after)

    outcomes: Counter[str] = Counter()
    subject = duplicate(*pristine)
    third = slice(None) if EVERY_LINE else slice(list(CUTS).index(name) % 3, None, 3)
    for place in last_runs(all_places)[third]:
        handler = signal.getsignal(signal.SIGINT)
        parameters = dict(subject[0].named_parameters())
        through = strikes_at(place, lambda pair=subject: plan.apply_(*pair))
        now = picture(*subject)
        outcome = "before" if same(now, before) else "after" if same(now, after) else "torn"
        outcomes[outcome] += 1
        assert outcome != "torn", place
        assert not (through and outcome == "before"), place
        for key, parameter in parameters.items():
            assert subject[0].get_parameter(key) is parameter or (outcome == "after" and "BC_projection" in key), place
        assert signal.getsignal(signal.SIGINT) is handler, place
        if outcome == "after":
            subject = duplicate(*pristine)
    print(f"\n{name}: {sum(outcomes.values())} strikes, of {len(all_places)} places: {dict(outcomes)}")
    assert outcomes["before"] > 100


CHANGE_FOR_A_WHILE = (
    *(f"cutting/{name}.py" for name in ("observing", "passes", "trials", "resuming")),
    "data/evaluation.py",
    "interrupts/",
)


@pytest.mark.parametrize(
    ("make", "target"),
    [(tiny_mamba, {"ratio": 0.6, "refit": 1}), (tiny_mamba2, {"max_divergence": 0.05})],
    ids=["ratio", "max_divergence"],
)
def test_measuring_and_planning_leave_nothing_behind(make, target):
    """With trial cuts, of each layer alone and of all of them."""
    model = make()
    optimizer = trained(model)
    config = CompreSSMConfig(**target, multiple_of=1)
    before = picture(model, optimizer)
    mixers = [layer.mixer for layer in model.backbone.layers]

    def work() -> None:
        measure(model, IDS, config).plan(config)

    all_places = places(work)
    assert same(picture(model, optimizer), before)
    chosen = [
        place
        for number, place in enumerate(last_runs(all_places))
        if EVERY_LINE or number % 48 == 0 or place[0].removeprefix(f"{PACKAGE}/").startswith(CHANGE_FOR_A_WHILE)
    ]
    for place in chosen:
        strikes_at(place, work)
        assert same(picture(model, optimizer), before), place
        assert [layer.mixer for layer in model.backbone.layers] == mixers, place
    print(f"\n{make.__name__}: {len(chosen)} strikes, of {len(all_places)} places: all as before")


class Interrupted(OneProcess):
    """Ctrl-C is pressed as the second parameter gets its new data."""

    calls = 0

    def resize_parameter_(self, parameter: torch.Tensor, data: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 2:
            signal.raise_signal(signal.SIGINT)
        super().resize_parameter_(parameter, data)


def test_ctrl_c_waits_until_model_config_and_optimizer_agree(mamba):
    optimizer = trained(mamba)
    config = CompreSSMConfig(state_size={0: 5, 1: 3}, refit=0)
    plan = measure(mamba, IDS, config).plan(config)
    model, its_optimizer = duplicate(mamba, optimizer)
    plan.apply_(model, its_optimizer)
    with pytest.raises(KeyboardInterrupt):
        plan.apply_(mamba, optimizer, backend=Interrupted())
    assert same(picture(mamba, optimizer), picture(model, its_optimizer))
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


class OutOfMemory(OneProcess):
    """The third parameter finds no room; in the undoing there is some."""

    calls = 0

    def resize_parameter_(self, parameter: torch.Tensor, data: torch.Tensor) -> None:
        self.calls += 1
        if self.calls == 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        super().resize_parameter_(parameter, data)


def test_an_error_in_the_middle_is_undone(mamba2):
    optimizer = trained(mamba2)
    config = CompreSSMConfig(state_size=8, realization="select", refit=0)
    plan = measure(mamba2, IDS, config).plan(config)
    before = picture(mamba2, optimizer)
    with pytest.raises(torch.OutOfMemoryError):
        plan.apply_(mamba2, optimizer, backend=OutOfMemory())
    assert same(picture(mamba2, optimizer), before)
    assert plan.apply_(mamba2, optimizer).sizes == {0: 8, 1: 8}
