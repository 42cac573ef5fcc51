"""Forms of rows that people have, and that each of them says the same to all four scripts."""

import csv
import json
import re
from typing import Any, NamedTuple

import pytest
from test_examples import write

from finetune.comparisons import read_comparison, read_judged
from finetune.data import read_data
from finetune.dialogues import put_together, read_answered
from finetune.errors import SettingsError
from finetune.examples import EXAMPLES, read_example
from finetune.fields import LeftOut, Tally
from finetune.files import read_table
from finetune.messages import plain_turns, prompt_text
from finetune.prompts import read_prompt, read_prompts
from finetune.seed_tasks import read_seed_tasks, task_of


def user(text, more=None):
    turn = {"role": "user", "content": text}
    return turn | {"input": more} if more else turn


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


class Form(NamedTuple):
    """A row, and what it says to each script.

    turns: as train_sft.py learns them. prompt: as train_rlhf.py asks. task: instruction, input and
    output, as make_instructions.py shows them; None where they can't be one.
    """

    row: dict
    turns: list
    form: str
    prompt: Any
    task: tuple | None
    unused: str = ""  # the names, of which the answer is one for prompts
    tools: list | None = None


KIND = "Be kind."
TOOLS = [{"type": "function", "function": {"name": "clock", "parameters": {}}}]
CALL = {"id": "1", "type": "function", "function": {"name": "clock", "arguments": {}}}
# OpenAI's arguments are a text, which templates that write JSON would put between quotes.
CALL_AS_TEXT = {"id": "1", "type": "function"}
CALL_AS_TEXT |= {"function": {"name": "clock", "arguments": "{}"}}
ALPACA = {"instruction": "Add", "input": "1 2", "output": "3"}
HI = [user("Hi"), assistant("Ho")]
FORMS = {
    "alpaca": Form(
        ALPACA,
        [user("Add", "1 2"), assistant("3")],
        "instruction",
        "Add\n1 2",
        ("Add", "1 2", "3"),
    ),
    "alpaca, its input empty": Form(
        {"instruction": "Hi", "input": "", "output": "Ho", "id": 7},
        HI,
        "instruction",
        "Hi",
        ("Hi", "", "Ho"),
        unused="id",
    ),
    "llama-factory": Form(
        {
            "instruction": "And?",
            "input": "now",
            "output": "Two",
            "system": KIND,
            "history": [["Hi", "Ho"], ["Well?", "One"]],
        },
        [
            system(KIND),
            *HI,
            user("Well?"),
            assistant("One"),
            user("And?", "now"),
            assistant("Two"),
        ],
        "instruction",
        [system(KIND), *HI, user("Well?"), assistant("One"), user("And?\nnow")],
        None,
    ),
    "dolly": Form(
        {"instruction": "Who?", "context": "Ann came.", "response": "Ann", "category": "qa"},
        [user("Who?", "Ann came."), assistant("Ann")],
        "instruction",
        "Who?\nAnn came.",
        ("Who?", "Ann came.", "Ann"),
        unused="category",
    ),
    "prompt and completion": Form(
        {"prompt": "Hi", "completion": "Ho"}, HI, "instruction", "Hi", ("Hi", "", "Ho")
    ),
    "trl's lists": Form(
        {"prompt": [system(KIND), user("Hi")], "completion": [assistant("Ho")]},
        [system(KIND), *HI],
        "messages",
        [system(KIND), user("Hi")],
        None,
    ),
    "a text and a message": Form(
        {"prompt": "Hi", "completion": assistant("Ho")},
        HI,
        "messages",
        "Hi",
        ("Hi", "", "Ho"),
    ),
    "a message and a text": Form(
        {"prompt": user("Hi"), "completion": "Ho"},
        HI,
        "messages",
        [user("Hi")],
        ("Hi", "", "Ho"),
    ),
    "question and answer": Form(
        {"question": "Hi", "answer": "Ho"}, HI, "instruction", "Hi", ("Hi", "", "Ho")
    ),
    "openorca": Form(
        {"id": "x", "system_prompt": KIND, "question": "Hi", "response": "Ho"},
        [system(KIND), *HI],
        "instruction",
        [system(KIND), user("Hi")],
        None,
        unused="id",
    ),
    "metamath": Form(
        {"type": "sum", "query": "Hi", "response": "Ho"},
        HI,
        "instruction",
        "Hi",
        ("Hi", "", "Ho"),
        unused="type",
    ),
    "messages": Form(
        {"messages": [system(KIND), *HI, user("And?"), assistant("Two")]},
        [system(KIND), *HI, user("And?"), assistant("Two")],
        "messages",
        [system(KIND), *HI, user("And?")],
        None,
    ),
    "messages of parts": Form(
        {
            "messages": [
                {"role": "developer", "content": [{"type": "text", "text": KIND}]},
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"text": "i"}]},
                {"role": "assistant", "content": "Ho", "id": 3},
            ]
        },
        [system(KIND), *HI],
        "messages",
        [system(KIND), user("Hi")],
        None,
        unused="messages.id",
    ),
    "messages with tools": Form(
        {
            "messages": [
                user("Time?"),
                {"role": "assistant", "content": None, "tool_calls": [CALL_AS_TEXT]},
                {"role": "tool", "content": "noon", "tool_call_id": "1", "name": "clock"},
                assistant("Noon."),
            ],
            "tools": TOOLS,
        },
        [
            user("Time?"),
            assistant("", tool_calls=[CALL]),
            {"role": "tool", "content": "noon", "tool_call_id": "1", "name": "clock"},
            assistant("Noon."),
        ],
        "messages",
        [
            user("Time?"),
            assistant("", tool_calls=[CALL]),
            {"role": "tool", "content": "noon", "tool_call_id": "1", "name": "clock"},
        ],
        None,
        tools=TOOLS,
    ),
    "sharegpt": Form(
        {
            "id": "a_0",
            "conversations": [
                {"from": "System", "value": KIND},
                {"from": "Human", "value": "Hi"},
                {"from": "GPT", "value": "Ho"},
                {"from": "user", "value": "And?"},
                {"from": "assistant", "value": "Two"},
            ],
        },
        [system(KIND), *HI, user("And?"), assistant("Two")],
        "messages",
        [system(KIND), *HI, user("And?")],
        None,
        unused="id",
    ),
    "sharegpt with system": Form(
        {
            "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}],
            "system": KIND,
        },
        [system(KIND), *HI],
        "messages",
        [system(KIND), user("Hi")],
        None,
    ),
    "conversation": Form(
        {"conversation": HI, "source": "x"},
        HI,
        "messages",
        [user("Hi")],
        ("Hi", "", "Ho"),
        unused="source",
    ),
    "text": Form({"text": "So it is."}, [user("So it is.")], "text", "So it is.", None),
}


