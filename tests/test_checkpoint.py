"""Checkpoints: what they bring back, what may change on the way, and the signals that stop."""

import random
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy
import pytest
import torch

import train_rlhf
from train_rlhf import check_resume, load_checkpoint, read_checkpoint

RECORD = {"step": 1, "samples": 4, "success_rate": 0.5, "score": 0.0, "kl": 0.0, "approx_kl": 0.001}
METRICS = [RECORD | {"skipped_updates": 0, "seconds": 1.0}]
SCALE = {"mean": 0.25, "deviation": 0.5, "graded": True, "threshold": None}
FILES = {"rewards.py": "the digest of a file", "prompts.txt": "the digest of another one"}
EPOCHS = ["--training-epochs", "2"]  # three steps


@pytest.fixture
def saved(build, step, make_settings):
    """Return a trainer after a step, with a checkpoint of it on the disk."""
    built = build(make_settings(*EPOCHS))
    torch.manual_seed(0)
    step(built)
    built.trainer.optimizer.param_groups[0]["lr"] = 0.00123
    (state_path(built.settings.output_dir).parent / "new").mkdir(parents=True)
    save(built, METRICS)
    return built


@pytest.fixture
def resume(saved, make_settings):
    """Return settings with which the saved run would go on, or raise what is wrong with them."""

    def check(*flags, files=FILES):
        settings = make_settings(*EPOCHS, *flags, "--resume")
        steps = train_rlhf.count_steps(settings, saved.rows)
        check_resume(settings, train_rlhf.RULES, steps, files)
        return settings

    return check


def learner(built):
    return built.trainer.model, built.trainer.optimizer, built.trainer.accelerator.scaler


def save(built, metrics):
    more = {"scale": SCALE, "files": FILES}
    train_rlhf.save_checkpoint(*learner(built), built.settings, metrics, **more)


def load(built, settings, files=FILES):
    steps = train_rlhf.count_steps(settings, built.rows)
    return load_checkpoint(*learner(built), settings, train_rlhf.RULES, steps, files)


def state_path(output):
    return Path(output, "checkpoint", "state.pt")


def names_of_files(built):
    """Return the names of all files in the checkpoint's folder, and in folders there."""
    paths = state_path(built.settings.output_dir).parent.rglob("*")
    return {path.name for path in paths if path.is_file()}


def state(built):
    tensors = {name: value.clone() for name, value in built.policy.state_dict().items()}
    for index, moments in built.trainer.optimizer.state_dict()["state"].items():
        tensors |= {f"{index} {name}": value.clone() for name, value in moments.items()}
    return tensors


def assert_same(found, expected):
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())


def train_on(built, metrics):
    """Let the script train to its last step; return all metrics but the seconds."""
    settings, metrics = built.settings, [*metrics]
    device = built.trainer.accelerator.device
    reward, scale = train_rlhf.load_reward(settings, built.rows, device)
    train_rlhf.train(
        built.trainer,
        built.policy,
        reward,
        scale,
        built.rows,
        settings,
        metrics,
        save=lambda: None,
    )
    assert len(metrics) == 3
    return [record | {"seconds": 0} for record in metrics]


def draw_random_numbers():
    for draw in (lambda: torch.rand(7), lambda: numpy.random.rand(7), random.random):
        draw()


# --------------------------------------------------------------------------------- what it brings back
def test_a_checkpoint_brings_everything_back(build, saved, resume):
    other = build(saved.settings)
    again = load(other, resume())
    assert (again["metrics"], again["scale"], again["files"]) == (METRICS, SCALE, FILES)
    assert_same(state(other), state(saved))
    assert {group["lr"] for group in other.trainer.optimizer.param_groups} == {0.00123}

    metrics = train_on(saved, METRICS)
    draw_random_numbers()
    assert train_on(other, METRICS) == metrics
    assert_same(state(other), state(saved))


