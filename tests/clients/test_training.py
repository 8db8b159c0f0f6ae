"""Slim models in TRL, PEFT, quantisers, lm-eval and ONNX, each beside the original."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import hf_compressm  # noqa: F401 - the plugin: layers of different sizes
from hf_compressm import CompreSSMCallback, CompreSSMConfig
from hf_compressm.modeling.state_sizes import get_state_sizes

pytestmark = pytest.mark.clients
forms = pytest.mark.parametrize(
    ("family", "form"),
    [("mamba", "original"), ("mamba", "slim"), ("mamba2", "original"), ("mamba2", "slim"), ("mamba2", "projected")],
)
PAIRS = {
    "prompt": ["def f(x):\n", "import ", "for i in", "The sea"] * 3,
    "chosen": ["    return x\n", "torch\n", " range(3):\n", " was calm.\n"] * 3,
    "rejected": ["pass", "was", "then", "return"] * 3,
}
# One column fewer, joined.
TEXTS = {"text": [prompt + chosen for prompt, chosen in zip(PAIRS["prompt"], PAIRS["chosen"], strict=True)]}


def trl_trainer(method: str, model, tokenizer, out, callbacks):
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    config, trainer, data = {
        "sft": (trl.SFTConfig, trl.SFTTrainer, TEXTS),
        "dpo": (trl.DPOConfig, trl.DPOTrainer, PAIRS),
    }[method]
    args = config(
        str(out),
        max_steps=6,
        per_device_train_batch_size=2,
        max_length=32,
        report_to=[],
        logging_steps=1,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
    )
    return trainer(
        model=model,
        args=args,
        train_dataset=datasets.Dataset.from_dict(data),
        processing_class=tokenizer,
        callbacks=callbacks,
    )


@pytest.mark.parametrize("cut", [False, True], ids=["slim before", "callback"])
@pytest.mark.parametrize("family", ["mamba", "mamba2"])
@pytest.mark.parametrize("method", ["sft", "dpo"])
def test_trl(folder, tokenizer, tmp_path, method, family, cut):
    model = AutoModelForCausalLM.from_pretrained(folder(family, "original" if cut else "slim"))
    before = set(get_state_sizes(model.config))
    target = CompreSSMConfig(ratio=0.5, start=1, end=3, num_reductions=1, calibration_batches=1)
    trainer = trl_trainer(method, model, tokenizer, tmp_path, [CompreSSMCallback(target)] if cut else [])
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert len(losses) == 6
    assert all(map(math.isfinite, losses))
    assert cut == (set(get_state_sizes(trainer.model.config)) != before)
    trainer.save_model(str(tmp_path / "saved"))
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert get_state_sizes(again.config) == get_state_sizes(trainer.model.config)


@forms
def test_lora_trained_reloaded_and_merged(folder, ids, tmp_path, family, form):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(folder(family, form))
    config = peft.LoraConfig(target_modules=["in_proj"], r=4, task_type="CAUSAL_LM")
    model = peft.get_peft_model(base, config)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        model(ids[:, :32], labels=ids[:, :32]).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    model.save_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(ids[:, :64]).logits
        loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder(family, form)), tmp_path)
        torch.testing.assert_close(loaded.eval()(ids[:, :64]).logits, expected)
        merged = loaded.merge_and_unload()
        torch.testing.assert_close(merged(ids[:, :64]).logits, expected, atol=1e-3, rtol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "merged").config.model_type == family


def quantise_by_torchao(model):
    torchao = pytest.importorskip("torchao.quantization")
    torchao.quantize_(model, torchao.Int8WeightOnlyConfig(), lambda module, name: name.endswith(("in_proj", "x_proj")))


def quantise_by_quanto(model):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8, include=["*in_proj", "*x_proj"])
    quanto.freeze(model)


@pytest.mark.parametrize("quantise", [quantise_by_torchao, quantise_by_quanto])
@forms
def test_int8_after_the_cut(folder, ids, family, form, quantise):
    model = AutoModelForCausalLM.from_pretrained(folder(family, form))
    with torch.no_grad():
        exact = model(ids[:, :128], labels=ids[:, :128]).loss
        quantise(model)
        assert abs(model(ids[:, :128], labels=ids[:, :128]).loss - exact) < 0.05 * exact


@forms
def test_onnx(folder, ids, tmp_path, family, form):
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = AutoModelForCausalLM.from_pretrained(folder(family, form)).eval()

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, input_ids):
            return self.model(input_ids, use_cache=False).logits

    with torch.no_grad():
        torch.onnx.export(Logits(), (ids[:, :8],), tmp_path / "model.onnx", dynamo=True, verbose=False)
        expected = model(ids[:, :8], use_cache=False).logits
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"), providers=["CPUExecutionProvider"])
    (found,) = session.run(None, {session.get_inputs()[0].name: ids[:, :8].numpy()})
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-3, rtol=1e-3)


@forms
def test_lm_eval_on_a_local_task(folder, tokenizer, tmp_path, family, form):
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    # It moves white space at the end of a context to the continuation, so there is none here.
    pairs = [("def f(x):", " return x"), ("for i in", " range(3):"), ("The sea", " was calm.")]
    rows = [{"text": text, "end": end} for text, end in pairs]
    (tmp_path / "rows.json").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "mine.yaml").write_text(
        f"task: mine\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path}/rows.json\n"
        'test_split: test\ntarget_delimiter: ""\noutput_type: loglikelihood\ndoc_to_text: "{{text}}"\ndoc_to_target: "{{end}}"\n'
        "metric_list:\n  - metric: perplexity\n    aggregation: perplexity\n    higher_is_better: false\n"
    )
    model = AutoModelForCausalLM.from_pretrained(folder(family, form))
    wrapped = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=2, device="cpu")
    tasks = TaskManager(include_path=str(tmp_path), include_defaults=False)
    found = lm_eval.simple_evaluate(wrapped, tasks=["mine"], task_manager=tasks, bootstrap_iters=0)
    total = 0.0
    for row in rows:
        start, whole = tokenizer(row["text"])["input_ids"], tokenizer(row["text"] + row["end"])["input_ids"]
        with torch.no_grad():
            scores = model(torch.tensor([whole])).logits[0].log_softmax(-1)
        total += sum(float(scores[i - 1, whole[i]]) for i in range(len(start), len(whole)))
    expected = math.exp(-total / len(rows))
    assert found["results"]["mine"]["perplexity,none"] == pytest.approx(expected, rel=1e-3)
