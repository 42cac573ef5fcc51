"""The rewards to copy: what they say of texts, and a run with each."""

import json
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
