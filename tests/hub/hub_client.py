"""Run by test_hub in processes of its own. Usage: python hub_client.py JOB FOLDER, or without_plugin FOLDER."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

time.sleep = lambda seconds: None  # huggingface_hub waits longer and longer between its attempts

JOB, FOLDER = sys.argv[1], Path(sys.argv[2])


class _Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_compressm":
            raise ImportError(f"{name} is blocked")


if JOB == "without_plugin":
    sys.meta_path.insert(0, _Blocked())

import torch  # noqa: E402
from huggingface_hub import HfApi, ModelCard, snapshot_download  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.set_verbosity_error()
torch.set_num_threads(1)
IDS = torch.arange(1, 41)[None]


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    return model.eval()(IDS).logits.cpu()


def push() -> dict[str, Any]:
    """Every way to the Hub, and the logits of what was pushed."""
    import hf_compressm
    from hf_compressm import CompreSSMCallback, CompreSSMConfig, compress_, compress_pretrained
    from hf_compressm.hub import publish
    from tests.conftest import tiny_mamba, tiny_mamba2

    def slim(make: Any, sizes: Any = None) -> Any:
        model = make()
        compress_(model, CompreSSMConfig(state_size=sizes or {0: 4, 1: 6}), IDS)
        return model

    reference = Path(hf_compressm.__file__).parent / "reference" / "mamba-small"
    text = (reference.parent / "calibration.txt").read_text()[:3000]
    pushed = {}

    # Small evaluation: the figure itself is tested elsewhere.
    from hf_compressm.data import evaluation

    evaluation.SEQUENCES = 1
    pushed["me/compressed"] = compress_pretrained(
        reference, CompreSSMConfig(ratio=0.5, refit=0), calibration_data=[text], push_to_hub="me/compressed"
    )

    HfApi().create_repo("me/model")
    HfApi().upload_file(
        path_or_fileobj=b"---\nlicense: mit\ntags: [mine]\n---\nMy own words.\n",
        path_in_repo="README.md",
        repo_id="me/model",
    )
    pushed["me/model"] = slim(tiny_mamba)
    pushed["me/model"].push_to_hub("me/model")
    pushed["me/model"].push_to_hub("me/model")  # the section is not written twice
    pushed["me/saved"] = slim(tiny_mamba2)
    pushed["me/saved"].save_pretrained(FOLDER / "saved", push_to_hub=True, repo_id="me/saved")
    pushed["me/private"] = slim(tiny_mamba)
    assert publish(pushed["me/private"], "private", private=True) == "me/private"
    pushed["me/small"] = slim(tiny_mamba, 4)
    publish(pushed["me/small"], "me/small")

    model = tiny_mamba()
    arguments = TrainingArguments(
        str(FOLDER / "trained"),
        max_steps=4,
        save_steps=1,
        per_device_train_batch_size=1,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        push_to_hub=True,
        hub_model_id="me/trained",
        hub_strategy="every_save",
        hub_always_push=True,
    )
    config = CompreSSMConfig(state_size={0: 4, 1: 6}, start=0, end=2, num_reductions=2)
    data = [{"input_ids": IDS[0], "labels": IDS[0]}]
    trainer = Trainer(model, arguments, train_dataset=data, callbacks=[CompreSSMCallback(config)])
    trainer.train()
    trainer.push_to_hub()
    pushed["me/trained"] = model

    # A slim model that is loaded and trained further has no report, but its code goes with every push.
    again = AutoModelForCausalLM.from_pretrained(FOLDER / "trained")
    arguments.hub_model_id, arguments.output_dir = "me/tuned", str(FOLDER / "tuned")
    arguments.max_steps = 1
    Trainer(again, arguments, train_dataset=data).train()
    pushed["me/tuned"] = again
    return {name: logits(model) for name, model in pushed.items()}


def load(**kwargs: Any) -> dict[str, Any]:
    names = ["me/compressed", "me/model", "me/saved", "me/private", "me/small", "me/trained", "me/tuned"]
    results: dict[str, Any] = {}
    for name in names:
        if "trust_remote_code" not in kwargs and "tuned" in name:
            continue
        results[name] = logits(AutoModelForCausalLM.from_pretrained(name, **kwargs))
    tokenizer = AutoTokenizer.from_pretrained("me/compressed")
    results["text"] = tokenizer.decode(tokenizer("Call me Ishmael.")["input_ids"])
    results["card"] = ModelCard.load("me/compressed").data.to_dict()
    results["files"] = sorted(path.name for path in Path(snapshot_download("me/compressed")).iterdir())
    results["plugin"] = "hf_compressm" in sys.modules
    return results


def with_plugin() -> dict[str, Any]:
    import hf_compressm  # noqa: F401

    return load()


def without_plugin() -> dict[str, Any]:
    return load(trust_remote_code=True)


def fail() -> dict[str, Any]:
    """What each refusal says."""
    from hf_compressm import compress_pretrained
    from hf_compressm.hub import publish
    from tests.conftest import tiny_mamba

    model = tiny_mamba()
    jobs = {
        "wrong token": lambda: publish(model, "me/new", token="hf_wrong"),
        "no token": lambda: publish(model, "me/new", token=False),
        "not mine": lambda: publish(model, "other/new"),
        "wrong token, early": lambda: compress_pretrained("no/where", push_to_hub="me/new", token="hf_wrong"),
        "missing": lambda: compress_pretrained("me/missing"),
        "private": lambda: compress_pretrained("me/private", token="hf_other"),
    }
    messages = {}
    for name, job in jobs.items():
        try:
            job()
        except OSError as error:
            messages[name] = str(error)
    return messages


if __name__ == "__main__":
    results = {"push": push, "with_plugin": with_plugin, "without_plugin": without_plugin, "fail": fail}[JOB]()
    torch.save(results, FOLDER / f"{JOB}.pt")
    print(json.dumps(sorted(results)))
