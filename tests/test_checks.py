"""finetune/checks.py: settings that don't fit each other, or the machine, are told before a run."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import make_instructions
import train_reward_model
import train_rlhf
import train_sft
from finetune import checks, processes
from finetune.errors import SettingsError, shorten
from finetune.output import claim_output
from finetune.processes import pick_device


def problem_of(check, *values):
    """Return the one problem that a check has with these settings, None where it has none."""
    try:
        check(*values)
    except SettingsError as error:
        (problem,) = error.args
        return problem
    return None


def test_which_checks_a_script_asks():
    """Those that look at its data, and at what is its own, stand first."""
    asked = {script: script.CHECKS for script in (train_rlhf, train_sft, train_reward_model)}
    for script in asked:
        assert [check for check in asked[script] if check in checks.OF_TRAINING] == [
            *checks.OF_TRAINING
        ]
        assert (checks.check_shares in asked[script]) == (script is not train_rlhf)
    assert checks.check_output in make_instructions.CHECKS


# ---------------------------------------------------------------------------------------- batches
@pytest.mark.parametrize(
    ("sizes", "problem"),
    [
        ((10, 0), None),
        ((10, 5), None),
        ((10, 10), None),
        ((7, 2), "MINI_BATCH_SIZE is 2: give 0 or a divisor of BATCH_SIZE, 7"),
        ((10, 20), "MINI_BATCH_SIZE is 20: give 0 or a divisor of BATCH_SIZE, 10"),
        # No long calculation.
        ((10**6, 3), "MINI_BATCH_SIZE is 3: give 0 or a divisor of BATCH_SIZE, 1000000"),
    ],
)
def test_minibatches_that_do_not_divide_a_batch(sizes, problem):
    assert problem_of(checks.check_batches, *sizes) == problem


@pytest.mark.parametrize(
    ("sizes", "name"),
    [
        ((2, 0), "BATCH_SIZE"),
        ((2, 2), "MINI_BATCH_SIZE"),
        ((4, 2), "MINI_BATCH_SIZE"),
        ((4, 0), None),
        ((3, 0), None),
        ((6, 3), None),
    ],
)
def test_batches_with_fewer_responses_than_there_are_processes(monkeypatch, sizes, name):
    monkeypatch.setenv("WORLD_SIZE", "3")  # as a launcher sets it
    problem = f"{name} is 2: give at least 3, a response for each process" if name else None
    assert problem_of(checks.check_batches, *sizes) == problem
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert problem_of(checks.check_batches, *sizes) is None


def test_a_script_that_is_one_process_is_no_launch_of_several(monkeypatch):
    assert problem_of(checks.check_alone) is None
    monkeypatch.setenv("WORLD_SIZE", "2")
    alone = "this script is one process: start it with python"
    assert problem_of(checks.check_alone) == f"WORLD_SIZE is 2: {alone}"
    assert checks.check_alone in make_instructions.CHECKS


@pytest.mark.parametrize(
    ("sizes", "told"),
    [((6, 0), None), ((12, 3), None), ((12, 4), "MINI_BATCH_SIZE is 4"), ((8, 0), "BATCH_SIZE is 8"),
     ((2, 0), None)],
)  # fmt: skip
def test_minibatches_that_the_processes_can_not_share_evenly(monkeypatch, sizes, told):
    monkeypatch.setenv("WORLD_SIZE", "3")
    problem = f"{told}: give a multiple of 3, the number of processes" if told else None
    assert problem_of(checks.check_shares, *sizes) == problem
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert problem_of(checks.check_shares, *sizes) is None


TARGET = "TARGET_APPROX_KL is 0.008: give 0, for a single update of a step can't be measured"


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ((0.008, 1, 10, 0), TARGET),
        ((0.008, 1, 10, 10), TARGET),
        ((0.008, 1, 10, 5), None),
        ((0.008, 2, 10, 0), None),
        ((0.0, 1, 10, 0), None),
    ],
)
def test_a_target_for_what_can_not_be_measured(values, problem):
    assert problem_of(train_rlhf.check_target, *values) == problem


# ----------------------------------------------------------------------------------------- device
@pytest.mark.parametrize(
    ("values", "problem"),
    [
        (("cuda", "auto"), "DEVICE is cuda: give cpu, since PyTorch sees no such GPU"),
        (("mps", "float16"), "DEVICE is mps: give cpu, since PyTorch sees no such GPU"),
        (("cpu", "float16"), "DTYPE is float16: give float32 or bfloat16 on a CPU"),
        (("auto", "float16"), "DTYPE is float16: give float32 or bfloat16 on a CPU"),
        (("auto", "bfloat16"), None),
        (("cpu", "auto"), None),
    ],
)
def test_a_device_or_a_dtype_that_is_not_there(monkeypatch, values, problem):
    for library in (torch.cuda, torch.mps):
        monkeypatch.setattr(library, "is_available", lambda: False)
    assert problem_of(checks.check_device, *values) == problem


def test_a_gpu_takes_16_bits(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    for device in ("auto", "cuda"):
        assert problem_of(checks.check_device, device, "float16") is None


@pytest.mark.parametrize(
    ("device", "dtype", "tiles", "expected"),
    [
        ("auto", "auto", True, ("cpu", "bfloat16")),
        ("cpu", "auto", True, ("cpu", "bfloat16")),
        ("cpu", "auto", False, ("cpu", "float32")),
        ("cpu", "float32", True, ("cpu", "float32")),
        ("cpu", "bfloat16", False, ("cpu", "bfloat16")),
        ("mps", "auto", True, ("mps", "float32")),
        ("mps", "bfloat16", False, ("mps", "bfloat16")),
    ],
)
def test_a_processor_with_matrix_units_gets_16_bits(monkeypatch, device, dtype, tiles, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: tiles)
    assert pick_device(device, dtype) == expected


@pytest.mark.parametrize(("has", "expected"), [(True, "bfloat16"), (False, "float16")])
def test_a_gpu_gets_the_16_bits_that_it_has(monkeypatch, has, expected):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: not has)
    for device in ("auto", "cuda"):
        assert pick_device(device, "auto") == ("cuda", expected)
        assert pick_device(device, "float32") == ("cuda", "float32")
    assert pick_device("cpu", "float32") == ("cpu", "float32")


# --------------------------------------------------------------------------------------- trackers
def test_trackers_that_are_not_known_or_not_installed(monkeypatch, tmp_path):
    find_spec, check = importlib.util.find_spec, checks.check_trackers
    found = lambda name: None if name == "tensorboard" else find_spec(name)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", found)
    assert problem_of(check, []) is None
    remedy = "give any of tensorboard, wandb and trackio"
    assert problem_of(check, ["trackio", "x"]) == f"REPORT_TO is x: {remedy}"
    assert problem_of(check, ["y" * 100]) == f"REPORT_TO is {'y' * 79}…: {remedy}"
    remedy = "leave it out, or pip install tensorboard"
    assert problem_of(check, ["tensorboard"]) == f"REPORT_TO is tensorboard: {remedy}"


def test_a_folder_of_that_name_is_no_tracker(monkeypatch, tmp_path):
    (tmp_path / "trackio").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "trackio", raising=False)
    problem = "REPORT_TO is trackio: leave it out, or pip install trackio"
    assert problem_of(checks.check_trackers, ["trackio"]) == problem


# ----------------------------------------------------------------------------------- output folder
@pytest.fixture
def places(copy_of_demo_model, tmp_path, monkeypatch):
    """Go to a folder with what can stand in the way of an output; return it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.png").write_text("")
    (copy_of_demo_model / "metrics.jsonl").write_text("")  # an earlier run has left the model
    (tmp_path / "link").symlink_to("copy")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "earlier" / "below").mkdir(parents=True)
    (tmp_path / "earlier" / "metrics.jsonl").write_text("")
    return tmp_path