def answer_of(row):
    """Return the name of the field with the answer, where it has one of its own."""
    return next(
        (name for name in ("output", "completion", "response", "answer") if name in row), ""
    )


def unused_of(form, script=""):
    """Return the counts of what a script does not use of a row."""
    names = [form.unused] if form.unused else []
    if script == "train_rlhf" and answer_of(form.row):
        names.append(answer_of(form.row))
    return dict.fromkeys(names, 1)


def reason_of(read, *arguments):
    """Return why a row is left out."""
    with pytest.raises(LeftOut) as left_out:
        read(*arguments)
    return str(left_out.value)


# ------------------------------------------------------------------- a row, and all scripts
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_row_is_an_example(form):
    tally = Tally()
    assert read_answered(form.row, tally) == (form.turns, form.form, form.tools)
    assert tally == Tally(unused=tally.unused) and tally.unused == unused_of(form)
    example = read_example(form.row, Tally())
    assert (example["turns"], example["form"], example["tools"]) == (
        form.turns,
        form.form,
        form.tools,
    )


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_row_is_a_prompt(form):
    tally = Tally()
    row = read_prompt(form.row, tally, "auto")
    assert row.pop("prompt") == form.prompt
    assert row.pop("tools", None) == form.tools
    others = {name: form.row[name] for name in form.row if name not in ("prompt", "tools")}
    assert row == others  # for a reward function, as they are
    assert tally == Tally(unused=tally.unused)
    assert tally.unused == unused_of(form, "train_rlhf")


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_row_is_a_seed_task(form):
    tally = Tally()
    if form.task is None:
        told = reason_of(task_of, form.row, tally)
        assert told == "that are no instruction with an answer"
        return
    names = ("instruction", "input", "output")
    task = dict(zip(names, form.task)) | {"is_classification": False}
    assert task_of(form.row, tally) == task
    assert tally.unused == unused_of(form)


