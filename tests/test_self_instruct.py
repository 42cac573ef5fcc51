"""Self-Instruct: prompts, what is taken of the answers to them, what is dropped; the seed tasks."""

import json
import unicodedata
from types import SimpleNamespace

import pytest

import make_instructions
from finetune.errors import SettingsError
from finetune.seed_tasks import read_seed_tasks
from finetune.self_instruct import (
    draw_examples,
    fault_of,
    instance_prompt,
    judge,
    kind_prompt,
    list_prompt,
    parse_instances,
    parse_list,
)

TASKS = read_seed_tasks("auto").tasks


def writer_of(context=400):
    """Return what knows how many words fit beside an answer of a hundred."""
    return SimpleNamespace(fits=lambda prompt: len(prompt.split()) + 100 <= context)


# ----------------------------------------------------------- the parsing
@pytest.mark.parametrize(
    ("answer", "ended", "found"),
    [
        (" One thing\n10. Another\n11. A third", True, ["One thing", "Another", "A third"]),
        (" One thing\n 10) Another\n11. A thi", False, ["One thing", "Another", "-A thi"]),
        (" Over\ntwo  lines\n2. Next", True, ["Over two lines", "Next"]),
        (" One\n2.\n3. Three", True, ["One", "Three"]),
        (" One\n2. Two\n\nI hope that helps, and", False, ["One", "Two"]),
        (" Take this:\n2.5 hours\n2. Two", True, ["Take this: 2.5 hours", "Two"]),
        (" 시를 쓰세요\n2. 계절을 설명하세요", True, ["시를 쓰세요", "계절을 설명하세요"]),
        (" ", True, []),
        ("", False, []),
    ],
)
def test_a_numbered_list_is_taken_apart_and_what_was_cut_is_known(answer, ended, found):
    parsed = parse_list(answer, ended)
    assert [text if whole else f"-{text}" for text, whole in parsed] == found


@pytest.mark.parametrize(
    ("answer", "ended", "kind", "found"),
    [
        (" a\nOutput: b\n", True, False, [("a", "b", True)]),
        (" a\nOutput: b\n", False, False, [("a", "b", False)]),
        (
            " a\nOutput: b\nInput: c\nOutput: d",
            False,
            False,
            [("a", "b", True), ("c", "d", False)],
        ),
        (" a\nOutput: b\nInput: c", True, False, [("a", "b", True), ("c", "", False)]),
        (" none\nOutput: b\nmore\n", True, False, [("", "b\nmore", True)]),
        (" None.\nOutput: b", True, False, [("", "b", True)]),
        (
            " yes\nInput: a\nOutput: no\nInput: b",
            True,
            True,
            [("a", "yes", True), ("b", "no", True)],
        ),
        (" words alone", True, False, [("words alone", "", False)]),
        (" a\nInput: b\nOutput: c", True, False, [("b", "", False)]),
        (" 봄\nOutput: 따뜻하다", True, False, [("봄", "따뜻하다", True)]),
    ],
)
def test_instances_are_taken_apart_and_what_was_cut_is_known(answer, ended, kind, found):
    parsed = parse_instances(answer, ended, kind)
    rows = [(row["input"], row["output"], row["whole"]) for row in parsed]
    assert rows == found


def test_what_a_prompt_shows_can_be_parsed_again():
    tasks = [task | {"is_classification": False} for task in TASKS]
    shown = list_prompt([task["instruction"] for task in tasks])
    shown_list = shown.partition("\n1.")[2].rpartition("\n")[0]
    texts = [text for text, _ in parse_list(shown_list, True)]
    assert texts == [task["instruction"] for task in TASKS]
    for kind in (True, False):
        prompt = instance_prompt("New", kind, tasks[:1])
        first = prompt.split("\n\n")[1].partition("put:")[2]
        (found,) = parse_instances(first, True, kind)
        assert found["input"] == TASKS[0]["input"]
        assert found["output"] == TASKS[0]["output"]
    assert kind_prompt("New", tasks[:1]).count("Labels: no") == 1


# --------------------------------------------------------- the filtering
KNOWN = ["Explain why leaves turn red in autumn.", "쉬운 말로 계절이 바뀌는 이유를 설명하세요."]
LIMITS = SimpleNamespace(
    min_words=4,
    max_words=12,
    rouge_limit=0.7,
    unanswerable=["map", "draw", "그림"],
)


