"""finetune/saving.py: what is saved is what was measured, in 16 bits too."""

import json

import pytest
import torch
from helpers import read_metrics
from test_examples import write
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_sft
from finetune.data import read_data
from finetune.examples import EXAMPLES
from finetune.labels import tokenize_data
from finetune.saving import as_saved, save_model

ROWS = [{"prompt": f"I am {n}", "completion": f" happy and {n * 7} times glad"} for n in range(40)]


def read_report(folder):
    return json.loads((folder / "report.json").read_text())


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_model_computes_as_the_one_that_is_saved_and_afterwards_as_before(
    build, step, make_settings, tmp_path, dtype
):
    # Half precision computes on a CPU too; only training in it is refused there.
    built = build(make_settings("--dtype", "float32", "--learning-rate", "0.01"))
    for _ in range(3):
        step(built)
    policy = built.policy.pretrained_model
    weights = {name: weight.clone() for name, weight in policy.named_parameters()}
    for name, weight in policy.named_parameters():
        if "lora" not in name:
            weight.data = weight.data.to(getattr(torch, dtype))
            weights[name] = weight.data.clone()
    inputs = built.tokenizer("I feel so very", return_tensors="pt", return_token_type_ids=False)

    def logits_of(model):
        with torch.no_grad():
            return model(**inputs).logits.float()

    before = logits_of(policy)
    with as_saved(policy, tmp_path):
        first = logits_of(policy)
        with policy.disable_adapter():
            base = logits_of(policy)
        measured = logits_of(policy)
    assert torch.equal(measured, first)
    for name, weight in policy.named_parameters():
        assert torch.equal(weight, weights[name]), name
    assert torch.equal(logits_of(policy), before)
    with policy.disable_adapter():
        assert torch.equal(logits_of(policy), base)

    save_model(policy, built.tokenizer, built.settings, tmp_path)
    saved = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=getattr(torch, dtype))
    same = torch.equal if dtype != "float32" else lambda *both: torch.allclose(*both, atol=1e-4)
    assert same(logits_of(saved), measured)
    assert torch.equal(measured, before) == (dtype == "float32")
    assert (measured - base).abs().max() > 0.1


@pytest.fixture(scope="module")
def sft(demo_model, tmp_path_factory):
    """Return the folder of a run of SFT in bfloat16, and its data."""
    folder = tmp_path_factory.mktemp("sft")
    write(folder / "rows.json", ROWS)
    flags = ["--model-name", str(demo_model), "--data", str(folder / "rows.json")]
    flags += ["--device", "cpu", "--dtype", "bfloat16", "--training-epochs", "6"]
    flags += ["--learning-rate", "3e-3", "--output-dir", str(folder / "out"), "--save-every", "0"]
    assert train_sft.main(flags) == 0
    return folder / "out", folder / "rows.json"


def test_the_loss_of_a_reloaded_sft_model_is_the_reported_one(sft):
    folder, data = sft
    report = read_report(folder)
    tokenizer = AutoTokenizer.from_pretrained(report["settings"]["model_name"])
    tokenizer.padding_side = "right"
    rows = read_data(str(data), 0.1, 0, EXAMPLES)
    _, eval_learned = tokenize_data(tokenizer, rows, train_sft.TEMPLATE, 512)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    settings = train_sft.Settings.model_construct(**report["settings"])
    held_out = train_sft.HeldOut(model, tokenizer, *eval_learned, settings)
    assert held_out.measure()["loss"] == pytest.approx(report["trained"]["loss"], abs=1e-6)
    # And much was learned.
    assert report["trained"]["loss"] < report["base"]["loss"] - 1


def test_success_and_kl_of_a_reloaded_policy_are_the_reported_ones(
    call_main, demo_model, tmp_path, capsys
):
    flags = ["--model-name", demo_model, "--device", "cpu", "--dtype", "bfloat16"]
    flags += ["--training-epochs", "25", "--eval-samples", "6", "--save-every", "0"]
    assert call_main(*flags, "--eval-prompts") == 0
    folder = tmp_path / "trained_model"
    report = read_report(folder)
    trained = report["trained"]["train_prompts"]
    assert trained["kl"] > 0.05 and len(read_metrics(folder)) == 15

    # The same prompts, with the same random numbers, are asked of the folder as a base model.
    reloaded = ["--model-name", folder, *flags[2:], "--eval-prompts", "--output-dir", "again"]
    reloaded += ["--training-epochs", "0.1", "--learning-rate", "1e-9", "--batch-size", "2"]
    reloaded += ["--target-approx-kl", "0"]
    assert call_main(*reloaded) == 0
    base = read_report(tmp_path / "again")["base"]["train_prompts"]
    assert base["success_rate"] == trained["success_rate"]
    assert base["first_sample"] == trained["first_sample"]
    assert base["score"] == trained["score"]

    # KL(saved || base model) of what was said, by plain transformers.
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    models = [
        AutoModelForCausalLM.from_pretrained(path, dtype=torch.bfloat16)
        for path in (folder, demo_model)
    ]
    total = 0.0
    for prompt, text in trained["first_sample"].items():
        ids = tokenizer(prompt + text, return_tensors="pt")["input_ids"]
        start = len(tokenizer(prompt)["input_ids"])
        with torch.no_grad():
            logprobs, ref = (model(ids).logits[0, start - 1 : -1].float().log_softmax(-1)
                             for model in models)  # fmt: skip
        total += (logprobs.exp() * (logprobs - ref)).sum().item()
    assert total / 6 == pytest.approx(trained["kl"], rel=0.03)