@pytest.mark.parametrize(
    ("output", "reason"),
    [
        ("file", "{folder}/file can't be written"),
        ("file/below", "{folder}/file can't be written"),
        ("/proc/1/below/trained_model", "/proc/1 can't be written"),
        ("a" * 300, "[Errno 36] File name too long: '{folder}/{output}'"),
        ("photos", "it holds files that are not a run's"),
        ("..", "it holds files that are not a run's"),
        ("~/run", "~ is no folder here"),
        ("copy", "the current folder or the model is in it"),
        ("copy/../copy", "the current folder or the model is in it"),
        ("link", "the current folder or the model is in it"),
        ("earlier", None),
        ("photos/new/deeper", None),
        ("new", None),
    ],
)
def test_an_output_that_can_not_be_used(places, output, reason):
    problem = None
    if reason:
        reason = shorten(reason.format(folder=places, output=output), 200)
        problem = f"OUTPUT_DIR is {shorten(output)}: it can't be used ({reason}): "
        problem += "name another folder"
    before = sorted(places.rglob("*"))
    assert problem_of(checks.check_output, "copy", output) == problem
    assert sorted(places.rglob("*")) == before


def test_the_current_folder_is_no_output_nor_one_above_it(places, monkeypatch):
    """An earlier run would be moved aside, and with it what is there."""
    reason = "the current folder or the model is in it"
    monkeypatch.chdir(places / "earlier" / "below")
    Path("metrics.jsonl").write_text("")
    for output in ("..", "."):
        problem = f"OUTPUT_DIR is {output}: it can't be used ({reason}): name another folder"
        assert problem_of(checks.check_output, str(places / "copy"), output) == problem


