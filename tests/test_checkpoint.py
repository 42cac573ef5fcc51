"""Checkpoints: what they bring back, what may change on the way, and those that are broken."""

import os
import random
import time
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch
from helpers import digests

import train_rlhf
from finetune import checkpoint as checkpoints
from finetune import measurement
from finetune.checkpoint import (
    Checkpoint,
    check_resume,
    read_checkpoint,
    state_path,
    write_state,
)
from finetune.errors import SettingsError
from finetune.output import claim_output
from finetune.progress import count_steps
from finetune.scale import Scale

RECORD = {"step": 1, "samples": 4, "success_rate": 0.5, "score": 0.0, "kl": 0.0, "approx_kl": 0.001}
METRICS = [RECORD | {"skipped_updates": 0, "seconds": 1.0}]
SCALE = {"mean": 0.25, "deviation": 0.5, "graded": True, "threshold": None, "accuracy": None}
FILES = {"more.jsonl": "the digest of a file", "prompts.txt": "the digest of another one"}
EPOCHS = ["--training-epochs", "2"]  # three steps


@pytest.fixture
def saved(build, step, make_settings):
    """Return a trainer after a step, with a checkpoint of it on the disk."""
    built = build(make_settings(*EPOCHS))
    torch.manual_seed(0)
    step(built)
    built.trainer.optimizer.param_groups[0]["lr"] = 0.00123
    make_place(built.settings)
    save(built, METRICS)
    return built


@pytest.fixture
def written(make_settings):
    """Return settings with a checkpoint on the disk that has all but weights."""
    settings = make_settings(*EPOCHS)
    make_place(settings)
    write(settings, METRICS)
    return settings


@pytest.fixture
def resume(make_settings):
    """Return settings with which a run that was saved goes on, or raise what is wrong with them."""

    def check(*flags, files=FILES):
        settings = make_settings(*EPOCHS, *flags, "--resume")
        check_resume(settings, steps_of(settings), files)
        return settings

    return check


@pytest.fixture
def train_on(make_learner):
    """Let the script train to its last step; return all metrics but the seconds."""

    def train(built, metrics):
        metrics = [*metrics]
        settings, device = built.settings, built.trainer.accelerator.device
        scorer, scale = train_rlhf.load_reward(settings, built.rows, device)
        nothing = SimpleNamespace(save=lambda metrics, **more: None)
        train_rlhf.train(make_learner(built, scorer, scale), built.rows, metrics, nothing)
        assert len(metrics) == 3
        return [record | {"seconds": 0} for record in metrics]

    return train


@pytest.fixture
def watch_records(monkeypatch):
    """Call a function with the record of each step that train notes from now on."""

    def watch(act):
        def make_record(*args, **more):
            record = original(*args, **more)
            act(record)
            return record

        original = measurement.make_record
        monkeypatch.setattr(measurement, "make_record", make_record)

    return watch


def make_place(settings):
    (state_path(settings.output_dir).parent / "new").mkdir(parents=True)


def write(settings, metrics):
    state = {"settings": settings.model_dump(), "metrics": metrics, "files": FILES}
    write_state(state, settings.output_dir)


def steps_of(settings):
    return count_steps(settings, settings.prompts)


def checkpoint_of(built, settings, files=FILES):
    trainer = built.trainer
    return Checkpoint(trainer.model, trainer.optimizer, trainer.accelerator.scaler, settings, files)


def save(built, metrics):
    checkpoint_of(built, built.settings).save(metrics, scale=SCALE)


def load(built, settings):
    return checkpoint_of(built, settings).load(steps_of(settings))


def names_of_files(settings):
    """Return the names of all files in the checkpoint's folder, and in folders there."""
    return {Path(name).name for name in digests(state_path(settings.output_dir).parent)}


def tensors_of(built):
    """Return a copy of all that a step changes."""
    tensors = {name: value.clone() for name, value in built.policy.state_dict().items()}
    for index, moments in built.trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"{index} {name}": value.clone() for name, value in moments.items()}
    return tensors


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def draw_random_numbers(*args):
    for draw in (lambda: torch.rand(7), lambda: numpy.random.rand(7), random.random):
        draw()


