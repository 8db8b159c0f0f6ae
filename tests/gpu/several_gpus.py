"""The callback on several GPUs against one: equal ranks, equal losses, speed, memory, and resuming on the other number.

`python tests/gpu/several_gpus.py` trains Mamba (N=128 to 12) and Mamba-2 (N=128 to 32, by selection) on the same global batches
with one process, and with 2 under DDP and under FSDP2 (or others of `--backends`; NCCL on GPUs, gloo on a CPU), then continues each run's checkpoint on
the other number of processes, and prints one table. `--tiny` makes it small enough for two CPU cores.

Columns: steps/s before the first and after the last cut, seconds of all cuts, peak memory of a GPU before and after;
whether all parameters were bit-identical on all processes after each cut; the largest difference of a step's loss from the
run on one process; and the same for the run that was continued on the other number of processes. Mamba scans with the Triton
kernel of `train_reference_models.py` where mamba_ssm is not installed.
"""

from __future__ import annotations

import argparse
import gc
import hashlib
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from transformers import (
    AutoModelForCausalLM,
    Mamba2Config,
    MambaConfig,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.utils import logging

import hf_compressm
from hf_compressm import CompreSSMCallback, CompreSSMConfig
from hf_compressm.compat.sharding import held, whole
from hf_compressm.hub import load_tokenizer

PACKAGE = Path(hf_compressm.__file__).parent
VOCABULARY = 4096
# Model config, target size, global batch, length of a sequence.
SIZES: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 256, "num_hidden_layers": 6, "state_size": 128},
    "mamba2": {"hidden_size": 512, "num_hidden_layers": 4, "state_size": 128, "num_heads": 16, "head_dim": 64},
}
TINY: dict[str, dict[str, Any]] = {
    "mamba": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 8},
    "mamba2": {"hidden_size": 16, "num_hidden_layers": 2, "state_size": 32, "num_heads": 8, "head_dim": 4},
}
TARGETS = {"mamba": (12, 3), "mamba2": (32, 16)}  # and of the tiny ones
STEPS, WINDOW, SAVED = 40, 20, 10  # of 4 cuts, 2 come before the checkpoint
TINY_STEPS, TINY_WINDOW, TINY_SAVED = 10, 4, 2


@dataclass(frozen=True, order=True)
class Run:
    """A model on a number of processes; `sharding` is empty for DDP, or one process alone."""

    model: str
    processes: int
    sharding: str = ""

    @property
    def way(self) -> str:
        return f"{self.processes} {(self.sharding or 'ddp').upper()}" if self.sharding or self.processes > 1 else "1"

    def __str__(self) -> str:
        return f"{self.model}-{self.way.replace(' ', '-')}"


class Watch(TrainerCallback):
    """Speed and memory of a run, and a digest of the parameters after each cut. Comes after the callback that cuts."""

    def __init__(self, cuts: CompreSSMCallback) -> None:
        self.cuts = cuts
        self.digests: list[str] = []
        self.times: list[float] = []
        self.memory = {"before": 0.0, "after": 0.0}

    def on_step_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            self.memory["after" if self.cuts.attempts else "before"] = torch.cuda.max_memory_allocated() / 2**30
        self.times.append(time.perf_counter())
        if self.cuts.attempts > len(self.digests):
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
            digest = hashlib.sha256()
            for parameter in model.parameters():
                digest.update(whole(held(parameter)).detach().float().cpu().numpy().tobytes())
            self.digests.append(digest.hexdigest())


def sharding(name: str) -> dict[str, Any]:
    """What the Trainer is given for FSDP1, FSDP2, or a stage of ZeRO."""
    if name.startswith("fsdp"):
        own: dict[str, Any] = {"use_orig_params": True} if name == "fsdp1" else {}
        if own and not torch.cuda.is_available():  # which FSDP1 takes for granted there
            own |= {
                "sync_module_states": False,
                "cpu_ram_efficient_loading": False,
                "state_dict_type": "SHARDED_STATE_DICT",
            }
        return {"fsdp": True, "fsdp_config": {"version": int(name[-1])} | own}
    if name.startswith("zero"):
        auto = [
            "train_micro_batch_size_per_gpu",
            "train_batch_size",
            "gradient_accumulation_steps",
            "gradient_clipping",
        ]
        zero = {"stage": int(name[-1]), "stage3_gather_16bit_weights_on_model_save": True}
        return {"deepspeed": dict.fromkeys(auto, "auto") | {"zero_optimization": zero, "bf16": {"enabled": "auto"}}}
    return {}