@pytest.mark.parametrize("output", ["loop", "loop/below"])
def test_an_output_that_leads_to_itself(places, output):
    """From Python 3.13 on such a link can be resolved, so that alone finds nothing."""
    problem = problem_of(checks.check_output, "model", output)
    assert problem.startswith(f"OUTPUT_DIR is {output}: it can't be used (")
    assert "Too many levels of symbolic links" in problem


# -------------------------------------------------------------- what is found where it is claimed
def problem_of_claim(folder):
    with pytest.raises(SettingsError) as error, claim_output(folder, resume=False):
        pass
    return error.value.args[0]


def test_an_output_whose_lock_is_a_folder(places):
    (places / "odd" / "checkpoint" / "lock").mkdir(parents=True)
    problem = "OUTPUT_DIR is odd: Is a directory: name another folder"
    assert problem_of(checks.check_output, "copy", "odd") is None
    assert problem_of_claim("odd") == problem


def test_an_output_that_only_turns_out_to_be_no_place_when_it_is_claimed():
    """The superuser may write in /proc, it seems, until he tries."""
    problem = problem_of_claim("/proc/trained_model")
    assert problem.startswith("OUTPUT_DIR is /proc/trained_model: ")
    assert problem.endswith(": name another folder")


def test_an_output_that_is_a_link_to_what_is_not_there_yet(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to("not/there/yet")
    assert problem_of(checks.check_output, "model", "link") is None
    with claim_output("link", resume=False):
        assert (tmp_path / "not" / "there" / "yet" / "checkpoint" / "lock").exists()


# -------------------------------------------------------------------------- the launch
LAUNCH = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({}, None),
        ({"RANK": "1"}, None),  # left over from a launcher
        (LAUNCH, None),
        ({"ACCELERATE_MIXED_PRECISION": "no", "ACCELERATE_DYNAMO_BACKEND": "NO"}, None),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is two: unset it, or launch with torchrun"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is 0: unset it, or launch with torchrun"),
        (
            {"WORLD_SIZE": "2", "RANK": "0"},
            "WORLD_SIZE is 2, but there is no MASTER_ADDR, MASTER_PORT: "
            "launch with accelerate or torchrun, or unset it",
        ),
        (
            {"ACCELERATE_MIXED_PRECISION": "bf16"},
            "ACCELERATE_MIXED_PRECISION is bf16: launch with no, or unset it",
        ),
        (
            {"ACCELERATE_USE_FSDP": "true"},
            "ACCELERATE_USE_FSDP is true: launch with false, or unset it",
        ),
        (
            {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4"},
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS is 4: launch with 1, or unset it",
        ),
    ],
)
def test_an_environment_that_is_no_launch_or_changes_the_run_is_refused(
    monkeypatch, environment, problem
):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert problem_of(checks.check_launch) == problem
    for script in (train_rlhf, train_sft, train_reward_model, make_instructions):
        assert checks.check_launch in script.CHECKS


def test_a_rank_alone_is_the_main_process(monkeypatch):
    """Else a left-over of a launcher would train, and neither print nor save anything."""
    monkeypatch.setenv("RANK", "1")
    assert processes.is_main_process()
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not processes.is_main_process()
