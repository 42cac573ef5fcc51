"""What is there to copy: rewards, what they say of texts, a run with each; and data to learn from."""

import json
import re
import runpy
from pathlib import Path

import pytest

FILE = Path(__file__).resolve().parent.parent / "examples" / "rewards.py"
SHORT = "--training-epochs 5 --batch-size 4 --eval-samples 8 --eval-batch-size 8 --scale-samples 20"
ONE_PASS = "--ppo-epochs 1 --target-approx-kl 0 --device cpu"


@pytest.fixture(scope="module")
def rewards():
    return runpy.run_path(str(FILE))


def test_few_words_counts_words(rewards):
    scores = rewards["few_words"](prompts=["I am"] * 3, completions=["", " so glad", " a b c"])
    assert scores == [0, -2, -3]


def test_right_answer_looks_for_the_answer_of_the_row_as_a_whole_word(rewards):
    completions = [" It is Paris.", " Parisian", " 4", " 42", " PARIS"]
    answers = ["Paris", "Paris", 4, 4, "Paris"]
    scores = rewards["right_answer"](["?"] * 5, completions, answer=answers)
    assert scores == [1.0, 0.0, 1.0, 0.0, 1.0]


def test_two_wishes_are_weighed(rewards):
    completions = ["", "happy happy", "so happy", "sad", "unhappy"]
    scores = rewards["cheerful_and_varied"](["I am"] * 5, completions)
    assert scores == [0.0, 1.25, 1.5, 0.5, 0.5]


@pytest.mark.parametrize("name", ["few_words", "right_answer", "cheerful_and_varied"])
def test_a_run_with_each(call_main, demo_model, name):
    rows = [
        {"prompt": "I feel so", "answer": "happy"},
        {"prompt": "Life is", "answer": "good"},
        {"prompt": "Today I am", "answer": "tired"},
        {"prompt": "This makes me", "answer": "smile"},
    ]
    Path("rows.json").write_text(json.dumps(rows))
    flags = [*SHORT.split(), *ONE_PASS.split(), "--prompts", "rows.json"]
    assert call_main("--model-name", demo_model, "--reward", f"{FILE}:{name}", *flags) == 0
    report = json.loads(Path("trained_model", "report.json").read_text())
    assert len(report["trained"]["train_prompts"]["first_sample"]) == 3
    assert len(report["trained"]["eval_prompts"]["first_sample"]) == 1
    graded = name != "right_answer"
    assert (report["base"]["train_prompts"]["success_rate"] is None) == graded
    assert (report["scale"]["deviation"] != 1.0) == graded


# ------------------------------------------------------------------------------- data to learn from
@pytest.fixture(scope="module")
def make_data():
    """Return what the file has, with a single prompt: less to sample."""
    found = runpy.run_path(str(FILE.parent / "make_data.py"))
    del found["PROMPTS"][1:]
    return found


@pytest.mark.parametrize(
    ("text", "truth"),
    [
        ("I am Happy, so happy, but lost", 1),
        ("unhappy gladly Sadness", 0),
        ("a bad and terrible day", -2),
        ("", 0),
    ],
)
def test_the_truth_is_good_words_less_bad_ones(make_data, text, truth):
    assert make_data["gold"](text) == truth


def test_the_data_is_what_it_says(make_data, monkeypatch, tmp_path, capsys):
    folder = tmp_path / "new" / "data"
    flags = ["--pairs", "25", "--texts", "15", "--output-dir", str(folder)]
    monkeypatch.setattr("sys.argv", ["make_data.py", *flags])
    make_data["main"]()
    said = capsys.readouterr().out.splitlines()
    assert said == [f"{folder / 'texts.jsonl'}: 15 rows", f"{folder / 'pairs.jsonl'}: 25 rows"]
    texts, pairs = (
        [json.loads(line) for line in (folder / f"{name}.jsonl").read_text().splitlines()]
        for name in ("texts", "pairs")
    )
    assert (len(texts), len(pairs)) == (15, 25)
    for row in texts:
        assert [*row] == ["text"] and row["text"].startswith("I feel so")
        assert set(re.findall(r"\w+", row["text"].lower())) & set(make_data["FAMILY"].split())
    good, bad = (set(make_data[name].split()) for name in ("GOOD", "BAD"))
    for row in pairs:
        assert row.pop("prompt") == "I feel so"
        words = {name: re.findall(r"\w+", text.lower()) for name, text in row.items()}
        truth = {name: sum((w in good) - (w in bad) for w in words[name]) for name in words}
        assert truth["chosen"] > truth["rejected"]
        assert all(text[0] in " .,!'" for text in row.values())  # what is sampled goes on
