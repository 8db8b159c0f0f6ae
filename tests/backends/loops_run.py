"""Loops of one's own in each of several processes, for test_loops.py: `torchrun -m tests.backends.loops_run FOLDER`."""

from __future__ import annotations

import copy
import hashlib
import json
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

from hf_compressm import CompreSSMConfig, compress_
from hf_compressm.backends import backend as backend_module
from hf_compressm.hankel import moments
from tests.conftest import VOCABULARY, tiny_mamba, tiny_mamba2
from tests.layers import lti_mixers
from tests.training.conftest import sizes

BATCH, STEPS, CUTS = 6, 6, (1, 3)
IDS = torch.randint(0, VOCABULARY, (STEPS, BATCH, 12), generator=torch.Generator().manual_seed(3))
TEXT = torch.randint(0, VOCABULARY, (48, 12), generator=torch.Generator().manual_seed(4))
CONFIG = CompreSSMConfig(ratio=0.7, refit=0)
VARIANTS: dict[str, dict[str, Any]] = {
    "unused": {"find_unused_parameters": True},
    "bucket_view": {"gradient_as_bucket_view": True},
    "accumulation": {},
    "mamba2": {},
    "large": {},
    "budget": {},
    "lti": {},
}
ONE_CUT = ("mamba2", "large", "budget", "lti")


def rank_and_world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def my_rows(rows: torch.Tensor) -> torch.Tensor:
    """Those of this process; in the order of the processes they are all of them."""
    rank, world = rank_and_world()
    return rows.chunk(world)[rank]


def digest(model: torch.nn.Module, optimizer: torch.optim.Optimizer | None = None) -> str:
    states = [] if optimizer is None else [e for p in model.parameters() for e in optimizer.state[p].values()]
    return hashlib.sha256(b"".join(t.detach().numpy().tobytes() for t in [*model.parameters(), *states])).hexdigest()


def step(model: Any, optimizer: Any, rows: torch.Tensor, parts: int = 1) -> float:
    """One of a loop of one's own; the loss over all processes."""
    total = torch.zeros(())
    for number, part in enumerate(my_rows(rows).chunk(parts)):
        wait = model.no_sync() if number < parts - 1 and hasattr(model, "no_sync") else nullcontext()
        with wait:
            loss = model(input_ids=part, labels=part).loss / parts
            loss.backward()
        total += loss.detach()
    optimizer.step()
    optimizer.zero_grad()
    if dist.is_initialized():
        dist.all_reduce(total)
    return float(total) / rank_and_world()[1]


def loop(variant: str) -> dict[str, Any]:
    model: Any = tiny_mamba2() if variant == "mamba2" else tiny_mamba()
    if variant == "lti":
        torch.manual_seed(0)
        model = lti_mixers.Net(VOCABULARY, 6, lambda: lti_mixers.LRU(6, 8))
    config, parts = CONFIG, 3 if variant == "accumulation" else 1
    if variant == "mamba2":
        config = CompreSSMConfig(state_size={1: 8}, refit=0, realization="select")
    elif variant == "budget":
        config = CompreSSMConfig(max_divergence=0.02, refit=1)  # both on the data of all processes
    wrapped: Any = model
    if dist.is_initialized():
        wrapped = DistributedDataParallel(model, **VARIANTS[variant])
    optimizer = torch.optim.AdamW(wrapped.parameters(), lr=1e-3)
    losses, reports = [], []
    for number in range(STEPS):
        losses.append(step(wrapped, optimizer, IDS[number], parts))
        if number in (CUTS[:1] if variant in ONE_CUT else CUTS) and variant != "none":
            # 8 states count as too many to fit all: 5 candidates are chosen.
            with patch.object(moments, "MAX_READOUT", 40 if variant == "large" else moments.MAX_READOUT):
                given = wrapped if number == CUTS[0] else model  # whose wrapper is found
                reports.append(compress_(given, config, my_rows(TEXT), optimizer=optimizer))
    spectra = [[layer.hankel_singular_values for layer in report.layers] for report in reports]
    return {"losses": losses, "sizes": sizes(model), "hash": digest(model, optimizer), "spectra": spectra}


