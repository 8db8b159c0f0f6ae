"""What a cut costs, with no fine-tuning: perplexity and recall on held-out text, for every way to choose sizes and states.

`python tests/gpu/quality.py hf_compressm/reference/mamba-small hf_compressm/reference/mamba2-small FOLDER_OF_ANOTHER_MODEL`, on models of
`train_reference_models.py`. Calibration and evaluation are on the code and prose that the package ships. Columns: states of a
layer, on average; change of the perplexity; change of that of the tokens whose bigram occurred earlier in the window; mean divergence from the full model's predictions, in nats per token; seconds to measure,
plan and cut.
"""

import argparse
import copy
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from hf_compressm import CompreSSMConfig, measure
from hf_compressm.cutting.divergence import Divergence
from hf_compressm.data.evaluation import evaluate
from hf_compressm.data.texts import CALIBRATION, EVALUATION, LENGTH, windows

BASELINES = ["ghost", "lti_modal", "magnitude", "random"]
BUDGETS = [0.01, 0.003, 0.03, 0.001, 0.1]


def cuts(N: int, mamba2: bool, mean: float) -> list[tuple[str, dict]]:
    """What to try: a name and a config for each row; `mean` is what the default call keeps of a layer."""
    rows: list[tuple[str, dict]] = [(f"budget {budget}", {"max_divergence": budget}) for budget in BUDGETS]
    rows += [("budget 0.01, gate", {"max_divergence": 0.01, "weights": "gate"})]
    rows += [("budget 0.01, uniform", {"max_divergence": 0.01, "uniform": True})]
    if mamba2:
        rows += [("budget 0.01, select", {"max_divergence": 0.01, "realization": "select"})]
    for ratio in (0.5, 0.25, 0.125):
        rows += [(f"ratio {ratio}, fisher", {"ratio": ratio, "weights": "fisher"})]
        rows += [(f"ratio {ratio}, gate", {"ratio": ratio, "weights": "gate"})]
        if mamba2:
            rows += [
                (f"ratio {ratio}, select, fisher", {"ratio": ratio, "realization": "select", "weights": "fisher"})
            ]
            rows += [(f"ratio {ratio}, select, gate", {"ratio": ratio, "realization": "select", "weights": "gate"})]
    rows += [(f"tolerance {tau}", {"tolerance": tau, "multiple_of": 1}) for tau in (0.01, 0.05, 0.1)]
    sizes = sorted(
        {N // 2, N // 4, 8 * max(1, round(mean / 8)) if mamba2 else max(1, round(mean))} - {N}, reverse=True
    )
    for size in sizes:
        for realization in ("project", "select") if mamba2 else ("select",):
            for weights in ("fisher", "gate"):
                options = {"state_size": size, "realization": realization, "weights": weights}
                rows.append((f"all {size}, {realization}, {weights}", options))
        for selection in BASELINES:
            options = {"state_size": size, "realization": "select", "selection": selection}
            rows.append((f"all {size}, {selection}", options))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="+")
    parser.add_argument("--only", default="", help="rows whose name holds one of these, apart by commas")
    parser.add_argument("--calibration", type=Path, default=CALIBRATION)
    parser.add_argument("--evaluation", type=Path, default=EVALUATION)
    parser.add_argument("--sequences", type=int, default=64, help="of 512 tokens, to calibrate and to evaluate on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    for folder in args.folder:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        texts = (path.read_text(encoding="utf-8") for path in (args.calibration, args.evaluation))
        known, unseen = (windows(text, tokenizer, args.sequences, LENGTH) for text in texts)
        full = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(args.device).eval()
        base, N, mamba2 = evaluate(full, unseen), full.config.state_size, full.config.model_type == "mamba2"
        print(f"\n{folder.name}: N={N}, perplexity {base.perplexity:.3f}, recall {base.recall:.3f}", flush=True)
        print(
            "| model | cut | states | perplexity | recall | divergence | s |\n|---|---|---|---|---|---|---|",
            flush=True,
        )
        measured: dict = {}
        mean = 0.3 * N
        for name, options in cuts(N, mamba2, mean):
            if not any(part in name for part in args.only.split(",")):
                continue
            changes, moved, begin = [], [], time.perf_counter()
            for seed in range(3 if "random" in name else 1):
                config = CompreSSMConfig(**options, seed=seed)
                key = config.weights if config.weights != "auto" else "fisher" if config.max_divergence else "gate"
                way = key, config.realization, config.uniform, config.selection
                if way not in measured:
                    names = dict(zip(("weights", "realization", "uniform", "selection"), way, strict=True))
                    asked = CompreSSMConfig(max_divergence=0.01, **names)
                    measured[way] = measure(full, known, asked)
                model = copy.deepcopy(full)
                plan = measured[way].plan(config)
                distance = Divergence(
                    model, [{"input_ids": i, "attention_mask": torch.ones_like(i)} for i in unseen.split(16)]
                )
                plan.apply_(model)
                seconds = time.perf_counter() - begin
                found = evaluate(model, unseen)
                changes.append((found.perplexity / base.perplexity - 1, found.recall / base.recall - 1))
                moved.append(distance())
            sizes = list(plan.report.sizes.values())
            perplexity, recall = (100 * sum(change) / len(changes) for change in zip(*changes, strict=True))
            print(
                f"| {folder.name} | {name} | {sum(sizes) / len(sizes):.1f} | {perplexity:+.2f}% | {recall:+.2f}% | "
                f"{sum(moved) / len(moved):.4f} | {seconds:.1f} | {' '.join(map(str, sizes))}",
                flush=True,
            )


if __name__ == "__main__":
    main()
