"""The callback knows one interface: whatever satisfies it is asked, in the order that a cut needs."""

from __future__ import annotations

import copy
import sys
import threading
from types import ModuleType, SimpleNamespace

import pytest
import torch
from torch import nn
from torch.distributed import HashStore

from hf_compressm import CompreSSMConfig, compress_, measure
from hf_compressm.backends import Backend, OneProcess, agreement, find_backend, register
from hf_compressm.backends import find as module
from hf_compressm.backends.deepspeed import DeepSpeed
from hf_compressm.backends.fsdp1 import FSDP1
from hf_compressm.backends.refused import DataParallel, ShardedOtherwise
from hf_compressm.compress import _facts
from hf_compressm.layers import set_data_
from tests.conftest import VOCABULARY, tiny_mamba
from tests.layers.lti_mixers import S5, Net
from tests.training.conftest import losses, make_trainer, sizes


@pytest.fixture(autouse=True)
def _registry(monkeypatch):
    monkeypatch.setattr(module, "_BACKENDS", list(module._BACKENDS))


def test_a_backend_of_ones_own_is_asked_for_everything(tmp_path):
    calls = []

    @register
    class Written(Backend):
        @classmethod
        def takes(cls, trainer):
            return True

        def refuse(self):
            calls.append("refuse")

        def share_candidates_(self, statistics, first):
            calls.append("share")

        def sum_(self, statistics):
            calls.append("sum")
            assert all(tensor.is_floating_point() for entry in statistics for tensor in entry.sums())

        def decide(self, choose):
            calls.append("decide")
            return choose()

        def resize_parameter_(self, parameter, data):
            calls.append("resize")
            set_data_(parameter, data)

        def after_cut_(self):
            calls.append("after")

    config = CompreSSMConfig(state_size=3, start=0, end=2, num_reductions=1)
    model, plain = tiny_mamba(), tiny_mamba()
    trainer = make_trainer(tmp_path, model, config, max_steps=3)
    trainer.train()
    assert calls == ["refuse", "share", "sum", "decide", *["resize"] * 4, "after"]
    assert sizes(model) == [3, 3]
    module._BACKENDS.remove(Written)
    alone = make_trainer(tmp_path, plain, config, max_steps=3)
    alone.train()
    assert losses(alone) == losses(trainer)


def test_which_is_found(tmp_path):
    trainer = make_trainer(tmp_path, tiny_mamba())
    assert type(find_backend(trainer)) is OneProcess
    trainer.accelerator.state.fsdp_plugin = SimpleNamespace(fsdp_version=1)
    for flag, kind in (("is_fsdp_enabled", FSDP1), ("is_deepspeed_enabled", DeepSpeed)):
        setattr(trainer, flag, True)
        assert type(find_backend(trainer)) is kind
    trainer.is_fsdp_xla_enabled = True
    assert type(find_backend(trainer)) is ShardedOtherwise
    with pytest.raises(ValueError, match="under FSDP of XLA: train with FSDP2"):
        find_backend(trainer).refuse()
    trainer.is_fsdp_enabled = trainer.is_fsdp_xla_enabled = trainer.is_deepspeed_enabled = False
    trainer.model_wrapped = nn.DataParallel(trainer.model)
    assert type(find_backend(trainer)) is DataParallel
    with pytest.raises(ValueError, match="torchrun"):
        find_backend(trainer).refuse()


def test_deepspeed_of_which_half_is_imported_stops_no_cut(monkeypatch, token_ids):
    """As a Ctrl-C in the middle of its import leaves it."""
    monkeypatch.setitem(sys.modules, "deepspeed", ModuleType("deepspeed"))
    assert compress_(tiny_mamba(), CompreSSMConfig(state_size=4, refit=0), token_ids).sizes == {0: 4, 1: 4}


def test_a_plan_is_not_applied_by_each_process_alone(monkeypatch, token_ids):
    model, config = tiny_mamba(), CompreSSMConfig(state_size=4)
    plan = measure(model, token_ids).plan(config)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_world_size", lambda: 2)
    with pytest.raises(ValueError, match=r"one of 2 processes.*call compress_ on all.*in one process before"):
        plan.apply_(model)
    assert sizes(model) == [8, 8]
    plan.apply_(model, backend=OneProcess())  # whoever names a backend knows
    assert sizes(model) == [4, 4]


def test_weights_of_every_kind_are_compared():
    model = Net(VOCABULARY, 6, lambda: S5(6, 12))
    with torch.no_grad():
        for mixer in model.mixers:
            mixer.B.data, mixer.D = (
                mixer.B.data.to(torch.complex128),
                nn.Parameter(torch.ones(3, dtype=torch.bfloat16)),
            )
    before = _facts(CompreSSMConfig(), model, None)
    assert before == _facts(CompreSSMConfig(), copy.deepcopy(model), None)
    with torch.no_grad():
        model.mixers[0].B[0, 0] += 1j
    assert before != _facts(CompreSSMConfig(), model, None)


def test_a_process_that_comes_a_little_later_is_waited_for(monkeypatch):
    """The second time, too, for which the first does not count."""
    store = HashStore()
    monkeypatch.setattr(agreement, "processes", lambda: 2)
    monkeypatch.setattr(agreement, "process_store", lambda: store)
    monkeypatch.setattr("torch.distributed.get_rank", lambda: 0)
    first, second = agreement.announce("it"), agreement.announce("it")
    threading.Timer(0.5, lambda: store.set(f"hf_compressm/{first}/1", "")).start()
    assert agreement.absent(first) == [1]
    assert agreement.absent(first, 30.0) == []
    assert agreement.absent(second, 0.1) == [1]
    assert agreement.absent("nothing", 0.1) == [0, 1]