def pair_of(row, chosen, rejected):
    """Return the turns of the two of the only comparison in a row."""
    ((better, worse),) = read_comparison(row | {"chosen": chosen, "rejected": rejected}, Tally())
    assert better.form == worse.form and better.tools == worse.tools
    return better, worse


@pytest.mark.parametrize("form", list(FORMS.values())[:-1], ids=list(FORMS)[:-1])
def test_what_a_row_asks_stands_before_answers_that_are_compared(form):
    row = dict(form.row)
    row.pop(answer_of(row), None)
    for name in ("messages", "conversations", "conversation"):
        if name in row:
            row[name] = row[name][:-1]
    answer = form.turns[-1]["content"]
    texts = pair_of(row, answer, "Bad.")
    messages = pair_of(row, [assistant(answer)], [assistant("Bad.")])
    for dialogue, last in zip(messages, (answer, "Bad."), strict=True):
        assert plain_turns(dialogue.turns) == [*plain_turns(form.turns[:-1]), assistant(last)]
        assert (dialogue.form, dialogue.tools) == ("messages", form.tools)
    if isinstance(form.prompt, str):
        said = [dialogue.turns[0]["content"] for dialogue in texts]
        assert said == [f"{form.prompt} {answer}", f"{form.prompt} Bad."]
        assert texts[0].form == "text"
    else:
        assert texts == messages


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_row_with_a_label_is_said_with_its_answer(form):
    for label, place in ((True, 0), ("1", 0), (False, 1), (0, 1)):
        ((*pair,),) = read_comparison(form.row | {"label": label}, Tally())
        dialogue = pair.pop(place)
        assert pair == [None]
        if dialogue.form == "text":
            before = "" if form.form == "text" else f"{form.prompt} "
            assert dialogue.turns[0]["content"] == before + form.turns[-1]["content"]
        else:
            assert plain_turns(dialogue.turns) == plain_turns(form.turns)


def test_a_file_of_all_forms_goes_through_all_four_readers(tmp_path):
    rows = [form.row for form in FORMS.values()]
    path = write(tmp_path / "rows.json", rows)
    data = read_data(path, 0, 0, EXAMPLES)
    said = {str((form.turns, form.form, form.tools)) for form in FORMS.values()}
    assert len(data.rows) == len(said) == len(rows) - data.tally.left_out["given twice"]
    prompts = read_prompts([path], [], 0, "auto", 0)
    assert len(prompts.rows) == len({str(form.prompt) for form in FORMS.values()})
    tasks, tally = read_seed_tasks(path)
    assert [(task["instruction"], task["input"], task["output"]) for task in tasks] == [
        form.task for form in FORMS.values() if form.task
    ]
    count = sum(form.task is None for form in FORMS.values())
    assert tally.reasons() == f"{count} that are no instruction with an answer"
    assert len(read_judged(path, Tally())) == len(rows)
    wanted = {"id": 3, "category": 1, "type": 1, "messages.id": 1, "source": 1}
    assert data.tally.unused == wanted
    assert tally.unused == {"id": 1, "category": 1, "type": 1, "source": 1}
    told = prompts.tally.unused
    assert told == wanted | {"output": 3, "response": 3, "completion": 4, "answer": 1}