def test_a_step_depends_on_no_random_number_drawn_before_it(build, make_settings, monkeypatch):
    settings = make_settings(*EPOCHS, "--mini-batch-size", "2")  # so that the batch is shuffled
    Path(settings.output_dir).mkdir()
    calm, make_record = build(settings), train_rlhf.make_record
    metrics = train_on(calm, [])
    monkeypatch.setattr(
        train_rlhf, "make_record", lambda *args: (draw_random_numbers(), make_record(*args))[1]
    )
    disturbed = build(settings)
    draw_random_numbers()
    assert train_on(disturbed, []) == metrics
    assert_same(state(disturbed), state(calm))
    assert metrics[0]["entropy"] != metrics[1]["entropy"]  # nor are all steps one


def test_the_seconds_of_a_run_that_goes_on_count_on(saved, monkeypatch):
    """What passes between two runs is nobody's; each look at the clock is a second later."""
    clock = iter(range(1000, 2000))
    own_time = SimpleNamespace(perf_counter=lambda: next(clock), monotonic=time.monotonic)
    monkeypatch.setattr(train_rlhf, "time", own_time)
    earlier = [METRICS[0] | {"seconds": 40.0}]
    seen = []
    make_record = train_rlhf.make_record

    def see(*args):
        seen.append(make_record(*args))
        return seen[-1]

    monkeypatch.setattr(train_rlhf, "make_record", see)
    train_on(saved, earlier)
    assert [record["seconds"] for record in seen] == [41.0, 42.0]
    seen.clear()
    train_on(saved, [])
    assert [record["seconds"] for record in seen] == [1.0, 2.0, 3.0]


def test_a_checkpoint_holds_what_is_needed_and_neither_random_states_nor_base_weights(saved):
    state = read_checkpoint(saved.settings.output_dir)
    needed = "settings metrics weights optimizer scaler scale files"
    assert set(state) == {*needed.split()}
    assert all("lora_" in name or "v_head" in name for name in state["weights"])
    assert len(state["weights"]) == len(state["optimizer"]["state"])
    assert names_of_files(saved) == {"state.pt"}


def test_a_checkpoint_replaces_the_last_one_and_leaves_nothing_beside_it(saved):
    save(saved, METRICS * 2)
    assert names_of_files(saved) == {"state.pt"}
    assert read_checkpoint(saved.settings.output_dir)["metrics"] == METRICS * 2


def test_weights_that_are_not_finite_never_replace_good_ones(saved):
    with torch.no_grad():
        saved.policy.v_head.summary.bias[0] = torch.nan
    save(saved, METRICS * 2)
    assert read_checkpoint(saved.settings.output_dir)["metrics"] == METRICS


def test_before_the_first_step_there_is_nothing_to_save(saved):
    save(saved, [])
    assert read_checkpoint(saved.settings.output_dir)["metrics"] == METRICS


def test_a_crash_while_saving_leaves_a_whole_checkpoint(saved, resume, monkeypatch):
    def crash(file):
        raise OSError("no space left on device")

    monkeypatch.setattr(train_rlhf.os, "fsync", crash)
    with pytest.raises(OSError), train_rlhf.claim_output(saved.settings.output_dir, resume=True):
        save(saved, METRICS * 2)
    assert names_of_files(saved) == {"lock", "state.pt"}
    assert load(saved, resume())["metrics"] == METRICS
    monkeypatch.undo()
    with train_rlhf.claim_output(saved.settings.output_dir, resume=True):
        save(saved, METRICS * 2)
    assert load(saved, resume())["metrics"] == METRICS * 2


# ------------------------------------------------------------------------------------- other settings
def test_what_does_not_change_the_steps_may_change(resume):
    flags = "--training-epochs 999 --eval-samples 7 --log-every 1 --save-every 3"
    assert resume(*flags.split()).training_epochs == 999
    assert resume("--gradient-checkpointing").gradient_checkpointing is True
    assert resume("--mini-batch-size", "2", "--max-grad-norm", "0").mini_batch_size == 2
    assert resume("--device", "auto", "--target-approx-kl", "0").target_approx_kl == 0