# ------------------------------------------------------------------ what it brings back
def test_a_checkpoint_brings_everything_back(build, saved, resume, train_on):
    other = build(saved.settings)
    state = load(other, resume())
    assert (state["metrics"], state["scale"], state["files"]) == (METRICS, SCALE, FILES)
    assert Scale(**state["scale"]) == Scale(mean=0.25, deviation=0.5, graded=True)
    assert_same(tensors_of(other), tensors_of(saved))
    assert {group["lr"] for group in other.trainer.optimizer.param_groups} == {0.00123}

    metrics = train_on(saved, METRICS)
    draw_random_numbers()
    assert train_on(other, METRICS) == metrics
    assert_same(tensors_of(other), tensors_of(saved))


def test_a_step_depends_on_no_random_number_drawn_before_it(
    build, make_settings, train_on, watch_records
):
    settings = make_settings(*EPOCHS, "--mini-batch-size", "2")  # so that the batch is shuffled
    Path(settings.output_dir).mkdir()
    calm = build(settings)
    metrics = train_on(calm, [])
    watch_records(draw_random_numbers)
    disturbed = build(settings)
    draw_random_numbers()
    assert train_on(disturbed, []) == metrics
    assert_same(tensors_of(disturbed), tensors_of(calm))
    assert metrics[0]["entropy"] != metrics[1]["entropy"]  # nor are all steps one


def test_the_seconds_of_a_run_that_goes_on_count_on(saved, train_on, watch_records, monkeypatch):
    """What passes between two runs is nobody's; each look at the clock is a second later."""
    clock = iter(range(1000, 2000))
    own_time = SimpleNamespace(perf_counter=lambda: next(clock), monotonic=time.monotonic)
    monkeypatch.setattr(train_rlhf, "time", own_time)
    records = []
    watch_records(records.append)
    train_on(saved, [METRICS[0] | {"seconds": 40.0}])
    train_on(saved, [])
    assert [record["seconds"] for record in records] == [41.0, 42.0, 1.0, 2.0, 3.0]


# -------------------------------------------------------------------------- on the disk
def test_a_checkpoint_holds_what_is_needed_and_replaces_the_last_one(saved):
    state = read_checkpoint(saved.settings.output_dir)
    needed = "settings metrics weights optimizer scaler scale files"
    assert set(state) == {*needed.split()}  # and neither random states nor the base weights
    assert all("lora_" in name or "v_head" in name for name in state["weights"])
    assert len(state["weights"]) == len(state["optimizer"]["state"])
    assert names_of_files(saved.settings) == {"state.pt"}

    save(saved, METRICS * 2)
    assert names_of_files(saved.settings) == {"state.pt"}
    assert read_checkpoint(saved.settings.output_dir)["metrics"] == METRICS * 2


def test_what_is_not_worth_keeping_never_replaces_a_good_checkpoint(saved):
    save(saved, [])  # there was no step
    assert read_checkpoint(saved.settings.output_dir)["metrics"] == METRICS
    with torch.no_grad():
        saved.policy.v_head.summary.bias[0] = torch.nan
    save(saved, METRICS * 2)
    assert read_checkpoint(saved.settings.output_dir)["metrics"] == METRICS


def test_a_crash_while_saving_leaves_a_whole_checkpoint(saved, resume, monkeypatch):
    def crash(file):
        raise OSError("no space left on device")

    output = saved.settings.output_dir
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints.os, "fsync", crash)
        with pytest.raises(OSError), claim_output(output, resume=True):
            save(saved, METRICS * 2)
    assert names_of_files(saved.settings) == {"lock", "state.pt"}
    assert load(saved, resume())["metrics"] == METRICS
    with claim_output(output, resume=True):
        save(saved, METRICS * 2)
    assert load(saved, resume())["metrics"] == METRICS * 2


