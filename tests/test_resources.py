"""A full disk, too little memory, an output that nobody reads: the run ends in one line, and can go on."""

import hashlib
import json
import os
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager

import pytest
import torch
from transformers import AutoModelForCausalLM

import train_rlhf

FLAGS = [
    *(
        "--device",
        "cpu",
        "--batch-size",
        "6",
        "--training-epochs",
        "4",
        "--max-new-tokens",
        "4",
        "--ppo-epochs",
        "2",
    ),
    *("--eval-samples", "6", "--save-every", "1"),
]
CPU_ERROR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried to allocate "
    "1024000000000 bytes. Error code 12 (Cannot allocate memory)"
)


def digests(folder):
    return {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.iterdir()
        if path.is_file()
    }


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
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = shutil.which("mount")
    if (
        not mount
        or subprocess.run(
            [mount, "-t", "tmpfs", "-o", "size=16m", "tmpfs", folder], stderr=-3
        ).returncode
    ):
        pytest.skip("no tmpfs can be mounted here: that takes root")
    yield folder
    subprocess.run(
        ["umount", "--lazy", folder], check=True
    )  # tensors may still lie in its checkpoint


@contextmanager
def filled_up(folder, left):
    """Fill the disk up to so many bytes."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    (folder / "filler").write_bytes(b"\0" * (free - left))
    yield
    (folder / "filler").unlink()


@pytest.fixture
def fail(monkeypatch):
    """Let train_rlhf's function do its work in that context, or raise that error, once it is called as often."""

    def start(name, trouble, call=1):
        function, calls = getattr(train_rlhf, name), []

        def spoiled(*args, **kwargs):
            calls.append(args)
            if len(calls) == call:
                if isinstance(trouble, BaseException):
                    raise trouble
                trouble.__enter__()
            return function(*args, **kwargs)

        monkeypatch.setattr(train_rlhf, name, spoiled)

    return start


