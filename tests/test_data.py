"""Prompts as people have them: files of each format, their rows, and in which order."""

import itertools
import json
import math
import re
import socket
from pathlib import Path
from types import SimpleNamespace

import numpy
import pandas
import pytest
import torch

import train_rlhf
from finetune import measurement
from finetune.data import batch_of_step, hold_out, read_data, read_prompts, text_in
from finetune.errors import SettingsError, shorten
from finetune.progress import count_steps
from finetune.settings import fixed_settings
from train_rlhf import EVAL_PROMPTS

REMEDY = "give a .txt, .jsonl, .json, .csv, .parquet file with a prompt a row, in UTF-8"
SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Who are you?"}
SAID = {"role": "assistant", "content": "A model."}
TURNS = [SYSTEM, USER]
MARK = "\ufeff"  # the byte order mark
NUMBERS = [f"Number {i} is" for i in range(41)]
A_TENTH = [NUMBERS[i] for i in numpy.random.default_rng(0).permutation(41)[:5]]
IN_PLACE = "36 to train on, 5 held out: EVAL_SHARE 0.1, in place of EVAL_PROMPTS"
NO_SHARE = ["--eval-share", "0"]


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


def read(*prompts, eval_prompts=(), share=0, field="auto", seed=0):
    """Return the rows to train on, those held out, and how many were left out.

    A share is held out in place of EVAL_PROMPTS; where these are [], nothing is.
    """
    if share and not eval_prompts:
        eval_prompts = EVAL_PROMPTS
    rows, eval_rows, count, _ = read_prompts([*prompts], [*eval_prompts], share, field, seed)
    return rows, eval_rows, count - len(rows) - len(eval_rows)


def read_file(*prompts, field="auto"):
    """Return the rows of these entries; none is held out, and none left out."""
    rows, eval_rows, left_out = read(*prompts, field=field)
    assert (eval_rows, left_out) == ([], 0)
    return rows


def problem_of(*prompts, **options):
    """Return the only line that tells why these entries can't be read."""
    with pytest.raises(SettingsError) as error:
        read(*prompts, **options)
    (problem,) = error.value.args
    return problem


def texts_of(rows):
    return [row["prompt"] for row in rows]


def lines_of(*rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows)


# ----------------------------------------------------------------- the formats
@pytest.mark.parametrize("name", ["p.txt", "p.Txt"])
def test_a_text_file_has_a_prompt_a_line(write, name):
    """A byte order mark, empty lines, spaces at the ends and Windows' line ends belong to none.

    Only what a text editor shows as the end of a line is one.
    """
    write(name, "\ufeffI feel so\r\n\n  Life is \nline\u2028separator\nDu bist schön\n\n")
    wanted = ["I feel so", "Life is", "line\u2028separator", "Du bist schön"]
    assert read_file(name) == [{"prompt": text} for text in wanted]


ROWS = [
    {"prompt": "I feel so, today", "answer": "happy", "count": 3},
    {"prompt": 'Say "so"\nLife is ', "answer": "long", "count": 4},
    {"prompt": "Du bist schön", "answer": "NA", "count": 5},
]
CSV = """prompt,answer,count
"I feel so, today",happy,3
"Say ""so""\nLife is ",long,4
Du bist schön,NA,5
"""


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("p.jsonl", lines_of(*ROWS)),
        ("empty lines.jsonl", MARK + lines_of(*ROWS).replace("\n", "\n\n") + "\n\n"),
        ("list.JSONL", MARK + json.dumps(ROWS)),
        ("p.json", json.dumps(ROWS, indent=4, ensure_ascii=False)),
        ("lines.JSON", lines_of(*ROWS)),
        ("p.csv", CSV),
        ("Windows.Csv", MARK + CSV.replace("\n", "\r\n").replace('so""\r\n', 'so""\n')),
        ("p.PARQUET", ROWS),
    ],
)
def test_a_file_of_rows_gives_their_prompts_and_their_other_fields(write, name, content):
    """There a prompt may have line breaks, and spaces at its ends."""
    assert read_file(write(name, content)) == ROWS


def test_texts_alone_are_prompts(write):
    assert texts_of(read_file(write("a.jsonl", '"A"\n"B"'))) == ["A", "B"]
    assert texts_of(read_file(write("b.json", '["A", "B"]'))) == ["A", "B"]


