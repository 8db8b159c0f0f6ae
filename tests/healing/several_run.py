"""Healing in each of several processes, for test_several.py."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.state import PartialState
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader

from hf_compressm import CompreSSMConfig, compress_, compress_pretrained
from hf_compressm.cutting.divergence import Divergence
from hf_compressm.healing import heal
from hf_compressm.healing.trainer import HealingTrainer
from tests.backends.loops_run import digest, rank_and_world, step
from tests.conftest import VOCABULARY, tiny_mamba, tiny_mamba2

# Of three tokens only, so that some hundreds of them tell much about the others.
IDS = torch.randint(0, 3, (48, 24), generator=torch.Generator().manual_seed(1))
PRETRAINED = CompreSSMConfig(state_size=4, refit=0, heal=2400)
LOOP = CompreSSMConfig(state_size=4, refit=0, heal=900)


def healed(model: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """What healing came to, and the sequences that this process learnt from."""
    read: list[list[int]] = []
    stock = HealingTrainer.compute_loss

    def compute_loss(self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        read.extend(inputs["input_ids"].tolist())
        return stock(self, model, inputs, *args, **kwargs)

    with patch.object(heal, "STEP_TOKENS", 200), patch.object(HealingTrainer, "compute_loss", compute_loss):
        if isinstance(model, Path):
            model = compress_pretrained(model, *args, **kwargs)
        else:
            compress_(model, *args, **kwargs)
    plain = getattr(model, "module", model)
    row = plain.compression_report.healing
    weights = [parameter.detach().flatten().tolist() for parameter in plain.parameters()]
    found = {"tokens": row.tokens, "before": row.before, "after": row.after, "held_out": row.held_out_tokens}
    return found | {"read": read, "hash": digest(plain), "weights": weights, "sizes": plain.compression_report.sizes}


def pretrained(folder: Path) -> dict[str, Any]:
    """Each process loads the checkpoint and has the same text. A step is of parts of two sequences."""
    with patch.object(heal, "CLASSES", 2 * 24 * VOCABULARY):
        return healed(folder, PRETRAINED, calibration_data=IDS)


def loop(kind: str) -> dict[str, Any]:
    """A loop of one's own: a step, a cut that is healed, and a step."""
    rank, world = rank_and_world()
    model = tiny_mamba()
    wrapped: Any = DistributedDataParallel(model, static_graph=True) if world > 1 else model
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    losses = [step(wrapped, optimizer, IDS[:6])]
    mine = IDS.chunk(world)[rank]
    rows = [{"input_ids": row} for row in (IDS if kind == "same stream" else mine)]
    data = mine if kind == "own" else DataLoader(rows, batch_size=4)
    found = healed(wrapped, LOOP, data, optimizer=optimizer)
    losses += [step(wrapped, optimizer, IDS[6 * n : 6 * n + 6]) for n in (1, 2)]
    return found | {"losses": losses, "end": digest(model, optimizer)}


def one_decides() -> list[int]:
    """Process 1 sees other divergences, and stops and keeps what process 0 does."""
    seen: list[int] = []

    def measured(self: Divergence) -> float:
        seen.append(len(seen))
        return float(abs(len(seen) - 4))  # the lowest is the fourth, and then it rises

    with patch.object(Divergence, "__call__", measured), patch.object(heal, "learning_rate", lambda *args: 1e-3):
        model = tiny_mamba2()
        found = healed(model, CompreSSMConfig(state_size=4, refit=0, heal=4800), IDS)
    return [len(seen), found["tokens"], found["after"], found["hash"]]


def accelerated() -> dict[str, Any]:
    """A model that Accelerate prepared, and its state after."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model, optimizer = accelerator.prepare(*(lambda m: (m, torch.optim.AdamW(m.parameters(), lr=1e-3)))(tiny_mamba()))
    state = dict(PartialState._shared_state)
    found = healed(model, LOOP, IDS, optimizer=optimizer)
    assert PartialState._shared_state == state
    assert accelerator.gradient_accumulation_steps == 2
    loss = model(input_ids=IDS[:4], labels=IDS[:4]).loss
    accelerator.backward(loss)
    optimizer.step()
    return found | {"end": digest(accelerator.unwrap_model(model))}


def refusals() -> dict[str, str]:
    """What one process can't do, none does."""
    found, one = {}, rank_and_world()[0] == 1
    model = tiny_mamba()
    before = digest(model)
    for name, config, data in (
        ("data", LOOP, IDS[:, :4] if one else IDS),
        ("config", CompreSSMConfig(state_size=4, heal=700 if one else 800), IDS),
    ):
        try:
            compress_(model, config, data)
        except ValueError as error:
            found[name] = str(error)
        assert digest(model) == before, name
    return found


def everything(folder: Path) -> None:
    """All of it, in each of two processes that nothing has joined yet."""
    assert not dist.is_initialized()
    found: dict[str, Any] = {"pretrained": pretrained(folder / "full")}
    found |= {kind: loop(kind) for kind in ("own", "own stream", "same stream")}
    found |= {"decides": one_decides(), "accelerated": accelerated(), "refusals": refusals()}
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))
