import json
import random
import signal

import numpy
import pytest
import torch
from safetensors.torch import load_file, save_file

import train_rlhf
from train_rlhf import find_checkpoint, load_checkpoint, read_settings, save_checkpoint

METRICS = [{"step": 1, "samples": 4}]
SMALL = ["--device", "cpu", "--batch-size", "4", "--max-new-tokens", "8", "--eval-samples", "12"]


@pytest.fixture
def saved(build, step, make_settings):
    """Return a trainer after a step, with a checkpoint of it on the disk."""
    settings = make_settings()
    with train_rlhf.prepare_output(settings) as lock:
        built = build(settings)
        built.lock = lock
        torch.manual_seed(0)
        step(built)
        built.trainer.optimizer.param_groups[0]["lr"] = 0.00123
        save_checkpoint(built.trainer, settings, METRICS)
        yield built


def files(built):
    return {entry.name for entry in find_checkpoint(built.settings).parent.iterdir()}


def state(built):
    tensors = {name: value.clone() for name, value in built.policy.state_dict().items()}
    for index, moments in built.trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"{index} {name}": value.clone() for name, value in moments.items()}
    return tensors


def next_step(built):
    settings = built.settings
    reward = train_rlhf.load_reward(settings)
    return train_rlhf.take_step(built.trainer, built.tokenizer, reward, settings, step=2)


def draw_random_numbers():
    for draw in (lambda: torch.rand(7), lambda: numpy.random.rand(7), random.random):
        draw()


def test_a_checkpoint_brings_everything_back(build, saved):
    expected = state(saved)
    texts, scores, stats = next_step(saved)
    after = state(saved)

    other = build(saved.settings)
    assert load_checkpoint(other.trainer, saved.settings) == METRICS
    found = state(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert {group["lr"] for group in other.trainer.optimizer.param_groups} == {0.00123}

    draw_random_numbers()
    other_texts, other_scores, other_stats = next_step(other)
    assert (other_texts, other_scores) == (texts, scores)
    assert other_stats["objective/kl"] == stats["objective/kl"]
    assert other_stats["ppo/loss/total"] == stats["ppo/loss/total"]
    assert all(torch.equal(state(other)[name], value) for name, value in after.items())


def test_a_step_depends_on_no_random_number_drawn_before_it(build, make_settings):
    settings = make_settings("--mini-batch-size", "2")  # so that TRL shuffles
    reward, ends = train_rlhf.load_reward(settings), []
    for disturb in (lambda: None, draw_random_numbers):
        built = build(settings)
        results = []
        for step in (1, 2):
            disturb()
            texts, scores, stats = train_rlhf.take_step(
                built.trainer, built.tokenizer, reward, settings, step
            )
            results.append((texts, scores, stats["objective/kl"], stats["ppo/loss/total"]))
        ends.append((results, state(built)))
    (results, tensors), (others, other_tensors) = ends
    assert results == others
    assert results[0][0] != results[1][0]  # nor are all steps one
    assert all(torch.equal(other_tensors[name], value) for name, value in tensors.items())


def test_a_checkpoint_holds_no_random_states(saved):
    state, tensors = train_rlhf.read_checkpoint(find_checkpoint(saved.settings))
    assert set(state) == {"settings", "model", "versions", "metrics", "param_groups", "scaler"}
    assert {name.partition(".")[0] for name in tensors} == {"model", "optimizer"}


def test_a_checkpoint_holds_no_base_weights(saved):
    path = find_checkpoint(saved.settings)
    assert all(
        "lora_" in name or "v_head" in name for name in load_file(path) if name.startswith("model.")
    )
    assert files(saved) == {"lock", "state.safetensors"}


def test_a_checkpoint_replaces_the_last_one_and_leaves_nothing_beside_it(saved):
    save_checkpoint(saved.trainer, saved.settings, METRICS * 2)
    path = find_checkpoint(saved.settings)
    assert files(saved) == {"lock", "state.safetensors"}
    assert train_rlhf.read_checkpoint(path)[0]["metrics"] == METRICS * 2


def test_a_crash_while_saving_leaves_a_whole_checkpoint(saved, monkeypatch):
    def crash(file):
        raise OSError("no space left on device")

    monkeypatch.setattr(train_rlhf.os, "fsync", crash)
    with pytest.raises(OSError):
        save_checkpoint(saved.trainer, saved.settings, METRICS * 2)
    assert files(saved) == {"lock", "state.safetensors"}
    assert load_checkpoint(saved.trainer, saved.settings) == METRICS
    monkeypatch.undo()
    save_checkpoint(saved.trainer, saved.settings, METRICS * 2)
    assert load_checkpoint(saved.trainer, saved.settings) == METRICS * 2


# -------------------------------------------------------------------------------------------------- other settings
def resume(saved, *flags):
    saved.lock.release()  # else that run would be going on
    settings = saved.settings
    places = ["--model-name", settings.model_name, "--output-dir", settings.output_dir]
    return read_settings([*places, *SMALL, *flags, "--resume"])


def test_the_same_settings_can_go_on(saved):
    assert resume(saved).resume is True


def test_what_does_not_change_the_steps_may_change(saved):
    flags = [
        "--training-epochs",
        "999",
        "--eval-samples",
        "7",
        "--log-every",
        "1",
        "--eval-prompts",
        "Hm",
    ]
    assert resume(saved, *flags, "--save-every", "3").training_epochs == 999
    assert resume(saved, "--mini-batch-size", "2", "--max-grad-norm", "0").mini_batch_size == 2
    assert resume(saved, "--device", "auto", "--target-approx-kl", "0").target_approx_kl == 0


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        ("--mini-batch-size 2", "MINI_BATCH_SIZE is 2 from now on, 0 until now"),
        ("--max-grad-norm 0.5", "MAX_GRAD_NORM is 0.5 from now on, 1.0 until now"),
        ("--target-approx-kl 0.001", "TARGET_APPROX_KL is 0.001 from now on, 0.0025 until now"),
        ("--training-epochs 200", "TRAINING_EPOCHS is 200 from now on, 150 until now"),
        ("--eval-prompts Hm", "EVAL_PROMPTS is ['Hm'] from now on, ['Right now I am', "),
        ("--device auto", "DEVICE is auto from now on, cpu until now"),
    ],
    ids=lambda value: "",
)
def test_what_a_run_can_change_on_its_way_is_told(build, saved, capsys, monkeypatch, flags, line):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    settings = resume(saved, *flags.split())
    other = build(settings)
    capsys.readouterr()
    assert load_checkpoint(other.trainer, settings) == METRICS
    (told,) = capsys.readouterr().out.splitlines()
    assert told.startswith(line)
    assert other.trainer.config.mini_batch_size == (settings.mini_batch_size or settings.batch_size)
    assert other.trainer.config.max_grad_norm == settings.max_grad_norm


