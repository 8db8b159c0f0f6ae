"""Perplexity after a cut, with no fine-tuning: every selection and realization, at several sizes, as a table.

`python tests/gpu/quality.py FOLDER ...` on the models that `train_reference_models.py` made, or on those in
`hf_compressm/reference`. Calibration and evaluation are on the texts that the package ships.
"""

import argparse
import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_compressm import CompreSSMConfig, measure
from hf_compressm.data.evaluation import perplexity
from hf_compressm.data.texts import EVALUATION, LENGTH, windows

ALL = 10**6  # sequences: more than the text has
BASELINES = ["greedy", "ghost", "lti_modal", "magnitude", "random"]


def cuts(N: int, mamba2: bool) -> list[tuple[str, dict]]:
    """What to try: a name and a config for each row."""
    ours = {"ours": {}} if mamba2 else {"ours": {}, "ours, read-out only": {"refit": 0}}
    selections = ours | {name: {"selection": name} for name in BASELINES}
    sizes = [size for size in (N // 2, N // 4, N // 8) if size >= (16 if mamba2 else 4)]
    rows = [(f"project {N // k}", {"state_size": N // k}) for k in (2, 4, 8, 16) if mamba2]
    rows += [
        (f"select {size}, {name}", {"state_size": size, "realization": "select"} | options)
        for size in reversed(sizes)
        for name, options in selections.items()
    ]
    for part, ratio in (("1/2", 0.5), ("1/4", 0.25)):
        rows += [(f"ratio {part}, per layer", {"ratio": ratio, "multiple_of": 1})]
        rows += [(f"ratio {part}, uniform", {"ratio": ratio, "multiple_of": 1, "uniform": True})]
        if mamba2:
            rows[-2:] = [(name, options | {"realization": "select"}) for name, options in rows[-2:]]
    return rows + [(f"tolerance {tau}", {"tolerance": tau, "multiple_of": 1}) for tau in (0.01, 0.05, 0.1)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--only", default="", help="rows whose name holds this")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for folder in args.folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        ids = windows(EVALUATION.read_text(encoding="utf-8"), tokenizer, ALL, LENGTH)
        full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device).eval()
        base = perplexity(full, ids)
        N = full.config.state_size
        measurement = measure(full, tokenizer=tokenizer)
        print(f"\n{folder.name}: N={N}, {ids.numel():,} tokens, perplexity {base:.3f}", flush=True)
        print("| model | cut | states, mean | perplexity | change |\n|---|---|---|---|---|", flush=True)
        for name, options in cuts(N, full.config.model_type == "mamba2"):
            if args.only not in name:
                continue
            values = []
            for seed in range(3 if "random" in name else 1):
                model = copy.deepcopy(full)
                report = measurement.plan(CompreSSMConfig(**options, seed=seed)).apply_(model)
                values.append(perplexity(model, ids))
            value = sum(values) / len(values)
            mean = sum(report.sizes.values()) / len(report.sizes)
            change = 100 * (value / base - 1)
            print(f"| {folder.name} | {name} | {mean:.1f} | {value:.3f} | {change:+.1f}% |", flush=True)


if __name__ == "__main__":
    main()
