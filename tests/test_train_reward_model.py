"""The reward model: its loss, its figures, what it learns, and what PPO makes of it."""

import json
import math
import shlex
import shutil
import sys
from itertools import combinations
from types import SimpleNamespace

import numpy
import peft
import pytest
import torch
from helpers import read_metrics, refusals
from safetensors.torch import load_file, save_file
from test_comparisons import answer, system, user, write_lines
from test_heads import (
    CPU,
    TEXTS,
    load_with_random_head,
    report_of,
    scores_alone,
    weights_of,
    write_few_pairs,
)
from transformers import AutoModelForCausalLM, AutoTokenizer, BatchEncoding

import train_reward_model
from finetune.batches import ComparisonCollator
from finetune.classifiers import load_classifier
from finetune.comparisons import COMPARISONS
from finetune.data import read_data
from finetune.errors import shorten
from finetune.fields import Tally
from finetune.judged import tokenize
from finetune.scale import Scale, success_rate
from finetune.scorers import load_scorer
from train_reward_model import ComparisonTrainer, HeldOut, make_report, margins_of, summarize


# -------------------------------------------------------------- the loss
def batch_of(tokenizer, *pairs):
    """Return a batch of comparisons (better text, worse text), each a row of its own."""
    numbered = [(row, *pair) for row, pair in enumerate(pairs)]
    return ComparisonCollator(tokenizer)(tokenize(tokenizer, numbered, Tally()))


def test_the_margin_of_each_comparison_and_their_loss(demo_model):
    """Of a pair it is the difference of two scores; of a label the score, for or against."""
    model, tokenizer = load_with_random_head(demo_model)
    first, second, third, fourth = TEXTS
    pairs = [(first, third), (None, second), (fourth, first), (third, None)]
    batch = batch_of(tokenizer, *pairs)
    assert batch["signs"].tolist() == [1, -1, -1, 1, -1, 1]
    glad, one, long, end = scores_alone(model, tokenizer, TEXTS)
    with torch.no_grad():
        margins, scores = margins_of(model, batch, model.dtype)
        trainer = SimpleNamespace(model=model)
        loss = ComparisonTrainer.compute_loss(trainer, model, batch).item()
    wanted = [glad - long, -one, end - glad, long]
    assert margins.tolist() == pytest.approx(wanted, abs=1e-4)
    in_order = [glad, long, one, end, glad, long]
    assert scores.tolist() == pytest.approx(in_order, abs=1e-4)
    nats = [math.log(1 + math.exp(-margin)) for margin in wanted]
    assert loss == pytest.approx(sum(nats) / 4, abs=1e-4)


# ----------------------------------------------------------- the figures
class Numbers:
    """A tokenizer and a model in one: a text is a number, and that is its score."""

    device, dtype = CPU, torch.float32
    bos_token_id = None
    model_max_length = 10**6

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
    """Return what is measured of comparisons: row, score of the better and of the worse."""
    numbers, numbered = Numbers(), []
    for pair in pairs.split(","):
        row, *texts = pair.split()
        better, worse = (None if text == "-" else text for text in texts)
        numbered.append((int(row), better, worse))
    examples = tokenize(numbers, numbered, Tally())
    return HeldOut(numbers, ComparisonCollator(numbers), examples, size).measure()


def test_the_figures_of_pairs():
    found = figures_of("0 1.0 0.0, 1 3.5 0.5, 2 2.5 2.25, 3 1.5 1.5, 4 -1.0 0.75")
    margins, right = [1.0, 3.0, 0.25, 0.0, -1.75], [1, 1, 1, 0.5, 0]
    assert found["accuracy"] == pytest.approx(0.7)
    deviation = math.sqrt(sum((share - 0.7) ** 2 for share in right) / 5)
    assert found["standard_error"] == pytest.approx(deviation / math.sqrt(5))
    assert found["margin"] == pytest.approx(0.5)
    nats = [math.log(1 + math.exp(-margin)) for margin in margins]
    assert found["loss"] == pytest.approx(sum(nats) / 5)
    assert (found["guessing"], found["comparisons"]) == (0.5, 5)
    # sigmoid: 0.731, 0.953, 0.562, 0.5, 0.852, of which 0.562 and 0.5 share the bin up to 0.6
    wanted = [(0.531, 0.75, 2), (0.731, 1, 1), (0.852, 0, 1), (0.953, 1, 1)]
    names = ("predicted", "observed", "comparisons")
    for figures, expected in zip(found["calibration"], wanted, strict=True):
        assert [figures[name] for name in names] == pytest.approx(expected, abs=1e-3)