def test_what_did_not_change_is_not_told(saved, capsys):
    settings = resume(saved)
    load_checkpoint(saved.trainer, settings)
    assert capsys.readouterr().out == ""


def test_a_model_is_the_same_however_its_folder_is_written(
    build, demo_model, make_settings, monkeypatch, capsys
):
    monkeypatch.chdir(demo_model.parent)
    settings = make_settings("--model-name", "demo_model")
    with train_rlhf.prepare_output(settings):
        built = build(settings)
        save_checkpoint(built.trainer, settings, METRICS)
    for name in ("demo_model", "./demo_model", "demo_model/", "demo_model/../demo_model"):
        again = make_settings("--model-name", name, "--resume")
        load_checkpoint(built.trainer, again)
        assert again.model_name == name
    assert capsys.readouterr().out == ""
    with pytest.raises(
        train_rlhf.SettingsError,
        match="MODEL_NAME is demo_model2, but demo_model in the checkpoint",
    ):
        make_settings("--model-name", "demo_model2", "--resume")


@pytest.mark.parametrize("part", ["lora_A", "lora_B", "v_head"])
def test_a_checkpoint_that_lacks_a_weight_is_an_error_before_anything_is_changed(
    call_main, saved, demo_model, capsys, part
):
    path, settings = find_checkpoint(saved.settings), saved.settings
    state, tensors = train_rlhf.read_checkpoint(path)
    lost = min(name for name in tensors if name.startswith("model.") and part in name)
    kept = {name: tensor.clone() for name, tensor in tensors.items() if name != lost}
    save_file(kept, path, {"state": json.dumps(state)})
    before = {
        entry: entry.read_bytes() for entry in path.parent.parent.rglob("*") if entry.is_file()
    }
    flags = ["--model-name", demo_model, "--output-dir", settings.output_dir, *SMALL]
    saved.lock.release()
    assert call_main(*flags, "--resume") == 2
    err = capsys.readouterr().err
    assert f" is broken (KeyError('{lost[:20]}" in err
    assert "- RESUME is True: the checkpoint " in err and err.endswith(": start without it\n")
    assert before == {
        entry: entry.read_bytes() for entry in path.parent.parent.rglob("*") if entry.is_file()
    }


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--learning-rate", "0.5"], "LEARNING_RATE is 0.5, but {learning_rate} in the checkpoint"),
        (["--batch-size", "5"], "BATCH_SIZE is 5, but 4 in the checkpoint"),
        (["--positive-words", "calm"], "POSITIVE_WORDS is ['calm'], but ['happy', "),
        (["--seed", "77"], "SEED is 77, but {seed} in the checkpoint"),
    ],
    ids=lambda value: "",
)
def test_what_changes_the_steps_is_an_error(saved, flags, line):
    with pytest.raises(train_rlhf.SettingsError) as error:
        resume(saved, *flags)
    assert line.format(**vars(saved.settings)) in str(error.value)
    assert "give that or start anew" in str(error.value)


def test_fewer_steps_than_are_done_are_an_error(saved):
    save_checkpoint(saved.trainer, saved.settings, METRICS * 9)
    with pytest.raises(
        train_rlhf.SettingsError,
        match="TRAINING_EPOCHS is 1, which takes 2 steps, but the checkpoint has 9",
    ):
        resume(saved, "--training-epochs", "1")


@pytest.mark.parametrize("content", [b"", b"{}", b"\2\0\0\0\0\0\0\0{}"])
def test_a_broken_checkpoint_is_an_error_with_a_message(saved, content):
    find_checkpoint(saved.settings).write_bytes(content)
    with pytest.raises(train_rlhf.SettingsError, match="RESUME"):
        resume(saved)


# -------------------------------------------------------------------------------------------------------- signals
@pytest.fixture
def stop():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield train_rlhf.StopSignal()
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_training_waits_for_the_end_of_the_step_and_a_second_does_not(stop, number):
    stop.after_step = True
    signal.raise_signal(number)
    assert stop.signal == number
    with pytest.raises(train_rlhf.Stopped):
        signal.raise_signal(number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_outside_of_training_stops_at_once(stop, number):
    with pytest.raises(train_rlhf.Stopped):
        signal.raise_signal(number)
    assert stop.signal == number


def test_a_run_stopped_before_its_first_step_says_that_there_is_nothing(
    call_main, demo_model, monkeypatch, capsys
):
    monkeypatch.setattr(train_rlhf, "load_policy", lambda *args: signal.raise_signal(signal.SIGINT))
    assert call_main("--model-name", demo_model, "--device", "cpu") == 130
    assert "nothing to save" in capsys.readouterr().err