def accelerated(folder: Path) -> dict[str, Any]:
    """A loop with Accelerate: cut, save, go on; and go on in a fresh model, from what was saved."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    result: dict[str, Any] = {}

    def run(model: Any, optimizer: Any, batches: Any) -> list[float]:
        losses = []
        for rows in batches:
            for part in my_rows(rows).chunk(2):
                with accelerator.accumulate(model):
                    loss = model(input_ids=part, labels=part).loss
                    accelerator.backward(loss)
                    optimizer.step()
                    optimizer.zero_grad()
                    losses.append(float(accelerator.gather(loss.detach()).mean()))
        return losses

    def prepared(model: Any) -> tuple[Any, Any]:
        return accelerator.prepare(model, torch.optim.AdamW(model.parameters(), lr=1e-3))

    model, optimizer = prepared(tiny_mamba())
    result["losses"] = run(model, optimizer, IDS[:2])
    compress_(model, CONFIG, my_rows(TEXT), optimizer=optimizer)
    accelerator.save_state(str(folder))
    if accelerator.is_main_process:
        accelerator.unwrap_model(model).config.save_pretrained(folder)
    accelerator.wait_for_everyone()
    result["after"] = run(model, optimizer, IDS[2:4])
    result["hash"] = digest(accelerator.unwrap_model(model), optimizer)
    accelerator.free_memory()
    model, optimizer = prepared(AutoModelForCausalLM.from_pretrained(folder))
    accelerator.load_state(str(folder))
    result["resumed"] = run(model, optimizer, IDS[2:4])
    result["resumed_hash"] = digest(accelerator.unwrap_model(model), optimizer)
    accelerator.free_memory()
    model, optimizer = prepared(tiny_mamba())
    try:
        accelerator.load_state(str(folder))
    except RuntimeError as error:
        result["full-size"] = str(error)
    accelerator.free_memory()
    return result


def refusals() -> dict[str, Any]:
    """What can't be done is refused on all processes, and changes nothing."""
    rank, _ = rank_and_world()
    model = tiny_mamba()
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(ddp.parameters(), lr=1e-3)
    step(ddp, optimizer, IDS[0])
    before, found = digest(model, optimizer), {}
    one = rank == 1
    broken = tiny_mamba(seed=1) if one else tiny_mamba()
    tries: dict[str, Any] = {
        "data": lambda: compress_(ddp, CONFIG, TEXT[:, :4] if one else TEXT, optimizer=optimizer),
        "config": lambda: compress_(ddp, CompreSSMConfig(ratio=0.5 if one else 0.6), TEXT, optimizer=optimizer),
        "optimizer": lambda: compress_(ddp, CONFIG, TEXT, optimizer=None if one else optimizer),
        "weights": lambda: compress_(broken, CONFIG, TEXT),
        "other optimizer": lambda: compress_(ddp, CONFIG, TEXT, optimizer=torch.optim.SGD([torch.zeros(1)], 0.1)),
        "sharded optimizer": lambda: compress_(
            ddp, CONFIG, TEXT, optimizer=ZeroRedundancyOptimizer(ddp.parameters(), torch.optim.AdamW, lr=1e-3)
        ),
        "target": lambda: compress_(ddp, CompreSSMConfig(state_size=99), TEXT, optimizer=optimizer),
        "projection": lambda: compress_(ddp, CompreSSMConfig(realization="project", ratio=0.5), TEXT),
        "cut": lambda: compress_(ddp, CONFIG, TEXT, optimizer=optimizer),
    }
    calls = iter(range(100))
    plain = backend_module.set_data_

    def fail(parameter: Any, data: Any) -> None:
        if one and next(calls) == 1:  # after the first of a layer
            raise MemoryError("no memory left")
        plain(parameter, data)

    for name, attempt in tries.items():
        with patch.object(backend_module, "set_data_", fail if name == "cut" else plain):
            try:
                attempt()
            except (ValueError, RuntimeError, MemoryError) as error:
                found[name] = f"{type(error).__name__}: {error}"
        assert digest(model, optimizer) == before, name
        assert sizes(model) == [8, 8], name
    state = copy.deepcopy([model.state_dict(), optimizer.state_dict()])
    later = [step(ddp, optimizer, IDS[1]), step(ddp, optimizer, IDS[2]), digest(model, optimizer)]
    model.load_state_dict(state[0])
    optimizer.load_state_dict(state[1])
    compress_(ddp, CONFIG, my_rows(TEXT), optimizer=optimizer)  # as if nothing had been
    step(ddp, optimizer, IDS[1])
    untouched = tiny_mamba()
    plain_ddp = DistributedDataParallel(untouched)
    plain_optimizer = torch.optim.AdamW(plain_ddp.parameters(), lr=1e-3)
    never = [step(plain_ddp, plain_optimizer, IDS[number]) for number in range(3)]
    never = [*never[1:], digest(untouched, plain_optimizer)]
    return {
        "messages": found,
        "later": later,
        "never tried": never,
        "hash": digest(model, optimizer),
        "sizes": sizes(model),
    }


def everything(folder: Path) -> None:
    """All of it, in each of two processes."""
    dist.init_process_group("gloo")
    found = {variant: loop(variant) for variant in VARIANTS}
    found["refusals"] = refusals()
    found["accelerate"] = accelerated(folder / "state")
    (folder / f"{dist.get_rank()}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    dist.init_process_group("gloo")
    (Path(sys.argv[1]) / f"three-{dist.get_rank()}.json").write_text(json.dumps(loop("unused")))
    dist.destroy_process_group()  # else gloo's threads are still running when the interpreter ends