def test_the_standard_error_of_rankings_is_that_of_whole_rows():
    """The comparisons of a row share texts: as many more of them tell less than more rows."""
    drawn = numpy.random.default_rng(0)
    pairs, wins = [], []
    for row in range(60):
        texts = drawn.normal([2, 1, 0, -1][: 2 + row % 3], 1.5).round(3)
        texts *= drawn.choice([1, 1, -1])  # of some rows it understands the contrary
        wins.append([])
        for one, other in combinations(texts.tolist(), 2):
            pairs.append(f"{row} {one} {other}")
            wins[row].append(float(one > other))
    found = figures_of(",".join(pairs), size=50)
    sums = numpy.array([sum(row) for row in wins])
    counts = numpy.array([len(row) for row in wins])
    accuracy = sums.sum() / counts.sum()
    assert found["accuracy"] == pytest.approx(accuracy)
    places = drawn.integers(60, size=(20_000, 60))
    # Over rows drawn again and again.
    spread = (sums[places].sum(1) / counts[places].sum(1)).std()
    assert found["standard_error"] == pytest.approx(spread, rel=0.05)
    alone = math.sqrt(accuracy * (1 - accuracy) / counts.sum())
    assert found["standard_error"] > 1.3 * alone


def test_of_labels_the_larger_share_is_what_guessing_gets():
    found = figures_of("0 1.0 -, 1 - -2.0, 2 - 0.5, 3 - -1.5")
    assert (found["accuracy"], found["guessing"]) == (0.75, 0.75)
    assert figures_of("0 1.0 -, 1 2.0 -, 2 - 1.5")["guessing"] == 2 / 3


def test_the_scale_is_that_of_the_different_texts():
    found = figures_of("0 4.0 1.0, 1 2.0 1.0")
    wanted = (7 / 3, math.sqrt(14 / 9))
    assert (found["score_mean"], found["score_std"]) == pytest.approx(wanted)
    scores = torch.tensor([*found["first_sample"].values()])
    assert scores.mean().item() == pytest.approx(0, abs=1e-6)
    assert scores.std(correction=0).item() == pytest.approx(1)
    assert figures_of("0 1.0 1.0")["score_std"] == 1.0  # or a division by zero


@pytest.mark.parametrize(("count", "learned"), [(3, False), (30, True)])
def test_a_few_comparisons_prove_nothing(monkeypatch, count, learned):
    monkeypatch.setattr(train_reward_model, "describe_run", lambda *parts: {})
    trained = figures_of(",".join(f"{row} 1.0 0.0" for row in range(count)))
    assert (trained["accuracy"], trained["standard_error"]) == (1.0, 0.0)
    stage = SimpleNamespace(model=None, settings=None, learning_rate=1e-3)
    assert make_report(stage, None, trained, trained)["learned"] is learned


# -------------------------------------------------------------- the runs
@pytest.fixture
def run_main(monkeypatch, tmp_path):
    """Train in a fresh folder; return the exit status."""
    monkeypatch.chdir(tmp_path)
    given = ["--device", "cpu", "--dtype", "float32", "--eval-every", "0", "--save-every", "0"]
    return lambda *flags: train_reward_model.main([*given, *map(str, flags)])


def test_minibatches_give_the_same_steps(demo_model, run_main, monkeypatch, tmp_path):
    monkeypatch.setattr(train_reward_model, "draw", lambda *parts: None)
    write_few_pairs(tmp_path / "rows.jsonl")
    flags = "--data rows.jsonl --eval-share 0.3 --batch-size 4 --training-epochs 1"
    figures = []
    for size in ("0", "2"):
        given = ["--model-name", demo_model, "--mini-batch-size", size]
        assert run_main(*given, *flags.split(), "--learning-rate", "1e-2") == 0
        metrics = read_metrics(tmp_path / "reward_model")
        figures.append([(record["loss"], record["grad_norm"]) for record in metrics])
    whole, parts = figures
    assert whole[0][0] == pytest.approx(math.log(2))  # the head is zero
    assert len(whole) == 2
    for wanted, found in zip(whole, parts):
        assert found == pytest.approx(wanted, rel=1e-3)