def test_what_a_run_can_change_on_its_way_holds_from_then_on(build, resume):
    settings = resume("--mini-batch-size", "2", "--max-grad-norm", "0.5")
    other = build(settings)
    assert load(other, settings)["metrics"] == METRICS
    assert other.trainer.config.mini_batch_size == 2
    assert other.trainer.config.max_grad_norm == 0.5


@pytest.mark.parametrize(
    ("flags", "line"),
    [
        (["--learning-rate", "0.5"], "LEARNING_RATE is 0.5, but {learning_rate} in the checkpoint"),
        (["--batch-size", "5"], "BATCH_SIZE is 5, but 4 in the checkpoint"),
        (["--positive-words", "calm"], "POSITIVE_WORDS is ['calm'], but ['happy', "),
        (["--model-name", "."], "MODEL_NAME is ., but "),
        (["--seed", "77"], "SEED is 77, but {seed} in the checkpoint"),
        (["--reward", "mine.py:f"], "REWARD is mine.py:f, but {reward} in the checkpoint"),
        (["--prompts", "Hm"], "PROMPTS is ['Hm'], but ['I feel so', "),
        (["--eval-prompts"], "EVAL_PROMPTS is [], but ['Right now I am', "),
        (["--chat-template"], "CHAT_TEMPLATE is True, but {chat_template} in the checkpoint"),
        (["--scale-samples", "9"], "SCALE_SAMPLES is 9, but {scale_samples} in the checkpoint"),
    ],
    ids=lambda value: "",
)
def test_what_changes_the_steps_is_an_error(saved, resume, flags, line):
    with pytest.raises(train_rlhf.SettingsError) as error:
        resume(*flags)
    (problem,) = error.value.args
    assert problem.startswith(line.format(**vars(saved.settings)))
    assert problem.endswith(" in the checkpoint: give that or start anew")


@pytest.mark.parametrize("path", [path for path in FILES if not path.endswith(".py")])
def test_data_that_has_changed_is_an_error_until_it_is_put_back(resume, path):
    with pytest.raises(train_rlhf.SettingsError) as error:
        resume(files=FILES | {path: "the digest of another text"})
    remedy = "put it back or start anew"
    assert error.value.args == (f"{path} has changed since the checkpoint: {remedy}",)
    resume()


def test_code_may_have_changed_for_it_may_have_been_mended(call_main, demo_model, tmp_path):
    code, output = tmp_path / "rewards.py", tmp_path / "out"
    flags = ["--batch-size", 4, "--max-new-tokens", 8, "--eval-samples", 12, "--device", "cpu"]
    flags += ["--model-name", demo_model, "--output-dir", output, "--reward", f"{code}:length"]
    function = "def length(prompts, completions, **kwargs):\n"
    code.write_text(function + "    return [len(text) for text in completions]\n")
    assert call_main(*flags, "--training-epochs", 0.5) == 0
    code.write_text(function + "    return [float(len(text)) for text in completions]\n")
    assert call_main(*flags, "--training-epochs", 1, "--resume") == 0
    assert len(read_checkpoint(output)["metrics"]) == 2


def test_files_are_told_apart_by_what_is_in_them(tmp_path):
    texts = {"one": "same", "two": "same", "three": "other"}
    for name, text in texts.items():
        (tmp_path / name).write_text(text)
    paths = [str(tmp_path / name) for name in texts]
    hashes = train_rlhf.hash_files([*paths, "I feel so", "", str(tmp_path)])
    assert [*hashes] == paths
    one, two, three = hashes.values()
    assert one == two != three


def test_fewer_steps_than_are_done_are_an_error(saved, resume):
    save(saved, METRICS * 9)
    problem = "TRAINING_EPOCHS is 1, which takes 2 steps, but the checkpoint has 9: give more"
    with pytest.raises(train_rlhf.SettingsError, match=problem):
        resume("--training-epochs", "1")


