"""Models of published shapes under FSDP2 on as many GPUs as there are: a cut from N=128 to 16 while they train.

`python tests/gpu/sharded_scale.py` trains mamba-2.8b with N=128 and granite-4-h-micro, a hybrid with Mamba-2 layers, with
random weights, in bf16 with activation checkpointing, on 1, 2, 4, ... GPUs: with FSDP2 where there are several. Each GPU
has the same batch, whatever their number. It prints a row for each: tokens a second of all GPUs, peak memory of a GPU,
and what a GPU receives and sends in collectives, each before and after the cut; the cut's seconds; losses and norms of the
gradients, of the first step, those before and after the cut and the last. Mamba-1 scans with the Triton kernel of `train_reference_models.py`. `--layers 16` makes the models so deep;
`--tiny` is for two CPU cores.

`--same` shares one batch out among the GPUs, so that all losses and norms are to be the same, and goes on from each sharded checkpoint of after
the cut on every other number of GPUs.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from healing import patch_scan
from scale import SHAPES, build
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.utils import logging

from hf_compressm import CompreSSMCallback, CompreSSMConfig
from hf_compressm.compat.pretrained import recompute_activations_
from hf_compressm.layers import find_layers

GIB = 2**30
N = {"mamba": "state_size", "granitemoehybrid": "mamba_d_state"}
TINY: dict[str, dict[str, Any]] = {
    "mamba-2.8b": {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 61},
    "granite-4-h-micro": {
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "layer_types": ["linear_attention", "full_attention"],
    }
    | {"vocab_size": 61, "mamba_n_heads": 8, "mamba_d_head": 8, "num_attention_heads": 4, "num_key_value_heads": 2}
    | {"shared_intermediate_size": 32},
}
STEPS, CUT, SAVED = 16, 7, 12
SHOWN = 0, CUT - 1, CUT, STEPS - 1


class Traffic:
    """Bytes that a process has sent and received in collectives, as a ring of the processes moves them."""

    def __init__(self) -> None:
        self.bytes = 0.0
        n = dist.get_world_size() if dist.is_initialized() else 1
        # Which argument has the size of the whole, and how often all but one part of it passes a process.
        for name, argument, times in (
            ("all_gather_into_tensor", 0, 1),
            ("reduce_scatter_tensor", 1, 1),
            ("all_reduce", 0, 2),
        ):
            setattr(dist, name, self._counting(getattr(dist, name), argument, times * (n - 1) / n))

    def _counting(self, stock: Any, argument: int, share: float) -> Any:
        names = ("output_tensor", "input", "tensor") if argument == 0 else ("input",)

        def counting(*args: Any, **kwargs: Any) -> Any:
            given = args[argument] if len(args) > argument else next(kwargs[name] for name in names if name in kwargs)
            self.bytes += share * given.numel() * given.element_size()
            return stock(*args, **kwargs)

        return counting


class Watch(TrainerCallback):
    """When each step ended, and memory and traffic since the one before. Comes after the callback that cuts."""

    def __init__(self) -> None:
        self.traffic = Traffic()
        self.ends: list[tuple[float, float, float]] = []
        self.begins: list[float] = []

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        self.traffic.bytes = 0
        self.begins.append(time.perf_counter())


class Clock(TrainerCallback):
    """The same at the end of a step, before the callback that cuts."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        on_gpu = torch.cuda.is_available()
        if on_gpu:
            torch.cuda.synchronize()
        peak = torch.cuda.max_memory_allocated() if on_gpu else 0
        if args.process_index == 0:
            print(f"step {state.global_step}: {time.perf_counter() - self.watch.begins[-1]:.2f} s", file=sys.stderr)
        self.watch.ends.append(
            (time.perf_counter() - self.watch.begins[-1], peak / GIB, self.watch.traffic.bytes / GIB)
        )


