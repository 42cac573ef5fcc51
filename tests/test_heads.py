"""A model with one output: what its scores depend on, what is trained of it, and how it is saved."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from helpers import refusals
from peft import PeftModel
from safetensors.torch import load_file, save_file
from test_comparisons import write_lines
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BertConfig,
    BertTokenizer,
    DistilBertConfig,
)

import train_reward_model
from finetune.classifiers import load_classifier
from finetune.fields import Tally
from finetune.heads import load_with_head, save_with_head
from finetune.judged import tokenize
from finetune.settings import read_settings

FULL = bool(os.environ.get("CI_FULL"))
CPU = torch.device("cpu")
LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
TEXTS = ["I am glad", "I", "Today I am sad, and then it rained and all of us were tired", "so</s>"]


def load_with_random_head(folder, *flags):
    """Return a model as it is made for training, and its tokenizer, but its head is not zero."""
    flags = ["--model-name", str(folder), "--lora-rank", "0", *flags]
    constants, settings_class = vars(train_reward_model), train_reward_model.Settings
    settings = read_settings(flags, constants, settings_class, ())
    model, tokenizer = load_with_head(settings, CPU, "float32")
    assert not [*model.parameters()][-1].any()
    torch.manual_seed(1)
    torch.nn.init.normal_([*model.parameters()][-1])
    return model.eval(), tokenizer


@torch.no_grad()
def scores_alone(model, tokenizer, texts):
    """Return the scores as head times what the body says at the last token of each text alone."""
    head, scores = [*model.parameters()][-1], []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert tokenizer.pad_token_id not in ids
        states = model.base_model(ids).last_hidden_state
        scores.append((states[0, -1] @ head[0]).item())
    return scores


def weights_of(folder):
    return load_file(Path(folder, "model.safetensors"))


def report_of(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def write_few_pairs(path):
    """Write twelve comparisons whose texts differ."""
    rows = []
    for number in range(12):
        rows.append({"chosen": f"very good {number}", "rejected": f"very {number} bad"})
    return write_lines(path, rows)


# ------------------------------------------------------------ the scores
@pytest.mark.parametrize("pad", ["<pad>", None, "</s>"])
def test_the_score_of_a_text_does_not_depend_on_its_batch(gpt2, tmp_path, pad):
    """A tokenizer without a pad token, or whose pad is the end token, gets one of its own."""
    folder = shutil.copytree(gpt2, tmp_path / "model")
    before = AutoTokenizer.from_pretrained(folder)
    before.pad_token = pad
    before.save_pretrained(folder)
    model, tokenizer = load_with_random_head(folder)
    ids = tokenizer(TEXTS[3], add_special_tokens=False)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
    wanted = scores_alone(model, tokenizer, TEXTS)
    assert max(wanted) - min(wanted) > 0.1
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    mask = batch["attention_mask"]
    assert mask.sum(1).max() > mask.sum(1).min()
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=mask).logits
    assert logits[:, 0].tolist() == pytest.approx(wanted, abs=2e-4)

    assert len(tokenizer) == len(before) + (pad != "<pad>")
    embeddings = model.get_input_embeddings().weight
    original = AutoModelForCausalLM.from_pretrained(folder).get_input_embeddings().weight
    assert torch.equal(embeddings[: len(before)], original)
    assert len(embeddings) == len(tokenizer) == model.config.vocab_size
    save_with_head(model, tokenizer, None, tmp_path)
    score, scale = load_classifier("REWARD", str(tmp_path), "", 3, CPU)
    # The last text is alone in its batch.
    assert score([""] * 4, TEXTS) == pytest.approx(wanted, abs=2e-4)
    assert scale is None


def test_of_a_long_text_the_end_counts(demo_model):
    text = " ".join(f"{number} days" for number in range(40))
    _, whole = load_with_random_head(demo_model)
    _, tokenizer = load_with_random_head(demo_model, "--max-length", "12")
    (example,) = tokenize(tokenizer, [(0, text, None)], Tally())
    ids = whole(text)["input_ids"]
    assert len(ids) > 100 and len(example["input_ids"]) == 12
    assert example["input_ids"] == [ids[0], *ids[-11:]]  # the start token stays


# -------------------------------------------------------------- the runs
@pytest.fixture(scope="module")
def classifiers(tmp_path_factory):
    """Return the folders of two tiny random classifiers of two labels, with words of their own."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS]
    words += [f"##{letter}" for letter in LETTERS]
    tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(words)})
    shared = {"vocab_size": len(words), "num_labels": 2, "initializer_range": 0.3}
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    configs = {
        "bert": BertConfig(**sizes, intermediate_size=48, **shared),
        "distilbert": DistilBertConfig(dim=32, n_layers=2, n_heads=2, hidden_dim=48, **shared),
    }
    folders = {}
    for kind, config in configs.items():
        folders[kind] = tmp_path_factory.mktemp(kind)
        torch.manual_seed(0)
        model = AutoModelForSequenceClassification.from_config(config)
        model.save_pretrained(folders[kind])
        tokenizer.save_pretrained(folders[kind])
    return folders


