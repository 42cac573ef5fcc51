"""Prompts as people have them: files of each format, which rows they give, and in which order."""

import contextlib
import io
import itertools
import json
import math
import re
import socket
from pathlib import Path

import numpy
import pandas
import pytest
import torch
from transformers import AutoTokenizer

import train_rlhf
from train_rlhf import SettingsError, count_steps, encode, prompts_that_fit, rows_of_step

SHIPPED = train_rlhf.EVAL_PROMPTS
REMEDY = "give a .txt, .jsonl, .json, .csv, .parquet file with a prompt a row, in UTF-8"
TURNS = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Who are you?"}]
SAID = {"role": "assistant", "content": "A model."}


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Write a file into the current folder; return its name."""
    monkeypatch.chdir(tmp_path)

    def save(name, content):
        if isinstance(content, list):
            pandas.DataFrame(content).to_parquet(name)
        else:
            data = content if isinstance(content, bytes) else content.encode()
            (tmp_path / name).write_bytes(data)
        return name

    return save


def read(*prompts, eval_prompts=(), field="auto", seed=0):
    rows, eval_rows, given = train_rlhf.read_prompts([*prompts], [*eval_prompts], field, seed)
    return rows, eval_rows, given - len(rows) - len(eval_rows)


def read_file(*prompts, field="auto"):
    """Return the rows of these entries; none is held out, and none left out."""
    rows, eval_rows, left_out = read(*prompts, field=field)
    assert (eval_rows, left_out) == ([], 0)
    return rows


def texts_of(rows):
    return [row["prompt"] for row in rows]


def lines_of(*rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


# --------------------------------------------------------------------------------------- the formats
@pytest.mark.parametrize("ending", [".txt", ".TXT", ".Txt"])
def test_a_text_file_has_a_prompt_a_line(write, ending):
    """A byte order mark, empty lines, spaces at the ends and Windows' line ends belong to none.

    Only what a text editor shows as the end of a line is one.
    """
    path = write(
        "p" + ending, "\ufeffI feel so\r\n\n  Life is \nline\u2028separator\nDu bist schön\n\n"
    )
    wanted = ["I feel so", "Life is", "line\u2028separator", "Du bist schön"]
    assert read_file(path) == [{"prompt": text} for text in wanted]


ROWS = [
    {"prompt": "I feel so, today", "answer": "happy", "count": 3},
    {"prompt": 'Say "so"\nLife is ', "answer": "long", "count": 4},
    {"prompt": "Du bist schön", "answer": "schön", "count": 5},
]
CSV = 'prompt,answer,count\n"I feel so, today",happy,3\n"Say ""so""\nLife is ",long,4\nDu bist schön,schön,5\n'


@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "byte order mark"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", lines_of(*ROWS)),
        ("p.jsonl", "\n\n".join(lines_of(*ROWS).split("\n")) + "\n\n"),  # with empty lines
        ("P.JSONL", json.dumps(ROWS)),  # a list, named so
        ("p.json", json.dumps(ROWS, indent=4, ensure_ascii=False)),
        ("p.JSON", lines_of(*ROWS)),
        ("p.csv", CSV),
        ("p.Csv", CSV.replace("\n", "\r\n").replace("so\"\"\r\n", "so\"\"\n")),
        ("p.parquet", ROWS),
        ("p.PARQUET", ROWS),
    ],
    ids=[
        "jsonl", "empty lines", "JSONL of a list", "json", "JSON of lines", "csv", "Csv of Windows",
        "parquet", "PARQUET",
    ],
)  # fmt: skip
def test_a_file_of_rows_gives_their_prompts_and_their_other_fields(write, name, content, mark):
    """There a prompt may have line breaks, and spaces at its ends."""
    path = write(name, content if isinstance(content, list) else mark + content)
    assert read_file(path) == ROWS


def test_a_json_list_of_texts(write):
    assert texts_of(read_file(write("p.json", '["I feel so", "Life is"]'))) == [
        "I feel so",
        "Life is",
    ]


@pytest.mark.parametrize("name", ["a b.txt", "[x].txt", "what?*.txt", "json.txt"])
def test_a_file_of_an_odd_name_beside_folders_of_a_format_s_name(write, tmp_path, name):
    for folder in ("text", "json", "train"):
        (tmp_path / folder).mkdir()
    assert texts_of(read_file(write(name, "One"))) == ["One"]


# ---------------------------------------------------------------------------------------- the fields
FIELDS = {"question": "Q", "instruction": "I", "text": "T", "messages": TURNS, "prompt": "P"}


@pytest.mark.parametrize("count", range(1, 6))
def test_the_field_of_the_prompt_is_the_first_of_those_that_are_usual(write, count):
    """prompt, else messages, text, instruction, question; the others stay fields."""
    row = dict([*FIELDS.items()][:count]) | {"x": 1}
    field = [*FIELDS][count - 1]
    assert read_file(write("p.jsonl", lines_of(row))) == [row | {"prompt": FIELDS[field]}]


def test_an_instruction_has_its_input_after_it(write):
    rows = [
        {"instruction": "Add.", "input": "1 + 1", "output": "2"},
        {"instruction": "Sing.", "input": "", "output": "La"},
        {"instruction": "Dance.", "output": "-"},
    ]
    wanted = ["Add.\n1 + 1", "Sing.", "Dance."]
    found = read_file(write("p.json", json.dumps(rows)))
    assert texts_of(found) == wanted
    assert [row["output"] for row in found] == ["2", "La", "-"]
    assert texts_of(read_file("p.json", field="instruction")) == wanted
    assert texts_of(read_file("p.json", field="output")) == ["2", "La", "-"]


def test_prompt_field_names_any_field(write):
    row = {"prompt": "P", "text": "T", "Frage": "F"}
    path = write("p.jsonl", lines_of(row))
    assert read_file(path, field="Frage") == [row | {"prompt": "F"}]
    assert texts_of(read_file(write("p.txt", "One"), field="Frage")) == ["One"]  # it has no fields
    with pytest.raises(SettingsError) as error:
        read(path, field="query")
    (problem,) = error.value.args
    assert "(row 1: PROMPT_FIELD is query, and its fields are prompt, text, Frage)" in problem


@pytest.mark.parametrize("field", ["prompt", "messages"])
@pytest.mark.parametrize("ending", [".jsonl", ".parquet"])
def test_of_messages_the_assistant_s_turns_at_the_end_are_dropped(write, field, ending):
    before = [TURNS[1], SAID, TURNS[1]]  # one in the middle stays
    rows = [{field: TURNS}, {field: [*before, SAID, SAID]}, {field: [TURNS[1], SAID]}]
    path = write("p" + ending, rows if ending == ".parquet" else lines_of(*rows))
    assert texts_of(read_file(path)) == [TURNS, before, TURNS[1:]]


def test_other_fields_are_none_where_a_row_lacks_them(write):
    """So a reward function gets each field of any row as a list with an entry for each."""
    one = write("a.jsonl", lines_of({"prompt": "A", "x": 1}, {"prompt": "B", "y": [2]}))
    other = write("b.jsonl", lines_of({"question": "C", "z": "3"}))
    rows, eval_rows, _ = read("Zero", one, eval_prompts=[other, "D"])
    none = dict.fromkeys(("x", "y", "z", "question"))
    assert sorted(rows, key=lambda row: row["prompt"]) == [
        none | {"prompt": "A", "x": 1},
        none | {"prompt": "B", "y": [2]},
        none | {"prompt": "Zero"},
    ]
    assert sorted(eval_rows, key=lambda row: row["prompt"]) == [
        none | {"prompt": "C", "z": "3", "question": "C"},
        none | {"prompt": "D"},
    ]


def test_rows_whose_prompt_is_empty_are_left_out(write):
    """As empty lines of a text file are: 3 of the 12,000 rows of KoChatGPT's file are such."""
    content = lines_of({"prompt": "A"}, {"prompt": ""}, {"prompt": " \n"}, {"prompt": "B"})
    assert texts_of(read(write("p.jsonl", content))[0]) == ["A", "B"]


