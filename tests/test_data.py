"""Examples of DATA: each once, a share of them held out, and what is told of the others."""

import json

import pytest

from finetune.data import Reader, hold_out, read_data
from finetune.dialogues import Dialogue, put_together, read_answered, read_asked
from finetune.errors import SettingsError
from finetune.examples import EXAMPLES
from finetune.fields import Fields, LeftOut, Tally

SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Who are you?"}
SAID = {"role": "assistant", "content": "A model."}
ALPACA = {"instruction": "Say it.", "output": "it"}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write rows into a file of the current folder; return its name."""
    monkeypatch.chdir(tmp_path)

    def save(*rows, name="n.jsonl"):
        (tmp_path / name).write_text("\n".join(json.dumps(row) for row in rows))
        return name

    return save


def double(row, tally):
    """Read an example as a script does, where it is a number in a text."""
    fields = Fields(row)
    if fields.is_filled("note"):
        raise LeftOut("with a note")
    text = fields.take_text("text")
    tally.unused.update(fields.unused)
    return int(text) * 2


def read_numbers(data, share=0.25, seed=0):
    return read_data(data, share, seed, Reader(double, "give numbers"))


def problem_of(data, read=read_numbers):
    """Return the only line that tells why data can't be read."""
    with pytest.raises(SettingsError) as error:
        read(data)
    (problem,) = error.value.args
    return problem


# ----------------------------------------------------------- what is held out
@pytest.mark.parametrize(
    ("share", "count", "held_out"),  # rounded up, but one at least stays
    [(0.1, 40, 4), (0.1, 41, 5), (0.001, 41, 1), (0.25, 41, 11), (0.9, 2, 1), (0.1, 1, 0)],
)
def test_a_share_is_held_out(share, count, held_out):
    rows, eval_rows = hold_out([*range(count)], share, seed=0)
    assert len(eval_rows) == held_out
    assert sorted(rows + eval_rows) == [*range(count)]


def test_what_is_held_out_depends_on_the_seed_alone():
    rows = [*range(40)]
    assert hold_out(rows, 0.1, seed=3) == hold_out(rows, 0.1, seed=3)
    others = {tuple(hold_out(rows, 0.1, seed)[1]) for seed in range(9)}
    assert len(others) == 9 and rows == [*range(40)]


# --------------------------------------------------------- each row, and once
def test_examples_are_read_each_once_and_a_share_is_held_out(write):
    """What is left out, and what is not used, is counted. A line of a text file is a row."""
    rows = [{"text": str(number % 9), "note": number == 3 or None} for number in range(12)]
    write(*rows[:5], rows[5] | {"id": 7, "": 1}, *rows[6:])
    examples, eval_examples, tally = read_numbers("n.jsonl")
    assert (len(examples), len(eval_examples)) == (6, 2)
    assert sorted(examples + eval_examples) == [0, 2, 4, 8, 10, 12, 14, 16]
    assert tally.left_out == {"given twice": 3, "with a note": 1}
    words = "; left out: 1 with a note, 3 given twice"
    assert tally.in_words(with_fields=False) == words
    assert tally.in_words() == f"{words}; fields not used: id (1), a nameless one (1)"
    assert read_numbers("n.jsonl", seed=1).rows != examples


def test_a_line_of_a_text_file_is_a_row(write, tmp_path):
    (tmp_path / "n.txt").write_text("1\n2\n\n3\n2\n")
    examples, eval_examples, tally = read_numbers("n.txt")
    assert sorted(examples + eval_examples) == [2, 4, 6]
    assert tally.in_words() == "; left out: 1 given twice"


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"text": "1"}, {"answer": "2"}], "row 2: it has no text: its fields are answer"),
        ([{"text": "1"}, {"text": 2.5}], "row 2: its text is 2.5, no text: put it in quotes"),
        ([{"text": "one"}], "row 1: invalid literal for int() with base 10: 'one'"),
        ([{"text": "1"}, 5], "row 2: it is 5: no text, and nothing with fields"),
        ([5], "row 1: it is 5: no text, and nothing with fields"),
    ],
)
def test_a_row_that_is_no_example_is_named(write, rows, reason):
    problem = f"DATA is n.jsonl: it can't be used ({reason}): give numbers"
    assert problem_of(write(*rows)) == problem


ONE = {"text": "1"}
NOTE = {"text": "1", "note": "x"}


@pytest.mark.parametrize(
    ("rows", "count", "reasons"),
    [
        ([ONE, ONE], "1 of 2", "1 given twice; the first row has text"),
        ([ONE], "1 of 1", "there are no more; the first row has text"),
        ([NOTE] * 3, "0 of 3", "3 with a note; the first row has text, note"),
        (
            [ONE, NOTE, ONE, NOTE, ONE],
            "1 of 5",
            "2 with a note, 2 given twice; the first row has text",
        ),
    ],
)
def test_where_too_few_are_left_all_reasons_are_told_with_what_was_found(
    write, rows, count, reasons
):
    found = f"{count} rows can be used, where 2 are the least: {reasons}"
    problem = f"DATA is n.jsonl: it can't be used ({found}): give numbers"
    assert problem_of(write(*rows)) == problem


