"""A full disk, too little memory, an output that nobody reads: one line tells, and it can go on."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager, suppress

import pytest
import torch
from fork_driver import environment
from transformers import AutoModelForCausalLM

import train_rlhf

FLAGS = ["--device", "cpu", "--ppo-epochs", "1", "--target-approx-kl", "0", "--save-every", "1"]
FLAGS += ["--batch-size", "6", "--max-new-tokens", "4", "--eval-samples", "6"]
FLAGS += ["--training-epochs", "4"]  # which are as many steps
CPU_ERROR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 1024000000000 bytes. Error code 12 (Cannot allocate memory)"
)
WHOLE = {"lock", "state.pt"}  # of a checkpoint's folder
LOGS = {"metrics.jsonl", "samples.jsonl"}


def digests(folder):
    files = [path for path in folder.iterdir() if path.is_file()]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def names(folder):
    return {path.name for path in folder.iterdir()}


def read_metrics(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) | {"seconds": 0} for line in lines]


@contextmanager
def largest_file(size):
    """Let no file grow beyond that size: what a full disk looks like to a program."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@pytest.fixture
def disk(tmp_path):
    """Return the folder of a disk of 16 MB of its own, or skip."""
    folder, mount = tmp_path / "disk", shutil.which("mount")
    folder.mkdir()
    line = [mount, "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder]
    if not mount or subprocess.run(line, stderr=subprocess.DEVNULL).returncode:
        pytest.skip("no tmpfs can be mounted here: that takes root")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)  # tensors may still lie in a file


@contextmanager
def filled_up(folder, left):
    """Fill the disk up to so many bytes."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    (folder / "filler").write_bytes(b"\0" * (free - left))
    yield
    (folder / "filler").unlink()


@pytest.fixture
def fail(monkeypatch):
    """Let a function do its work in that context, or raise that error, once called as often."""

    def start(name, trouble, call=1, owner=train_rlhf):
        function, calls = getattr(owner, name), []

        def spoiled(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                if isinstance(trouble, BaseException):
                    raise trouble
                trouble.__enter__()
            return function(*args, **kwargs)

        monkeypatch.setattr(owner, name, spoiled)

    return start


@pytest.fixture(scope="session")
def undisturbed(demo_model, tmp_path_factory):
    """Return the folder of a run that nothing stops."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    places = ["--model-name", str(demo_model), "--output-dir", str(output)]
    assert train_rlhf.main([*places, *FLAGS]) == 0
    return output


def assert_ended_like(output, undisturbed):
    assert read_metrics(output) == read_metrics(undisturbed)
    for name in ("samples.jsonl", "model.safetensors"):
        assert digests(output)[name] == digests(undisturbed)[name], name


def stopped(capsys, output, steps):
    """Return the reason for which a run stopped, after a look at the one line that told it."""
    err = capsys.readouterr().err
    start, saved = "\nStopped: ", "there was nothing to save yet\n"
    if steps:
        saved = f"what was learned up to step {steps} is saved. To go on, run the same line"
        saved += " with --resume\n"
        state = train_rlhf.read_checkpoint(output)
        assert len(state["metrics"]) == steps
        assert all(weight.isfinite().all() for weight in state["weights"].values())
    assert err.startswith(start) and err.endswith(f"; {saved}")
    assert err.count("\n") == 2
    return err.removeprefix(start).removesuffix(f"; {saved}")


def remedy_for(folder):
    return f": make room in OUTPUT_DIR, {folder}, and let what is printed be read to its end"


# ----------------------------------------------------------------------------------------- full disk
@pytest.mark.parametrize("kind", ["checkpoint", "metrics", "disk"])
def test_a_disk_that_is_full_while_training_leaves_the_last_checkpoint_and_the_run_can_go_on(
    call_main, fail, request, undisturbed, demo_model, tmp_path, capsys, kind
):
    folder = request.getfixturevalue("disk") if kind == "disk" else tmp_path
    output = folder / "out"
    flags = ["--model-name", demo_model, "--output-dir", output, *FLAGS]
    trouble = largest_file(1_000_000 if kind == "checkpoint" else 10)
    if kind == "disk":
        trouble = filled_up(folder, 500_000)
    capsys.readouterr()
    fail("make_record", trouble, call=3)
    assert call_main(*flags) == 1
    trouble.__exit__(None, None, None)
    reason = "No space left on device" if kind == "disk" else "File too large"
    told = stopped(capsys, output, steps=2)
    assert told == f"something can't be written ({reason}){remedy_for(output)}"
    assert names(output / "checkpoint") == WHOLE
    assert not (output / "model.safetensors").exists()

    assert call_main(*flags, "--resume") == 0
    assert_ended_like(output, undisturbed)
    assert (output / "report.json").exists()


def test_a_disk_that_is_full_from_the_start(call_main, fail, demo_model, tmp_path, capsys):
    trouble = largest_file(0)
    fail("make_record", trouble)
    assert call_main("--model-name", demo_model, *FLAGS) == 1
    trouble.__exit__(None, None, None)
    told = stopped(capsys, tmp_path / "trained_model", steps=0)
    assert told == f"something can't be written (File too large){remedy_for('trained_model')}"