def test_an_answer_that_looks_like_a_number_or_a_date_among_others_stays_a_text(write):
    rows = [{"prompt": "A", "answer": "007"}, {"prompt": "B", "answer": "1e3"}]
    rows += [{"prompt": "2020-01-01", "answer": "2020-01-01"}, {"prompt": "true", "answer": "no"}]
    for name, content in (
        ("p.jsonl", lines_of(*rows)),
        ("p.json", json.dumps(rows)),
        ("p.parquet", rows),
    ):
        assert read_file(write(name, content)) == rows


# --------------------------------------------------------------------------------- texts, duplicates
@pytest.mark.parametrize(
    "text",
    [
        "I feel so",
        " a .txt of mine ",
        "...",
        "e.g.",
        "and/or",
        "Is it a .txt?",
        "Yes. No",
        "/",
        "~",
    ],
)
def test_a_text_is_itself(text):
    assert read(text) == ([{"prompt": text}], [], 0)


def test_files_and_texts_mix_in_the_order_of_the_setting(write):
    write("p.txt", "One\nTwo\n")
    write("p.jsonl", lines_of({"prompt": "Four"}))
    rows = read_file("Zero", "p.txt", "Three", "p.jsonl", "Five")
    assert texts_of(rows) == ["Zero", "One", "Two", "Three", "Four", "Five"]