# -------------------------------------------------------------------------- as files have it
def write_csv(path, row, as_text):
    """Write a table of one row, in which all that is no text is written as one."""
    texts = {
        name: value if isinstance(value, str) else as_text(value) for name, value in row.items()
    }
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, texts)
        writer.writeheader()
        writer.writerow(texts)
    return str(path)


@pytest.mark.parametrize("as_text", [json.dumps, str], ids=["as JSON", "as Python"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_a_csv_says_the_same_with_its_lists_as_texts(form, as_text, tmp_path):
    (row,) = read_table(write_csv(tmp_path / "rows.csv", form.row, as_text))
    assert read_answered(row, Tally()) == (form.turns, form.form, form.tools)
    prompt = read_prompt(row, Tally(), "auto")
    assert (prompt["prompt"], prompt.get("tools")) == (form.prompt, form.tools)


@pytest.mark.parametrize("answer", ["2", "True", "007", "1.50", "null", "NaN", "[1, 2]", "{}"])
def test_an_answer_in_a_csv_is_the_text_that_stands_there(answer, tmp_path):
    path = write_csv(tmp_path / "rows.csv", ALPACA | {"output": answer}, str)
    data = [read_example(row, Tally())["turns"][-1] for row in read_table(path)]
    assert data == [assistant(answer)]


NAMES = ["prompt", "messages", "conversations", "instruction", "question", "query", "text"]
NAMES += ["completion", "output", "response", "answer", "input", "context", "system"]
NAMES += ["system_prompt", "history", "tools", "label", "kto_tag"]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_fields_that_are_none_as_in_a_parquet_file_are_nothing(form):
    row = dict.fromkeys(NAMES) | form.row
    tally = Tally()
    assert read_answered(row, tally) == (form.turns, form.form, form.tools)
    assert tally.unused == unused_of(form)
    assert read_prompt(row, Tally(), "auto")["prompt"] == form.prompt


@pytest.mark.parametrize("empty", ["", " ", []])
def test_what_is_empty_changes_nothing_that_is_asked(empty):
    names = ("input", "context", "system", "system_prompt", "history", "tools")
    row = dict.fromkeys(names, empty) | {"instruction": "Hi", "output": "Ho"}
    tally = Tally()
    assert read_answered(row, tally).turns == HI
    assert read_prompt(row, Tally(), "auto")["prompt"] == "Hi"
    assert not tally.unused


def test_fields_of_other_forms_that_are_empty_as_in_a_csv_are_nothing():
    for name in ("prompt", "text"):
        row = {name: "", "instruction": "Hi", "output": "Ho"}
        assert read_answered(row, Tally()).turns == HI
        assert read_prompt(row, Tally(), "auto")["prompt"] == "Hi"
    row = {"instruction": "Hi", "completion": "", "output": "Ho"}
    assert read_answered(row, Tally()).turns == HI


def test_no_tools_as_the_text_of_a_list_are_none():
    row = {"instruction": "Hi", "output": "Ho", "tools": "[]", "history": "[]"}
    assert read_answered(row, Tally()).turns == HI


# ---------------------------------------------------------------------- what is not used
def test_every_field_that_is_not_used_is_named_once_with_its_count(tmp_path):
    rows = [{"instruction": f"Do {n}", "output": "Yes.", "source": "x"} for n in range(3)]
    rows[0] |= {"id": 0, "note": "", "tags": [], "other": None}
    rows += [{"messages": [*HI, user("x"), {**assistant(f"{n}"), "ts": 1}]} for n in range(1200)]
    path = write(tmp_path / "rows.json", rows)
    told = read_data(path, 0, 0, EXAMPLES).tally.in_words()
    assert told == "; fields not used: source (3), id (1), messages.ts (1,200)"
    told = read_prompts([path], [], 0, "auto", 0).tally.in_words()
    assert "given twice" in told
    assert told.endswith("fields not used: output (3), source (3), id (1), messages.ts (1,200)")
    _, tally = read_seed_tasks(path)
    assert tally.unused == {"source": 3, "id": 1}  # conversations are left out


def test_a_row_that_is_left_out_names_no_fields_of_its_own():
    tally = Tally()
    with pytest.raises(LeftOut):
        read_answered({"instruction": "Hi", "output": "Ho", "label": 0, "id": 1}, tally)
    assert not tally.unused


# ------------------------------------------------------------------------ what is left out
PICTURE = {"type": "image_url", "image_url": {"url": "x"}}
LEFT_OUT = [
    (ALPACA | {"context": "more"}, "with both input and context"),
    (ALPACA | {"tools": TOOLS}, "with tools, which does not go with instruction"),
    ({"text": "Hi", "system": KIND}, "with system, which does not go with text"),
    ({"text": "Hi", "history": [["a", "b"]]}, "with history, which does not go with text"),
    ({"messages": HI, "history": [["a", "b"]]}, "with history, which does not go with messages"),
    ({"messages": HI, "input": "x"}, "with input, which does not go with messages"),
    ({"conversations": HI, "context": "x"}, "with context, which does not go with conversations"),
    ({"messages": [system("A"), *HI], "system": "B"}, "with two different system texts"),
    (ALPACA | {"system": "A", "system_prompt": "B"}, "with two different system texts"),
    ({"messages": [{"role": "narrator", "content": "x"}]}, "with the unknown role narrator"),
    (
        {"conversations": [{"from": "human", "value": "x"}, {"from": "bing", "value": "y"}]},
        "with the unknown role bing",
    ),
    (
        {"messages": [{"role": "user", "content": [PICTURE]}, assistant("A cat.")]},
        "with something else than text in a message",
    ),
]


@pytest.mark.parametrize(("row", "reason"), LEFT_OUT)
def test_a_row_is_left_out_by_all_scripts_for_the_same_reason(row, reason):
    assert reason_of(read_answered, row, Tally()) == reason
    assert reason_of(read_prompt, row, Tally(), "auto") == reason
    assert reason_of(task_of, row, Tally()) == reason
    pair = {"chosen": [assistant("A")], "rejected": [assistant("B")]}
    if "text" not in row:
        assert reason_of(read_comparison, row | pair, Tally()) == reason


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (ALPACA | {"output": ""}, "without an answer"),
        (ALPACA | {"output": " \n"}, "without an answer"),
        (ALPACA | {"output": None}, "without an answer"),
        ({"prompt": [user("Hi")], "completion": [assistant("")]}, "without an answer"),
        ({"messages": [user("Hi")]}, "without an answer"),
        ({"messages": [assistant("Hi"), user("Ho")]}, "without an answer"),
        ({"text": "\n"}, "without an answer"),
        (
            {"prompt": [user("Hi")], "completion": [assistant("Ho"), user("And?")]},
            "whose completion does not end with an answer",
        ),
        ({"messages": HI, "label": False}, "whose label says that the answer is a bad one"),
        ({"messages": HI, "label": "false"}, "whose label says that the answer is a bad one"),
        (ALPACA | {"kto_tag": 0}, "whose kto_tag says that the answer is a bad one"),
    ],
)
def test_a_row_without_a_good_answer_is_left_out(row, reason):
    assert reason_of(read_example, row, Tally()) == reason


