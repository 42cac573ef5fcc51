"""What is there to copy: rewards, and what they say of texts; data to learn from."""

import json
import re
import runpy
from pathlib import Path

import pytest
import torch

from finetune.comparisons import COMPARISONS
from finetune.data import read_data
from finetune.examples import EXAMPLES
from train_rlhf import load_reward

FOLDER = Path(__file__).resolve().parent.parent / "examples"


# ----------------------------------------------------------------- the rewards
@pytest.mark.parametrize(
    ("name", "completions", "expected"),
    [
        ("few_words", ["", " so glad", " a b c"], [0, -2, -3]),
        (
            "right_answer",  # as a whole word; a .csv with gaps makes 4.0 of 4
            [" It is Paris.", " Parisian", " 4", " 42", " PARIS", " of 4"],
            [1.0, 0.0, 1.0, 0.0, 1.0, 1.0],
        ),
        (
            "cheerful_and_varied",
            ["", "happy happy", "so happy", "sad", "unhappy"],
            [0.0, 1.25, 1.5, 0.5, 0.5],
        ),
    ],
)
def test_what_each_says_of_texts(make_settings, name, completions, expected):
    """Each is loaded and called as in a run, where it gets the other fields of the rows."""
    answers = ["Paris", "Paris", 4, 4, "Paris", 4.0]
    rows = [{"prompt": "I am", "answer": answer} for answer in answers[: len(completions)]]
    settings = make_settings("--reward", f"{FOLDER / 'rewards.py'}:{name}")
    scorer, scale = load_reward(settings, rows, torch.device("cpu"))
    assert scorer(rows, completions) == expected
    assert scale is None  # which is measured


# ---------------------------------------------------------- data to learn from
@pytest.fixture(scope="module")
def make_data():
    """Return what the file has, with a single prompt: less to sample."""
    found = runpy.run_path(str(FOLDER / "make_data.py"))
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


def words_of(text):
    return re.findall(r"\w+", text.lower())


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
        assert {*words_of(row["text"])} & {*make_data["FAMILY"].split()}
    good, bad = (make_data[name].split() for name in ("GOOD", "BAD"))
    for row in pairs:
        assert row.pop("prompt") == "I feel so"
        truth = {
            name: sum((word in good) - (word in bad) for word in words_of(text))
            for name, text in row.items()
        }
        assert truth["chosen"] > truth["rejected"]
        assert all(text[0] in " .,!'" for text in row.values())  # what is sampled goes on


def test_the_data_is_read_whole(make_data, monkeypatch, tmp_path):
    """Nothing of it is left out, and each field is used."""
    flags = ["--pairs", "12", "--texts", "12", "--output-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["make_data.py", *flags])
    make_data["main"]()
    texts, pairs = (tmp_path / f"{name}.jsonl" for name in ("texts", "pairs"))

    found = read_data(str(texts), 0.25, 0, EXAMPLES)
    said = [example["turns"][0]["content"] for example in found.rows + found.eval_rows]
    wanted = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    assert (sorted(said), found.tally.in_words()) == (sorted(wanted), "")

    found = read_data(str(pairs), 0.25, 0, COMPARISONS)
    said, wanted = [], []
    for (pair,) in found.rows + found.eval_rows:
        said.append([dialogue.turns[0]["content"] for dialogue in pair])
    for row in map(json.loads, pairs.read_text().splitlines()):
        wanted.append([row["prompt"] + row[name] for name in ("chosen", "rejected")])
    assert (sorted(said), found.tally.in_words()) == (sorted(wanted), "")