def test_duplicates_are_dropped_and_counted(write):
    """Within a file, between files and texts, within EVAL_PROMPTS, and there what PROMPTS has."""
    write("p.jsonl", lines_of(*({"prompt": text, "x": i} for i, text in enumerate("ABABA"))))
    write("q.txt", "B\nC\nD\n")
    rows, eval_rows, left_out = read("p.jsonl", "q.txt", "C", eval_prompts=["D", "E", "E", "q.txt"])
    assert sorted((row["prompt"], row["x"]) for row in rows if row["x"] is not None) == [
        ("A", 0),
        ("B", 1),
    ]
    assert sorted(texts_of(rows)) == [*"ABCD"]
    assert texts_of(eval_rows) == ["E"]
    assert left_out == (5 + 3 + 1) + (3 + 3) - 5


def test_conversations_are_duplicates_where_all_their_messages_are(write):
    again = [TURNS[0], {"role": "user", "content": "Why?"}]
    rows = [{"messages": TURNS}, {"messages": again}, {"messages": [*TURNS, SAID]}]
    found, _, left_out = read(write("p.jsonl", lines_of(*rows)))
    assert (texts_of(found), left_out) == ([TURNS, again], 1)


# ---------------------------------------------------------------------------------------- bad files
@pytest.mark.parametrize("setting", ["PROMPTS", "EVAL_PROMPTS"])
@pytest.mark.parametrize(
    ("name", "content"),
    [
        # None: there is no such file.
        ("none.txt", None),
        ("none.JSONL", None),
        ("data/prompts.parquet", None),
        ("prompts.xlsx", None),  # a name like a file's
        ("data/", None),
        ("my prompts.csv", None),
        ("x" * 300 + ".txt", None),
        ("~/prompts.txt", None),
        # of another kind
        ("p.md", "I feel so"),
        ("p.jsonl.gz", b"\x1f\x8b"),
        ("prompts", "I feel so"),
        # empty
        ("p.txt", ""),
        ("p.txt", "\n \n\n"),
        ("p.txt", "\ufeff"),
        ("p.json", ""),
        ("p.json", "[]"),
        ("p.json", "{}"),
        ("p.json", "[[]]"),
        ("p.jsonl", "3"),
        ("p.jsonl", "\n \n"),
        ("p.csv", "prompt\n"),
        ("p.parquet", b""),
        # broken
        ("p.txt", b"fine\nno\xff"),
        ("p.txt", "I feel so\n".encode("utf-16")),
        ("p.jsonl", b'{"prompt": "\xff"}'),
        ("p.csv", b"prompt\n\xff\n"),
        ("p.csv", 'prompt\n"never closed\n'),
        ("p.json", '[{"prompt": "A"},'),
        ("p.jsonl", '{"prompt": "\\udcff"}'),  # half a character
        ("p.parquet", b"PAR1 no more"),
        ("p.parquet", "prompt\nLife is\n"),
    ],
)  # fmt: skip
def test_a_file_that_gives_no_prompts(write, setting, name, content):
    if content is not None:
        write(name, content)
    entries = [name] if setting == "PROMPTS" else ["Good day"], [name]
    with pytest.raises(SettingsError) as error:
        read(*entries[0], eval_prompts=entries[1])
    (problem,) = error.value.args
    assert problem.startswith(f"{setting} is {train_rlhf.shorten(name)}: it can't be used (")
    assert problem.endswith(f"): {REMEDY}")
    assert len(problem) < 500


