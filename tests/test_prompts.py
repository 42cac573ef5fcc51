"""Prompts as people have them: of texts and files, those held out, and in which order."""

import itertools
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import numpy
import pandas
import pytest
import torch

import train_rlhf
from finetune import measurement
from finetune.errors import SettingsError
from finetune.progress import count_steps
from finetune.prompts import batch_of_step, is_turn, last_said, read_prompts
from finetune.settings import fixed_settings
from train_rlhf import EVAL_PROMPTS

REMEDY = "give rows with prompt, messages, instruction, question or text, or set PROMPT_FIELD"
SYSTEM = {"role": "system", "content": "Be kind."}
USER = {"role": "user", "content": "Who are you?"}
SAID = {"role": "assistant", "content": "A model."}
TURNS = [SYSTEM, USER]
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


def read_all(*prompts, eval_prompts=(), share=0, field="auto", seed=0):
    """Return what prompts stand for.

    A share is held out in place of EVAL_PROMPTS; where these are [], nothing is.
    """
    if share and not eval_prompts:
        eval_prompts = EVAL_PROMPTS
    return read_prompts([*prompts], [*eval_prompts], share, field, seed)


def read(*prompts, **options):
    """Return the rows to train on, those held out, and how many were left out."""
    found = read_all(*prompts, **options)
    return found.rows, found.eval_rows, found.tally.left_out.total()


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


# ------------------------------------------------------------------ the fields
FIELDS = {"text": "T", "query": "Y", "question": "Q", "instruction": "I"}
FIELDS |= {"conversation": [USER], "conversations": TURNS, "messages": TURNS, "prompt": "P"}


@pytest.mark.parametrize("count", range(1, 9))
def test_the_field_of_the_prompt_is_the_first_of_those_that_are_usual(write, count):
    """prompt, else messages, …; the others stay fields, and are counted as not used."""
    row = dict([*FIELDS.items()][:count]) | {"x": 1}
    field = [*FIELDS][count - 1]
    found = read_all(write("p.jsonl", lines_of(row, row | {"x": 2})))
    assert found.rows[0] == row | {"prompt": FIELDS[field]}
    assert found.tally.unused == {name: 2 for name in row if name != field}


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
    told = "(row 1: PROMPT_FIELD is Anfrage, and its fields are prompt, text, Frage)"
    assert told in problem_of(path, field="Anfrage")
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


# -------------------------------------------------------------------- bad rows
@pytest.mark.parametrize(
    ("rows", "reason"),
    [
        ([{"prompt": "A"}, {"prompt": 5}], "row 2: its prompt is 5, no text"),
        ([{"prompt": {"text": "A"}}], "row 1: its prompt 1 has no role, but text"),
        ([{"prompt": ["A", "B"]}], "row 1: its prompt has A, no message"),
        ([{"messages": "Hi"}], "row 1: its messages is Hi, no list"),
        ([{"messages": [{"content": 4}]}], "row 1: its messages 1 has no role, but content"),
        ([{"messages": [{"role": "user"}]}], "row 1: its messages 1 has no content, but role"),
        ([{"messages": [USER | {"content": 4}]}], "row 1: its messages 1, content is 4, no text"),
        ([{"frage": "A", "x": 1}], "row 1: PROMPT_FIELD is auto, and its fields are frage, x"),
        ([{"instruction": "A", "input": 5}], "row 1: its input is 5, no text"),
        ([{"prompt": "A", "system": ["B"]}], "row 1: its system is ['B'], no text"),
        ([{"prompt": "A", "history": "B"}], "row 1: its history is B, no list"),
        ([{"prompt": "A", "history": [["B"]]}], "row 1: its history has ['B'], no pair of texts"),
        ([{"messages": [USER], "tools": 5}], "row 1: its tools is 5, no list"),
        ([{"prompt": "A"}, ["B"]], "row 2: it is ['B']: no text, and nothing with fields"),
        ("fine\nI\0", "row 2: its prompt is "),
    ],
)
def test_a_row_that_has_no_prompt_is_named(write, rows, reason):
    """With its field, and what is in it."""
    name = "p.txt" if isinstance(rows, str) else "p.jsonl"
    write(name, rows if isinstance(rows, str) else lines_of(*rows))
    problem = problem_of(name)
    assert problem.startswith(f"PROMPTS is {name}: it can't be used ({reason}")
    assert problem.endswith(f"): {REMEDY}")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": None}, "empty"),
        ({"prompt": []}, "empty"),
        ({"messages": []}, "empty"),
        ({"messages": None, "x": 1}, "empty"),
        ({"instruction": " ", "output": "A"}, "empty"),
        ({"messages": [USER | {"content": " "}]}, "empty"),
        ({"messages": [USER | {"role": "Narrator"}]}, "with the unknown role narrator"),
        ({"text": "A", "system": "B"}, "with system, which does not go with text"),
        ({"text": "A", "context": "B"}, "with context, which does not go with text"),
        ({"prompt": "A", "tools": [{"name": "f"}]}, "with tools, which does not go with prompt"),
        ({"messages": [USER], "input": "B"}, "with input, which does not go with messages"),
        ({"prompt": "A", "input": "B", "context": "C"}, "with both input and context"),
        ({"messages": TURNS, "system": "Be bad."}, "with two different system texts"),
        (
            {"messages": [USER | {"content": [{"type": "image", "url": "a"}]}]},
            "with something else than text in a message",
        ),
        pytest.param(
            {"messages": [SAID]},
            "without a question",
        ),
    ],
)
def test_a_row_is_left_out_for_its_true_reason(write, row, reason):
    """It is counted among others, and told where it is alone."""
    rows = [row, {"prompt": "fine"}, row]
    found = read_all(write("p.jsonl", lines_of(*rows)))
    assert texts_of(found.rows) == ["fine"]
    assert found.tally.in_words(with_fields=False) == f"; left out: 2 {reason}"
    problem = problem_of(write("q.jsonl", lines_of(row)))
    assert (
        problem == f"PROMPTS is q.jsonl: it can't be used (it has no prompts: 1 {reason}): {REMEDY}"
    )