# ----------------------------------------------------------------------- other settings
def test_what_does_not_change_the_steps_may_change(written, resume):
    flags = "--training-epochs 999 --eval-samples 7 --log-every 1 --save-every 3"
    flags += " --gradient-checkpointing --mini-batch-size 2 --max-grad-norm 0 --device auto"
    settings = resume(*flags.split(), "--target-approx-kl", "0")
    assert (settings.training_epochs, settings.eval_samples) == (999, 7)
    assert settings.gradient_checkpointing is True


def test_what_a_run_can_change_on_its_way_holds_from_then_on(build, saved, resume):
    settings = resume("--mini-batch-size", "2", "--max-grad-norm", "0.5")
    other = build(settings)
    assert load(other, settings)["metrics"] == METRICS
    assert other.trainer.config.mini_batch_size == 2
    assert other.trainer.config.max_grad_norm == 0.5


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--learning-rate", "0.5"], "LEARNING_RATE is 0.5, but {learning_rate}"),
        (["--positive-words", "calm"], "POSITIVE_WORDS is ['calm'], but ['happy', "),
        (["--eval-prompts"], "EVAL_PROMPTS is [], but ['Right now I am', "),
        (["--eval-share", "0"], "EVAL_SHARE is 0.0, but {eval_share}"),
        (["--chat-template"], "CHAT_TEMPLATE is True, but {chat_template}"),
    ],
    ids=lambda value: "",
)
def test_what_changes_the_steps_is_an_error(written, resume, flags, line):
    with pytest.raises(SettingsError) as error:
        resume(*flags)
    (problem,) = error.value.args
    assert problem.startswith(line.format(**written.model_dump()))
    assert problem.endswith(" in the checkpoint: give that or start anew")


def test_all_that_changes_the_steps_is_told_at_once(written, resume):
    with pytest.raises(SettingsError) as error:
        resume("--seed", "77", "--reward", "mine.py:f", files=FILES | {"prompts.txt": "another"})
    told = [problem.partition(":")[0] for problem in error.value.args]
    assert told == [
        "SEED is 77, but 0 in the checkpoint",
        "REWARD is mine.py",
        "prompts.txt has changed since the checkpoint",
    ]


def test_data_that_has_changed_is_an_error_until_it_is_put_back(written, resume):
    with pytest.raises(SettingsError) as error:
        resume(files=FILES | {"prompts.txt": "the digest of another text"})
    remedy = "put it back or start anew"
    assert error.value.args == (f"prompts.txt has changed since the checkpoint: {remedy}",)
    resume()


def test_fewer_steps_than_are_done_are_an_error(written, resume):
    write(written, METRICS * 9)
    problem = "TRAINING_EPOCHS is 1, which takes 2 steps, but the checkpoint has 9: give more"
    with pytest.raises(SettingsError, match=problem):
        resume("--training-epochs", "1")


# ------------------------------------------------------------------- broken checkpoints
def test_a_checkpoint_that_lacks_a_weight_is_an_error_with_a_message(saved, resume):
    state = read_checkpoint(saved.settings.output_dir)
    lost = min(name for name in state["weights"] if "v_head" in name)
    del state["weights"][lost]
    torch.save(state, state_path(saved.settings.output_dir))
    with pytest.raises(SettingsError) as error:
        load(saved, resume())
    problem = f"RESUME is True: it can't be used (KeyError('{lost}')): start without it"
    assert error.value.args == (problem,)


@pytest.mark.parametrize("content", ["empty", "text", "half", "other"])
def test_a_broken_checkpoint_is_an_error_with_a_message(written, resume, content):
    path = state_path(written.output_dir)
    whole = path.read_bytes()
    if content == "other":
        torch.save({"metrics": []}, path)
    else:
        path.write_bytes({"empty": b"", "text": b"{}", "half": whole[: len(whole) // 2]}[content])
    with pytest.raises(SettingsError) as error:
        resume()
    (problem,) = error.value.args
    assert problem.startswith("RESUME is True: it can't be used (")
    assert problem.endswith("): start without it")


class Harmful:
    """An object that does harm where it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_no_code_in_a_checkpoint_is_run(written, resume, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(written, [Harmful()])
    with pytest.raises(SettingsError, match="RESUME is True: it can't be used "):
        resume()
    assert not (tmp_path / "harmed").exists()