@pytest.mark.parametrize(
    ("name", "content", "number", "reason"),
    [
        ("p.jsonl", lines_of({"prompt": "A"}, {"prompt": 5}), 2, "its prompt is 5, no text"),
        ("p.jsonl", lines_of({"prompt": "A"}, {"prompt": None}), 2, "its prompt is None, no text"),
        ("p.json", json.dumps([{"prompt": {"text": "A"}}]), 1, "its prompt is {'text': 'A'}, no text"),
        ("p.json", json.dumps([{"prompt": ["A", "B"]}]), 1, "its prompt is ['A', 'B'], no text"),
        ("p.jsonl", lines_of({"prompt": "A"}, {"prompt": []}), 2, "its prompt is [], no text"),
        ("p.jsonl", lines_of({"messages": TURNS}, {"messages": [SAID]}), 2, "its messages is [{'role': "),
        ("p.jsonl", lines_of({"messages": [{"content": "A"}]}), 1, "its messages is [{'content': 'A'}], no text"),
        ("p.json", json.dumps([{"query": "A", "x": 1}]), 1, "PROMPT_FIELD is auto, and its fields are query, x"),
        ("p.csv", "prompt\n4\n5\n", 1, "its prompt is 4, no text"),
        ("p.parquet", [{"prompt": 4.5}], 1, "its prompt is 4.5, no text"),
        ("p.txt", "fine\nI\0", 2, ""),
    ],
)  # fmt: skip
def test_a_row_that_has_no_prompt_is_named(write, name, content, number, reason):
    write(name, content)
    with pytest.raises(SettingsError) as error:
        read(name)
    (problem,) = error.value.args
    assert problem.startswith(f"PROMPTS is {name}: it can't be used (row {number}: {reason}")
    assert problem.endswith(f"): {REMEDY}")


@pytest.mark.parametrize("text", ['{"prompt": ', "b", "{'prompt': 'B'}"])
@pytest.mark.parametrize("form", ["{}", "[{}]"])
def test_a_line_that_is_no_json_is_named(write, text, form):
    lines = ['{"prompt": "A"}', text, '{"prompt": "C"}']
    content = "\n".join(lines) if form == "{}" else "[" + ",\n".join(lines) + "]"
    with pytest.raises(SettingsError) as error:
        read(write("p.jsonl", content))
    assert re.search(r"p.jsonl: it can't be used \(.*: line [23] column", error.value.args[0])


def test_texts_alone_are_prompts(write):
    assert texts_of(read(write("a.jsonl", '"A"\n"B"'))[0]) == ["A", "B"]
    assert texts_of(read(write("b.json", '["A", "B"]'))[0]) == ["A", "B"]


@pytest.mark.parametrize("content", ["null", 'null\n{"prompt": "A"}'])
def test_json_that_begins_with_null(start_script, write, tmp_path, content):
    """In a process of its own, since what reads it can crash."""
    name = write("p.json", content)
    result = start_script(tmp_path, "--prompts", name).end()
    assert (result.status, result.stdout) == (2, "")
    first, line = result.stderr.splitlines()
    assert first == "Nothing was started or changed:"
    assert line.startswith(f"- PROMPTS is {name}: ") and line.endswith(f"): {REMEDY}")


def test_a_csv_file_whose_prompts_have_commas_without_quotes(write):
    """Half of each would be lost without a word."""
    with pytest.raises(SettingsError, match=r"PROMPTS is p\.csv: it can't be used \("):
        read(write("p.csv", "prompt\nHello, you are\nTell me, what is\n"))


def test_a_folder_is_no_file_of_prompts(write, tmp_path):
    (tmp_path / "p.txt").mkdir()
    (tmp_path / "p.txt" / "inner.txt").write_text("A")
    with pytest.raises(SettingsError, match=r"PROMPTS is p\.txt: it can't be used \("):
        read("p.txt")


