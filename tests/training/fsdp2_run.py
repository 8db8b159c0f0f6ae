"""Runs of the callback under FSDP2 in each process, for test_fsdp2.py: `torchrun fsdp2_run.py OUT VARIANT,... PROCESSES`."""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import Trainer, TrainingArguments

from hf_compressm import CompreSSMCallback, CompreSSMConfig
from tests.conftest import tiny_mamba, tiny_mamba2
from tests.training.conftest import dataset, losses, sizes

VARIANTS = {
    "plain": {},
    "none": {},
    "mamba2": {},
}


def make(out: Path, variant: str, processes: int, **kwargs) -> tuple[Trainer, CompreSSMCallback]:
    model = tiny_mamba2() if variant.startswith("mamba2") else tiny_mamba()
    target = {"state_size": 8} if variant.startswith("mamba2") else {"ratio": 0.5}
    config = CompreSSMConfig(start=0, end=4, num_reductions=2, calibration_batches=2, **target)
    options = {"version": 2, "transformer_layer_cls_to_wrap": [type(model.backbone.layers[0]).__name__]}
    args = TrainingArguments(
        str(out),
        **{"max_steps": 7, "per_device_train_batch_size": 4 // processes, "learning_rate": 1e-3, "logging_steps": 1}
        | {"save_strategy": "no", "report_to": [], "use_cpu": True, "disable_tqdm": True}
        | ({"ddp_backend": "gloo", "fsdp": True, "fsdp_config": options} if processes > 1 else {})
        | kwargs,
    )
    if processes > 1:
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    callback = CompreSSMCallback(config)
    trainer = Trainer(
        model=model, args=args, train_dataset=dataset(), callbacks=[] if variant == "none" else [callback]
    )
    return trainer, callback


def run(out: Path, variant: str, processes: int, rank: int, checkpoint: str | None = None) -> dict:
    trainer, callback = make(out, variant, processes, **VARIANTS[variant])
    trainer.train(resume_from_checkpoint=checkpoint)
    model = trainer.model
    return {
        "rank": rank,
        "losses": losses(trainer),
        "sizes": sizes(model),
        "spectra": [attempt.hankel_singular_values for attempt in callback.history],
    }


if __name__ == "__main__":
    folder, variants, world = Path(sys.argv[1]), sys.argv[2].split(","), int(sys.argv[3])
    torch.set_num_threads(1)
    process = int(os.environ.get("RANK", 0))
    for name in variants:
        result = run(folder / name, name, world, process)
        (folder / f"{name}-{world}-{process}.json").write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()