@pytest.fixture
def refused(run_main, call_main, tmp_path, capsys):
    """Return the one line that tells why nothing was started."""
    rows = [{"chosen": "a", "rejected": "b"}, {"chosen": "c", "rejected": "d"}]
    data = write_lines(tmp_path / "rows.jsonl", rows)

    def start(script, *flags):
        capsys.readouterr()
        main, given = run_main, ["--data", data]
        if script == "train_rlhf":
            main, given = call_main, ["--device", "cpu"]
        (problem,) = refusals(main(*given, *flags), capsys.readouterr().err)
        assert not [*tmp_path.glob("*/checkpoint")]
        return problem

    return start


# -------------------------------------------------------------- adapters
@pytest.fixture(scope="module")
def adapter(demo_model, tmp_path_factory):
    """Return the folder of an adapter that changes a lot."""
    folder = tmp_path_factory.mktemp("adapter")
    model = AutoModelForCausalLM.from_pretrained(demo_model)
    lora = peft.LoraConfig(r=3, lora_alpha=6, target_modules="all-linear")
    torch.manual_seed(0)
    model = peft.get_peft_model(model, lora)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(demo_model).save_pretrained(folder)
    return folder


def test_an_adapter_stands_for_its_base_with_it(demo_model, adapter):
    """Their weights together are W + B A alpha / r."""
    model, _ = load_with_random_head(adapter)
    assert not hasattr(model, "peft_config")
    weights, bare = model.state_dict(), weights_of(demo_model)
    lora = load_file(adapter / "adapter_model.safetensors")
    for name in [name for name in lora if "lora_A" in name]:
        plain = name.removeprefix("base_model.model.").replace(".lora_A", "")
        update = 2 * lora[name.replace("lora_A", "lora_B")] @ lora.pop(name)
        wanted = bare.pop(plain).float() + update
        assert update.abs().max() > 0.1
        assert torch.allclose(weights[plain], wanted, atol=1e-5), name
    assert len(bare) < len(weights) - 15
    for name in bare.keys() & weights.keys():
        assert torch.equal(weights[name], bare[name].float()), name


@pytest.mark.parametrize("lacking", ["a weight", "all"])
@pytest.mark.parametrize("script", ["train_rlhf", "train_reward_model"])
def test_an_adapter_without_its_weights(refused, adapter, tmp_path, script, lacking):
    folder = shutil.copytree(adapter, tmp_path / "spoiled")
    weights = load_file(folder / "adapter_model.safetensors")
    del weights[min(weights)]
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    if lacking == "all":
        (folder / "adapter_model.safetensors").unlink()
    problem = refused(script, "--model-name", folder)
    assert problem.startswith(f"MODEL_NAME is {shorten(folder)}: it can't be used (")


