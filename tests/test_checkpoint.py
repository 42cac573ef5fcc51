import signal

import pytest
import torch
from safetensors.torch import load_file

import train_rlhf
from train_rlhf import find_checkpoint, load_checkpoint, read_settings, save_checkpoint

METRICS = [{"step": 1, "samples": 4}]


@pytest.fixture
def saved(build, step, make_settings):
    """Return a trainer after a step, with a checkpoint of it on the disk."""
    settings = make_settings()
    train_rlhf.prepare_output(settings)
    built = build(settings)
    torch.manual_seed(0)
    step(built)
    built.trainer.optimizer.param_groups[0]["lr"] = 0.00123
    save_checkpoint(built.trainer, settings, METRICS)
    return built


def state(built):
    tensors = {name: value.clone() for name, value in built.policy.state_dict().items()}
    for index, moments in built.trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"{index} {name}": value.clone() for name, value in moments.items()}
    return tensors


def test_a_checkpoint_brings_everything_back(build, step, saved):
    expected = state(saved)
    next_step = step(saved)  # what comes after depends on the random states too
    after = state(saved)

    other = build(saved.settings)
    assert load_checkpoint(other.trainer, saved.settings) == METRICS
    found = state(other)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    assert {group["lr"] for group in other.trainer.optimizer.param_groups} == {0.00123}

    stats = step(other)
    assert stats["objective/kl"] == next_step["objective/kl"]
    assert stats["ppo/loss/total"] == next_step["ppo/loss/total"]
    assert all(torch.equal(state(other)[name], value) for name, value in after.items())


def test_a_checkpoint_holds_no_base_weights(saved):
    path = find_checkpoint(saved.settings)
    assert all("lora_" in name or "v_head" in name for name in load_file(path) if name.startswith("model."))
    assert [entry.name for entry in path.parent.iterdir()] == ["state.safetensors"]


def test_a_checkpoint_replaces_the_last_one_and_leaves_nothing_beside_it(saved):
    save_checkpoint(saved.trainer, saved.settings, METRICS * 2)
    path = find_checkpoint(saved.settings)
    assert [entry.name for entry in path.parent.iterdir()] == ["state.safetensors"]
    assert train_rlhf.read_checkpoint(path)[0]["metrics"] == METRICS * 2


def test_a_crash_while_saving_leaves_a_whole_checkpoint(saved, monkeypatch):
    def crash(*args):
        raise OSError("no space left on device")

    monkeypatch.setattr(train_rlhf, "save_file", crash)
    with pytest.raises(OSError):
        save_checkpoint(saved.trainer, saved.settings, METRICS * 2)
    assert load_checkpoint(saved.trainer, saved.settings) == METRICS
    monkeypatch.undo()
    save_checkpoint(saved.trainer, saved.settings, METRICS * 2)
    assert load_checkpoint(saved.trainer, saved.settings) == METRICS * 2


# -------------------------------------------------------------------------------------------------- other settings
def resume(saved, *flags):
    settings = saved.settings
    given = ["--model-name", settings.model_name, "--output-dir", settings.output_dir, "--device", "cpu"]
    sizes = ["--batch-size", "4", "--max-new-tokens", "8", "--eval-samples", "12"]
    return read_settings([*given, *sizes, *flags, "--resume"])


def test_the_same_settings_can_go_on(saved):
    assert resume(saved).resume is True


def test_what_does_not_change_the_steps_may_change(saved):
    flags = ["--training-epochs", "999", "--eval-samples", "7", "--log-every", "1", "--eval-prompts", "Hm"]
    assert resume(saved, *flags, "--save-every", "3").training_epochs == 999


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
    with pytest.raises(train_rlhf.SettingsError, match=r"TRAINING_EPOCHS is 1, less than the checkpoint's \d+ steps"):
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


def test_a_run_stopped_before_its_first_step_says_that_there_is_nothing(call_main, demo_model, monkeypatch, capsys):
    monkeypatch.setattr(train_rlhf, "load_policy", lambda *args: signal.raise_signal(signal.SIGINT))
    assert call_main("--model-name", demo_model, "--device", "cpu") == 130
    assert "nothing to save" in capsys.readouterr().err