def test_a_label_that_says_yes_and_that_of_a_text_change_nothing():
    for label in (True, 1, "True", "1"):
        tally = Tally()
        assert read_answered({"messages": HI, "label": label}, tally).turns == HI
        assert not tally.unused
    tally = Tally()
    assert read_answered({"text": "So.", "label": 0}, tally).turns == [user("So.")]
    assert tally.unused == {"label": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": ""},
        {"prompt": None, "id": 3},
        {"instruction": " ", "output": "x"},
        {"messages": [user(" "), assistant("x")]},
        {"text": "\n"},
        "",
    ],
    ids=str,
)
def test_an_empty_prompt_is_left_out(row):
    assert reason_of(read_prompt, row, Tally(), "auto") == "empty"


@pytest.mark.parametrize(
    "row",
    [
        pytest.param(
            {"instruction": None, "output": "x"},
        ),
        pytest.param(
            {"title": "q", "output": "x"},
        ),
        {"title": "q", "body": "x"},
    ],
    ids=str,
)
def test_a_row_that_asks_nothing_is_not_told_to_lack_an_answer(row):
    with pytest.raises((LeftOut, ValueError)) as told:
        read_example(row, Tally())
    assert "without an answer" not in str(told.value)


def test_a_row_whose_answers_are_all_marked_is_told_as_that():
    row = {"messages": [user("Hi"), assistant("Ho", weight=0)]}
    assert reason_of(read_example, row, Tally()) != "without an answer"