def test_why_a_file_has_no_prompts_is_told_of_this_file_alone(write):
    write("p.jsonl", lines_of({"prompt": "A"}, {"prompt": ""}, {"text": "A", "system": "B"}))
    problem = problem_of("p.jsonl", write("q.jsonl", lines_of({"prompt": " "})))
    assert "(it has no prompts: 1 empty): " in problem


# ------------------------------------------- what changes what is asked, and what is not used
@pytest.mark.parametrize(
    ("row", "prompt"),
    [
        ({"instruction": "Add.", "context": "1 + 1"}, "Add.\n1 + 1"),
        ({"prompt": "Who?", "system": "Be kind."}, [SYSTEM, USER | {"content": "Who?"}]),
        ({"question": "Who?", "system_prompt": "Be kind."}, [SYSTEM, USER | {"content": "Who?"}]),
        ({"messages": [USER], "system": "Be kind."}, TURNS),
        ({"messages": TURNS, "system": "Be kind."}, TURNS),
        (
            {"instruction": "Add.", "input": "2", "history": [["Who are you?", "A model."]]},
            [USER, SAID, USER | {"content": "Add.\n2"}],
        ),
        (
            {"conversations": [{"from": "HUMAN", "value": "Who are you?"}]},
            [USER],
        ),
        ({"instruction": "Sing.", "input": "<noinput>", "system": ""}, "Sing."),
    ],
)
def test_what_changes_what_is_asked_is_in_the_prompt(write, row, prompt):
    found = read_all(write("p.jsonl", lines_of(row)))
    assert [found.rows[0]["prompt"]] == texts_of(found.rows) == [prompt]
    assert found.tally.unused == {}


def test_fields_that_are_not_used_are_counted_and_handed_on(write):
    """An answer is one of them; where a reward function gets all fields they are not told."""
    rows = [{"prompt": text, "completion": "x", "id": id} for text, id in (("A", 1), ("B", 2))]
    found = read_all(write("p.jsonl", lines_of(*rows, {"prompt": "C", "id": ""})))
    assert [row["id"] for row in found.rows] == [1, 2, ""]
    assert found.tally.in_words() == "; fields not used: completion (2), id (2)"
    assert found.tally.in_words(with_fields=False) == ""


def test_tools_are_handed_on_as_a_list(write):
    tools = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
    row = {"messages": [USER], "tools": json.dumps(tools)}
    (found,) = read_all(write("p.jsonl", lines_of(row))).rows
    assert (found["prompt"], found["tools"]) == ([USER], tools)


def test_what_is_said_last_and_what_goes_through_the_template():
    assert last_said("Hi") == "Hi" and last_said(TURNS) == "Who are you?"
    assert [is_turn("Hi", False), is_turn("Hi", True), is_turn(TURNS, False)] == [False, True, True]


# ------------------------------------------------------------ what is held out
@pytest.fixture
def numbers(write):
    return write("p.txt", "\n".join(NUMBERS))


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
    scorer = SimpleNamespace(text_before=str, meaning=None)
    policy = SimpleNamespace(pretrained_model=model, head=SimpleNamespace(layer=True))
    measurement.announce(policy, settings, found, [], scorer)
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
    line += ", in place of EVAL_PROMPTS; left out: 1 given twice, 2 too long"
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
    inputs = [re.sub(r"^\W*no\W*input\W*$", "", row["input"], flags=re.I) for row in given]
    prompts = [f"{row['instruction']}\n{text}".rstrip("\n") for row, text in zip(given, inputs)]
    assert texts_of(rows) == [*dict.fromkeys(prompts)]
    assert left_out == 5000 - len(rows) == len(prompts) - len({*prompts})
    assert rows[0]["output"] == given[0]["output"]
    told = ', 56 inputs that say "noinput"; fields not used: output (4,998)'
    assert read_all(path).tally.in_words() == told


def test_the_conversations_of_three_hundred_preferences(shared):
    """Five are there twice; of each the answers, chosen and rejected, are not in the prompt."""
    path = str(shared("data/preferences_300.json"))
    given = json.loads(Path(path).read_text(encoding="utf-8"))
    found = read_all(path)
    said = [[turn["value"] for turn in row["conversations"]] for row in given]
    prompts = [[turn["content"] for turn in prompt] for prompt in texts_of(found.rows)]
    assert prompts == [list(texts) for texts in dict.fromkeys(map(tuple, said))]
    assert {prompt[-1]["role"] for prompt in texts_of(found.rows)} == {"user"}
    told = "; left out: 5 given twice; fields not used: chosen (300), rejected (300)"
    assert found.tally.in_words() == told


def test_files_whose_names_do_not_tell_what_is_in_them_are_not_read_as_text(shared):
    for path in sorted(shared("data/sentiment").iterdir()):
        assert "(its ending does not tell what is in it: give it one of .json" in problem_of(
            str(path)
        )
