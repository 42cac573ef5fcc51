"""Instructions that a model writes: what is parsed, kept and dropped, written down and gone on with."""

import ast
import json
import os
import re
import signal
import subprocess
import sys
import unicodedata
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import make_instructions
from make_instructions import (
    RULES,
    TASKS,
    Writer,
    draw_examples,
    fault_of,
    instance_prompt,
    judge,
    kind_prompt,
    list_prompt,
    parse_instances,
    parse_list,
    tally,
)

SUBJECTS = ["a river", "two old friends", "the price of bread", "winter mornings", "a lost key"]
VERBS = ["Describe", "Compare", "Rank", "Question", "Translate"]


class FakeWriter(Writer):
    """A writer without a model: what it writes hangs on the prompt and on torch's random numbers."""

    def __init__(self, settings, device, dtype):
        self.tokenizer = lambda text: {"input_ids": text.split()}
        self.context, self.new_tokens = 400, 100

    def write(self, prompts, stop, new_tokens=None, **sampling):
        return [self.answer(prompt, stop) for prompt in prompts]

    def answer(self, prompt, stop):
        drawn = [int(number) for number in torch.randint(5, (8,))]
        if prompt.endswith("Labels:"):
            return (" yes" if drawn[0] == 0 else " no", True)
        if stop == "\nTask:":
            output = SUBJECTS[drawn[0]] if drawn[1] else ""
            return (f" {SUBJECTS[drawn[2]]}\nOutput: {output}\nInput: cut", bool(drawn[3]))
        place = int(re.findall(r"(\d+)\.$", prompt)[0])
        texts = [f"{VERBS[n]} {SUBJECTS[m]} for us" for n, m in zip(drawn[:4], drawn[4:])]
        texts += ["Draw a map of it", "쉬운 말로 계절을 설명하세요"]
        lines = [f"{n}. {text}" for n, text in enumerate(texts, start=place)]
        return ("\n".join(lines).removeprefix(f"{place}."), False)