def test_to_read_a_file_nothing_is_asked_of_the_network(write, call_main, monkeypatch):
    """The library would count the load on a server, and wait for it where there is no network."""
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host))
    for name, content in (("p.txt", "A"), ("p.json", '["A"]'), ("p.csv", "prompt\nA")):
        assert call_main("--prompts", write(name, content), "--gamma", "2") == 2
    assert asked == []


def test_all_bad_settings_are_told_beside_a_bad_file(write, read_settings):
    with pytest.raises(SettingsError) as error:
        read_settings("--prompts", "none.txt", "--gamma", "2")
    problems = sorted(problem.split()[0] for problem in error.value.args)
    assert problems == ["GAMMA", "PROMPTS"]


# ------------------------------------------------------------------------------------- what is held out
@pytest.fixture
def numbers(write):
    return write("p.txt", "\n".join(f"Number {i} is" for i in range(41)))


def test_a_tenth_of_a_file_is_held_out_by_seed(numbers):
    rows, eval_rows, left_out = read(numbers, eval_prompts=SHIPPED)
    assert (len(rows), len(eval_rows), left_out) == (36, 5, 0)  # rounded up
    assert sorted(texts_of(rows + eval_rows)) == sorted(texts_of(read_file(numbers)))
    numpy.random.seed(123)  # whatever happened in between
    assert read(numbers, eval_prompts=SHIPPED) == (rows, eval_rows, 0)
    others = [texts_of(read(numbers, eval_prompts=SHIPPED, seed=seed)[1]) for seed in range(1, 9)]
    assert len({*map(tuple, others)}) == 8 and texts_of(eval_rows) not in others
    assert len({text for texts in others for text in texts}) > 20  # from everywhere


def test_a_file_of_one_prompt_holds_none_out(write):
    assert read(write("p.txt", "One\nOne"), eval_prompts=SHIPPED) == ([{"prompt": "One"}], [], 1)
    rows, eval_rows, _ = read(write("p.txt", "One\nTwo"), eval_prompts=SHIPPED)
    assert (len(rows), len(eval_rows)) == (1, 1)


@pytest.mark.parametrize(
    "given",
    [
        [],
        ["Mine is"],
        ["Mine is", *SHIPPED],
        SHIPPED[1:],
        SHIPPED[:-1],
        [*SHIPPED, "Mine is"],
        SHIPPED[:1],
    ],
    ids=[
        "none",
        "own",
        "one before",
        "without the first",
        "without the last",
        "one after",
        "first",
    ],
)
def test_eval_prompts_that_were_given_or_edited_are_those(numbers, given):
    rows, eval_rows, _ = read(numbers, eval_prompts=given)
    assert len(rows) == 41
    assert texts_of(eval_rows) == given


def test_eval_prompts_as_shipped_are_for_prompts_that_are_texts(numbers):
    assert texts_of(read("One", "Two", eval_prompts=SHIPPED)[1]) == SHIPPED
    _, eval_rows, left_out = read("One", numbers, eval_prompts=[numbers, "Two"])
    assert (texts_of(eval_rows), left_out) == (["Two"], 41)


def test_a_resumed_run_has_the_rows_that_it_had(numbers, make_settings, tmp_path):
    """Other EVAL_PROMPTS would give back the tenth that was held out, or hold one out."""
    folder = tmp_path / "trained_model" / "checkpoint"
    folder.mkdir(parents=True)
    before = make_settings("--prompts", numbers)
    files = train_rlhf.hash_files([numbers])
    state = {"settings": vars(before), "model": before.model_name, "metrics": [{}], "files": files}
    torch.save(state, folder / "state.pt")
    train_rlhf.check_resume(before, train_rlhf.RULES, 9, files)
    after = make_settings("--prompts", numbers, "--eval-prompts", "Mine is")
    with pytest.raises(SettingsError, match="EVAL_PROMPTS"):
        train_rlhf.check_resume(after, train_rlhf.RULES, 9, files)


# --------------------------------------------------------------------------------- order and length
def epochs_of(count, batch_size, seed, steps):
    """Return the prompts that so many steps take, cut where an epoch ends."""
    rows = [{"prompt": i} for i in range(count)]
    taken = [rows_of_step(step, rows, batch_size, seed) for step in range(1, steps + 1)]
    assert {len(batch) for batch in taken} == {batch_size}
    numbers = texts_of(itertools.chain(*taken))
    return [numbers[start : start + count] for start in range(0, len(numbers), count)]