def train(args: argparse.Namespace, processes: int) -> dict[str, Any]:
    """One process of a run; its results."""
    logging.set_verbosity_error()
    set_seed(0)
    options = (TINY if args.tiny else SIZES)[args.model] | {"vocab_size": VOCABULARY}
    if args.model == "mamba2":
        options |= {"n_groups": 1, "chunk_size": 16 if args.tiny else 256, "expand": 2, "tie_word_embeddings": True}
    config = MambaConfig(**options) if args.model == "mamba" else Mamba2Config(**options)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    steps, window, saved = (TINY_STEPS, TINY_WINDOW, TINY_SAVED) if args.tiny else (STEPS, WINDOW, SAVED)
    batch, length = (4, 16) if args.tiny else (64 if args.model == "mamba" else 32, 512)
    text = "".join((PACKAGE / "reference" / name).read_text("utf-8") for name in ("calibration.txt", "evaluation.txt"))
    ids = torch.tensor(load_tokenizer(PACKAGE / "reference" / "mamba-small")(text, verbose=False)["input_ids"])
    # Whole global batches: the last, smaller one of an epoch would be another on another number of processes.
    count = len(ids) // length // batch * batch
    rows = ids[: count * length].view(-1, length)
    cuts = CompreSSMCallback(
        CompreSSMConfig(
            state_size=TARGETS[args.model][args.tiny], start=0, end=window, num_reductions=4, calibration_batches=2
        )
    )
    watch = Watch(cuts)
    on_gpu = torch.cuda.is_available()
    if on_gpu and find_spec("mamba_ssm") is None:
        from healing import patch_scan

        patch_scan()
    arguments = TrainingArguments(
        str(args.out.with_suffix("")),
        max_steps=steps,
        per_device_train_batch_size=batch // processes,
        learning_rate=1e-3,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        optim="adamw_torch",
        logging_steps=1,
        save_strategy="steps",
        save_steps=saved,
        report_to=[],
        disable_tqdm=True,
        **({} if on_gpu or processes == 1 else {"ddp_backend": "gloo"}),
        **sharding(args.sharding),
    )
    if args.sharding.startswith("fsdp") and not on_gpu:  # accelerate leaves FSDP out on CPUs
        PartialState._shared_state |= {"distributed_type": DistributedType.MULTI_GPU, "device": torch.device("cpu")}
    trainer = Trainer(
        model,
        arguments,
        train_dataset=[{"input_ids": row, "labels": row} for row in rows],
        callbacks=[cuts, watch],
    )
    trainer.train(resume_from_checkpoint=str(args.resume) if args.resume else None)
    between = [after - before for before, after in zip(watch.times, watch.times[1:], strict=False)]
    history = trainer.state.log_history
    first, last = window // 4 - 2, window + (2 if args.tiny else 6)
    return {
        "losses": {entry["step"]: entry["loss"] for entry in history if "loss" in entry},
        "sizes": [layer.mixer.ssm_state_size for layer in model.backbone.layers],
        "digests": watch.digests,
        "tokens": batch * length,
        "before": 1 / statistics.median(between[:first] or between),
        "after": 1 / statistics.median(between[last:] or between),
        "cut_seconds": sum(entry.get("compressm/cut_seconds", 0.0) for entry in history),
        "memory": watch.memory,
    }