# -------------------------------------------------------------------------------- broken checkpoints
@pytest.mark.parametrize("part", ["lora_A", "lora_B", "v_head"])
def test_a_checkpoint_that_lacks_a_weight_is_an_error_before_anything_is_changed(
    call_main, saved, capsys, part
):
    settings, output = saved.settings, Path(saved.settings.output_dir)
    state = read_checkpoint(output)
    lost = min(name for name in state["weights"] if part in name)
    del state["weights"][lost]
    torch.save(state, state_path(output))

    def contents():
        entries = [path for path in output.rglob("*") if path.is_file() and path.name != "lock"]
        return {path: path.read_bytes() for path in entries}

    before = contents()
    flags = ["--batch-size", 4, "--max-new-tokens", 8, "--eval-samples", 12, "--device", "cpu"]
    flags += ["--model-name", settings.model_name, "--output-dir", output, *EPOCHS, "--resume"]
    assert call_main(*flags) == 2
    line = f"- RESUME is True: it can't be used (KeyError('{lost}')): start without it"
    assert capsys.readouterr().err == f"Nothing was started or changed:\n{line}\n"
    assert contents() == before


class Harmful:
    """An object that does harm where it is unpickled."""

    def __reduce__(self):
        return exec, ("import train_rlhf; train_rlhf.harmed = True",)


@pytest.mark.parametrize("content", ["empty", "text", "half", "of something else", "harmful"])
def test_a_broken_checkpoint_is_an_error_with_a_message(saved, resume, monkeypatch, content):
    monkeypatch.setattr(train_rlhf, "harmed", False, raising=False)
    path = state_path(saved.settings.output_dir)
    whole = path.read_bytes()
    if content in ("of something else", "harmful"):
        torch.save({"metrics": Harmful() if content == "harmful" else []}, path)
    else:
        path.write_bytes({"empty": b"", "text": b"{}", "half": whole[: len(whole) // 2]}[content])
    with pytest.raises(train_rlhf.SettingsError) as error:
        resume()
    (problem,) = error.value.args
    assert problem.startswith("RESUME is True: it can't be used (")
    assert problem.endswith("): start without it")
    assert not train_rlhf.harmed


# ------------------------------------------------------------------------------------------- signals
SIGNALS = pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])


@SIGNALS
def test_a_signal_while_training_waits_for_the_end_of_the_step_and_a_second_does_not(number):
    before, reached = signal.getsignal(number), []
    for signals in (1, 2):
        with (
            pytest.raises(train_rlhf.Stopped) as stopped,
            train_rlhf.stop_on_signal(after_step=True) as stop,
        ):
            for _ in range(signals):
                signal.raise_signal(number)
                reached.append(stop.requested)
        assert stopped.value.args == (number,)
        assert signal.getsignal(number) == before
    assert reached == [number, number]  # not a third time


@SIGNALS
def test_a_signal_outside_of_training_stops_at_once(number):
    before, reached = signal.getsignal(number), []
    with pytest.raises(train_rlhf.Stopped) as stopped, train_rlhf.stop_on_signal():
        signal.raise_signal(number)
        reached.append("what comes after it")
    assert stopped.value.args == (number,)
    assert reached == []
    assert signal.getsignal(number) == before


def test_without_a_signal_nothing_is_raised():
    with train_rlhf.stop_on_signal(after_step=True) as stop:
        pass
    assert stop.requested == 0


def test_a_run_stopped_before_its_first_step_says_that_there_is_nothing(
    call_main, demo_model, monkeypatch, capsys
):
    def stop(*args):
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(train_rlhf, "load_base_model", stop)
    assert call_main("--model-name", demo_model, "--device", "cpu") == 130
    assert capsys.readouterr().err == "\nStopped: by a signal; there was nothing to save yet\n"