@pytest.fixture
def run_main(monkeypatch, tmp_path, demo_model):
    """Run in a fresh folder with demo_model; return the exit status."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    given = ["--model-name", str(demo_model), "--device", "cpu"]
    return lambda *flags: make_instructions.main([*given, *map(str, flags)])


@pytest.fixture
def run_fake(run_main, monkeypatch):
    """Do the same with the writer that has no model, six requests long."""
    monkeypatch.setattr(make_instructions, "Writer", FakeWriter)
    return lambda *flags: run_main("--requests", "6", *flags)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "instructions"


def lines_of(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


def files_of(folder):
    return {name: (folder / name).read_bytes() for name in ("answers.jsonl", "instructions.jsonl")}


def all_of(folder):
    """Return the content of all files in a folder, by path."""
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# ------------------------------------------------------------------------------------- parsing
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
        (" a\nOutput: b\nInput: c\nOutput: d", False, False, [("a", "b", True), ("c", "d", False)]),
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
    assert [(each["input"], each["output"], each["whole"]) for each in parsed] == found


def test_what_a_prompt_shows_can_be_parsed_again():
    tasks = [task | {"is_classification": False} for task in TASKS]
    shown = list_prompt([task["instruction"] for task in tasks])
    texts = [text for text, _ in parse_list(shown.partition("\n1.")[2].rpartition("\n")[0], True)]
    assert texts == [task["instruction"] for task in TASKS]
    for kind in (True, False):
        prompt = instance_prompt("New", kind, tasks[:1])
        first = prompt.split("\n\n")[1].partition("put:")[2]
        (found,) = parse_instances(first, True, kind)
        assert (found["input"], found["output"]) == (TASKS[0]["input"], TASKS[0]["output"])
    assert kind_prompt("New", tasks[:1]).count("Labels: no") == 1


# ----------------------------------------------------------------------------------- filtering
KNOWN = ["Explain why leaves turn red in autumn.", "쉬운 말로 계절이 바뀌는 이유를 설명하세요."]


@pytest.fixture
def find_fault():
    """Return why an instruction is dropped beside those that are known."""
    names = {"min_words": 4, "max_words": 12, "rouge_limit": 0.7}
    settings = SimpleNamespace(**names, unanswerable=["map", "draw", "그림"])
    writer = FakeWriter(settings, None, None)
    return lambda text, whole=True: fault_of(text, whole, KNOWN, writer, settings)


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
def test_an_instruction_is_dropped_for_a_reason(find_fault, instruction, fault):
    assert find_fault(instruction) == fault


def test_an_instruction_that_was_cut_or_leaves_no_room_is_dropped(find_fault):
    assert find_fault("Tell how bread is made at", whole=False) == "unfinished"
    writer = FakeWriter(None, None, None)
    writer.context = 104
    settings = SimpleNamespace(min_words=1, max_words=99, rouge_limit=0.7, unanswerable=[])
    assert fault_of("Tell how bread is made", True, [], writer, settings) == "too long"


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
    judged = judge([each for each, _ in given])
    assert [each["dropped"] for each in judged] == [fault for _, fault in given]


def test_a_quarter_of_the_examples_are_the_models_own():
    seeds, own = [f"seed {n}" for n in range(12)], [f"own {n}" for n in range(9)]
    drawn = draw_examples(seeds, own, 8, (0, 3))
    assert len(set(drawn)) == 8 and len({*drawn} & {*own}) == 2
    assert draw_examples(seeds, own, 8, (0, 3)) == drawn != draw_examples(seeds, own, 8, (0, 4))
    assert {*draw_examples(seeds, [], 8, (0, 1))} <= {*seeds}
    assert sorted(draw_examples(seeds[:2], own[:1], 8, (0, 1))) == ["own 0", "seed 0", "seed 1"]


def test_as_many_examples_are_shown_as_fit():
    writer = FakeWriter(None, None, None)
    examples = ["five words are in here"] * 100
    prompt, count = writer.fill(list_prompt, examples)
    assert 40 < count < 60 and writer.fits(prompt)
    assert not writer.fits(list_prompt(examples[: count + 1]))
    writer.context = 0
    assert writer.fill(list_prompt, examples)[1] == 0


# --------------------------------------------------------------------------------- bookkeeping
def test_the_yield_adds_up(run_fake, folder, capsys):
    assert run_fake() == 0
    first, *records = lines_of(folder / "answers.jsonl")
    rows = lines_of(folder / "instructions.jsonl")
    report = json.loads((folder / "report.json").read_text())
    assert first["seed_tasks"][0]["instruction"] == TASKS[0]["instruction"]
    assert [record["request"] for record in records] == [1, 2, 3, 4, 5, 6]
    counts = report["yield"]
    assert counts == tally(records) and counts["requests"] == 6
    for name in ("instructions", "instances"):
        part = counts[name]
        assert part["written"] == part["kept"] + sum(part["dropped"].values()) > part["kept"] > 0
    candidates = [each for record in records for each in record["candidates"]]
    assert counts["instructions"]["written"] == len(candidates) == 36
    assert counts["instructions"]["dropped"]["needs more than text"] == 6
    assert counts["instructions"]["dropped"]["unfinished"] == 6
    assert counts["instructions"]["dropped"]["similar to another"] > 0
    assert counts["instances"]["kept"] == len(rows)
    assert all([*row] == ["instruction", "input", "output"] for row in rows)
    shown = Counter(row["instruction"] for row in rows)
    assert len(shown) == counts["instructions"]["kept"]
    screen = capsys.readouterr().out
    assert f"instances kept: {len(rows)} of {counts['instances']['written']}; dropped: " in screen
    path = os.path.join("instructions", "instructions.jsonl")
    assert screen.endswith(f"python train_sft.py --data {path}\n")
    assert report["settings"]["requests"] == report["requests_in_these_seconds"] == 6
    assert report["versions"].keys() == {"torch", "transformers", "rouge_score"}


def test_what_was_written_is_shown_and_labelled_and_not_written_again(
    run_fake, folder, monkeypatch
):
    asked, own = [], "Say if the river is deep or shallow"
    likewise = "Say if the river was deep or shallow"

    def answer(self, prompt, stop):
        asked.append(prompt)
        if prompt.endswith("Labels:"):
            return (" Yes.", True)
        if stop == "\nTask:":
            return (" deep\nInput: ten metres", True)
        return (f" {own}\n9. {likewise}\n10. Name three birds of the sea", True)

    monkeypatch.setattr(FakeWriter, "answer", answer)
    assert run_fake("--requests", "2") == 0
    _, *records = lines_of(folder / "answers.jsonl")
    faults = [[each["dropped"] for each in record["candidates"]] for record in records]
    again = "similar to another"
    assert faults == [[None, again, None], [again, again, again]]
    first, kind, _, instances, _, second = asked
    assert own not in first and own in second and second.endswith("\n9.")
    assert kind.count("Labels: yes") == 4 and kind.count("Labels: no") == 8
    assert instances.endswith(f"Task: {own}\nOutput:")  # the label first
    assert instances.count("\nOutput: ") == 4  # of the other tasks there is none
    row = {"instruction": own, "input": "ten metres", "output": "deep"}
    assert lines_of(folder / "instructions.jsonl")[0] == row


def test_a_task_that_is_not_classification_has_its_input_first(run_fake, folder, monkeypatch):
    asked = []

    def answer(self, prompt, stop):
        asked.append(prompt)
        return (" Name three birds of the sea" if prompt.endswith("9.") else " no", True)

    monkeypatch.setattr(FakeWriter, "answer", answer)
    assert run_fake("--requests", "1") == 0
    assert asked[2].endswith("Task: Name three birds of the sea\nInput:")
    assert asked[2].count("\nInput: ") == 8


def test_an_earlier_run_is_moved_aside(run_fake, folder, tmp_path):
    assert run_fake() == 0
    before = files_of(folder)
    assert run_fake("--seed", "1") == 0
    assert files_of(tmp_path / "instructions-1") == before != files_of(folder)


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(run_fake, folder):
    assert run_fake() == 0
    files = files_of(folder)
    lines = files["answers.jsonl"].splitlines(keepends=True)
    for count in range(1, len(lines) + 1):
        torn = lines[count][: len(lines[count]) // 2] if count < len(lines) else b""
        for rest in {b"", torn, torn[:1]}:
            (folder / "report.json").unlink(missing_ok=True)
            (folder / "answers.jsonl").write_bytes(b"".join(lines[:count]) + rest)
            (folder / "instructions.jsonl").write_bytes(files["instructions.jsonl"][: 50 * count])
            assert run_fake("--resume") == 0
            assert files_of(folder) == files
            report = json.loads((folder / "report.json").read_text())
            assert report["requests_in_these_seconds"] == len(lines) - count


def test_more_requests_go_on_where_fewer_ended(run_fake, folder):
    assert run_fake() == 0
    files = files_of(folder)
    assert run_fake("--requests", "4") == 0
    assert files_of(folder) != files
    assert run_fake("--resume") == 0
    assert files_of(folder) == files


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_request_and_the_run_can_go_on(
    run_fake, folder, monkeypatch, capsys, number
):
    assert run_fake() == 0
    files = files_of(folder)
    answer_request = make_instructions.answer_request

    def stopped(request, *arguments):
        if request == 3:
            os.kill(os.getpid(), number)
        return answer_request(request, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(make_instructions, "answer_request", stopped)
        assert run_fake() == 128 + number
    assert len(lines_of(folder / "answers.jsonl")) == 1 + 3
    told = "the answers to 3 requests are saved. To go on, run the same line with --resume\n"
    assert capsys.readouterr().err.endswith(told)
    assert run_fake("--resume") == 0
    assert files_of(folder) == files


def test_too_little_memory_names_the_settings_of_this_script(run_fake, folder, monkeypatch, capsys):
    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr(make_instructions, "answer_request", fail)
    assert run_fake() == 1
    told = capsys.readouterr().err
    assert "there is too little memory: lower BATCH_SIZE (it is 8)" in told
    assert told.endswith("there was nothing to save yet\n")
    assert "EVAL" not in told and "MINI" not in told


def test_a_report_that_can_not_be_written_costs_no_answer(run_fake, folder, monkeypatch, capsys):
    def fail(report):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(make_instructions, "summarize", fail)
        assert run_fake() == 1
    told = capsys.readouterr().err
    assert "can't be written (No space left on device): make room in OUTPUT_DIR" in told
    assert told.endswith(
        "; the answers to 6 requests are saved. To go on, run the same line with --resume\n"
    )
    files = files_of(folder)
    assert run_fake("--resume") == 0
    assert files_of(folder) == files


CHANGES = {
    "EXAMPLES": 4, "MAX_NEW_TOKENS": 7, "MIN_WORDS": 2, "MAX_WORDS": 30, "SEED": 5, "DTYPE": "bfloat16",
    "TEMPERATURE": 0.9, "TOP_P": 0.25, "ROUGE_LIMIT": 0.4, "UNANSWERABLE": "map",
    "QUANTIZATION": "8bit", "MODEL_NAME": "another",
}  # fmt: skip


def test_what_would_change_the_rest_is_refused(run_fake, folder, capsys):
    assert run_fake() == 0
    capsys.readouterr()
    before = all_of(folder)
    lasting = {name for *_, free, names in RULES for name in names.split() if not free}
    assert lasting == {*CHANGES}
    for name, value in CHANGES.items():
        flag = "--" + name.lower().replace("_", "-")
        assert run_fake("--resume", flag, value) == 2
        first, told = capsys.readouterr().err.strip().split("\n")
        assert first == "Nothing was started or changed:"
        shown = "['map']" if name == "UNANSWERABLE" else value
        assert told.startswith(f"- {name} is {shown}, but was ")
        assert told.endswith(": give that or start anew")
        assert all_of(folder) == before
    assert run_fake("--resume", "--requests", "5") == 2
    assert "REQUESTS is 5, but 6 are done: give at least that" in capsys.readouterr().err
    assert all_of(folder) == before


def test_other_seed_tasks_are_refused_wherever_they_stand(run_fake, folder, tmp_path, capsys):
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(TASKS[:4]))
    assert run_fake("--seed-tasks", path) == 0
    files = files_of(folder)
    path = path.rename(tmp_path / "moved.json")
    assert run_fake("--seed-tasks", path, "--resume") == 0
    path.write_text(json.dumps(TASKS[:3]))
    assert run_fake("--seed-tasks", "moved.json", "--resume") == 2
    told = capsys.readouterr().err
    assert "SEED_TASKS is moved.json, whose tasks are not those so far: give those or" in told
    assert files_of(folder) == files


@pytest.mark.parametrize("content", [None, b"", b'{"settings": {', b"{}\n", b"none\n"])
def test_there_is_nothing_to_go_on_from(run_fake, folder, capsys, content):
    if content is not None:
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "answers.jsonl").write_bytes(content)
    assert run_fake("--resume") == 2
    told = capsys.readouterr().err
    assert "- RESUME is True: it can't be used (" in told
    assert told.endswith("): start without it\n")
    assert folder.exists() is (content is not None)


# ----------------------------------------------------------------------------------- seed tasks
GOOD = '{"instruction": "Add the numbers.", "input": "1 2", "output": "3"}\n'


@pytest.mark.parametrize(
    ("name", "content", "problem"),
    [
        ("tasks.jsonl", None, "No such file"),
        ("tasks.yaml", GOOD, "it is a file of another kind"),
        ("tasks.jsonl", "", "it has no tasks"),
        ("tasks.jsonl", GOOD + "{broken\n", "line 2"),
        ("tasks.jsonl", GOOD + "[1]\n", "row 2 is [1], not in braces"),
        ("tasks.txt", "Add the numbers.\n", "row 1 is Add the numbers., not in braces"),
        ("tasks.jsonl", GOOD + '{"output": "3"}\n', "row 2: its instruction is empty, not a text"),
        ("tasks.jsonl", GOOD + '{"instruction": "Add."}', "row 2: its output is empty, not a text"),
        ("tasks.jsonl", GOOD.replace('"3"', "3"), "row 1: its output is 3, not a text"),
        ("tasks.jsonl", GOOD.replace('"3"', '" "'), "row 1: its output is empty, not a text"),
        ("tasks.jsonl", GOOD.replace('"1 2"', "[1]"), "row 1: its input is [1], not a text"),
        (
            "tasks.jsonl",
            GOOD.replace("}", ', "is_classification": "no"}'),
            "row 1: its is_classification is no, not true or false",
        ),
        ("tasks.jsonl", GOOD.replace("3", "\\ud800"), "surrogates not allowed"),
    ],
)
def test_bad_seed_tasks_are_told_and_nothing_is_made(
    run_main, tmp_path, capsys, name, content, problem
):
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    before = all_of(tmp_path)
    assert run_main("--seed-tasks", path) == 2
    first, told = capsys.readouterr().err.strip().split("\n")
    assert first == "Nothing was started or changed:"
    assert told.startswith("- SEED_TASKS is ") and problem in told
    assert told.endswith(
        ": give a .jsonl or .json file, its rows with instruction, input and output"
    )
    assert all_of(tmp_path) == before and not (tmp_path / "instructions").exists()


def test_input_and_class_of_a_seed_task_may_lack(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_text('{"instruction": "Say it.", "output": "It.", "input": null}\n')
    expected = {"instruction": "Say it.", "input": "", "output": "It.", "is_classification": False}
    assert make_instructions.read_seed_tasks(str(path)) == [expected]


def test_the_seed_tasks_are_twelve_of_which_four_are_classification():
    tasks = make_instructions.read_seed_tasks("auto")
    assert len({task["instruction"] for task in tasks}) == 12
    assert sum(task["is_classification"] for task in tasks) == 4
    settings = SimpleNamespace(
        **{
            name: getattr(make_instructions, name.upper())
            for name in ("min_words", "max_words", "rouge_limit", "unanswerable")
        }
    )
    for task in tasks:  # they pass the filters beside one another
        others = [each["instruction"] for each in tasks if each is not task]
        writer = FakeWriter(settings, None, None)
        assert fault_of(task["instruction"], True, others, writer, settings) is None


# ------------------------------------------------------------------------------ the whole script
def test_help_shows_every_constant_and_waits_for_no_library(tmp_path):
    path = make_instructions.__file__
    code = f"""