def test_a_call_of_a_function_as_openai_had_it_before_tools_is_not_left_away():
    call = {"role": "assistant", "content": None, "function_call": CALL["function"]}
    row = {"messages": [*HI, user("Time?"), call, user("So?"), assistant("Noon.")]}
    assert reason_of(read_example, row, Tally())


def test_a_text_that_is_none_is_left_out_as_one_that_is_empty():
    assert reason_of(read_example, {"text": None}, Tally()) == "without an answer"


def test_an_input_without_an_instruction_is_what_is_asked_by_all_scripts():
    """LLaMA-Factory's data have some: what is asked is in the input alone."""
    row = {"instruction": "", "input": "Hi", "output": "Ho"}
    assert plain_turns(read_answered(row, Tally()).turns) == HI
    assert read_prompt(row, Tally(), "auto")["prompt"] == "Hi"
    better, _ = pair_of({"instruction": "", "input": "Hi"}, [assistant("Ho")], [assistant("No")])
    assert plain_turns(better.turns) == HI


# ------------------------------------------------------------------- which field is taken
def test_of_several_questions_the_one_with_an_answer_is_taken():
    """UltraChat's rows have a prompt, which is the first message; others have a text of all."""
    row = {"prompt": "Hi", "prompt_id": "x", "messages": HI}
    tally = Tally()
    assert read_answered(row, tally).turns == HI
    assert tally.unused == {"prompt": 1, "prompt_id": 1}
    assert read_prompt(row, Tally(), "auto")["prompt"] == "Hi"
    row = {"text": "Below is … Hi … Ho", "instruction": "Hi", "input": "", "output": "Ho"}
    tally = Tally()
    assert read_answered(row, tally).turns == HI
    assert tally.unused == {"text": 1}


def test_a_field_that_prompt_field_names_stands_alone():
    row = {"title": "Hi", "instruction": "Add", "input": "1 2", "system": KIND}
    tally = Tally()
    wanted = [system(KIND), user("Hi")]
    assert read_prompt(row, tally, "title") == row | {"prompt": wanted}
    assert tally.unused == {"instruction": 1, "input": 1}
    with pytest.raises(ValueError, match="PROMPT_FIELD is body, and its fields are title, inst"):
        read_prompt(row, Tally(), "body")
    talk = {"talk": HI}
    assert read_prompt(talk, Tally(), "talk")["prompt"] == [user("Hi")]


# ------------------------------------------------------------- the files beside the repository
def test_alpaca_is_read_alike_by_all_scripts(shared):
    path = str(shared("data/alpaca_5000.json"))
    tasks, tally = read_seed_tasks(path)
    assert len(tasks) == 4998 and tally.reasons() == "2 without an answer"
    asked = {(task["instruction"], task["input"]) for task in tasks}
    examples = read_data(path, 0, 0, EXAMPLES).rows
    first = [row["turns"][0] for row in examples]
    assert {(turn["content"].strip(), turn.get("input", "")) for turn in first} == asked
    prompts = read_prompts([path], [], 0, "auto", 0)
    assert len(prompts.rows) + prompts.tally.left_out["given twice"] == 5000
    assert prompts.tally.unused == {"output": 4998}
    texts = {row["prompt"] for row in prompts.rows}
    assert len(texts - {prompt_text(turn) for turn in first}) == 2  # those without an answer