def find_fault(text, whole=True, writer=None):
    """Return why an instruction is dropped beside those that are known."""
    return fault_of(text, whole, KNOWN, writer or writer_of(), LIMITS)


@pytest.mark.parametrize(
    ("instruction", "fault"),
    [
        ("Tell how bread is made at home.", None),
        ("Tell how bread.", "too short"),
        ("Tell about good bread", None),
        ("word " * 12 + "of", "too long"),
        ("Tell how " + "bread " * 10, None),
        ("- Tell how bread is made", "begins with punctuation"),
        ("<b>Tell how bread is made", "begins with punctuation"),
        ("Draw the house where you live", "needs more than text"),
        ("Say what the MAP shows us", "needs more than text"),
        ("Say what the mapping shows us", None),
        ("Explain why leaves turn red in autumn.", "similar to another"),
        ("explain WHY leaves turn yellow in autumn", "similar to another"),
        ("Explain why rivers turn cold every winter.", None),
        ("봄에 심을 꽃을 세 가지 고르세요.", None),
        ("쉬운 말로 계절이 바뀌는 까닭을 설명하세요", "similar to another"),
        (unicodedata.normalize("NFD", KNOWN[1]), "similar to another"),
        ("이 그림 속의 사람을 설명하세요", "needs more than text"),
        ("시를 쓰세요", "too short"),
        ("写一首关于秋天的诗", None),
    ],
)
def test_an_instruction_is_dropped_for_a_reason(instruction, fault):
    assert find_fault(instruction) == fault


def test_an_instruction_that_was_cut_or_leaves_no_room_is_dropped():
    assert find_fault("Tell how bread is made at", whole=False) == "unfinished"
    assert find_fault("Tell how bread is made", writer=writer_of(104)) == "too long"


def test_an_instance_is_dropped_for_a_reason():
    def instance(text, output, whole=True):
        return {"input": text, "output": output, "whole": whole}

    given = [
        (instance("a", "b"), None),
        (instance("a", "b"), "written twice"),
        (instance("c", ""), "empty output"),
        (instance("Same", "same"), "output equals input"),
        (instance("d", "one"), "same input, another output"),
        (instance("d", "two"), "same input, another output"),
        (instance("e", "cut", False), "unfinished"),
        (instance("a", "cu", False), "unfinished"),  # which says nothing against the first
        (instance("", "free"), None),
        (instance("", "other"), None),  # without an input there may be many answers
    ]
    judged = judge([row for row, _ in given])
    assert [row["dropped"] for row in judged] == [fault for _, fault in given]


# ---------------------------------------------------------- the examples
def test_a_quarter_of_the_examples_are_the_models_own():
    seeds, own = [f"seed {n}" for n in range(12)], [f"own {n}" for n in range(9)]
    drawn = draw_examples(seeds, own, 8, (0, 3))
    assert len(set(drawn)) == 8 and len({*drawn} & {*own}) == 2
    again, another = (draw_examples(seeds, own, 8, (0, key)) for key in (3, 4))
    assert again == drawn != another
    assert {*draw_examples(seeds, [], 8, (0, 1))} <= {*seeds}
    few = draw_examples(seeds[:2], own[:1], 8, (0, 1))
    assert sorted(few) == ["own 0", "seed 0", "seed 1"]