@pytest.mark.parametrize(("count", "batch_size"), [(12, 4), (11, 4), (3, 10), (1, 4), (10, 10)])
def test_every_epoch_has_each_row_once_in_an_order_of_its_own(count, batch_size):
    """A batch may begin in one epoch and end in another, or have several."""
    epochs = epochs_of(count, batch_size, seed=0, steps=4 * count)
    assert len(epochs) == 4 * batch_size
    assert all(sorted(epoch) == [*range(count)] for epoch in epochs)
    different = {tuple(epoch) for epoch in epochs}
    assert len(different) > min(len(epochs), math.factorial(count)) * 0.6
    assert epochs == epochs_of(count, batch_size, seed=0, steps=4 * count)
    if count > 3:
        assert len(different) == len(epochs)
        others = epochs_of(count, batch_size, seed=1, steps=4 * count)
        assert not different & {tuple(epoch) for epoch in others}


def test_the_rows_of_a_step_depend_on_seed_and_step_alone():
    """So a resumed run goes on with what the whole run would have taken."""
    rows = [{"prompt": i} for i in range(11)]
    whole = [rows_of_step(step, rows, 4, 5) for step in range(1, 20)]
    torch.manual_seed(123)
    numpy.random.seed(123)
    state, next_number = torch.get_rng_state(), numpy.random.RandomState(123).random()
    for step in reversed(range(1, 20)):
        torch.rand(step)
        numpy.random.random(step)
        assert rows_of_step(step, rows, 4, 5) == whole[step - 1]
    torch.set_rng_state(state)
    numpy.random.seed(123)
    rows_of_step(7, rows, 4, 5)
    assert torch.equal(torch.get_rng_state(), state)  # nor does it take from anyone's numbers
    assert numpy.random.random() == next_number


@pytest.mark.parametrize(
    ("epochs", "count", "batch_size", "steps"),
    [(0.1, 30, 1, 3), (0.07, 100, 1, 7), (0.1, 31, 3, 2), (1, 30, 4, 8), (2.5, 6, 5, 3), (1e-6, 9, 4, 1)],
)  # fmt: skip
def test_a_part_of_an_epoch_takes_a_part_of_its_steps(
    make_settings, epochs, count, batch_size, steps
):
    settings = make_settings("--training-epochs", str(epochs), "--batch-size", str(batch_size))
    assert count_steps(settings, [{"prompt": "A"}] * count) == steps