import runpy, sys
sys.path.insert(0, {os.path.dirname(path)!r})
sys.argv = ["make_instructions.py", "--help"]
try:
    runpy.run_path({path!r}, run_name="__main__")
finally:
    assert not {{"torch", "transformers", "nltk", "numpy"}} & {{*sys.modules}}
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    assert (done.returncode, done.stderr) == (0, "")
    for *_, names in RULES:
        for name in names.split():
            assert f"\n--{name.lower().replace('_', '-')} = " in done.stdout
    assert not [*tmp_path.iterdir()]


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--requests", "0"], "REQUESTS is 0: give a whole number from 1 to"),
        (["--top-p", "0"], "TOP_P is 0: give a number from 0.01 to 1"),
        (["--model-name", "absent"], "MODEL_NAME is absent: there is no such folder"),
        (["--rouge", "1"], "--rouge is no flag"),
        (["--dtype", "float16"], "DTYPE is float16: give float32 or bfloat16 on a CPU"),
        (["--output-dir", "."], "OUTPUT_DIR is .: it can't be used"),
    ],
)
def test_bad_settings_are_told_and_nothing_is_made(run_main, tmp_path, capsys, flags, told):
    assert run_main(*flags) == 2
    assert told in capsys.readouterr().err
    assert not [*tmp_path.iterdir()]