# --------------------------------------- a reward model that has learned
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
    return report_of(learned / "reward_model")


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
    accuracy, error = trained["accuracy"], trained["standard_error"]
    assert f"Right: {accuracy:.1%} ± {error:.1%} of 200" in card
    assert (folder / "training.png").stat().st_size > 10_000
    held_out = [record["eval_accuracy"] for record in read_metrics(folder)]
    steps = [step for step, share in enumerate(held_out, start=1) if share is not None]
    assert steps == [20]
    names = {path.name for path in (folder / "adapter").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors"} <= names


def test_the_lines_that_it_tells_are_of_its_folder_whatever_its_name(report):
    settings = report["settings"] | {"output_dir": "my 'own' model"}
    card = summarize(report | {"settings": settings})
    lines = [shlex.split(line) for line in card.splitlines() if line.startswith("    python ")]
    before = [line[line.index("my 'own' model") - 1] for line in lines]
    assert before == ["--reward", "--output-dir"]


@pytest.fixture(scope="module")
def classifier(learned):
    """Return the function that PPO has for a reward, and its scale."""
    name = str(learned / "reward_model")
    return load_classifier("REWARD", name, "POSITIVE", 40, CPU)


@pytest.fixture(scope="module")
def score(classifier):
    """Return the scores of texts alone."""
    return lambda texts: classifier[0]([""] * len(texts), texts)


def test_the_scale_goes_to_ppo(learned, report, classifier, score):
    _, scale = classifier
    trained = report["trained"]
    config = json.loads((learned / "reward_model" / "config.json").read_text())
    assert config["score_mean"] == trained["score_mean"]
    assert config["score_std"] == trained["score_std"]
    assert config["score_accuracy"] == trained["accuracy"]
    assert config["conversation_form"] == "text"
    assert scale == Scale(threshold=0.0, accuracy=trained["accuracy"])
    assert success_rate([-0.1, 0.1, 0.0, 2.0], scale.threshold) == 0.5
    wanted = trained["first_sample"]
    assert score([*wanted]) == pytest.approx([*wanted.values()], abs=1e-3)
    assert [*wanted.values()] == sorted(wanted.values(), reverse=True)


def test_scores_have_mean_0_and_deviation_1_over_the_held_out_texts(learned, report, score):
    held_out = [
        [dialogue.turns[0]["content"] for dialogue in pair]
        for (pair,) in read_data(str(learned / "pairs.jsonl"), 0.4, 0, COMPARISONS).eval_rows
    ]
    texts = sorted({text for pair in held_out for text in pair})
    scores = dict(zip(texts, score(texts)))
    values = torch.tensor([*scores.values()])
    assert values.mean().item() == pytest.approx(0, abs=1e-3)
    assert values.std(correction=0).item() == pytest.approx(1, abs=1e-3)
    right = [scores[better] > scores[worse] for better, worse in held_out]
    assert sum(right) / 200 == pytest.approx(report["trained"]["accuracy"], abs=0.006)


@pytest.fixture
def show(run_main, learned, capsys):
    """Return exit status, lines and errors of --score."""

    def start(*texts, folder=learned / "reward_model"):
        capsys.readouterr()
        status = run_main("--output-dir", folder, "--score", *texts)
        output, errors = capsys.readouterr()
        return status, output.splitlines(), errors

    return start


def test_texts_are_scored_as_ppo_would(show, score, tmp_path):
    texts = ["I am happy.", "I am sad.", "Hi\nI feel good"]
    first, second, _ = [f"{number:+8.3f}  " for number in score(texts)]
    assert show(*texts[:2]) == (0, [first + texts[0], second + texts[1]], "")
    (tmp_path / "texts.txt").write_text("\n".join(texts[:2]))
    rows = [{"text": texts[0]}, {"prompt": "I am", "completion": "sad."}]
    write_lines(tmp_path / "rows.jsonl", rows)
    for name in ("texts.txt", "rows.jsonl"):
        assert show(name) == (0, [first + texts[0], second + texts[1]], "")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"messages": [user("Hi")]}, "row 2 is one whose last turn is no answer"),
        ({"sentence": "Hi"}, "row 2: it has nothing that is said: its fields are sentence"),
        ({"text": "Hi", "system": "Be kind"}, "row 2 is one whose text answers nothing"),
    ],
)
def test_a_row_that_can_not_be_scored_is_named(show, tmp_path, row, reason):
    rows = [{"text": "I am"}, row]
    status, lines, errors = show(write_lines(tmp_path / "rows.jsonl", rows))
    (problem,) = refusals(status, errors)
    assert problem.startswith("SCORE is ")
    assert f"it can't be used ({reason}" in problem
    assert lines == []


def test_fields_of_a_file_to_score_that_are_not_used_are_named(show, tmp_path):
    rows = [{"text": "I am", "source": "web"}] * 2
    _, lines, _ = show(write_lines(tmp_path / "rows.jsonl", rows))
    assert any("source (2)" in line for line in lines)


def test_what_can_not_be_scored(show, copy_of_demo_model):
    status, lines, errors = show("I am", folder="nowhere")
    told = "OUTPUT_DIR is nowhere: there is no model in it: train one first"
    assert (lines, refusals(status, errors)) == ([], [told])
    status, _, errors = show("missing.txt")
    (problem,) = refusals(status, errors)
    assert problem.startswith("SCORE is missing.txt: it can't be used (")
    (copy_of_demo_model / "report.json").touch()
    status, _, errors = show("I am", folder=copy_of_demo_model)
    (problem,) = refusals(status, errors)
    assert "(it is a LlamaForCausalLM)" in problem


def test_the_stages_are_not_taken_for_each_other(refused, learned, demo_model):
    folder, adapter = learned / "reward_model", learned / "reward_model" / "adapter"
    problem = refused("train_rlhf", "--model-name", folder)
    assert problem.startswith("MODEL_NAME is ")
    assert "(it is a LlamaForSequenceClassification)" in problem
    for script in ("train_rlhf", "train_reward_model"):
        problem = refused(script, "--model-name", adapter)
        assert problem.startswith("MODEL_NAME is ")
        assert "(it is the adapter of a classifier)" in problem
    for other in (demo_model, adapter):
        problem = refused("train_rlhf", "--model-name", demo_model, "--reward", other)
        assert problem.startswith("REWARD is ") and "it can't be used (" in problem


