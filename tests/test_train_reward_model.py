"""The reward model: what its rows mean, what is learned from them, and what PPO makes of it."""

import json
import math
import shlex
import shutil
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn.functional import binary_cross_entropy_with_logits
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BatchEncoding,
    BertConfig,
    BertTokenizer,
    DistilBertConfig,
    GPT2Config,
    LlamaConfig,
)

import train_reward_model
import train_rlhf
from train_reward_model import RULES, ComparisonTrainer, margins_of, measure, read_comparison

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789"
SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIZES |= {"intermediate_size": 48, "max_position_embeddings": 64}
SHORT = "--eval-share 0.3 --batch-size 4 --training-epochs 1 --learning-rate 1e-2 --lora-rank 4"
TEXTS = ["I am glad", "I", "Today I am sad, and then it rained and all of us were tired", "so</s>"]
CPU = torch.device("cpu")


def settings_of(*flags):
    """Return settings of the reward model without a look at data or places."""
    flags = ["--device", "cpu", "--dtype", "float32", *map(str, flags)]
    return train_rlhf.read_settings(flags, vars(train_reward_model), RULES, ())


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def run_main(monkeypatch, tmp_path):
    """Train in a fresh folder; return the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    given = ["--device", "cpu", "--dtype", "float32", "--eval-every", "0", "--save-every", "0"]
    return lambda *flags: train_reward_model.main([*given, *map(str, flags)])


@pytest.fixture
def run_small(run_main, monkeypatch, tmp_path):
    """Do two steps on eight rows; return the folder that is left, and the report."""
    monkeypatch.setattr(train_reward_model, "draw", lambda *parts: parts[-1].touch())
    rows = [{"chosen": f"very good {n}", "rejected": f"very {n} bad"} for n in range(12)]
    data = write_lines(tmp_path / "rows.jsonl", rows)

    def run(model, *flags):
        shutil.rmtree(tmp_path / "reward_model", ignore_errors=True)
        assert run_main("--model-name", model, "--data", data, *SHORT.split(), *flags) == 0
        folder = tmp_path / "reward_model"
        return folder, json.loads((folder / "report.json").read_text(encoding="utf-8"))

    return run


@pytest.fixture(scope="module")
def save_model(demo_model, shared_model, tmp_path_factory):
    """Save a tiny random model, its weights large enough to tell texts apart; return its folder."""

    def save(kind):
        folder = tmp_path_factory.mktemp(kind)
        words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *LETTERS, *(f"##{each}" for each in LETTERS)]
        tokenizer = BertTokenizer(vocab={word: place for place, word in enumerate(words)})
        if kind in ("gpt2", "llama"):
            tokenizer = AutoTokenizer.from_pretrained(demo_model)
        elif kind == "tinyllama":
            tokenizer = AutoTokenizer.from_pretrained(shared_model("tinyllama-shape"))
        more = {"vocab_size": len(tokenizer), "initializer_range": 0.3}
        auto = AutoModelForCausalLM
        if kind == "gpt2":
            tokenizer.pad_token = None
            ids = {"bos_token_id": 1, "eos_token_id": 2}
            config = GPT2Config(n_positions=64, n_embd=32, n_layer=2, n_head=2, **ids, **more)
        elif kind in ("llama", "tinyllama"):
            config = LlamaConfig(**SIZES, **more)
        else:
            auto = AutoModelForSequenceClassification
            sizes = {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 48}
            more |= {"num_labels": 2}
            is_bert = kind == "bert"
            config = BertConfig(**SIZES, **more) if is_bert else DistilBertConfig(**sizes, **more)
        torch.manual_seed(0)
        auto.from_config(config).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return folder

    return save


@pytest.fixture(scope="module")
def models(save_model):
    """Return the folder of a model of some kind, which is made where it is first asked for."""
    made = {}

    def find(kind):
        made[kind] = made.get(kind) or save_model(kind)
        return made[kind]

    return find


def load_with_random_head(folder, *flags):
    """Return a model as it is made for training, and its tokenizer, but its head is not zero."""
    settings = settings_of("--model-name", folder, "--lora-rank", 0, *flags)
    model, tokenizer = train_reward_model.load_model(settings, CPU, "float32")
    torch.manual_seed(1)
    torch.nn.init.normal_([*model.parameters()][-1])
    return model.eval(), tokenizer


# --------------------------------------------------------------------------------- what rows mean
SYSTEM = {"from": "system", "value": "Be kind"}
ASKED = {"from": "human", "value": "Hi"}
TURNS = [{"role": "user", "content": "Hi"}]
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Hello", "No"))
RANKED = {"completion_0": "a", "completion_1": "b", "completion_2": "c"}


@pytest.mark.parametrize(
    ("row", "wanted"),
    [
        ({"chosen": "I am glad", "rejected": "I am sad"}, [("I am glad", "I am sad")]),
        ({"prompt": "I am", "chosen": "ok", "rejected": " so"}, [("I am ok", "I am so")]),
        ({"prompt": "Hi\n", "chosen": "ok", "rejected": "no"}, [("Hi\nok", "Hi\nno")]),
        ({"prompt": "", "chosen": "ok", "rejected": "no"}, [("ok", "no")]),
        (
            {
                "conversations": [SYSTEM, ASKED],
                "chosen": {"from": "gpt", "value": "Hello"},
                "rejected": {"from": "gpt", "value": "No"},
            },
            [("Be kind\nHi\nHello", "Be kind\nHi\nNo")],
        ),
        ({"prompt": TURNS, "chosen": [GOOD], "rejected": [BAD]}, [("Hi\nHello", "Hi\nNo")]),
        ({"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]}, [("Hi\nHello", "Hi\nNo")]),
        ({"messages": TURNS, "chosen": "Hello", "rejected": "No"}, [("Hi\nHello", "Hi\nNo")]),
        (RANKED | {"ranking": [2, 0, 1]}, [("b", "a"), ("c", "a"), ("b", "c")]),
        (RANKED | {"ranking": [1, 1, 0]}, [("c", "a"), ("c", "b")]),
        (RANKED | {"ranking": [0, 0, 0]}, None),
        (RANKED | {"completion_2": "b", "ranking": [0, 1, 2]}, [("a", "b"), ("a", "b")]),
        ({"prompt": "x", **RANKED, "ranking": [0, 1, 1]}, [("x a", "x b"), ("x a", "x c")]),
        ({"chosen": "same", "rejected": "same"}, None),
        ({"text": "fine", "label": 1}, [("fine", None)]),
        ({"text": "dull", "label": "0"}, [(None, "dull")]),
        ({"text": "fine", "label": True}, [("fine", None)]),
        ({"text": "1 a fine film"}, [("a fine film", None)]),
        ({"text": "0 1 dull film"}, [(None, "1 dull film")]),
        ({"text": " ", "label": 1}, None),
    ],
)
def test_a_row_is_its_comparisons(row, wanted):
    assert read_comparison(row, Counter()) == wanted


def test_conversations_that_people_compared(shared):
    path = shared("data/preferences_300.json")
    rows, eval_rows, left_out = train_reward_model.read_comparisons(str(path), 0.1, 0)
    wanted = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        before = "\n".join(turn["value"] for turn in row["conversations"])
        pair = tuple(f"{before}\n{row[name]['value']}" for name in ("chosen", "rejected"))
        wanted.append(pair)
    assert {pair for row in rows + eval_rows for pair in row} == {*wanted}
    assert left_out == {"given twice": 300 - len({*wanted})}
    assert len(eval_rows) == math.ceil(0.1 * len({*wanted}))


def test_sentences_with_labels(shared):
    path = shared("data/sentiment/stsa.binary.train")
    rows, eval_rows, _ = train_reward_model.read_comparisons(str(path), 0.1, 0)
    lines = path.read_text(encoding="utf-8").strip().split("\n")
    wanted = {(line[2:].strip(), None) if line[0] == "1" else (None, line[2:]) for line in lines}
    assert {pair for row in rows + eval_rows for pair in row} == wanted
    assert len(eval_rows) == math.ceil(0.1 * len(wanted))


def test_what_is_held_out_is_not_trained_on(tmp_path):
    """A comparison may be there twice, in several forms: of them one is left."""
    rows = []
    for number in range(20):
        better, worse = f"I am {number}", f"I am not {number}"
        rows.append({"chosen": better, "rejected": worse})
        rows.append({"prompt": "I am", "chosen": str(number), "rejected": f"not {number}"})
        rows.append({"completion_0": worse, "completion_1": better, "ranking": [1, 0]})
    data = write_lines(tmp_path / "rows.jsonl", rows)
    for seed in range(3):
        parts = train_reward_model.read_comparisons(str(data), 0.25, seed)
        kept, held_out = ({pair for row in part for pair in row} for part in parts[:2])
        assert (len(kept), len(held_out), len(kept & held_out)) == (15, 5, 0)
        assert parts[2] == {"given twice": 40}


FIRST = {"chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"chosen": "a"}, "it has no 'rejected'"),
        ({"chosen": "a", "rejected": 5}, "its answer is 5, no text"),
        ({"chosen": "a", "rejected": None}, "its answer is None, no text"),
        ({"prompt": "a", "chosen": [], "rejected": []}, "its answer is [], no text"),
        ({"chosen": [], "rejected": []}, "its answer is [], no text"),
        ({"text": "a", "label": 2}, "its label is 2: give 0 or 1"),
        ({"text": "a", "label": "good"}, "its label is good: give 0 or 1"),
        ({"text": "a fine film"}, "its label is a: give 0 or 1"),
        ({"text": None, "label": 1}, "its text is None, no text"),
        ({"sentence": "a"}, "it has no 'label'"),
        (RANKED | {"ranking": [0, 1, 2, 3]}, "it has no 'completion_3'"),
        (
            RANKED | {"ranking": [1, 0]},
            "its ranking is [1, 0]: give a rank for each completion",
        ),
        (
            RANKED | {"ranking": "210"},
            "its ranking is 210: give a rank for each completion",
        ),
    ],
)
def test_a_bad_row(run_main, tmp_path, capsys, demo_model, row, reason):
    data = write_lines(tmp_path / "rows.jsonl", [FIRST, row])
    assert run_main("--model-name", demo_model, "--data", data.name) == 2
    remedy = "give rows with chosen and rejected, completion_0 … and ranking, or text and label"
    line = f"- DATA is rows.jsonl: it can't be used (row 2: {reason}): {remedy}"
    assert capsys.readouterr().err.splitlines() == ["Nothing was started or changed:", line]
    assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_data_without_a_preference(run_main, tmp_path, capsys, demo_model):
    rows = [FIRST, {"chosen": "a", "rejected": "a"}]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    assert run_main("--model-name", demo_model, "--data", data.name) == 2
    assert "1 rows of it can be used, where 2 are the least" in capsys.readouterr().err
    assert not (tmp_path / "reward_model").exists()


# ------------------------------------------------------------------------------------- the scores
PAIRS = [
    (0, TEXTS[0], TEXTS[2]),
    (1, None, TEXTS[1]),
    (2, TEXTS[3], TEXTS[0]),
    (3, TEXTS[2], None),
]


@torch.no_grad()
def scores_alone(model, tokenizer, texts):
    """Return the scores as head times what the body says at the last token of each text alone."""
    head, scores = [*model.parameters()][-1], []
    for text in texts:
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        assert tokenizer.pad_token_id not in ids
        scores.append((model.base_model(ids).last_hidden_state[0, -1] @ head[0]).item())
    return scores


@pytest.mark.parametrize("kind", ["demo_model", "gpt2", "tinyllama"])
def test_the_score_of_a_text_does_not_depend_on_its_batch(models, demo_model, tmp_path, kind):
    """GPT-2 here has no pad token, and TinyLlama's is the end token: each gets one of its own."""
    folder = demo_model if kind == "demo_model" else models(kind)
    before = AutoTokenizer.from_pretrained(folder)
    model, tokenizer = load_with_random_head(folder)
    ids = tokenizer(TEXTS[3], add_special_tokens=False)["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id != tokenizer.pad_token_id
    wanted = scores_alone(model, tokenizer, TEXTS)
    assert max(wanted) - min(wanted) > 0.1
    batch = tokenizer(TEXTS, padding=True, return_tensors="pt")
    assert batch["attention_mask"].sum(1).max() > batch["attention_mask"].sum(1).min()
    with torch.no_grad():
        logits = model(batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert logits[:, 0].tolist() == pytest.approx(wanted, abs=2e-4)

    added = kind != "demo_model"
    assert len(tokenizer) == len(before) + added
    embeddings = model.get_input_embeddings().weight
    original = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    assert torch.equal(embeddings[: len(before)], original.get_input_embeddings().weight)
    assert len(embeddings) == len(tokenizer) == model.config.vocab_size
    train_reward_model.save_trained(model, tokenizer, None, tmp_path)
    score, scale = train_rlhf.load_classifier("REWARD", str(tmp_path), "", 3, CPU)
    assert score([""] * 4, TEXTS) == pytest.approx(wanted, abs=2e-4)  # the last is alone
    assert scale is None


def test_of_a_long_text_the_end_counts(demo_model):
    text = " ".join(f"{number} days" for number in range(40))
    _, whole = load_with_random_head(demo_model)
    _, tokenizer = load_with_random_head(demo_model, "--max-length", 12)
    (example,) = train_reward_model.tokenize(tokenizer, [(0, text, None)])
    ids = whole(text)["input_ids"]
    assert len(ids) > 100 and len(example["input_ids"]) == 12
    assert example["input_ids"] == [ids[0], *ids[-11:]]  # the start token stays


def test_the_margin_of_each_comparison_and_their_loss(models):
    """Of a pair it is the difference of two scores; of a label the score, for or against."""
    model, tokenizer = load_with_random_head(models("llama"))
    batch = train_reward_model.pad_batch(tokenizer, train_reward_model.tokenize(tokenizer, PAIRS))
    assert batch["signs"].tolist() == [1, -1, -1, 1, -1, 1]
    glad, one, long, end = scores_alone(model, tokenizer, TEXTS)
    with torch.no_grad():
        margins, scores = margins_of(model, batch)
        loss = ComparisonTrainer().compute_loss(model, batch).item()
    wanted = [glad - long, -one, end - glad, long]
    assert margins.tolist() == pytest.approx(wanted, abs=1e-4)
    assert scores.tolist() == pytest.approx([glad, long, one, end, glad, long], abs=1e-4)
    nats = [math.log(1 + math.exp(-margin)) for margin in wanted]
    assert loss == pytest.approx(sum(nats) / 4, abs=1e-4)


def test_the_loss_of_labels_is_the_cross_entropy(models):
    model, tokenizer = load_with_random_head(models("llama"))
    pairs = [(0, TEXTS[0], None), (1, None, TEXTS[1]), (2, None, TEXTS[2])]
    batch = train_reward_model.pad_batch(tokenizer, train_reward_model.tokenize(tokenizer, pairs))
    scores = torch.tensor(scores_alone(model, tokenizer, TEXTS[:3]))
    wanted = binary_cross_entropy_with_logits(scores, torch.tensor([1.0, 0.0, 0.0])).item()
    with torch.no_grad():
        loss = ComparisonTrainer().compute_loss(model, batch).item()
    assert loss == pytest.approx(wanted, abs=1e-4)


# ----------------------------------------------------------------------------------- the figures
class Numbers:
    """A tokenizer and a model in one: a text is a number, and that is its score."""

    device, dtype = CPU, torch.float32

    def eval(self):
        return self

    def pad(self, inputs, return_tensors):
        ids = torch.tensor(inputs["input_ids"])
        return BatchEncoding({"input_ids": ids, "attention_mask": torch.ones_like(ids)})

    def __call__(self, input_ids, attention_mask=None, **options):
        if isinstance(input_ids, str):
            return {"input_ids": [round(float(input_ids) * 1000)]}
        return SimpleNamespace(logits=input_ids / 1000)


def figures_of(pairs, size=3):
    """Return what is measured of (row, score of the better, score of the worse) comparisons."""
    pairs = [(row, *(None if each is None else str(each) for each in two)) for row, *two in pairs]
    numbers = Numbers()
    return measure(numbers, numbers, train_reward_model.tokenize(numbers, pairs), size)


def test_the_figures_of_pairs():
    pairs = [(0, 1.0, 0.0), (1, 3.5, 0.5), (2, 2.5, 2.25), (3, 1.5, 1.5), (4, -1.0, 0.75)]
    found = figures_of(pairs)
    margins, right = [1.0, 3.0, 0.25, 0.0, -1.75], [1, 1, 1, 0.5, 0]
    assert found["accuracy"] == pytest.approx(0.7)
    deviation = math.sqrt(sum((each - 0.7) ** 2 for each in right) / 5)
    assert found["standard_error"] == pytest.approx(deviation / math.sqrt(5))
    assert found["margin"] == pytest.approx(0.5)
    nats = [math.log(1 + math.exp(-margin)) for margin in margins]
    assert found["loss"] == pytest.approx(sum(nats) / 5)
    assert (found["guessing"], found["comparisons"]) == (0.5, 5)
    # sigmoid: 0.731, 0.953, 0.562, 0.5, 0.852, of which 0.562 and 0.5 share the bin up to 0.6
    wanted = [(0.531, 0.75, 2), (0.731, 1, 1), (0.852, 0, 1), (0.953, 1, 1)]
    names = ("predicted", "observed", "comparisons")
    bins = [tuple(each[name] for name in names) for each in found["calibration"]]
    assert bins == [pytest.approx(each, abs=1e-3) for each in wanted]


def test_the_standard_error_of_rankings_is_that_of_whole_rows():
    """The comparisons of a row share texts: as many more of them tell less than more rows."""
    drawn = numpy.random.default_rng(0)
    pairs, wins = [], []
    for row in range(60):
        texts = drawn.normal([2, 1, 0, -1][: 2 + row % 3], 1.5).round(3)
        texts *= drawn.choice([1, 1, -1])  # of some rows it understands the contrary
        pairs += [(row, *two) for two in combinations(texts.tolist(), 2)]
        wins.append([float(one > other) for one, other in combinations(texts, 2)])
    found = figures_of(pairs, size=50)
    sums, counts = numpy.array([[sum(each), len(each)] for each in wins]).T
    assert found["accuracy"] == pytest.approx(sums.sum() / counts.sum())
    places = drawn.integers(60, size=(20_000, 60))
    spread = (sums[places].sum(1) / counts[places].sum(1)).std()  # over rows drawn again and again
    assert found["standard_error"] == pytest.approx(spread, rel=0.05)
    alone = math.sqrt(found["accuracy"] * (1 - found["accuracy"]) / counts.sum())
    assert found["standard_error"] > 1.3 * alone


def test_of_labels_the_larger_share_is_what_guessing_gets():
    found = figures_of([(0, 1.0, None), (1, None, -2.0), (2, None, 0.5), (3, None, -1.5)])
    assert (found["accuracy"], found["guessing"]) == (0.75, 0.75)
    assert figures_of([(0, 1.0, None), (1, 2.0, None), (2, None, 1.5)])["guessing"] == 2 / 3


def test_the_scale_is_that_of_the_different_texts():
    found = figures_of([(0, 4.0, 1.0), (1, 2.0, 1.0)])
    assert (found["score_mean"], found["score_std"]) == pytest.approx((7 / 3, math.sqrt(14 / 9)))
    scores = torch.tensor([*found["first_sample"].values()])
    assert scores.mean().item() == pytest.approx(0, abs=1e-6)
    assert scores.std(correction=0).item() == pytest.approx(1)
    assert figures_of([(0, 1.0, 1.0)])["score_std"] == 1.0  # or a division by zero


@pytest.mark.parametrize(("count", "learned"), [(3, False), (30, True)])
def test_a_few_comparisons_prove_nothing(monkeypatch, count, learned):
    monkeypatch.setattr(train_reward_model, "describe_run", lambda *parts: {})
    trained = figures_of([(row, 1.0, 0.0) for row in range(count)])
    assert (trained["accuracy"], trained["standard_error"]) == (1.0, 0.0)
    report = train_reward_model.make_report(None, None, None, trained, trained)
    assert report["learned"] is learned


# ------------------------------------------------------------------------------------ other models
def weights_of(folder):
    return load_file(Path(folder, "model.safetensors"))


@pytest.mark.parametrize("kind", ["bert", "distilbert"])
@pytest.mark.parametrize("rank", ["4", "0"])
def test_another_architecture_with_its_own_tokenizer(models, run_small, kind, rank):
    """It has two labels, and gets a new head with one."""
    before = weights_of(models(kind))
    folder, report = run_small(models(kind), "--lora-rank", rank)
    after, config = weights_of(folder), json.loads((folder / "config.json").read_text())
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    body = {name for name in before if name.startswith(f"{kind}.")}
    assert set(after) == set(before) and len(before) - len(body) == (2 if kind == "bert" else 4)
    assert body.isdisjoint(changed) if rank == "0" else len(body & changed) > 8
    assert set(before) - body == changed - body
    assert after["classifier.weight"].shape == (1, 32) and after["classifier.weight"].any()
    assert len(config.get("id2label", {0: "the only one"})) == 1
    assert (report["base"]["margin"], report["base"]["accuracy"]) == (0, 0.5)
    assert (folder / "adapter").exists() == ("lora" in report["tags"]) == (rank != "0")

    score, _ = train_rlhf.load_classifier("REWARD", str(folder), "", 3, CPU)
    wanted = report["trained"]["first_sample"]
    raw = 1e-5 / report["trained"]["score_std"]
    assert score([""] * len(wanted), [*wanted]) == pytest.approx([*wanted.values()], abs=raw)


@pytest.mark.parametrize(("kind", "bits"), [("llama", "8bit"), ("distilbert", "4bit")])
def test_a_quantized_model_is_saved_whole(models, run_small, kind, bits):
    """Where bitsandbytes quantizes part of a new head, that can't be trained."""
    folder, report = run_small(models(kind), "--quantization", bits)
    before, after = weights_of(models(kind)), weights_of(folder)
    assert {weight.dtype for weight in after.values()} == {torch.float32}
    shared = set(before) & set(after) - {"classifier.weight", "classifier.bias"}
    assert all(before[name].shape == after[name].shape for name in shared) and len(shared) >= 20
    assert "quantization_config" not in json.loads((folder / "config.json").read_text())
    score, _ = train_rlhf.load_classifier("REWARD", str(folder), "", 3, CPU)
    wanted = report["trained"]["first_sample"]
    allowed = 0.1 if bits == "8bit" else 1e-3  # with 8 bits activations are rounded too
    assert score([""] * len(wanted), [*wanted]) == pytest.approx([*wanted.values()], abs=allowed)


def test_minibatches_give_the_same_steps(models, run_small):
    def metrics_of(*flags):
        folder, _ = run_small(models("llama"), *flags)
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        return [json.loads(line)[name] for line in lines for name in ("loss", "grad_norm")]

    whole = metrics_of()
    assert whole[0] == pytest.approx(math.log(2))  # the head is zero
    assert metrics_of("--mini-batch-size", "2") == pytest.approx(whole, rel=1e-3)


@pytest.fixture
def refused(run_main, tmp_path, capsys):
    """Return the one line that tells why nothing was started."""
    data = write_lines(tmp_path / "rows.jsonl", [FIRST, {"chosen": "c", "rejected": "d"}])

    def start(*flags, main=run_main):
        capsys.readouterr()
        given = ["--data", data] if main is run_main else []
        assert main(*given, *flags) == 2
        first, line = capsys.readouterr().err.splitlines()
        assert first == "Nothing was started or changed:"
        assert not [*tmp_path.glob("*/checkpoint")]
        return line

    return start


def test_a_head_alone_on_a_quantized_body(refused, models):
    line = refused("--model-name", models("llama"), "--quantization", "4bit", "--lora-rank", "0")
    assert line == "- QUANTIZATION is 4bit: give none, or LORA_RANK 1 or more"


@pytest.mark.parametrize("kind", ["llama", "bert"])
@pytest.mark.parametrize("spoil", ["missing", "misshapen"])
def test_a_body_that_is_not_whole(refused, models, tmp_path, kind, spoil):
    """transformers would go on with random numbers."""
    folder = tmp_path / "spoiled"
    shutil.copytree(models(kind), folder)
    weights = weights_of(folder)
    name = next(name for name in weights if "layer" in name and weights[name].ndim == 2)
    weights[name] = weights[name][:-1].clone()
    if spoil == "missing":
        del weights[name]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    line = refused("--model-name", folder)
    assert line.startswith("- MODEL_NAME is ")
    assert f"(it lacks weights such as {name}): name a language model or a classifier" in line


# ---------------------------------------------------------------------------------------- adapters
@pytest.fixture(scope="module")
def adapter(models, tmp_path_factory):
    """Return the folder of an adapter on the tiny Llama that changes a lot."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(models("llama"))
    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear", task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(models("llama")).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def merged(models, adapter):
    """Return the weights that base and adapter make together: W + B A alpha / r."""
    weights, lora = weights_of(models("llama")), load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in lora if "lora_A" in name]:
        own = name.removeprefix("base_model.model.").replace(".lora_A", "")
        weights[own] = weights[own] + 2 * lora[name.replace("lora_A", "lora_B")] @ lora[name]
    return weights


@pytest.mark.parametrize("kind", ["AutoModelForCausalLM", "AutoModelForSequenceClassification"])
def test_an_adapter_stands_for_its_base_with_it(models, adapter, merged, kind):
    options = {"new_head": True, "num_labels": 1} if "Sequence" in kind else {}
    model = train_rlhf.load_base_model(str(adapter), CPU, "float32", "none", kind, **options)
    assert not hasattr(model, "peft_config")
    found = model.state_dict()
    names = [name for name in merged if name.startswith("model.")]
    assert len(names) > 15
    for name in names:
        assert torch.allclose(found[name], merged[name], atol=1e-6), name
    bare = weights_of(models("llama"))
    assert max((found[name] - bare[name]).abs().max() for name in names) > 0.5
    if not options:
        reference = AutoModelForCausalLM.from_pretrained(models("llama"))
        both = peft.PeftModel.from_pretrained(reference, adapter).eval()
        ids = torch.arange(3, 13)[None]
        with torch.no_grad():
            assert torch.allclose(model(ids).logits, both(ids).logits, atol=1e-4)


@pytest.mark.parametrize("lacking", ["a weight", "all"])
@pytest.mark.parametrize("stage", ["train_rlhf", "train_reward_model"])
def test_an_adapter_without_its_weights(refused, call_main, adapter, tmp_path, stage, lacking):
    folder = tmp_path / "spoiled"
    shutil.copytree(adapter, folder)
    weights = load_file(folder / "adapter_model.safetensors")
    del weights[min(weights)]
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    if lacking == "all":
        (folder / "adapter_model.safetensors").unlink()
    options = {"main": call_main} if stage == "train_rlhf" else {}
    line = refused("--model-name", folder, "--device", "cpu", **options)
    assert line.startswith(f"- MODEL_NAME is {train_rlhf.shorten(folder)}: it can't be used (")


# ------------------------------------------------------------------- a reward model that has learned
@pytest.fixture(scope="module")
def learned(demo_model, tmp_path_factory):
    """Learn from 300 pairs whose truth is known, in the folder that is returned."""
    folder = tmp_path_factory.mktemp("learned")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(demo_model.parent / "examples")
        import make_data

        patch.setattr(sys, "argv", ["make_data.py", "--pairs", "500", "--texts", "0"])
        make_data.main()
        flags = ["--model-name", str(demo_model), "--data", "pairs.jsonl", "--eval-share", "0.4"]
        flags += ["--learning-rate", "7e-3", "--training-epochs", "1.5", "--eval-every", "20"]
        flags += ["--device", "cpu", "--dtype", "float32"]
        assert train_reward_model.main(flags) == 0
    return folder


@pytest.fixture(scope="module")
def report(learned):
    return json.loads((learned / "reward_model" / "report.json").read_text(encoding="utf-8"))


def test_300_pairs_teach_what_is_preferred(report):
    base, trained = report["base"], report["trained"]
    assert report["samples"] == 29 * 16 and trained["comparisons"] == 200
    assert (base["accuracy"], base["loss"]) == (0.5, pytest.approx(math.log(2)))
    assert trained["accuracy"] >= 0.8 and trained["standard_error"] < 0.03
    assert trained["loss"] < 0.55 and trained["margin"] > 1
    assert report["learned"]
    surest, least_sure = trained["calibration"][-1], trained["calibration"][0]
    assert surest["observed"] > least_sure["observed"]


def test_its_folder_has_all_that_a_run_leaves(learned, report):
    folder = learned / "reward_model"
    card = (folder / "README.md").read_text(encoding="utf-8")
    trained = report["trained"]
    assert f"Right: {trained['accuracy']:.1%} ± {trained['standard_error']:.1%} of 200" in card
    assert (folder / "training.png").stat().st_size > 10_000
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    held_out = [json.loads(line)["eval_accuracy"] for line in lines]
    assert [place for place, each in enumerate(held_out, start=1) if each is not None] == [20]
    names = {path.name for path in (folder / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names


def test_the_lines_that_it_tells_are_of_its_folder_whatever_its_name(report):
    settings = report["settings"] | {"output_dir": "my 'own' model"}
    told = train_reward_model.summarize(report | {"settings": settings})
    lines = [shlex.split(line) for line in told.splitlines() if line.startswith("    python ")]
    assert [line[line.index("my 'own' model") - 1] for line in lines] == [
        "--reward",
        "--output-dir",
    ]


@pytest.fixture(scope="module")
def score(learned):
    """Return the function that PPO has for a reward, of texts alone, and its scale."""
    name = str(learned / "reward_model")
    function, scale = train_rlhf.load_classifier("REWARD", name, "POSITIVE", 40, CPU)
    return lambda texts: function([""] * len(texts), texts), scale


def test_the_scale_goes_to_ppo(learned, report, score):
    of_texts, scale = score
    trained = report["trained"]
    config = json.loads((learned / "reward_model" / "config.json").read_text())
    for name, figure in (("mean", "score_mean"), ("std", "score_std"), ("accuracy", "accuracy")):
        assert config[f"score_{name}"] == trained[figure]
    given = {"threshold": 0.0, "accuracy": trained["accuracy"]}
    assert scale == {"mean": 0.0, "deviation": 1.0, "graded": False} | given
    assert train_rlhf.success_rate([-0.1, 0.1, 0.0, 2.0], scale["threshold"]) == 0.5
    wanted = trained["first_sample"]
    assert of_texts([*wanted]) == pytest.approx([*wanted.values()], abs=1e-3)
    assert [*wanted.values()] == sorted(wanted.values(), reverse=True)


def test_scores_have_mean_0_and_deviation_1_over_the_held_out_texts(learned, report, score):
    of_texts, _ = score
    _, held_out, _ = train_reward_model.read_comparisons(str(learned / "pairs.jsonl"), 0.4, 0)
    texts = sorted({text for row in held_out for pair in row for text in pair})
    scores = dict(zip(texts, of_texts(texts)))
    values = torch.tensor([*scores.values()])
    assert values.mean().item() == pytest.approx(0, abs=1e-3)
    assert values.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    right = [scores[better] > scores[worse] for ((better, worse),) in held_out]
    assert sum(right) / 200 == pytest.approx(report["trained"]["accuracy"], abs=0.006)


@pytest.fixture
def show(run_main, learned, capsys):
    """Return exit status, lines and errors of --score."""

    def start(*texts, folder=learned / "reward_model"):
        capsys.readouterr()
        status = run_main("--output-dir", folder, "--score", *texts)
        output, errors = capsys.readouterr()
        return status, output.splitlines(), errors.splitlines()

    return start


def test_texts_are_scored_as_ppo_would(show, score, tmp_path):
    of_texts, _ = score
    texts = ["I am happy.", "I am sad.", "Hi\nI feel good"]
    wanted = [f"{number:+8.3f}  " for number in of_texts(texts)]
    assert show(*texts[:2]) == (0, [wanted[0] + texts[0], wanted[1] + texts[1]], [])
    (tmp_path / "texts.txt").write_text("\n".join(texts[:2]))
    rows = [{"text": texts[0]}, {"messages": [{"role": "user", "content": texts[1]}]}]
    write_lines(tmp_path / "rows.jsonl", rows)
    for name in ("texts.txt", "rows.jsonl"):
        status, lines, errors = show(name)
        assert (status, [line[10:] for line in lines], errors) == (0, texts[:2], [])
        assert float(lines[0][:8]) > 0 > float(lines[1][:8])


def test_what_can_not_be_scored(show, tmp_path, models):
    line = "OUTPUT_DIR is nowhere: there is no model in it: train one first"
    refused = "Nothing was started or changed:"
    assert show("I am", folder="nowhere") == (2, [], [refused, f"- {line}"])
    status, _, errors = show("missing.txt")
    assert status == 2 and errors[0] == refused and len(errors) == 2
    assert errors[1].startswith("- SCORE is missing.txt: it can't be used (")
    (tmp_path / "lm").mkdir()
    for path in models("llama").iterdir():
        shutil.copy(path, tmp_path / "lm")
    (tmp_path / "lm" / "report.json").touch()
    status, _, errors = show("I am", folder="lm")
    assert status == 2 and "(it is a LlamaForCausalLM)" in errors[1]


def test_the_stages_are_not_taken_for_each_other(refused, call_main, learned, demo_model):
    folder, adapter = learned / "reward_model", learned / "reward_model" / "adapter"
    start = {"main": call_main}
    line = refused("--model-name", folder, "--device", "cpu", **start)
    assert "MODEL_NAME is " in line and "(it is a LlamaForSequenceClassification)" in line
    for options in ({}, start):
        line = refused("--model-name", adapter, "--device", "cpu", **options)
        assert "MODEL_NAME is " in line and "(it is the adapter of a classifier)" in line
    for other in (demo_model, adapter):
        flags = ["--model-name", demo_model, "--reward", other, "--device", "cpu"]
        line = refused(*flags, **start)
        assert line.startswith("- REWARD is ") and "it can't be used (" in line


def test_ppo_on_it_from_an_adapter(call_main, learned, report, score, adapter, merged, tmp_path):
    """So small a rate leaves the model as it was: the adapter on its base, and no bare model."""
    flags = "--batch-size 4 --max-new-tokens 4 --eval-samples 6 --training-epochs 0.5 --seed 1"
    flags += " --device cpu --dtype float32 --learning-rate 1e-20 --target-approx-kl 0"
    flags += " --ppo-epochs 1"
    folder = tmp_path / "trained_model"
    given = ["--model-name", adapter, "--reward", learned / "reward_model"]
    assert call_main(*given, *flags.split()) == 0
    (metrics,) = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    assert metrics["kl"] == pytest.approx(0, abs=1e-6)
    saved = weights_of(folder)
    names = [name for name in merged if name in saved]
    assert len(names) > 15
    for name in names:
        assert torch.allclose(saved[name], merged[name], atol=1e-5), name

    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    scores = score[0]([sample["prompt"] + sample["response"] for sample in samples])
    assert [sample["score"] for sample in samples] == pytest.approx(scores, abs=1e-3)
    assert metrics["success_rate"] == sum(each > 0 for each in scores) / 4
    accuracy = report["trained"]["accuracy"]
    after = json.loads((folder / "report.json").read_text())
    assert after["scale"]["accuracy"] == accuracy
    assert after["trained"]["train_prompts"]["success_rate"] is not None
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert f"agrees with {accuracy:.0%} of held-out comparisons." in card