@pytest.mark.parametrize("name", ["a b.txt", "[x].csv", "what?*.csv", "csv.csv"])
def test_a_file_of_an_odd_name_beside_folders_of_a_format_s_name(write, tmp_path, name):
    for folder in ("csv", "text", "train"):
        (tmp_path / folder).mkdir()
    assert texts_of(read(write(name, "prompt\nOne"))[0])[-1] == "One"


def test_what_looks_like_a_number_or_a_date_among_others_stays_a_text(write):
    rows = [{"prompt": "A", "answer": "007"}, {"prompt": "2020-01-01", "answer": "1e3"}]
    assert read_file(write("p.jsonl", lines_of(*rows))) == rows
    assert read_file(write("p.parquet", rows)) == rows


def test_to_read_a_file_nothing_is_asked_of_the_network(write, monkeypatch):
    """The library would count the load on a server, and wait for an answer."""
    asked = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *_, **__: asked.append(host))
    read_file(write("p.csv", "prompt\nA"))
    read_file(write("p.parquet", ROWS))
    assert asked == []


# ------------------------------------------------------------------ the fields
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
    told = "(row 1: PROMPT_FIELD is query, and its fields are prompt, text, Frage)"
    assert told in problem_of(path, field="query")
    assert texts_of(read_file(write("p.txt", "One"), field="Frage")) == ["One"]  # it has no fields


@pytest.mark.parametrize("field", ["prompt", "messages"])
def test_of_messages_the_assistant_s_turns_at_the_end_are_dropped(write, field):
    before = [USER, SAID, USER]  # one in the middle stays
    rows = [{field: TURNS}, {field: [*before, SAID, SAID]}, {field: [USER, SAID]}]
    is_table = field == "messages"
    path = write("p.parquet", rows) if is_table else write("p.jsonl", lines_of(*rows))
    assert texts_of(read_file(path)) == [TURNS, before, [USER]]


def test_other_fields_are_none_where_a_row_lacks_them(write):
    """So a reward function gets each field of any row as a list with an entry for each."""
    one = write("a.jsonl", lines_of({"prompt": "A", "x": 1}, {"prompt": "B", "y": [2]}))
    other = write("b.jsonl", lines_of({"question": "C", "z": "3"}))
    rows, eval_rows, _ = read("Zero", one, eval_prompts=[other, "D"])
    none = dict.fromkeys(("x", "y", "z", "question"))
    assert rows[:2] == [none | {"prompt": "Zero"}, none | {"prompt": "A", "x": 1}]
    assert rows[2:] == [none | {"prompt": "B", "y": [2]}]
    assert eval_rows[0] == none | {"prompt": "C", "z": "3", "question": "C"}
    assert eval_rows[1:] == [none | {"prompt": "D"}]


# ----------------------------------------------------------- texts, duplicates
def test_a_text_is_itself():
    texts = ["I feel so", " a .txt of mine ", "...", "e.g.", "and/or", "Is it a .txt?", "Yes. No"]
    for text in [*texts, "/", "~"]:
        assert read(text) == ([{"prompt": text}], [], 0)


def test_files_and_texts_mix_in_the_order_of_the_setting(write):
    write("p.txt", "One\nTwo\n")
    write("p.jsonl", lines_of({"prompt": "Four"}))
    rows = read_file("Zero", "p.txt", "Three", "p.jsonl", "Five")
    assert texts_of(rows) == ["Zero", "One", "Two", "Three", "Four", "Five"]


def test_rows_whose_prompt_is_empty_are_left_out_and_counted(write):
    """As empty lines of a text file are: 3 rows of KoChatGPT's file are such."""
    content = lines_of({"prompt": "A"}, {"prompt": ""}, {"prompt": " \n"}, {"prompt": "B"})
    rows, _, left_out = read(write("p.jsonl", content))
    assert (texts_of(rows), left_out) == (["A", "B"], 2)


def test_duplicates_are_dropped_and_counted(write):
    """Of a file, of files and texts, of EVAL_PROMPTS, and there what PROMPTS has."""
    rows = [{"prompt": text, "x": i} for i, text in enumerate("ABABA")]
    write("p.jsonl", lines_of(*rows))
    write("q.txt", "B\nC\nD\n")
    held_out = ["D", "E", "E", "q.txt"]
    rows, eval_rows, left_out = read("p.jsonl", "q.txt", "C", eval_prompts=held_out)
    wanted = [("A", 0), ("B", 1), ("C", None), ("D", None)]
    assert [(row["prompt"], row["x"]) for row in rows] == wanted
    assert texts_of(eval_rows) == ["E"]
    assert left_out == (5 + 3 + 1) + (3 + 3) - 5