# --------------------------------------- one that has learned conversations
TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{ '<' + message['role'] + '> ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<assistant> ' }}{% endif %}"
)


@pytest.fixture(params=["lines", "chat_template"])
def of_conversations(request, run_main, copy_of_demo_model, monkeypatch, tmp_path, capsys):
    """Train a step on conversations, with a chat template or without.

    Returns the form, the folder, and what was told.
    """
    if request.param == "chat_template":
        tokenizer = AutoTokenizer.from_pretrained(copy_of_demo_model)
        tokenizer.chat_template = TEMPLATE
        tokenizer.save_pretrained(copy_of_demo_model)
    monkeypatch.setattr(train_reward_model, "draw", lambda *parts: parts[-1].touch())
    rows = []
    for number in range(8):
        before = [user(f"Say {number}"), answer(str(number)), user("And?")]
        rows.append({"prompt": before, "chosen": f"Good {number}", "rejected": "Bad", "id": number})
    data = write_lines(tmp_path / "pairs.jsonl", [*rows, rows[0]])
    flags = "--eval-share 0.25 --batch-size 6 --training-epochs 1 --learning-rate 1e-2"
    assert run_main("--model-name", copy_of_demo_model, "--data", data, *flags.split()) == 0
    return request.param, tmp_path / "reward_model", capsys.readouterr().out


def test_the_form_of_conversations_goes_to_ppo_and_to_score(of_conversations, show):
    """All that was left out, or is not used, is told where the run begins."""
    form, folder, out = of_conversations
    assert "; left out: 1 given twice; fields not used: id (9)\n" in out
    assert json.loads((folder / "config.json").read_text())["conversation_form"] == form
    sample = report_of(folder)["trained"]["first_sample"]
    beginning = "<s><user> Say " if form == "chat_template" else "Say "
    last = "And?\n<assistant> " if form == "chat_template" else "And?\n"
    assert all(text.startswith(beginning) for text in sample)
    assert all(f"{last}Good" in text or f"{last}Bad" in text for text in sample)

    # What it said of held-out conversations, PPO gets from it, and so does who looks.
    scorer, _ = load_scorer("REWARD", str(folder), None, "", 40, False, CPU)
    rows, prompts, texts = [], [], []
    for whole in sample:
        number = whole.removeprefix(beginning)[0]
        turns = [user(f"Say {number}"), answer(number), user("And?")]
        prompts.append({"prompt": turns})
        texts.append(whole.rpartition(last)[2])
        rows.append({"messages": [*turns, answer(texts[-1])]})
    assert scorer(prompts, texts) == pytest.approx([*sample.values()], abs=1e-3)
    _, lines, _ = show(write_lines(folder.parent / "said.jsonl", rows), folder=folder)
    assert [float(line[:8]) for line in lines] == pytest.approx([*sample.values()], abs=2e-3)


def test_rows_of_each_kind_are_scored_as_in_ppo(of_conversations, show, tmp_path):
    _, folder, _ = of_conversations
    before = [user("Hi"), answer("Yo"), user("And?")]
    said = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Good"}]
    table = [  # a row, and prompt and response in PPO
        ({"text": "I am glad"}, "I am", " glad"),
        ({"prompt": "I am", "completion": "glad"}, "I am", " glad"),
        ({"instruction": "Add", "input": "1 2", "output": "3"}, "Add\n1 2", " 3"),
        ({"question": "Why?", "answer": "So"}, "Why?", " So"),
        ({"messages": [*before, answer("Good")]}, before, "Good"),
        ({"prompt": before, "completion": [answer("Good")]}, before, "Good"),
        ({"conversations": said}, [user("Hi")], "Good"),
        ({"conversations": said, "system": "Be"}, [system("Be"), user("Hi")], "Good"),
        ({"history": [["Hi", "Yo"]], "instruction": "And?", "output": "Good"}, before, "Good"),
    ]
    rows, prompts, texts = zip(*table)
    scorer, _ = load_scorer("REWARD", str(folder), None, "", 40, False, CPU)
    wanted = scorer([{"prompt": prompt} for prompt in prompts], [*texts])
    assert max(wanted) - min(wanted) > 0.1
    status, lines, errors = show(write_lines(tmp_path / "rows.jsonl", rows), folder=folder)
    assert (status, errors) == (0, "")
    assert [float(line[:8]) for line in lines] == pytest.approx(wanted, abs=1.1e-3)