def test_prompts_of_others_are_read(shared):
    path = str(shared("data/kochatgpt_3_PPO.jsonl"))
    texts = [row["prompt"] for row in read_table(path)]
    prompts = read_prompts([path], [], 0, "auto", 0)
    assert {row["prompt"] for row in prompts.rows} == set(texts) - {""}
    assert prompts.tally.left_out["empty"] == texts.count("")
    with pytest.raises(SettingsError, match="row 1: it has nothing that answers its prompt"):
        read_data(path, 0, 0, EXAMPLES)


def test_conversations_with_two_answers_are_prompts_too(shared):
    path = str(shared("data/preferences_300.json"))
    rows = read_table(path)
    prompts = read_prompts([path], [], 0, "auto", 0)
    unused = dict(prompts.tally.unused)
    assert unused["chosen"] == unused["rejected"] == len(rows)
    said = {row["conversations"][-1]["value"] for row in rows}
    assert {row["prompt"][-1]["content"] for row in prompts.rows} == said


# ------------------------------------------------------------------- what is put together
@pytest.mark.parametrize(
    ("before", "answer", "whole"),
    [
        ("u:Hi", "a:Ho", "u:Hi a:Ho"),
        ("u:Hi", "u:Hi a:Ho", "u:Hi a:Ho"),
        ("s:Be u:Hi", "u:Hi a:Ho", "s:Be u:Hi a:Ho"),
        ("s:Be u:Hi", "s:Be u:Hi a:Ho", "s:Be u:Hi a:Ho"),
        ("u:Hi", "s:Be u:Hi a:Ho", "s:Be u:Hi a:Ho"),
        ("u:More", "u:Hi a:Ho u:More a:Yes", "u:Hi a:Ho u:More a:Yes"),  # it has all of it
        ("u:A a:B u:Hi", "u:Hi a:Ho", "u:A a:B u:Hi a:Ho"),  # it goes on from its end
        ("u:Hi a:Hi u:Hi", "u:Hi a:bye", "u:Hi a:Hi u:Hi a:bye"),
        ("u:Q", "u:Hi a:Ho", "u:Q u:Hi a:Ho"),
        ("u:Q a:call", "t:9 a:It is 9", "u:Q a:call t:9 a:It is 9"),
        ("s:Be u:Hi", "s:Other u:Hi a:Ho", "with two different system texts"),
        ("u:Hi a:It", "a:is", "whose prompt ends with an answer"),
    ],
)
def test_what_was_asked_already_is_not_asked_again(before, answer, whole):
    roles = {"u": "user", "a": "assistant", "s": "system", "t": "tool"}

    def said(text):
        parts = re.split(r" (?=[uast]:)", text)
        return [{"role": roles[part[0]], "content": part[2:]} for part in parts]

    if ":" in whole:
        assert put_together(said(before), said(answer)) == said(whole)
    else:
        assert reason_of(put_together, said(before), said(answer)) == whole


def test_of_many_fields_and_reasons_some_are_named_and_the_others_counted():
    tally = Tally()
    tally.unused.update({f"field {number}": 2 for number in range(300)})
    tally.left_out.update({f"with the unknown role {number}": 1 for number in range(300)})
    words = tally.in_words()
    assert len(words) < 1500
    assert "280 for other reasons" in words and words.endswith("280 more")
    tally = Tally()
    tally.unused.update({"x\ny\x1b[31m": 1, "": 1})
    assert tally.in_words() == "; fields not used: x… (1), a nameless one (1)"