def test_conversations_are_duplicates_where_all_their_messages_are(write):
    again = [SYSTEM, {"role": "user", "content": "Why?"}]
    rows = [{"messages": TURNS}, {"messages": again}, {"messages": [*TURNS, SAID]}]
    found, _, left_out = read(write("p.jsonl", lines_of(*rows)))
    assert (texts_of(found), left_out) == ([TURNS, again], 1)


# ------------------------------------------------------------------- bad files
@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("none.txt", None),  # there is no such file
        ("data/prompts.parquet", None),
        ("prompts.xlsx", None),  # a name like a file's
        ("data/", None),
        ("my prompts.csv", None),
        ("x" * 300 + ".txt", None),
        # of another kind
        ("p.md", "I feel so"),
        ("p.jsonl.gz", b"\x1f\x8b"),
        ("prompts", "I feel so"),
        # empty
        ("p.txt", "\ufeff\n \n"),
        ("p.json", "[]"),
        ("p.json", "[[]]"),
        ("p.json", "null"),
        ("p.jsonl", '{"prompt": " "}'),
        ("p.csv", "prompt\n"),
        ("p.csv", "prompt\n4\n5\n"),  # these are numbers
        # broken
        ("p.txt", b"fine\nno\xff"),
        ("p.txt", "I feel so\n".encode("utf-16")),
        ("p.jsonl", '{"prompt": "\\udcff"}'),  # half a character
        ("p.jsonl", 'null\n{"prompt": "A"}'),
        ("p.csv", b"prompt\n\xff\n"),
        ("p.csv", 'prompt\n"never closed\n'),
        ("p.csv", "prompt\nHello, you are\nTell me, what is\n"),  # or half would be lost
        ("p.parquet", "prompt\nLife is\n"),
    ],
)
def test_a_file_that_gives_no_prompts(write, name, content):
    if content is not None:
        write(name, content)
    problem = problem_of("Good day", name)
    assert problem.startswith(f"PROMPTS is {shorten(name)}: it can't be used (")
    assert problem.endswith(f"): {REMEDY}")
    assert len(problem) < 500


def test_a_folder_is_no_file_of_prompts(write, tmp_path):
    (tmp_path / "p.txt").mkdir()
    (tmp_path / "p.txt" / "inner.txt").write_text("A")
    write("q.txt", "One")
    problem = problem_of("q.txt", eval_prompts=["p.txt"])
    assert problem.startswith("EVAL_PROMPTS is p.txt: it can't be used (")


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"prompt": "A"}, {"prompt": 5}], "row 2: its prompt is 5, no text"),
        ([{"prompt": "A"}, {"prompt": None}], "row 2: its prompt is None, no text"),
        ([{"prompt": {"text": "A"}}], "row 1: its prompt is {'text': 'A'}, no text"),
        ([{"prompt": ["A", "B"]}], "row 1: its prompt is ['A', 'B'], no text"),
        ([{"prompt": "A"}, {"prompt": []}], "row 2: its prompt is [], no text"),
        ([{"messages": TURNS}, {"messages": [SAID]}], "row 2: its messages is [{'role': "),
        ([{"messages": [{"content": 4}]}], "row 1: its messages is [{'content': 4}], no text"),
        ([{"query": "A", "x": 1}], "row 1: PROMPT_FIELD is auto, and its fields are query, x"),
        ("fine\nI\0", "row 2: its prompt is "),
    ],
)
def test_a_row_that_has_no_prompt_is_named(write, rows, reason):
    name = "p.txt" if isinstance(rows, str) else "p.jsonl"
    write(name, rows if isinstance(rows, str) else lines_of(*rows))
    problem = problem_of(name)
    assert problem.startswith(f"PROMPTS is {name}: it can't be used ({reason}")
    assert problem.endswith(f"): {REMEDY}")


@pytest.mark.parametrize("text", ['{"prompt": ', "b"])
def test_a_line_that_is_no_json_is_named(write, text):
    """Whether there is a row on each, or a list over all of them."""
    lines = ['{"prompt": "A"}', text, '{"prompt": "C"}']
    for content in ("\n".join(lines), "[" + ",\n".join(lines) + "]"):
        problem = problem_of(write("p.jsonl", content))
        assert re.search(r"p.jsonl: it can't be used \(.*: line [23] column", problem)


# ------------------------------------------------------------ what is held out
@pytest.fixture
def numbers(write):
    return write("p.txt", "\n".join(NUMBERS))


