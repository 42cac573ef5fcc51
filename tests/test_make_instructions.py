"""Instructions that a model writes: asked for, kept, written down, and gone on with."""

import json
import os
import re
import signal
from collections import Counter

import pytest
import torch
from helpers import digests, refusals
from transformers import AutoTokenizer

import make_instructions
from finetune.answers import tally
from finetune.seed_tasks import read_seed_tasks
from finetune.writer import Writer

TASKS = read_seed_tasks("auto").tasks
SUBJECTS = ["a river", "two old friends", "the price of bread", "winter mornings", "a lost key"]
VERBS = ["Describe", "Compare", "Rank", "Question", "Translate"]


class FakeWriter(Writer):
    """A writer without a model: what it writes hangs on prompt and torch's random numbers."""

    def __init__(self, settings, device, dtype, shortest_prompt, texts):
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
            answer = f" {SUBJECTS[drawn[2]]}\nOutput: {output}\nInput: cut"
            return (answer, bool(drawn[3]))
        place = int(re.findall(r"(\d+)\.$", prompt)[0])
        texts = [f"{VERBS[n]} {SUBJECTS[m]} for us" for n, m in zip(drawn[:4], drawn[4:])]
        texts += ["Draw a map of it", "쉬운 말로 계절을 설명하세요"]
        lines = [f"{n}. {text}" for n, text in enumerate(texts, start=place)]
        return ("\n".join(lines).removeprefix(f"{place}."), False)


@pytest.fixture
def run_main(monkeypatch, tmp_path, demo_model):
    """Run in a fresh folder with demo_model; return the exit status."""
    monkeypatch.chdir(tmp_path)
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