# -------------------------------------------------------- the seed tasks
GOOD = {"instruction": "Add the numbers.", "input": "1 2", "output": "3"}


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ([1], "row 2: it is [1]: no text, and nothing with fields"),
        ({"title": "3"}, "row 2: it has nothing that asks: its fields are title"),
        ({"instruction": "Add."}, "row 2: it has nothing that answers its instruction: its fields"),
        pytest.param(
            GOOD | {"output": 3},
            "row 2: its output is 3, no text",
        ),
        (GOOD | {"input": [1]}, "row 2: its input is [1], no text"),
        (
            GOOD | {"is_classification": "no"},
            "row 2: its is_classification is no: give 0 or 1, false or true",
        ),
        (GOOD | {"output": "\ud800"}, "row 2: its output is '\\ud800', no text"),
        ({"instruction": "Add.", "instances": "x"}, "row 2: its instances is x, no list"),
        pytest.param(
            {"instruction": "Add.", "instances": [3]},
            "row 2: its instances",
        ),
    ],
)
def test_a_bad_seed_task_is_named(tmp_path, row, problem):
    path = write_lines(tmp_path / "tasks.jsonl", [GOOD, row])
    with pytest.raises(SettingsError) as told:
        read_seed_tasks(path)
    assert str(told.value).startswith("SEED_TASKS is ") and problem in str(told.value)
    remedy = "give rows with instruction, input and output, or with instances of these"
    assert str(told.value).endswith(f": {remedy}")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (GOOD | {"output": " "}, "1 without an answer"),
        (GOOD | {"output": None}, "1 without an answer"),
        (GOOD | {"instruction": " ", "input": ""}, "1 without a question"),
        ({"text": "Add."}, "1 that are no instruction with an answer"),
        (GOOD | {"history": [["a", "b"]]}, "1 that are no instruction with an answer"),
        (GOOD | {"system": "Be kind."}, "1 that are no instruction with an answer"),
    ],
)
def test_a_row_that_is_no_task_is_left_out_and_counted(tmp_path, row, reason):
    path = write_lines(tmp_path / "tasks.jsonl", [GOOD, row])
    tasks, tally = read_seed_tasks(path)
    assert tasks == [GOOD | {"is_classification": False}]
    assert tally.reasons() == reason
    alone = write_lines(tmp_path / "alone.jsonl", [row])
    with pytest.raises(SettingsError, match=rf"it has no tasks: {reason}"):
        read_seed_tasks(alone)


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("none.jsonl", "No such file"),
        ("tasks.yaml", "its ending does not tell what is in it"),
        ("tasks.jsonl", "it has no tasks"),
        ("tasks.txt", "it has no tasks: 1 that are no instruction with an answer"),
    ],
)
def test_a_file_that_has_no_seed_tasks(tmp_path, name, problem):
    (tmp_path / "tasks.yaml").write_text(json.dumps(GOOD))
    (tmp_path / "tasks.jsonl").touch()
    (tmp_path / "tasks.txt").write_text("Add the numbers.")
    with pytest.raises(SettingsError, match=f"^SEED_TASKS is .*{problem}"):
        read_seed_tasks(str(tmp_path / name))


def test_input_and_class_of_a_seed_task_may_lack(tmp_path):
    row = {"instruction": " Say it.\n", "output": "It. ", "input": None}
    task = {"instruction": "Say it.", "input": "", "output": "It.", "is_classification": False}
    assert read_seed_tasks(write_lines(tmp_path / "t.jsonl", [row])).tasks == [task]


@pytest.mark.parametrize("mark", [True, 1, "True", "1"])
def test_the_class_of_a_seed_task_may_be_a_text(tmp_path, mark):
    rows = [GOOD | {"is_classification": mark}, GOOD | {"is_classification": False}]
    tasks = read_seed_tasks(write_lines(tmp_path / "tasks.jsonl", rows)).tasks
    assert [task["is_classification"] for task in tasks] == [True, False]


def test_seed_tasks_with_instances_show_the_first_of_them(tmp_path):
    instances = [{"input": "1 2", "output": "3"}, {"input": "4 5", "output": "9"}]
    given = {"id": "seed_task_0", "name": "add", "instruction": "Add the numbers."}
    rows = [
        given | {"instances": shown, "is_classification": False}
        for shown in (
            instances,
            instances[:1],
            [{"input": "", "output": "none"}],
            json.dumps(instances),
        )
    ]
    tasks, tally = read_seed_tasks(write_lines(tmp_path / "tasks.jsonl", rows))
    task = GOOD | {"is_classification": False}
    assert tasks == [task, task, task | {"input": "", "output": "none"}, task]
    assert tally.changed == {"instances after the first": 2}
    assert tally.unused == {"id": 4, "name": 4}


def test_the_seed_tasks_are_twelve_of_which_four_are_classification():
    assert len({task["instruction"] for task in TASKS}) == 12
    assert sum(task["is_classification"] for task in TASKS) == 4
    # They pass the filters beside one another.
    names = ("min_words", "max_words", "rouge_limit", "unanswerable")
    limits = {name: getattr(make_instructions, name.upper()) for name in names}
    settings = SimpleNamespace(**limits)
    for task in TASKS:
        others = [other["instruction"] for other in TASKS if other is not task]
        fault = fault_of(task["instruction"], True, others, writer_of(), settings)
        assert fault is None