# ------------------------------------------------------------------------------------ whole runs
@pytest.fixture(scope="module")
def report_of_a_tenth(demo_model, tmp_path_factory):
    """Do a tenth of an epoch over a file with two equal prompts and two that are too long."""
    folder = tmp_path_factory.mktemp("tenth")
    prompts = [f"Number {i} is" for i in range(40)]
    prompts[10:10] = ["Number 3 is", "very " * 300, "so " * 300]
    rows = [{"prompt": text, "answer": str(i)} for i, text in enumerate(prompts)]
    (folder / "p.jsonl").write_text(lines_of(*rows))
    (folder / "mine.py").write_text(
        "def score(prompts, completions, answer, **kwargs):\n"
        "    assert len(prompts) == len(completions) == len(answer)\n"
        "    assert all(prompt.split()[1] in (number, str(int(number) - 3))\n"
        "               for prompt, number in zip(prompts, answer))\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    fast = "--device cpu --ppo-epochs 1 --target-approx-kl 0 --batch-size 2 --max-new-tokens 4"
    flags = f"--model-name {demo_model} --prompts {folder}/p.jsonl --reward {folder}/mine.py:score"
    flags += f" --output-dir {folder}/run --training-epochs 0.1 --eval-samples 12 --scale-samples 8"
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        assert train_rlhf.main(f"{flags} {fast}".split()) == 0
    return folder / "run", output.getvalue()


def test_the_announcement_counts_prompts_and_steps(report_of_a_tenth):
    """Of 43, one is given twice; of the 42, five are held out; two are too long for the context."""
    _, output = report_of_a_tenth
    line = re.search("^Prompts +(.*)$", output, re.M)[1]
    counts = [int(number) for number in re.findall(r"\d+", line)]
    assert (
        line
        == "{} to train on, {} held out, {} left out: empty, given twice or too long".format(
            *counts
        )
    )
    assert sum(counts) == 43 and counts[2] == 3
    assert counts[1] in (3, 4, 5)  # where a long one was held out, it is one less
    line = re.search("^Training +(.*)$", output, re.M)[1]
    assert line.startswith("4 samples in 2 steps, ")


def test_a_step_takes_the_rows_that_are_its_own(report_of_a_tenth):
    """The prompts of samples.jsonl are those of the epoch's order, and are no one's held out."""
    folder, _ = report_of_a_tenth
    said = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [line["step"] for line in said] == [1, 1, 2, 2]
    assert len({line["prompt"] for line in said}) == 4
    report = json.loads((folder / "report.json").read_text())
    held_out = report["trained"]["eval_prompts"]["first_sample"]
    assert not {line["prompt"] for line in said} & held_out.keys()
    assert not {"very " * 300, "so " * 300} & held_out.keys()


def test_of_many_prompts_no_more_are_measured_than_samples_are_asked_for(
    build, make_settings, write
):
    path = write("p.txt", "\n".join(f"Number {i} is" for i in range(50)))
    built = build(make_settings("--prompts", path, "--eval-prompts"))
    reward, scale = train_rlhf.load_reward(built.settings, built.rows, torch.device("cpu"))
    parts = built.trainer, built.policy, reward, scale, built.rows, []
    metrics = [{"samples": 4, "seconds": 1.0}]
    report, base_scores = train_rlhf.make_report(*parts, built.settings, metrics)
    for model in ("base", "trained"):
        measured = report[model]["train_prompts"]
        assert list(measured["first_sample"]) == [f"Number {i} is" for i in range(0, 50, 5)]
        assert measured["samples"] == len(base_scores) == 20  # two of each, at least the 12


# ------------------------------------------------------------------------------- length, real files
@pytest.fixture(scope="module")
def tokenizer(demo_model):
    return AutoTokenizer.from_pretrained(demo_model)


def test_prompts_that_leave_no_room_for_a_response_are_left_out(
    demo_model, tokenizer, make_settings
):
    """demo_model has a context of 256 tokens, here 8 of them for the response."""
    settings = make_settings()
    rows = [{"prompt": "very " * count, "count": count} for count in (1, 246, 247, 300, 2)]
    lengths = [len(query) for query in encode(tokenizer, rows, False)]
    context = train_rlhf.context_of(demo_model)
    found = prompts_that_fit(context, tokenizer, rows, settings)
    assert found == [row for row, length in zip(rows, lengths) if length <= 248]
    assert 248 in lengths and 249 in lengths
    assert prompts_that_fit(context, tokenizer, [], settings) == []


@pytest.fixture(scope="module")
def shared_data(shared):
    """Return a file of prompts that stands beside the repository, or skip."""
    return lambda name: str(shared(f"data/{name}"))


def test_a_json_list_of_twelve_thousand_prompts_that_is_named_jsonl(shared_data):
    """Of them 11,946 are different, one of which is empty and is there three times."""
    rows, eval_rows, left_out = read(shared_data("kochatgpt_3_PPO.jsonl"), eval_prompts=SHIPPED)
    assert (len(rows), len(eval_rows)) == (10750, 1195)
    assert len({*texts_of(rows), *texts_of(eval_rows)}) == 11945
    assert left_out in (52, 55)  # with those that are empty, or without
    assert any("번디는 자신이 탐정잡지" in text for text in texts_of(rows + eval_rows))


def test_five_thousand_rows_of_instructions(shared_data):
    path = shared_data("alpaca_5000.json")
    given = json.loads(Path(path).read_text(encoding="utf-8"))
    rows, _, left_out = read(path)
    prompts = ["\n".join(filter(None, [row["instruction"], row["input"]])) for row in given]
    assert texts_of(rows) == [*dict.fromkeys(prompts)]
    assert left_out == 5000 - len(rows) == len(prompts) - len({*prompts})
    assert rows[0]["output"] == given[0]["output"]