@pytest.mark.parametrize(
    ("share", "count", "held_out"),  # rounded up, but one at least stays
    [(0.1, 40, 4), (0.1, 41, 5), (0.001, 41, 1), (0.25, 41, 11), (0.9, 2, 1), (0.1, 1, 0)],
)
def test_a_share_is_held_out(share, count, held_out):
    rows, eval_rows = hold_out([*range(count)], share, seed=0)
    assert len(eval_rows) == held_out
    assert sorted(rows + eval_rows) == [*range(count)]


def test_what_is_held_out_depends_on_the_seed_alone(numbers):
    """It comes from everywhere in the file."""
    rows, eval_rows, left_out = read(numbers, share=0.1)
    assert texts_of(eval_rows) == A_TENTH and left_out == 0
    numpy.random.seed(123)  # whatever happened in between
    assert read(numbers, share=0.1) == (rows, eval_rows, 0)
    others = [texts_of(read(numbers, share=0.1, seed=seed)[1]) for seed in range(1, 9)]
    assert len({*map(tuple, others)}) == 8 and A_TENTH not in others
    assert len({text for texts in others for text in texts}) > 20


def test_a_share_is_of_all_prompts_where_one_is_a_file(numbers, write):
    """It is of those that are different; of a single one none is held out."""
    rows, eval_rows, left_out = read("One", numbers, "Two", NUMBERS[3], share=0.5)
    assert (len(rows), len(eval_rows), left_out) == (21, 22, 1)
    assert {*texts_of(rows), *texts_of(eval_rows)} == {"One", "Two", *NUMBERS}
    assert read(write("q.txt", "One\nOne"), share=0.1) == ([{"prompt": "One"}], [], 1)


@pytest.mark.parametrize("name", ["q.txt", "no_such_file.csv"])
def test_a_file_to_measure_on_beside_a_share_is_refused(numbers, write, read_settings, name):
    """It is told beside whatever else is wrong."""
    write("q.txt", "One\nTwo")
    flags = ["--prompts", numbers, "--eval-prompts", "Mine is"]
    with pytest.raises(SettingsError) as error:
        read_settings(*flags, name, "--eval-share", "0.25", "--gamma", "2")
    other, problem = error.value.args
    assert other.startswith("GAMMA is 2: ")
    told = f"EVAL_PROMPTS is {name}, but EVAL_SHARE 0.25 of PROMPTS is held out in its"
    assert problem == f"{told} place: give EVAL_SHARE 0 to measure EVAL_PROMPTS"
    settings = read_settings(*flags, "q.txt", *NO_SHARE)
    eval_rows = read(numbers, eval_prompts=settings.eval_prompts)[1]
    assert texts_of(eval_rows) == ["Mine is", "One", "Two"]


@pytest.mark.parametrize(
    ("prompts", "flags", "eval_texts", "line"),
    [
        (NUMBERS, [], EVAL_PROMPTS, "41 to train on, 6 held out"),
        (["One"], ["--eval-prompts", "p.txt"], NUMBERS, "1 to train on, 41 held out"),
        (["p.txt"], [], A_TENTH, IN_PLACE),
        (["p.txt"], ["--eval-prompts", "A"], A_TENTH, IN_PLACE),
        (["p.txt"], ["--eval-prompts"], [], "41 to train on, 0 held out"),
        (["p.txt"], NO_SHARE, EVAL_PROMPTS, "41 to train on, 6 held out"),
        (["p.txt"], [*NO_SHARE, "--eval-prompts"], [], "41 to train on, 0 held out"),
        (["p.txt"], [*NO_SHARE, "--eval-prompts", "A"], ["A"], "41 to train on, 1 held out"),
    ],
)
def test_a_share_of_a_file_is_held_out_in_place_of_eval_prompts_and_the_screen_tells(
    numbers, make_settings, capsys, prompts, flags, eval_texts, line
):
    """Whatever texts these are; but not where it is 0, nor where PROMPTS are texts."""
    settings = make_settings("--prompts", *prompts, *flags)
    held_out = settings.eval_prompts, settings.eval_share
    found = read_prompts(settings.prompts, *held_out, "auto", settings.seed)
    assert texts_of(found.eval_rows) == eval_texts
    model = SimpleNamespace(
        device=torch.device("cpu"),
        get_nb_trainable_parameters=lambda: (1, 2),
        get_input_embeddings=lambda: torch.nn.Embedding(1, 1),
    )
    measurement.announce(model, settings, found, found.rows, found.eval_rows, [])
    assert f"\nPrompts   {line}\n" in capsys.readouterr().out