def train(args: argparse.Namespace) -> None:
    """One process of a run, which writes its results to a file if it is the first."""
    logging.set_verbosity_error()
    rank, processes = int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    on_gpu = torch.cuda.is_available()
    device = torch.device("cuda", rank) if on_gpu else torch.device("cpu")
    kind, fields = SHAPES[args.shape]
    fields |= {N[kind]: 32 if args.tiny else 128} | (TINY[args.shape] if args.tiny else {})
    if args.layers:
        fields["num_hidden_layers"] = args.layers
        fields |= {"layer_types": fields["layer_types"][: args.layers]} if "layer_types" in fields else {}
    if on_gpu:
        torch.cuda.set_device(device)
        patch_scan()
    model = build(args.shape, device, torch.float32).train().requires_grad_(True)
    model.config.use_cache = False
    batch, length = args.batch, 64 if args.tiny else args.length
    ids = torch.randint(
        fields["vocab_size"], (STEPS * batch * processes, length), generator=torch.Generator().manual_seed(0)
    )
    sharding = {"version": 2, "activation_checkpointing": True, "state_dict_type": "SHARDED_STATE_DICT"}
    if processes == 1:
        recompute_activations_(model)
    arguments = TrainingArguments(
        str(args.out.with_suffix("")),
        max_steps=STEPS,
        per_device_train_batch_size=batch,
        learning_rate=1e-4,
        bf16=on_gpu,
        use_cpu=not on_gpu,
        logging_steps=1,
        save_strategy="steps" if args.same and processes > 1 and not args.resume else "no",
        save_steps=SAVED,
        report_to=[],
        disable_tqdm=True,
        **({"fsdp": True, "fsdp_config": sharding} if processes > 1 else {}),
        **({} if on_gpu or processes == 1 else {"ddp_backend": "gloo"}),
    )
    if not on_gpu and processes > 1:  # accelerate leaves FSDP out on CPUs
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    cuts = CompreSSMCallback(CompreSSMConfig(state_size=16, start=0, end=CUT, num_reductions=1, calibration_batches=1))
    watch = Watch()
    rows = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[Clock(watch), cuts, watch])
    trainer.train(resume_from_checkpoint=args.resume)
    seconds, peaks, traffic = zip(*watch.ends, strict=True)
    log = trainer.state.log_history
    losses, norms = ([float(entry[name]) for entry in log if name in entry] for name in ("loss", "grad_norm"))
    result = {
        "parameters": sum(p.numel() for p in trainer.model.parameters()),
        "states": sorted({layer.state_size for layer in find_layers(trainer.model)}),
        "tokens": batch * length * processes,
        "cut_seconds": sum(entry.get("compressm/cut_seconds", 0.0) for entry in log),
        "losses": losses[-1:] if args.resume else [losses[step] for step in SHOWN],
        "norms": [] if args.resume else [norms[step] for step in SHOWN],
    }
    for name, part in {} if args.resume else {"before": slice(2, CUT), "after": slice(CUT + 2, None)}.items():
        result[name] = {
            "seconds": statistics.median(seconds[part]),
            "peak": max(peaks[part]),
            "traffic": statistics.median(traffic[part]),
        }
    if rank == 0:
        args.out.write_text(json.dumps(result))
    if dist.is_initialized():
        dist.destroy_process_group()


def launch(
    args: argparse.Namespace, shape: str, processes: int, batch: int, out: Path, resume: Path | None = None
) -> dict[str, Any]:
    """Start a run and return its results."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    command += [__file__, shape, "--out", str(out), "--batch", str(batch), "--length", str(args.length)]
    command += ["--tiny"] * args.tiny + ["--same"] * args.same
    command += ["--layers", str(args.layers)] if args.layers else []
    command += ["--resume", str(resume)] if resume else []
    environment = {name: value for name, value in os.environ.items() if not name.startswith("ACCELERATE_")}
    if processes == 1:  # which would take all of them as one, by DataParallel
        environment["CUDA_VISIBLE_DEVICES"] = environment.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    if subprocess.run(command, env=environment, stdout=sys.stderr).returncode:
        raise RuntimeError("failed")
    return json.loads(out.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", nargs="*", default=[*TINY], help=", ".join(TINY))
    parser.add_argument(
        "--gpus", type=int, nargs="+", help="numbers of them; by default 1, 2, 4, ... of those there are"
    )
    parser.add_argument(
        "--batch", type=int, default=2, help="sequences of a GPU; with --same, of one of the most GPUs"
    )
    parser.add_argument("--length", type=int, default=1024)
    parser.add_argument("--layers", type=int, help="of the models, by default their own number")
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--same", action="store_true")
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--resume", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.out:
        (args.shape,) = args.shape
        train(args)
        return
    there = torch.cuda.device_count() or 2
    print(
        "| shape | GPUs | parameters | states | tokens/s | after | GiB a GPU | after | GiB moved a step | after | cut, s | losses | norms of the gradients |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for shape in args.shape:
            numbers = args.gpus or [n for n in (1, 2, 4, 8) if n <= there]
            runs: dict[int, dict[str, Any]] = {}
            for processes in numbers:
                begin, out = time.perf_counter(), Path(folder) / f"{shape}-{processes}.json"
                batch = args.batch * max(numbers) // processes if args.same else args.batch
                try:
                    runs[processes] = run = launch(args, shape, processes, batch, out)
                except RuntimeError as error:
                    print(f"{shape} on {processes}: {error}", flush=True)
                    continue
                before, after = run["before"], run["after"]
                speed = [f"{run['tokens'] / part['seconds']:,.0f}" for part in (before, after)]
                memory = [f"{part['peak']:.1f}" for part in (before, after)]
                moved = [f"{part['traffic']:.2f}" for part in (before, after)]
                cells = [shape, str(processes), f"{run['parameters'] / 1e9:.2f}B", f"{run['states']}", *speed, *memory]
                cells += [*moved, f"{run['cut_seconds']:.1f}"]
                cells += [" ".join(f"{value:.3f}" for value in run[name]) for name in ("losses", "norms")]
                print(f"| {' | '.join(cells)} |", flush=True)
                print(f"{shape} on {processes}: {time.perf_counter() - begin:.0f} s", file=sys.stderr, flush=True)
            for source, processes in itertools.permutations([n for n in runs if n > 1] if args.same else [], 2):
                out, saved = Path(folder) / "resumed.json", Path(folder) / f"{shape}-{source}" / f"checkpoint-{SAVED}"
                resumed = launch(args, shape, processes, args.batch * max(numbers) // processes, out, saved)
                last, whole = resumed["losses"][-1], runs[source]["losses"][-1]
                print(
                    f"{shape}, saved by {source} and resumed by {processes}: last loss {last:.4f}, whole run {whole:.4f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