def test_several_processes_are_refused(run_main, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert run_main() == 2
    assert "WORLD_SIZE is 2: start a single process, with python" in capsys.readouterr().err


def test_the_writer_stops_where_it_should_whatever_stands_beside(demo_model):
    settings = SimpleNamespace(
        model_name=str(demo_model), quantization="none", max_new_tokens=300, batch_size=3
    )
    writer = Writer(settings, torch.device("cpu"), "float32")
    assert (writer.context, writer.new_tokens) == (256, 128)
    prompts = ["I feel so", "This morning it was cold, and", "My aunt"]
    together = writer.write(prompts, "no such text", new_tokens=6)
    writer.batch_size = 1
    assert writer.write(prompts, "no such text", new_tokens=6) == together
    assert not any(ended for _, ended in together)
    whole = writer.write(prompts, "no such text")
    assert all(ended for _, ended in whole)  # by the model's end token
    stop = whole[0][0][4:7]
    ((text, ended),) = writer.write(prompts[:1], stop)
    assert ended and text == whole[0][0].partition(stop)[0] != whole[0][0]


def test_a_run_on_the_demo_model_ends_well(run_main, folder, capsys):
    flags = ("--requests", "3", "--temperature", "1.5", "--top-p", "1")
    assert run_main(*flags) == 0
    screen = capsys.readouterr().out
    room = "128 for an answer, about 3 examples fit into the rest"
    assert f"Context   256 tokens: {room}\n" in screen
    assert "request 3/3, 0 s left, " in screen
    assert screen.endswith("Nothing was kept to train on: try a larger model, or more REQUESTS\n")
    assert (folder / "instructions.jsonl").read_bytes() == b""
    files = files_of(folder)
    assert any(record["candidates"] for record in lines_of(folder / "answers.jsonl")[1:])
    lines = files["answers.jsonl"].splitlines(keepends=True)
    (folder / "answers.jsonl").write_bytes(b"".join(lines[:2]) + lines[2][:9])
    assert run_main(*flags, "--resume") == 0
    assert "going on after request 1\n" in capsys.readouterr().out
    assert files_of(folder) == files


# ------------------------------------------------------------------------------------- its form
def test_the_constants_are_literals_with_a_comment_and_functions_say_what_they_are():
    source = Path(make_instructions.__file__).read_text(encoding="utf-8")
    lines, tree = source.splitlines(), ast.parse(source)
    names = [name for *_, names in RULES for name in names.split()]
    for name in names:
        (line,) = (line for line in lines if line.startswith(f"{name} = "))
        assert re.search(r"  # \S.{15}", line), line
    assert not [line for line in lines if len(line) > 100]
    for node in ast.walk(tree):
        assert not isinstance(node, ast.NamedExpr)
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name != "__init__":
            first = (ast.get_docstring(node) or "").partition("\n")[0]
            assert re.fullmatch(r"[A-Z].*[^.]\.", first), node.name