@pytest.fixture(scope="session")
def undisturbed(demo_model, tmp_path_factory):
    """Return the metrics of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rlhf, "StopSignal", lambda: train_rlhf.SimpleNamespace(signal=None))
        assert (
            train_rlhf.main(
                ["--model-name", str(demo_model), "--output-dir", str(folder / "out"), *FLAGS]
            )
            == 0
        )
    return read_metrics(folder / "out")


def stopped(capsys, output, steps):
    """Return the reason for which a run stopped, after a look at the one line that told it."""
    err = capsys.readouterr().err
    start, saved = "\nStopped: ", "there was nothing to save yet\n"
    if steps:
        saved = f"what was learned up to step {steps} is saved. To go on, run the same line with --resume\n"
        state, tensors = train_rlhf.read_checkpoint(output / "checkpoint" / "state.safetensors")
        assert len(state["metrics"]) == steps
        assert all(tensor.isfinite().all() for tensor in tensors.values())
    assert err.startswith(start) and err.endswith(f"; {saved}")
    assert err.count("\n") == 2
    return err.removeprefix(start).removesuffix(f"; {saved}")


# ---------------------------------------------------------------------------------------------------------- full disk
@pytest.mark.parametrize("kind", ["checkpoint", "metrics", "disk"])
def test_a_disk_that_is_full_while_training_leaves_the_last_checkpoint_and_the_run_can_go_on(
    call_main, fail, request, undisturbed, demo_model, tmp_path, capsys, kind
):
    folder = request.getfixturevalue("disk") if kind == "disk" else tmp_path
    flags = ["--model-name", demo_model, "--output-dir", folder / "out", *FLAGS]
    trouble = (
        filled_up(folder, 500_000)
        if kind == "disk"
        else largest_file(1_000_000 if kind == "checkpoint" else 10)
    )
    fail("take_step", trouble, call=3)
    assert call_main(*flags) == 1
    trouble.__exit__(None, None, None)
    reason = stopped(capsys, folder / "out", steps=2)
    assert reason.startswith(f"OUTPUT_DIR is {folder / 'out'}: it can't be written (")
    assert ("No space left on device" if kind == "disk" else "File too large") in reason
    assert {path.name for path in (folder / "out" / "checkpoint").iterdir()} == {
        "lock",
        "state.safetensors",
    }
    assert not (folder / "out" / "model.safetensors").exists()

    assert call_main(*flags, "--resume") == 0
    assert read_metrics(folder / "out") == undisturbed
    assert (folder / "out" / "report.json").exists()


def test_a_disk_that_is_full_from_the_start(call_main, fail, demo_model, tmp_path, capsys):
    trouble = largest_file(0)
    fail("train", trouble)
    assert call_main("--model-name", demo_model, *FLAGS) == 1
    trouble.__exit__(None, None, None)
    assert "OUTPUT_DIR is trained_model: it can't be written (File too large)" in stopped(
        capsys, tmp_path / "trained_model", steps=0
    )


@pytest.mark.parametrize("function", ["save_model", "write_report", "draw"])
def test_a_disk_that_is_full_in_the_end_leaves_an_earlier_model_as_it_was(
    call_main, fail, demo_model, tmp_path, monkeypatch, capsys, function
):
    folder, flags = tmp_path / "trained_model", ["--model-name", demo_model, *FLAGS]
    assert call_main(*flags) == 0
    before = digests(folder)
    trouble = largest_file(
        {"save_model": 3_000_000, "write_report": 2_000, "draw": 20_000}[function]
    )
    fail(function, trouble)
    assert call_main(*flags, "--training-epochs", "5", "--resume") == 1
    trouble.__exit__(None, None, None)
    assert "OUTPUT_DIR is trained_model: it can't be written (" in stopped(capsys, folder, steps=5)
    after = digests(folder)
    assert after.keys() == before.keys()
    assert {name for name in before if after[name] != before[name]} == {"metrics.jsonl"}

    assert call_main(*flags, "--training-epochs", "5", "--resume") == 0
    again = digests(folder)
    assert (
        again["model.safetensors"] != before["model.safetensors"]
        and again["report.json"] != before["report.json"]
    )
    assert {path.name for path in (folder / "checkpoint").iterdir()} == {
        "lock",
        "state.safetensors",
    }
    AutoModelForCausalLM.from_pretrained(folder)


def test_a_disk_that_is_full_in_the_end_gets_back_what_was_written(
    call_main, fail, demo_model, tmp_path
):
    trouble = largest_file(2_000)
    fail("write_report", trouble)
    assert call_main("--model-name", demo_model, *FLAGS) == 1
    trouble.__exit__(None, None, None)
    folder = tmp_path / "trained_model" / "checkpoint"
    assert {path.name for path in folder.iterdir()} == {"lock", "state.safetensors"}


# --------------------------------------------------------------------------------------------------- too little memory
ERRORS = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_ERROR), MemoryError()]
REMEDY = "set MINI_BATCH_SIZE to 3, then EVAL_BATCH_SIZE to 20, then QUANTIZATION to 4bit, then BATCH_SIZE to 3"


@pytest.mark.parametrize(
    ("function", "call", "steps"), [("take_step", 1, 0), ("take_step", 3, 2), ("measure", 1, 4)]
)
@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_too_little_memory_names_settings_and_values(
    call_main, fail, demo_model, tmp_path, capsys, error, function, call, steps
):
    fail(function, error, call)
    assert call_main("--model-name", demo_model, *FLAGS) == 1
    reason = stopped(capsys, tmp_path / "trained_model", steps)
    assert reason == f"there is too little memory: {REMEDY}, then LORA_RANK to 8"


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_too_little_memory_for_the_model_is_no_fault_of_its_files(
    call_main, demo_model, monkeypatch, tmp_path, capsys, error
):
    def from_pretrained(*args, **kwargs):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    status = call_main("--model-name", demo_model, *FLAGS)
    err = capsys.readouterr().err
    assert "there is too little memory: " in err and "QUANTIZATION to 4bit" in err
    assert status == 1


def test_a_run_that_lacked_memory_goes_on_with_smaller_batches(call_main, fail, demo_model, capsys):
    flags = ["--model-name", demo_model, *FLAGS]
    fail("take_step", MemoryError(), call=3)
    assert call_main(*flags) == 1
    capsys.readouterr()
    assert call_main(*flags, "--mini-batch-size", "3", "--eval-batch-size", "20", "--resume") == 0
    lines = capsys.readouterr().out.splitlines()
    assert {
        "MINI_BATCH_SIZE is 3 from now on, 0 until now",
        "EVAL_BATCH_SIZE is 20 from now on, 40 until now",
    } <= {*lines}


@pytest.mark.parametrize(
    ("flags", "remedies"),
    [
        ("--batch-size 10", ["5", "20", "4bit", "5", "8"]),
        ("--batch-size 7 --quantization 8bit", ["1", "20", "4bit", "3", "8"]),
        ("--batch-size 12 --mini-batch-size 4 --quantization 4bit", ["3", "20", "", "6", "8"]),
        (
            "--batch-size 12 --mini-batch-size 1 --eval-batch-size 1 --lora-rank 1",
            ["", "", "4bit", "6", ""],
        ),
        (
            "--batch-size 1 --eval-batch-size 3 --quantization 4bit --lora-rank 3",
            ["", "1", "", "", "1"],
        ),
    ],
)
def test_the_remedy_for_too_little_memory(make_settings, flags, remedies):
    names = ("MINI_BATCH_SIZE", "EVAL_BATCH_SIZE", "QUANTIZATION", "BATCH_SIZE", "LORA_RANK")
    remedy = ", then ".join(f"{name} to {value}" for name, value in zip(names, remedies) if value)
    assert train_rlhf.memory_remedy(make_settings(*flags.split())) == f"set {remedy}"


def test_where_nothing_can_be_lowered_any_more_a_smaller_model_is_the_remedy(make_settings):
    flags = "--batch-size 1 --eval-batch-size 1 --quantization 4bit --lora-rank 1"
    assert (
        train_rlhf.memory_remedy(make_settings(*flags.split()))
        == "set MODEL_NAME to a smaller model"
    )


@pytest.mark.parametrize("batch_size", [1, 2, 7, 9, 10, 12])
def test_the_first_remedies_lead_to_an_end_and_are_settings_that_work(make_settings, batch_size):
    values = {"BATCH_SIZE": str(batch_size)}
    for _ in range(40):
        flags = [
            text
            for name, value in values.items()
            for text in ("--" + name.lower().replace("_", "-"), value)
        ]
        first = (
            train_rlhf.memory_remedy(make_settings(*flags)).removeprefix("set ").split(", then ")[0]
        )
        name, value = first.split(" to ")
        if name == "MODEL_NAME":
            return
        values[name] = value
    raise AssertionError(f"no end: {values}")


# ------------------------------------------------------------------------------------------------------------- output
ENDINGS = {"head": "| head -1", "closed": ">&-", "full": "> /dev/full"}


@pytest.fixture(scope="module")
def outputs(script, demo_model, tmp_path_factory):
    """Return runs whose output goes into a shell's dead ends: exit status, what was shown, folder."""
    folder = tmp_path_factory.mktemp("outputs")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    flags, processes, results = (
        " ".join(map(str, ["--model-name", demo_model, *FLAGS, "--training-epochs", "1"])),
        {},
        {},
    )
    for name, ending in ENDINGS.items():
        line = f"{sys.executable} {script} {flags} --output-dir {name} {ending}; exit ${{PIPESTATUS[0]}}"
        processes[name] = subprocess.Popen(
            *(["bash", "-c", line], -1, None, None, subprocess.PIPE, subprocess.PIPE),
            cwd=folder,
            env=environment,
            encoding="utf-8",
        )
    for name, process in processes.items():
        try:
            out, err = process.communicate(timeout=120)
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
    assert (
        run.err.startswith("\nStopped: the output can't be written (Broken pipe): ")
        and run.err.count("\n") == 2
    )


def test_without_an_output_the_run_goes_on_to_its_end(outputs):
    run = outputs["closed"]
    assert (run.status, run.out, run.err) == (0, "", "")
    assert (run.folder / "report.json").exists()


def test_a_device_that_is_full_ends_the_run(outputs):
    run = outputs["full"]
    assert run.status == 1
    assert run.err.startswith("\nStopped: ") and run.err.count("\n") == 2
    assert "No space left on device" in run.err


def test_a_device_that_is_full_is_not_output_dir(outputs):
    assert "OUTPUT_DIR" not in outputs["full"].err