def report_of(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


# --------------------------------------------------------- what is asked
def test_the_yield_adds_up(run_fake, folder, capsys):
    assert run_fake() == 0
    first, *records = lines_of(folder / "answers.jsonl")
    rows = lines_of(folder / "instructions.jsonl")
    report = report_of(folder)
    assert first["seed_tasks"][0]["instruction"] == TASKS[0]["instruction"]
    assert [record["request"] for record in records] == [1, 2, 3, 4, 5, 6]
    counts = report["yield"]
    assert counts == tally(records) and counts["requests"] == 6
    for name in ("instructions", "instances"):
        part = counts[name]
        dropped = sum(part["dropped"].values())
        assert part["written"] == part["kept"] + dropped > part["kept"] > 0
    instructions, instances = counts["instructions"], counts["instances"]
    assert instructions["written"] == sum(len(record["candidates"]) for record in records) == 36
    assert instructions["dropped"]["needs more than text"] == 6
    assert instructions["dropped"]["unfinished"] == 6
    assert instructions["dropped"]["similar to another"] > 0
    assert instances["kept"] == len(rows)
    assert all([*row] == ["instruction", "input", "output"] for row in rows)
    assert len(Counter(row["instruction"] for row in rows)) == instructions["kept"]
    screen = capsys.readouterr().out
    assert f"instances kept: {len(rows)} of {instances['written']}; dropped: " in screen
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
    faults = [[row["dropped"] for row in record["candidates"]] for record in records]
    again = "similar to another"
    assert faults == [[None, again, None], [again, again, again]]
    first, kind, _, instances, _, second = asked
    assert own not in first and own in second and second.endswith("\n9.")
    assert kind.count("Labels: yes") == 4 and kind.count("Labels: no") == 8
    assert instances.endswith(f"Task: {own}\nOutput:")  # the label first
    assert instances.count("\nOutput: ") == 4  # of the other tasks there is none
    row = {"instruction": own, "input": "ten metres", "output": "deep"}
    assert lines_of(folder / "instructions.jsonl")[0] == row


def test_a_task_that_is_not_classification_has_its_input_first(run_fake, monkeypatch):
    asked = []

    def answer(self, prompt, stop):
        asked.append(prompt)
        return (" Name three birds of the sea" if prompt.endswith("9.") else " no", True)

    monkeypatch.setattr(FakeWriter, "answer", answer)
    assert run_fake("--requests", "1") == 0
    assert asked[2].endswith("Task: Name three birds of the sea\nInput:")
    assert asked[2].count("\nInput: ") == 8


# ------------------------------------------------------ going on with it
def test_more_requests_go_on_where_fewer_ended(run_fake, folder, tmp_path):
    assert run_fake() == 0
    files = files_of(folder)
    assert run_fake("--requests", "4") == 0
    assert files_of(tmp_path / "instructions-1") == files != files_of(folder)
    assert run_fake("--resume") == 0
    assert files_of(folder) == files
    assert run_fake("--seed", "1") == 0
    assert files_of(folder) != files


def test_a_run_that_was_killed_goes_on_as_if_it_had_not_been(run_fake, folder):
    assert run_fake() == 0
    files = files_of(folder)
    lines = files["answers.jsonl"].splitlines(keepends=True)
    for count in range(1, len(lines) + 1):
        torn = lines[count][: len(lines[count]) // 2] if count < len(lines) else b""
        for rest in {b"", torn, torn[:1]}:
            (folder / "report.json").unlink(missing_ok=True)
            (folder / "answers.jsonl").write_bytes(b"".join(lines[:count]) + rest)
            rows = files["instructions.jsonl"][: 50 * count]
            (folder / "instructions.jsonl").write_bytes(rows)
            assert run_fake("--resume") == 0
            assert files_of(folder) == files
            assert report_of(folder)["requests_in_these_seconds"] == len(lines) - count


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
    saved = "the answers to 3 requests are saved. To go on, run the same line with --resume\n"
    assert capsys.readouterr().err.endswith(saved)
    assert run_fake("--resume") == 0
    assert files_of(folder) == files


def test_too_little_memory_names_the_settings_of_this_script(run_fake, monkeypatch, capsys):
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
    saved = "; the answers to 6 requests are saved. To go on, run the same line with --resume\n"
    assert told.endswith(saved)
    files = files_of(folder)
    assert run_fake("--resume") == 0
    assert files_of(folder) == files


# ------------------------------------------------------- what is refused
def test_what_would_change_the_rest_is_refused(run_fake, folder, capsys):
    assert run_fake() == 0
    capsys.readouterr()
    before = digests(folder)
    changes = [("EXAMPLES", 4), ("TEMPERATURE", 0.9), ("UNANSWERABLE", "['map']")]
    flags = ["--examples", 4, "--temperature", 0.9, "--unanswerable", "map"]
    problems = refusals(run_fake("--resume", *flags), capsys.readouterr().err)
    for problem, (name, value) in zip(problems, changes, strict=True):
        assert problem.startswith(f"{name} is {value}, but was ")
        assert problem.endswith(": give that or start anew")
    status = run_fake("--resume", "--requests", "5")
    told = "REQUESTS is 5, but 6 are done: give at least that"
    assert refusals(status, capsys.readouterr().err) == [told]
    assert digests(folder) == before


def test_other_seed_tasks_are_refused_wherever_they_stand(run_fake, folder, tmp_path, capsys):
    path = tmp_path / "tasks.json"
    path.write_text(json.dumps(TASKS[:4]))
    assert run_fake("--seed-tasks", path) == 0
    files = files_of(folder)
    path = path.rename(tmp_path / "moved.json")
    assert run_fake("--seed-tasks", path, "--resume") == 0
    path.write_text(json.dumps(TASKS[:3]))
    assert run_fake("--seed-tasks", "moved.json", "--resume") == 2
    told = "SEED_TASKS is moved.json, whose tasks are not those so far: give those or"
    assert told in capsys.readouterr().err
    assert files_of(folder) == files


@pytest.mark.parametrize("content", [None, b"", b'{"settings": {', b"{}\n", b"none\n"])
def test_there_is_nothing_to_go_on_from(run_fake, folder, capsys, content):
    if content is not None:
        (folder / "checkpoint").mkdir(parents=True)
        (folder / "answers.jsonl").write_bytes(content)
    status = run_fake("--resume")
    (problem,) = refusals(status, capsys.readouterr().err)
    assert problem.startswith("RESUME is True: it can't be used (")
    assert problem.endswith("): start without it")
    assert folder.exists() is (content is not None)


SELF_INSTRUCT = [
    {
        "id": f"seed_task_{number}",
        "name": "sounds",
        "instruction": task["instruction"],
        "instances": [{"input": task["input"], "output": task["output"]}] * 2,
        "is_classification": task["is_classification"],
    }
    for number, task in enumerate(TASKS)
]


def test_seed_tasks_as_self_instruct_has_them_give_the_same_answers(
    run_fake, folder, tmp_path, capsys
):
    assert run_fake() == 0
    files = files_of(folder)
    path = tmp_path / "seed_tasks.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in SELF_INSTRUCT), encoding="utf-8")
    capsys.readouterr()
    assert run_fake("--seed-tasks", path) == 0
    assert files_of(folder) == files
    told = "12 instances after the first; fields not used: id (12), name (12)"
    assert f"{told}\n" in capsys.readouterr().out


def test_seed_tasks_of_dolly_may_stand_in_a_csv(run_fake, folder, tmp_path, capsys):
    path = tmp_path / "tasks.csv"
    path.write_text("instruction,context,response,category\nSay 2,,2,qa\nAdd,1 2,3,\nHum,,,\n")
    assert run_fake("--seed-tasks", path) == 0
    first, *_ = lines_of(folder / "answers.jsonl")
    said = [(task["instruction"], task["input"], task["output"]) for task in first["seed_tasks"]]
    assert said == [("Say 2", "", "2"), ("Add", "1 2", "3")]
    told = "; left out: 1 without an answer; fields not used: category (1)\n"
    assert told in capsys.readouterr().out


def test_a_token_that_the_model_has_no_embedding_for_is_told_before_anything_is_written(
    run_main, copy_of_demo_model, folder, capsys
):
    tokenizer = AutoTokenizer.from_pretrained(copy_of_demo_model)
    size = len(tokenizer)
    tokenizer.add_tokens(["kind"])  # a word of each prompt
    tokenizer.save_pretrained(copy_of_demo_model)
    status = run_main("--model-name", copy_of_demo_model, "--requests", "1")
    (problem,) = refusals(status, capsys.readouterr().err)
    assert problem.startswith("MODEL_NAME is ")
    assert f"the id {size}, but its embedding has {size} rows" in problem
    assert not folder.exists()


# ------------------------------------------------------ the whole script
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
