"""A run that can't go on is refused by main, before anything is loaded or touched."""

import gzip
import os

import pytest
import torch
from datasets import Dataset, disable_progress_bars
from helpers import digests, refusals

FLAGS = ["--device", "cpu", "--training-epochs", "30"]


@pytest.fixture
def refused_resume(call_main, read_settings, demo_model, tmp_path, monkeypatch, capfd):
    """Call main with --resume beside a checkpoint of 18 steps, its entries changed.

    data: what the file holds in their place. Returns the problems, after a look at all files.
    """
    flags = ["--model-name", str(demo_model), *FLAGS]
    checkpoint = tmp_path / "trained_model" / "checkpoint"

    def call(*changed, data=None, **entries):
        state = {
            "settings": read_settings(*flags).model_dump(),
            "metrics": [{}] * 18,
            "weights": {},
            "optimizer": {},
            "scaler": None,
            "scale": {"mean": 0.0, "deviation": 1.0, "threshold": 0.0},
            "files": {},
        }
        checkpoint.mkdir(parents=True)
        (checkpoint / "lock").touch()
        torch.save(state | entries, checkpoint / "state.pt")
        if data is not None:
            (checkpoint / "state.pt").write_bytes(data)
        before = digests(tmp_path), sorted(tmp_path.rglob("*"))
        status = call_main(*flags, "--resume", *changed)
        output, message = capfd.readouterr()
        assert output == ""
        assert (digests(tmp_path), sorted(tmp_path.rglob("*"))) == before
        return refusals(status, message)

    return call


ANEW = "in the checkpoint: give that or start anew"


@pytest.mark.parametrize(
    ("flags", "problems"),
    [
        (["--seed", "5"], [f"SEED is 5, but 0 {ANEW}"]),
        (["--lora-rank", "8"], [f"LORA_RANK is 8, but 16 {ANEW}"]),
        (["--reward", "my.py:f"], [f"REWARD is my.py:f, but positive_word_reward {ANEW}"]),
        (
            ["--training-epochs", "1"],
            ["TRAINING_EPOCHS is 1, which takes 1 steps, but the checkpoint has 18: give more"],
        ),
        # Then the number of steps says nothing.
        (
            ["--batch-size", "50", "--seed", "5"],
            [f"SEED is 5, but 0 {ANEW}", f"BATCH_SIZE is 50, but 10 {ANEW}"],
        ),
    ],
)
def test_a_checkpoint_of_other_settings(refused_resume, flags, problems):
    assert refused_resume(*flags) == problems


def test_a_prompt_file_that_is_missing_is_the_only_problem(refused_resume):
    (problem,) = refused_resume("--prompts", "none.txt")
    assert problem.startswith("PROMPTS is none.txt: it can't be used (")


@pytest.mark.parametrize("name", ["p.jsonl", "p.csv.gz", "saved"])
def test_prompts_that_have_changed_are_refused(
    refused_resume, read_settings, demo_model, tmp_path, name
):
    """Whether they are in a file, a packed one, or a folder that datasets saved."""
    disable_progress_bars()  # which would be on the screen that is looked at
    rows = Dataset.from_list([{"prompt": "I feel so"}, {"prompt": "Life is"}])
    if name == "p.jsonl":
        rows.to_json(tmp_path / name)
    elif name == "p.csv.gz":
        (tmp_path / name).write_bytes(gzip.compress(b"prompt\nI feel so\nLife is\n"))
    else:
        rows.save_to_disk(tmp_path / name)
    flags = ["--prompts", str(tmp_path / name)]
    settings = read_settings("--model-name", str(demo_model), *FLAGS, *flags).model_dump()
    (problem,) = refused_resume(*flags, settings=settings, files={flags[1]: "of before"})
    told = "has changed since the checkpoint: put it back or start anew"
    assert problem == f"{flags[1]} {told}"


@pytest.mark.parametrize("folder", ["trained_model", "new"])
def test_a_folder_without_a_checkpoint(call_main, capsys, tmp_path, folder):
    (tmp_path / "trained_model").mkdir()
    (tmp_path / "trained_model" / "report.json").write_text("{}")
    status = call_main("--device", "cpu", "--resume", "--output-dir", folder)
    reason = f"there is no checkpoint in {folder}"
    problem = f"RESUME is True: it can't be used ({reason}): start without it"
    assert refusals(status, capsys.readouterr().err) == [problem]
    assert list(digests(tmp_path)) == ["trained_model/report.json"]


@pytest.mark.parametrize("output", ["loop", "a" * 300])
def test_an_output_that_is_no_place_at_all(call_main, capsys, tmp_path, output):
    (tmp_path / "loop").symlink_to("loop")
    status = call_main("--output-dir", output, "--resume")
    problems = refusals(status, capsys.readouterr().err)
    assert any(problem.startswith(f"OUTPUT_DIR is {output[:79]}") for problem in problems)


class RunsCode:
    """What a pickle can do to whoever loads it: make a folder, here."""

    def __reduce__(self):
        return os.mkdir, ("ran",)


@pytest.mark.parametrize(
    "spoiled",
    [
        pytest.param({"data": b"PK\x03\x04" + b"x" * 1000}, id="broken archive"),
        pytest.param({"settings": []}, id="settings"),
        pytest.param({"metrics": None}, id="metrics"),
        pytest.param({"metrics": RunsCode()}, id="code"),
        pytest.param({"weights": {}}, id="no weights"),  # found when the model is there
    ],
)
def test_a_checkpoint_that_is_broken(refused_resume, spoiled):
    (problem,) = refused_resume(**spoiled)
    assert problem.startswith("RESUME is True: it can't be used (")
    assert problem.endswith("): start without it")
    assert len(problem) < 400
