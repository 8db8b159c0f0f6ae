"""Run by test_round_trips in a process of its own, where hf_compressm cannot be imported.

Usage: python without_plugin.py FOLDER, with one checkpoint in each subfolder of FOLDER/saved. Writes FOLDER/results.pt
and saves each checkpoint that loads again, in FOLDER/saved_again.
"""

import json
import shutil
import sys
from pathlib import Path


class _Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "hf_compressm":
            raise ImportError(f"{name} is blocked")


sys.meta_path.insert(0, _Blocked())

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModel, AutoModelForCausalLM  # noqa: E402
from transformers.utils import logging  # noqa: E402

logging.set_verbosity_error()


def stock(path: Path) -> dict:
    """What transformers alone makes of a checkpoint, through the Auto classes and without."""
    model_class = getattr(transformers, json.loads((path / "config.json").read_text())["architectures"][0])
    results = {}
    for load in (AutoModelForCausalLM.from_pretrained, model_class.from_pretrained):
        try:
            model = load(path)
        except Exception as error:
            results[str(load)] = type(error).__name__
        else:
            results[str(load)] = model(INPUT_IDS).logits.detach()
    return {"stock": list(results.values())}


def remote(path: Path, again: Path) -> dict:
    """What a process that trusts the checkpoint's own code makes of it."""
    model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
    model.save_pretrained(again, max_shard_size="4KB")
    # The copy has to stand alone: it is loaded from elsewhere after the first one is gone.
    moved = again.with_name(again.name + "_moved")
    shutil.copytree(again, moved)
    generate = {"max_new_tokens": 4, "do_sample": False}
    return {
        "logits": model(INPUT_IDS).logits.detach(),
        "class": type(model).__name__,
        "base": AutoModel.from_pretrained(path, trust_remote_code=True)(INPUT_IDS)[0].detach(),
        "again": AutoModelForCausalLM.from_pretrained(moved, trust_remote_code=True)(INPUT_IDS).logits.detach(),
        "generated": [model.generate(INPUT_IDS, use_cache=cache, **generate) for cache in (True, False)],
        "mapped": AutoModelForCausalLM.from_pretrained(
            path, trust_remote_code=True, dtype=torch.bfloat16, device_map="auto"
        )(INPUT_IDS)
        .logits.detach()
        .float(),
    }


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    INPUT_IDS = torch.load(folder / "input_ids.pt")
    paths = sorted((folder / "saved").iterdir())
    # All of these first: the code of a checkpoint, once trusted, holds for the whole process.
    results = {path.name: stock(path) for path in paths}
    for path in paths:
        results[path.name] |= remote(path, folder / "saved_again" / path.name)
    results["hf_compressm imported"] = "hf_compressm" in sys.modules
    torch.save(results, folder / "results.pt")
