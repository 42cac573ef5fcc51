"""Comparisons to learn from: what a row means, which of them are held out, and how they are told."""

import json
import math
from collections import Counter

import pytest

from finetune.comparisons import read_comparison, read_comparisons
from finetune.errors import SettingsError

TURNS = [{"role": "user", "content": "Hi"}]
GOOD, BAD = ({"role": "assistant", "content": text} for text in ("Hello", "No"))
RANKED = {"completion_0": "a", "completion_1": "b", "completion_2": "c"}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("row", "pairs"),
    [
        ({"chosen": "I am glad", "rejected": "I am sad"}, "I am glad > I am sad"),
        ({"prompt": "I am", "chosen": "ok", "rejected": " so"}, "I am ok > I am so"),
        ({"prompt": "Hi\n", "chosen": "ok", "rejected": "no"}, "Hi\nok > Hi\nno"),
        ({"prompt": "", "chosen": "ok", "rejected": "no"}, "ok > no"),
        (
            {
                "conversations": [
                    {"from": "system", "value": "Be kind"},
                    {"from": "human", "value": "Hi"},
                ],
                "chosen": {"from": "gpt", "value": "Hello"},
                "rejected": {"from": "gpt", "value": "No"},
            },
            "Be kind\nHi\nHello > Be kind\nHi\nNo",
        ),
        ({"prompt": TURNS, "chosen": [GOOD], "rejected": [BAD]}, "Hi\nHello > Hi\nNo"),
        ({"chosen": [*TURNS, GOOD], "rejected": [*TURNS, BAD]}, "Hi\nHello > Hi\nNo"),
        ({"messages": TURNS, "chosen": "Yes", "rejected": "No"}, "Hi\nYes > Hi\nNo"),
        (RANKED | {"ranking": [2, 0, 1]}, "b > a, c > a, b > c"),
        (RANKED | {"ranking": [1, 1, 0]}, "c > a, c > b"),
        (RANKED | {"ranking": [0, 0, 0]}, None),
        (RANKED | {"completion_2": "b", "ranking": [0, 1, 2]}, "a > b, a > b"),
        (RANKED | {"prompt": "x", "ranking": [0, 1, 1]}, "x a > x b, x a > x c"),
        ({"chosen": "same", "rejected": "same"}, None),
        ({"text": "fine", "label": 1}, "fine > None"),
        ({"text": "dull", "label": "0"}, "None > dull"),
        ({"text": "fine", "label": True}, "fine > None"),
        ({"text": "1 a fine film"}, "a fine film > None"),
        ({"text": "0 1 dull film"}, "None > 1 dull film"),
        ({"text": " ", "label": 1}, None),
    ],
)
def test_a_row_is_its_comparisons(row, pairs):
    found = read_comparison(row, Counter())
    if found is not None:
        found = ", ".join(f"{better} > {worse}" for better, worse in found)
    assert found == pairs


def test_conversations_that_people_compared(shared):
    path = shared("data/preferences_300.json")
    rows, eval_rows, left_out = read_comparisons(str(path), 0.1, 0)
    wanted = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        before = "\n".join(turn["value"] for turn in row["conversations"])
        chosen, rejected = row["chosen"]["value"], row["rejected"]["value"]
        wanted.append((f"{before}\n{chosen}", f"{before}\n{rejected}"))
    assert {pair for row in rows + eval_rows for pair in row} == {*wanted}
    assert left_out == {"given twice": 300 - len({*wanted})}
    assert len(eval_rows) == math.ceil(0.1 * len({*wanted}))


def test_sentences_with_labels(shared):
    path = shared("data/sentiment/stsa.binary.train")
    rows, eval_rows, _ = read_comparisons(str(path), 0.1, 0)
    wanted = set()
    for line in path.read_text(encoding="utf-8").strip().split("\n"):
        text = line[2:].strip()
        wanted.add((text, None) if line[0] == "1" else (None, text))
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
    held_out_by_seed = []
    for seed in range(3):
        *parts, left_out = read_comparisons(data, 0.25, seed)
        kept, held_out = ({pair for row in part for pair in row} for part in parts)
        assert (len(kept), len(held_out), len(kept & held_out)) == (15, 5, 0)
        assert left_out == {"given twice": 40}
        held_out_by_seed.append(held_out)
    assert held_out_by_seed[0] != held_out_by_seed[1]


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
        (RANKED | {"ranking": [1, 0]}, "its ranking is [1, 0]: give a rank for each completion"),
        (RANKED | {"ranking": "210"}, "its ranking is 210: give a rank for each completion"),
    ],
)
def test_a_bad_row_is_named(tmp_path, row, reason):
    data = write_lines(tmp_path / "r.jsonl", [{"chosen": "a", "rejected": "b"}, row])
    with pytest.raises(SettingsError) as told:
        read_comparisons(data, 0.1, 0)
    remedy = "give rows with chosen and rejected, completion_0 … and ranking, or text and label"
    problem = f"DATA is {data}: it can't be used (row 2: {reason}): {remedy}"
    assert str(told.value) == problem


def test_data_without_a_preference(tmp_path):
    rows = [{"chosen": "a", "rejected": "b"}, {"chosen": "a", "rejected": "a"}]
    data = write_lines(tmp_path / "rows.jsonl", rows)
    with pytest.raises(SettingsError, match="1 rows of it can be used, where 2 are the least"):
        read_comparisons(data, 0.1, 0)