def test_a_resumed_run_has_the_rows_that_it_had(make_settings):
    """Others held out would be trained on, or the other way round."""
    names = {"prompts", "eval_prompts", "eval_share", "prompt_field", "seed"}
    assert names <= fixed_settings(make_settings()).keys()


# ------------------------------------------------------------ order and length
def epochs_of(count, batch_size, seed, steps):
    """Return the prompts that so many steps take, cut where an epoch ends."""
    rows = [{"prompt": i} for i in range(count)]
    numbers = range(1, steps + 1)
    batches = [batch_of_step(step, rows, batch_size, seed) for step in numbers]
    assert {len(batch) for batch in batches} == {batch_size}
    taken = texts_of(itertools.chain(*batches))
    return [taken[start : start + count] for start in range(0, len(taken), count)]


@pytest.mark.parametrize(("count", "batch_size"), [(12, 4), (11, 4), (3, 10), (1, 4), (10, 10)])
def test_every_epoch_has_each_row_once_in_an_order_of_its_own(count, batch_size):
    """A batch may begin in one epoch and end in another, or have several."""
    epochs = epochs_of(count, batch_size, seed=0, steps=4 * count)
    assert len(epochs) == 4 * batch_size
    assert all(sorted(epoch) == [*range(count)] for epoch in epochs)
    different = {tuple(epoch) for epoch in epochs}
    assert len(different) > min(len(epochs), math.factorial(count)) * 0.6
    if count > 3:
        assert len(different) == len(epochs)
        others = epochs_of(count, batch_size, seed=1, steps=4 * count)
        assert not different & {tuple(epoch) for epoch in others}


def test_the_rows_of_a_step_depend_on_seed_and_step_alone():
    """So a resumed run goes on with what the whole run would have taken."""
    rows = [{"prompt": i} for i in range(11)]
    whole = [batch_of_step(step, rows, 4, 5) for step in range(1, 20)]
    torch.manual_seed(123)
    numpy.random.seed(123)
    state, next_number = torch.get_rng_state(), numpy.random.RandomState(123).random()
    again = [batch_of_step(step, rows, 4, 5) for step in reversed(range(1, 20))]
    assert again == whole[::-1]
    assert torch.equal(torch.get_rng_state(), state)  # nor does it take from anyone's numbers
    assert numpy.random.random() == next_number


@pytest.mark.parametrize(
    ("epochs", "count", "batch_size", "steps"),
    [(0.1, 30, 1, 3), (0.07, 100, 1, 7), (0.1, 31, 3, 2), (2.5, 6, 5, 3), (1e-6, 9, 4, 1)],
)
def test_a_part_of_an_epoch_takes_a_part_of_its_steps(
    make_settings, epochs, count, batch_size, steps
):
    settings = make_settings("--training-epochs", str(epochs), "--batch-size", str(batch_size))
    assert count_steps(settings, [{"prompt": "A"}] * count) == steps


# ------------------------------------------------------ examples to learn from
def double(row, left_out, factor):
    """Read an example as a script does, where it is a number in a text."""
    if row.get("note"):
        left_out["with a note"] += 1
    text = text_in(row, "text")
    return int(text) * factor if text else None


def read_numbers(data, share=0.25, seed=0):
    return read_data(data, share, seed, double, "give numbers", factor=2)


def test_examples_are_read_each_once_and_a_share_is_held_out(write):
    """What is left out is counted. A line of a file of unknown ending is a row."""
    rows = [{"text": str(number % 9), "note": number == 3} for number in range(12)]
    write("n.jsonl", lines_of(*rows, {"text": ""}))
    examples, eval_examples, left_out = read_numbers("n.jsonl")
    assert (len(examples), len(eval_examples)) == (6, 3)
    assert sorted(examples + eval_examples) == [*range(0, 18, 2)]
    assert left_out == {"given twice": 3, "with a note": 1, "without an answer": 1}
    assert read_numbers("n.jsonl", seed=1)[0] != examples
    write("n.of_no_known_ending", "\n".join(row["text"] for row in rows))
    wanted = (examples, eval_examples, {"given twice": 3})
    assert read_numbers("n.of_no_known_ending") == wanted