def test_a_file_without_rows_is_told(write, tmp_path):
    told = "it is empty"
    for name, content in (("n.jsonl", ""), ("n.json", "[]"), ("n.csv", "text\n")):
        (tmp_path / name).write_text(content)
        assert told in problem_of(name) or "no JSON" in problem_of(name)


def test_examples_that_differ_in_anything_are_not_the_same(write):
    """An input, a system text, what is not to be learned; but not in a field that is not used."""
    rows = [ALPACA, ALPACA | {"input": "now"}, ALPACA | {"system": "Be kind."}]
    rows += [ALPACA | {"output": "It"}, ALPACA | {"id": 5}, ALPACA | {"input": ""}]
    found = read_data(write(*rows), 0.1, 0, EXAMPLES)
    assert len(found.rows) + len(found.eval_rows) == 4
    assert found.tally.in_words() == "; left out: 2 given twice; fields not used: id (1)"


@pytest.mark.parametrize(
    ("bad", "reason"),
    [
        ({"instruction": "Say it.", "output": " "}, "without an answer"),
        ({"instruction": "Say it.", "output": None}, "without an answer"),
        ({"instruction": "Say it.", "output": "it", "label": False}, "whose label says that the"),
        ({"messages": [USER]}, "without an answer"),
        ({"messages": [USER, SAID | {"role": "narrator"}]}, "with the unknown role narrator"),
        (
            {"messages": [USER, SAID | {"weight": 0}]},
            "whose answers are marked not to be learned",
        ),
        ({"text": "A", "system": "B"}, "with system, which does not go with text"),
    ],
)
def test_rows_are_left_out_by_their_true_reason_and_told_where_none_is_left(write, bad, reason):
    other = ALPACA | {"output": "that"}
    found = read_data(write(bad, ALPACA, other, bad), 0.1, 0, EXAMPLES)
    assert len(found.rows) + len(found.eval_rows) == 2
    assert found.tally.in_words().startswith(f"; left out: 2 {reason}")
    problem = problem_of(write(bad, bad), lambda data: read_data(data, 0.1, 0, EXAMPLES))
    assert f"(0 of 2 rows can be used, where 2 are the least: 2 {reason}" in problem


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"instruction": "A", "output": 5}, "its output is 5, no"),
        ({"instruction": "A", "id": 5}, "it has nothing that answers its instruction: its fields"),
        ({"id": 5, "frage": "A"}, "it has nothing that asks: its fields are id, frage"),
        ({"messages": "Hi"}, "its messages is Hi, no list"),
        ({"messages": [SAID | {"content": 5}]}, "its messages 1, content is 5, no text"),
    ],
)
def test_a_row_is_blamed_with_its_field_and_file_never_the_model(write, row, reason):
    problem = problem_of(write(ALPACA, row), lambda data: read_data(data, 0.1, 0, EXAMPLES))
    assert problem.startswith(f"DATA is n.jsonl: it can't be used (row 2: {reason}")
    assert "MODEL_NAME" not in problem


# -------------------------------------------------------------- what a row says
def test_a_dialogue_is_what_is_asked_with_all_that_changes_it_and_the_answer():
    row = ALPACA | {"input": "now", "system": "Be kind.", "history": [["Who are you?", "A model."]]}
    tally = Tally()
    asked = {"role": "user", "content": "Say it.", "input": "now"}
    answer = {"role": "assistant", "content": "it"}
    turns = [SYSTEM, USER, SAID, asked, answer]
    assert read_answered(row | {"id": 5}, tally) == Dialogue(turns, "instruction")
    assert tally.unused == {"id": 1}
    fields = Fields(row)
    assert read_asked(fields, "instruction", Tally()) == Dialogue(turns[:-1], "instruction")
    assert fields.unused == ["output"]


@pytest.mark.parametrize(
    ("before", "answer", "wanted"),
    [
        ([USER], [SAID], [USER, SAID]),
        ([USER], [USER, SAID], [USER, SAID]),
        ([SYSTEM, USER], [USER, SAID], [SYSTEM, USER, SAID]),
        ([SYSTEM, USER], [SYSTEM, USER, SAID], [SYSTEM, USER, SAID]),
        ([USER, SAID], [USER, SAID, USER, SAID], [USER, SAID, USER, SAID]),
    ],
)
def test_what_an_answer_begins_with_is_not_asked_again(before, answer, wanted):
    assert put_together(before, answer) == wanted


def test_a_turn_that_only_follows_what_was_asked_is_put_behind_it():
    more = {"role": "user", "content": "And now?"}
    assert put_together([USER], [more, SAID]) == [USER, more, SAID]