def train_and_leave(args: argparse.Namespace) -> None:
    """One process of a run, which writes its results to a file of its own."""
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    args.out.with_suffix(f".{rank}").write_text(json.dumps(train(args, processes)))
    # DDP's reducer must go before the process group: gloo's threads want the interpreter's lock, and it would hold that.
    gc.collect()
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(args: argparse.Namespace, run: Run, out: Path, gpu: int = 0, resume: Path | None = None) -> dict[str, Any]:
    """Start a run, one process on the GPU of this number, and return its results."""
    command = [sys.executable]
    if run.processes > 1 or run.sharding:  # which wants a group of processes, if only of one
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(run.processes)]
    command += [__file__, "--train", "--model", run.model, "--out", str(out)]
    command += ["--tiny"] * args.tiny + ["--sharding", run.sharding] * bool(run.sharding)
    command += ["--resume", str(resume)] if resume else []
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    if run.processes == 1 and torch.cuda.is_available():
        environment["CUDA_VISIBLE_DEVICES"] = str(gpu)
    begin = time.perf_counter()
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}")
    print(f"{out.stem}: {time.perf_counter() - begin:.0f} s", flush=True)
    first, *others = [json.loads(out.with_suffix(f".{rank}").read_text()) for rank in range(run.processes)]
    return first | {"equal": all(other["digests"] == first["digests"] for other in others)}


def distance(one: dict[str, Any], other: dict[str, Any]) -> float:
    """The largest difference of a step's loss, over the steps that both runs made or logged."""
    return max(abs(loss - other["losses"][step]) for step, loss in one["losses"].items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="mamba,mamba2")
    parser.add_argument(
        "--backends", default="ddp,fsdp2", help="of two processes: ddp, fsdp2, fsdp1, zero1, zero2, zero3"
    )
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--sharding", default="", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resume", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.train:
        train_and_leave(args)
        return
    saved, models, backends = TINY_SAVED if args.tiny else SAVED, args.models.split(","), args.backends.split(",")
    runs: dict[Run, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def begin(run: Run, gpu: int = 0) -> None:
            runs[run] = launch(args, run, folder / f"{run}.run", gpu)

        def go_on(run: Run, gpu: int = 0) -> None:
            """From its checkpoint, on the other number of processes."""
            # ZeRO goes on with the number of processes that it was saved with.
            other = run if run.sharding.startswith("zero") else replace(run, processes=3 - run.processes)
            checkpoint = folder / f"{run}" / f"checkpoint-{saved}"
            again = launch(args, other, folder / f"{run}-on-{other.processes}.run", gpu, checkpoint)
            assert again["sizes"] == runs[run]["sizes"]
            runs[run]["continued"] = distance(again, runs[run])

        # One process of each model side by side, a GPU for each; those of two processes one after the other.
        alone = [Run(model, 1) for model in models]
        together = [Run(model, 2, backend if backend != "ddp" else "") for model in models for backend in backends]
        ddp = [run for run in together if not run.sharding]
        for each, side_by_side in (
            (begin, alone),
            (begin, together),
            (go_on, together),
            (go_on, [run for run in alone if any(other.model == run.model for other in ddp)]),
        ):
            on_one = side_by_side is alone or (
                each is go_on and not any(r.sharding.startswith("zero") for r in side_by_side)
            )
            with ThreadPoolExecutor(2 if on_one and torch.cuda.device_count() > 1 else 1) as pool:
                list(pool.map(each, side_by_side, itertools.cycle((0, 1))))
            print_table(runs)


def print_table(runs: dict[Run, dict[str, Any]]) -> None:
    print(
        "\n| model | processes | states | steps/s | after | cutting, s | GiB | after | ranks equal | loss | continued |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|")
    for run, found in sorted(runs.items()):
        assert len(found["digests"]) == 4
        assert len(set(found["sizes"])) == 1
        memory = [f"{found['memory'][when]:.2f}" for when in ("before", "after")]
        cells = [run.model, run.way, f"{found['sizes'][0]}", f"{found['before']:.2f}", f"{found['after']:.2f}"]
        cells += [f"{found['cut_seconds']:.2f}", *memory, "yes" if found["equal"] else "NO"]
        cells += [f"{distance(found, runs[Run(run.model, 1)]):.1e}"]
        cells += [f"{found['continued']:.1e}" if "continued" in found else "-"]
        print(f"| {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