@pytest.fixture
def run(monkeypatch, tmp_path):
    """Do two steps on eight rows in a fresh folder; return the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(train_reward_model, "draw", lambda *parts: parts[-1].touch())
    data = write_few_pairs(tmp_path / "rows.jsonl")
    flags = "--device cpu --dtype float32 --eval-share 0.3 --batch-size 4 --training-epochs 1"
    flags += " --learning-rate 1e-2 --lora-rank 4 --eval-every 0 --save-every 0"
    given = ["--data", data, *flags.split(), "--model-name"]
    return lambda *more: train_reward_model.main([*given, *map(str, more)])


def check_scores(folder, report, allowed):
    """Check that the saved model says of texts what the report does."""
    wanted = report["trained"]["first_sample"]
    score, _ = load_classifier("REWARD", str(folder), "", 3, CPU)
    scores = score([""] * len(wanted), [*wanted])
    assert scores == pytest.approx([*wanted.values()], abs=allowed)


FAMILIES = [("bert", 4), ("distilbert", 0), *[("bert", 0), ("distilbert", 4)] * FULL]


@pytest.mark.parametrize(("kind", "rank"), FAMILIES)
def test_another_architecture_with_its_own_tokenizer(classifiers, run, tmp_path, kind, rank):
    """It has two labels, and gets a new head with one."""
    assert run(classifiers[kind], "--lora-rank", rank) == 0
    folder = tmp_path / "reward_model"
    before, after = weights_of(classifiers[kind]), weights_of(folder)
    config, report = AutoConfig.from_pretrained(folder), report_of(folder)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    body = {name for name in before if name.startswith(f"{kind}.")}
    assert set(after) == set(before)
    assert len(before) - len(body) == (2 if kind == "bert" else 4)
    assert body.isdisjoint(changed) if rank == 0 else len(body & changed) > 8
    assert set(before) - body == changed - body
    head = after["classifier.weight"]
    assert head.shape == (1, 32) and head.any()
    assert config.num_labels == 1
    assert report["base"]["margin"] == 0
    assert report["base"]["accuracy"] == 0.5
    assert (folder / "adapter").exists() == ("lora" in report["tags"]) == (rank != 0)
    check_scores(folder, report, allowed=1e-5 / report["trained"]["score_std"])


@pytest.mark.parametrize(("kind", "bits"), [("demo_model", "8bit"), ("distilbert", "4bit")])
def test_a_quantized_model_is_saved_whole(classifiers, demo_model, run, tmp_path, kind, bits):
    """Where bitsandbytes quantizes part of a new head, that can't be trained."""
    model, folder = classifiers.get(kind, demo_model), tmp_path / "reward_model"
    assert run(model, "--quantization", bits) == 0
    before, after = weights_of(model), weights_of(folder)
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    shared = set(before) & set(after) - {"classifier.weight", "classifier.bias"}
    assert len(shared) >= 20
    assert all(before[name].shape == after[name].shape for name in shared)
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    # With 8 bits activations are rounded too.
    allowed = 0.1 if bits == "8bit" else 1e-3
    check_scores(folder, report_of(folder), allowed)


@pytest.mark.parametrize("pad", ["<pad>", None, "</s>"])
def test_the_tokenizer_of_the_adapter_has_no_token_that_the_base_lacks(run, gpt2, tmp_path, pad):
    """The model beside it has the pad token that was added, and a row for it."""
    base = shutil.copytree(gpt2, tmp_path / "base")
    before = AutoTokenizer.from_pretrained(base)
    before.pad_token = pad
    before.save_pretrained(base)
    assert run(base) == 0
    folder = tmp_path / "reward_model"
    whole, alone = (AutoTokenizer.from_pretrained(path) for path in (folder, folder / "adapter"))
    is_added = pad != "<pad>"
    assert alone.get_vocab() == before.get_vocab()
    assert ("<|pad|>" in whole.get_vocab()) == is_added
    assert len(weights_of(folder)["transformer.wte.weight"]) == len(whole) == len(before) + is_added

    # With the base it says what the model says.
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    model = PeftModel.from_pretrained(model, folder / "adapter").eval()
    merged = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    for text in TEXTS[:3]:
        ids = torch.tensor([alone(text)["input_ids"]])
        assert whole(text)["input_ids"] == ids[0].tolist()
        with torch.no_grad():
            scores = [each(ids).logits.item() for each in (model, merged)]
        assert scores[0] == pytest.approx(scores[1], abs=1e-4)


# ------------------------------------------------------- what is refused
def test_ids_beyond_the_embedding_are_told_before_anything_is_written(
    run, copy_of_demo_model, capsys
):
    """With both numbers."""
    tokenizer = AutoTokenizer.from_pretrained(copy_of_demo_model)
    rows = len(tokenizer)
    tokenizer.add_tokens(["ry go"])
    tokenizer.save_pretrained(copy_of_demo_model)
    (problem,) = refusals(run(copy_of_demo_model), capsys.readouterr().err)
    assert problem.startswith("MODEL_NAME is ")
    assert f"'ry go' with the id {rows}, but its embedding has {rows} rows" in problem
    assert not Path("reward_model").exists()


def test_a_head_alone_on_a_quantized_body(run, demo_model, capsys):
    status = run(demo_model, "--quantization", "4bit", "--lora-rank", 0)
    told = "QUANTIZATION is 4bit: give none, or LORA_RANK 1 or more"
    assert refusals(status, capsys.readouterr().err) == [told]


@pytest.mark.parametrize("kind", ["demo_model", "bert"])
@pytest.mark.parametrize("spoil", ["missing", "misshapen"])
def test_a_body_that_is_not_whole(run, classifiers, demo_model, tmp_path, capsys, kind, spoil):
    """transformers would go on with random numbers."""
    folder = shutil.copytree(classifiers.get(kind, demo_model), tmp_path / "spoiled")
    weights = weights_of(folder)
    name = next(name for name in weights if "layer" in name and weights[name].ndim == 2)
    weights[name] = weights[name][:-1].clone()
    if spoil == "missing":
        del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    (problem,) = refusals(run(folder), capsys.readouterr().err)
    assert problem.startswith("MODEL_NAME is ")
    remedy = "name a language model or a classifier"
    assert f"(it lacks weights such as {name}): {remedy}" in problem
    assert not Path("reward_model").exists()