@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"text": "1"}, {"answer": "2"}], "row 2: it has no 'text'"),
        ([{"text": "1"}, {"text": 2.5}], "row 2: its text is 2.5, no text"),
        ([{"text": "one"}], "row 1: invalid literal for int() with base 10: 'one'"),
        ([5], "row 1: 'int' object has no attribute 'get'"),
        ([{"text": "1"}, {"text": "1"}], "1 rows of it can be used, where 2 are the least"),
    ],
)
def test_a_row_that_is_no_example_is_named(write, rows, reason):
    write("n.jsonl", lines_of(*rows))
    with pytest.raises(SettingsError) as error:
        read_numbers("n.jsonl")
    assert error.value.args == (f"DATA is n.jsonl: it can't be used ({reason}): give numbers",)


# ----------------------------------------------------------------- a whole run
def test_a_run_on_a_file_of_conversations(
    call_main, copy_of_demo_model, tmp_path, monkeypatch, capsys
):
    """Of 43 one is given twice, of the 42 five are held out, two are too long for the context.

    They use the template anyway, and the reward sees conversations and all fields of each row.
    """
    path = copy_of_demo_model / "tokenizer_config.json"
    template = "{{ bos_token }}{{ messages[-1]['content'] }}"
    config = json.loads(path.read_text()) | {"chat_template": template}
    path.write_text(json.dumps(config))
    texts = NUMBERS[:40]
    texts[10:10] = [NUMBERS[3], "very " * 300, "so " * 300]
    rows = [{"messages": [USER | {"content": text}], "text": text} for text in texts]
    (tmp_path / "chats.jsonl").write_text(lines_of(*rows))

    def brevity(prompts, completions, text, **kwargs):
        assert [prompt[-1]["content"] for prompt in prompts] == text
        assert {turn["role"] for (turn,) in completions} == {"assistant"}
        return [-len(turn["content"]) for (turn,) in completions]

    monkeypatch.setattr(train_rlhf, "REWARD", brevity)
    flags = "--device cpu --prompts chats.jsonl --ppo-epochs 1 --target-approx-kl 0"
    flags += " --batch-size 2 --training-epochs 0.1 --max-new-tokens 4"
    flags += " --eval-samples 12 --scale-samples 8"
    assert call_main("--model-name", copy_of_demo_model, *flags.split()) == 0

    found = read("chats.jsonl", share=0.1)[:2]
    rows, eval_rows = ([row for row in part if len(row["text"]) < 300] for part in found)
    assert len(rows) + len(eval_rows) == 40
    line = f"{len(rows)} to train on, {len(eval_rows)} held out: EVAL_SHARE 0.1"
    line += ", in place of EVAL_PROMPTS, 3 left out: empty, given twice or too long"
    output = capsys.readouterr().out
    assert f"\nPrompts   {line}\n" in output
    assert "\nTraining  4 samples in 2 steps, " in output

    folder = tmp_path / "trained_model"
    lines = (folder / "samples.jsonl").read_text().splitlines()
    samples = [json.loads(line) for line in lines]
    batches = [batch_of_step(step, rows, 2, seed=0) for step in (1, 2)]
    assert [sample["prompt"] for sample in samples] == texts_of(itertools.chain(*batches))
    assert all(sample["score"] == -len(sample["response"]) for sample in samples)
    report = json.loads((folder / "report.json").read_text())
    assert report["chat"] is True
    measured = report["trained"]["eval_prompts"]["first_sample"]
    assert [*measured] == [row["text"] for row in eval_rows]


# ------------------------------------------------------------------ real files
def test_a_json_list_of_twelve_thousand_prompts_that_is_named_jsonl(shared):
    """Of them 11,946 are different, one of which is empty and is there three times."""
    rows, eval_rows, left_out = read(str(shared("data/kochatgpt_3_PPO.jsonl")), share=0.1)
    assert (len(rows), len(eval_rows), left_out) == (10750, 1195, 55)
    assert len({*texts_of(rows), *texts_of(eval_rows)}) == 11945
    assert any("번디는 자신이 탐정잡지" in text for text in texts_of(rows + eval_rows))


def test_five_thousand_rows_of_instructions(shared):
    path = str(shared("data/alpaca_5000.json"))
    given = json.loads(Path(path).read_text(encoding="utf-8"))
    rows, _, left_out = read(path)
    prompts = [f"{row['instruction']}\n{row['input']}".rstrip("\n") for row in given]
    assert texts_of(rows) == [*dict.fromkeys(prompts)]
    assert left_out == 5000 - len(rows) == len(prompts) - len({*prompts})
    assert rows[0]["output"] == given[0]["output"]