@pytest.mark.parametrize(
    ("function", "size"), [("save_model", 3_000_000), ("summarize", 2_000), ("draw", 2_000)]
)
def test_a_disk_that_is_full_in_the_end_leaves_an_earlier_model_as_it_was(
    call_main, fail, demo_model, tmp_path, capsys, function, size
):
    folder, flags = tmp_path / "trained_model", ["--model-name", demo_model, *FLAGS]
    assert call_main(*flags) == 0
    before, trouble = digests(folder), largest_file(size)
    fail(function, trouble)
    assert call_main(*flags, "--training-epochs", "5", "--resume") == 1
    trouble.__exit__(None, None, None)
    told = stopped(capsys, folder, steps=5)
    assert told.startswith("something can't be written (")
    assert told.endswith(remedy_for("trained_model"))
    after = digests(folder)
    assert after.keys() == before.keys()
    assert {name for name in before if after[name] != before[name]} == LOGS
    assert names(folder / "checkpoint") == WHOLE  # what was written meanwhile is given back

    assert call_main(*flags, "--training-epochs", "5", "--resume") == 0
    again = digests(folder)
    for name in ("model.safetensors", "report.json"):
        assert again[name] != before[name]
    assert names(folder / "checkpoint") == WHOLE
    AutoModelForCausalLM.from_pretrained(folder)


# ---------------------------------------------------------------------------------- too little memory
ERRORS = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_ERROR), MemoryError()]
REMEDY = (
    "there is too little memory: lower MINI_BATCH_SIZE (it is {}) or EVAL_BATCH_SIZE ({}) and go "
    "on, or start anew with QUANTIZATION 4bit, a BATCH_SIZE below {} or a smaller model"
)
EACH_ERROR = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)


@EACH_ERROR
def test_too_little_memory_names_settings_and_values(
    call_main, fail, demo_model, tmp_path, capsys, error
):
    fail("step", error, owner=train_rlhf.ExactKLTrainer)
    assert call_main("--model-name", demo_model, *FLAGS) == 1
    assert stopped(capsys, tmp_path / "trained_model", steps=0) == REMEDY.format(6, 40, 6)


@EACH_ERROR
def test_too_little_memory_for_the_model_is_no_fault_of_its_files(
    call_main, demo_model, monkeypatch, tmp_path, capsys, error
):
    def from_pretrained(*args, **kwargs):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    assert call_main("--model-name", demo_model, *FLAGS) == 1
    assert stopped(capsys, tmp_path / "trained_model", steps=0) == REMEDY.format(6, 40, 6)
    assert not (tmp_path / "trained_model").exists()


def test_a_run_that_lacked_memory_goes_on_with_smaller_batches(
    call_main, fail, demo_model, tmp_path, capsys
):
    flags = ["--model-name", demo_model, *FLAGS]
    fail("step", MemoryError(), call=3, owner=train_rlhf.ExactKLTrainer)
    assert call_main(*flags) == 1
    assert stopped(capsys, tmp_path / "trained_model", steps=2) == REMEDY.format(6, 40, 6)

    fail("measure", MemoryError())
    smaller = ["--mini-batch-size", "3", "--eval-batch-size", "20", "--resume"]
    assert call_main(*flags, *smaller) == 1
    assert stopped(capsys, tmp_path / "trained_model", steps=4) == REMEDY.format(3, 20, 6)

    assert call_main(*flags, *smaller) == 0
    assert len(read_metrics(tmp_path / "trained_model")) == 4


# -------------------------------------------------------------------------------------------- output
ENDINGS = {"head": "| head -1", "closed": ">&-", "full": "> /dev/full"}


@pytest.fixture(scope="session")
def outputs(script, demo_model, tmp_path_factory):
    """Return runs whose output goes into a shell's dead ends, with status, out, err and folder."""
    folder, processes, results = tmp_path_factory.mktemp("outputs"), {}, {}
    flags = " ".join(map(str, ["--model-name", demo_model, *FLAGS, "--training-epochs", "1"]))
    for name, ending in ENDINGS.items():
        line = f"{sys.executable} {script} {flags} --output-dir {name} {ending}"
        processes[name] = subprocess.Popen(
            ["bash", "-c", f"{line}; exit ${{PIPESTATUS[0]}}"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            cwd=folder,
            env=environment(folder),
            encoding="utf-8",
        )
    for name, process in processes.items():
        try:
            out, err = process.communicate(timeout=240)
        finally:
            process.kill()
        results[name] = train_rlhf.SimpleNamespace(
            status=process.returncode, out=out, err=err, folder=folder / name
        )
    return results


@pytest.mark.parametrize("name", ENDINGS)
def test_an_output_that_goes_nowhere_shows_no_stack_trace(outputs, name):
    shown = outputs[name].out + outputs[name].err
    assert "Traceback" not in shown and "Error" not in shown and "Exception ignored" not in shown


def test_an_output_that_nobody_reads_any_more_ends_the_run(outputs):
    run = outputs["head"]
    assert run.status == 1
    assert run.out.startswith("Model ") and run.out.count("\n") == 1
    reason = f"something can't be written (Broken pipe){remedy_for('head')}; "
    assert run.err.startswith(f"\nStopped: {reason}") and run.err.count("\n") == 2


def test_without_an_output_the_run_goes_on_to_its_end(outputs):
    run = outputs["closed"]
    assert (run.status, run.out, run.err) == (0, "", "")
    assert (run.folder / "report.json").exists()


def test_a_device_that_is_full_ends_the_run(outputs):
    run = outputs["full"]
    assert run.status == 1
    reason = f"something can't be written (No space left on device){remedy_for('full')}; "
    assert run.err.startswith(f"\nStopped: {reason}") and run.err.count("\n") == 2


def test_a_result_that_cannot_be_shown_in_the_end_is_told(
    call_main, demo_model, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(train_rlhf, "run", lambda settings: print("the result"))
    with suppress(OSError), open("/dev/full", "w") as full:  # closing it fails once more
        monkeypatch.setattr(sys, "stdout", full)
        assert call_main("--model-name", demo_model, *FLAGS) == 1
    told = stopped(capsys, tmp_path / "trained_model", steps=0)
    assert told.startswith("something can't be written (No space left on device): ")
