"""The folder that a run leaves: nobody else's, whole whatever happens, with a report of the run."""

import importlib.metadata
import importlib.util
import itertools
import os
import resource
import shutil
import stat
import subprocess
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from helpers import digests, read_metrics
from transformers import AutoModelForCausalLM

import train_rlhf
from finetune import evaluation, measurement, output
from finetune.checkpoint import read_checkpoint, write_state
from finetune.errors import SettingsError
from finetune.output import claim_output, describe_run, whole_results

FLAGS = ["--device", "cpu", "--ppo-epochs", "1", "--target-approx-kl", "0", "--save-every", "1"]
FLAGS += ["--batch-size", "6", "--max-new-tokens", "4", "--eval-samples", "6"]
FLAGS += ["--training-epochs", "4"]  # which are as many steps
METRICS = [{"samples": 6, "seconds": 2.0, "score": -1.0, "success_rate": 0.0, "kl": 0.0}]
WHOLE = {"checkpoint/lock", "checkpoint/state.pt"}  # of a checkpoint's folder
SAVED = "what was learned up to step 3 is saved. To go on, run the same line with --resume"


@pytest.fixture
def out(tmp_path, monkeypatch):
    """Return the name of an output folder, in a current folder that is empty."""
    monkeypatch.chdir(tmp_path)
    return "out"


def write_files(folder, **texts):
    for name, text in texts.items():
        Path(folder, name).write_text(text)


def names_in(folder):
    return sorted(path.name for path in Path(folder).iterdir())


# ------------------------------------------------------------------ a folder of its own
def test_an_earlier_run_is_moved_aside_and_not_deleted(out, capsys):
    for number in range(3):
        with claim_output(out, resume=False):
            assert digests(Path(out)).keys() == {"checkpoint/lock"}
            write_files(out, metrics=f"run {number}")
    assert names_in(".") == ["out", "out-1", "out-2"]
    texts = [Path(folder, "metrics").read_text() for folder in ("out-1", "out-2", "out")]
    assert texts == ["run 0", "run 1", "run 2"]
    lines = [f"The earlier run in out/ was moved to out-{number}/\n" for number in (1, 2)]
    assert capsys.readouterr().out == "".join(lines)


def test_a_run_that_goes_on_finds_all_but_what_a_killed_one_left_unfinished(out, capsys):
    Path(out, "checkpoint", "new", "adapter").mkdir(parents=True)
    write_files(f"{out}/checkpoint/new", torn="half")
    write_files(f"{out}/checkpoint/new/adapter", torn="half")
    write_files(out, metrics="of the first steps")
    with claim_output(out, resume=True):
        assert names_in(f"{out}/checkpoint/new") == []
        assert Path(out, "metrics").read_text() == "of the first steps"
    assert digests(Path(out)).keys() == {"checkpoint/lock", "metrics"}
    assert not Path(out, "checkpoint", "new").exists()
    assert (names_in("."), capsys.readouterr().out) == (["out"], "")


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_where_another_run_is_writing_is_refused_and_left_alone(out, capsys, resume):
    line = "OUTPUT_DIR is out: another run is writing there: name another folder"
    with claim_output(out, resume=False):
        write_files(out, metrics="of that run")
        before = digests(Path(out))
        with pytest.raises(SettingsError) as error, claim_output(out, resume):
            pass
        assert error.value.args == (line,)
        assert digests(Path(out)) == before
        assert Path(out, "checkpoint", "new").exists()
    with claim_output(out, resume=True):  # it is free again
        assert (names_in("."), capsys.readouterr().out) == (["out"], "")


def test_what_ends_a_run_is_told_what_is_saved(out):
    for steps, notes in ([], []), ([3], [SAVED]):
        with pytest.raises(ZeroDivisionError) as error, claim_output(out, resume=True):
            for count in steps:
                write_state({"metrics": METRICS * count}, out)
            1 / 0  # noqa: B018
        assert getattr(error.value, "__notes__", []) == notes


def test_only_the_main_process_claims_the_folder(out, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with claim_output(out, resume=False):
        assert names_in(".") == []


# -------------------------------------------------------------------------- the results
def test_results_come_all_at_once_for_everybody_to_read(out):
    os.makedirs(f"{out}/adapter")
    write_files(out, metrics="stays", report="of the last model")
    write_files(f"{out}/adapter", lora="of the last model")
    with claim_output(out, resume=True), whole_results(out) as folder:
        before = digests(Path(out))
        os.makedirs(folder / "templates")
        write_files(folder, README="for the mode", report="new", model="new")
        (folder / "README").rename(folder / "README.md")
        write_files(folder / "templates", chat="new")
        (folder / "model").chmod(0o600)  # as safetensors leaves it
        changed = {name for name, digest in before.items() if digests(Path(out))[name] != digest}
        assert changed == set()  # until the block ends
    files = "README.md checkpoint/lock metrics model report templates/chat"
    assert sorted(digests(Path(out))) == files.split()  # no adapter of a model that is gone
    assert Path(out, "report").read_text() == Path(out, "model").read_text() == "new"
    modes = {stat.S_IMODE(Path(out, name).stat().st_mode) for name in ("model", "README.md")}
    assert len(modes) == 1 and modes != {0o600}


def test_where_results_fail_none_of_them_comes(out):
    os.makedirs(f"{out}/adapter")
    write_files(out, report="of the last model")
    write_files(f"{out}/adapter", lora="of the last model")
    before = digests(Path(out))
    with pytest.raises(OSError), claim_output(out, resume=True), whole_results(out) as folder:
        write_files(folder, report="new")
        raise OSError("the disk is full")
    after = digests(Path(out))
    after.pop("checkpoint/lock")
    assert after == before
    assert not Path(out, "checkpoint", "new").exists()  # its room is given back


# ------------------------------------------------------------------------ the full disk
@contextmanager
def largest_file(size):
    """Let no file grow beyond that size: what a full disk looks like to a program."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))


@contextmanager
def filled_up(folder, left):
    """Fill the disk up to so many bytes."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    (folder / "filler").write_bytes(b"\0" * (free - left))
    try:
        yield
    finally:
        (folder / "filler").unlink()


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


@pytest.fixture
def during():
    """Let a function do its work in a context, at the call with that number and from then on."""

    @contextmanager
    def watch(owner, name, trouble, call=1):
        function, count = getattr(owner, name), itertools.count(1)
        with pytest.MonkeyPatch.context() as patch, ExitStack() as entered:

            def spoiled(*args, **kwargs):
                if next(count) == call:
                    entered.enter_context(trouble)
                return function(*args, **kwargs)

            patch.setattr(owner, name, spoiled)
            yield

    return watch


@pytest.fixture(scope="module")
def undisturbed(run_script, demo_model, tmp_path_factory):
    """Return the folder of a run that nothing stops."""
    folder = tmp_path_factory.mktemp("undisturbed")
    ended = run_script(folder, "--model-name", demo_model, *FLAGS, "--output-dir", "out")
    assert (ended.status, ended.stderr) == (0, "")
    return folder / "out"


def reason_of_stop(capsys, folder, steps):
    """Return why something could not be written, as the one line said that told of the stop."""
    told = capsys.readouterr().err
    saved = "there was nothing to save yet\n"
    if steps:
        saved = f"{SAVED.replace('step 3', f'step {steps}')}\n"
        state = read_checkpoint(folder)
        assert len(state["metrics"]) == steps
        assert all(weight.isfinite().all() for weight in state["weights"].values())
    start = "\nStopped: something can't be written ("
    remedy = f"make room in OUTPUT_DIR, {folder}, and let what is printed be read to its end"
    end = f"): {remedy}; {saved}"
    assert told.startswith(start) and told.endswith(end)
    assert told.count("\n") == 2
    return told.removeprefix(start).removesuffix(end)


@pytest.mark.parametrize("kind", ["checkpoint", "metrics", "disk"])
def test_a_disk_that_is_full_while_training_leaves_the_last_checkpoint_and_the_run_can_go_on(
    call_main, during, request, undisturbed, demo_model, tmp_path, capsys, kind
):
    place = request.getfixturevalue("disk") if kind == "disk" else tmp_path
    folder = place / "out"
    flags = ["--model-name", demo_model, "--output-dir", folder, *FLAGS]
    trouble = largest_file(1_000_000 if kind == "checkpoint" else 10)
    if kind == "disk":
        trouble = filled_up(place, 500_000)
    capsys.readouterr()
    with during(measurement, "make_record", trouble, call=3):
        assert call_main(*flags) == 1
    reason = "No space left on device" if kind == "disk" else "File too large"
    assert reason_of_stop(capsys, folder, steps=2) == reason
    logs = {"metrics.jsonl", "run.json", "samples.jsonl"}
    assert digests(folder).keys() == WHOLE | logs

    # The two that fail in a checkpoint are left alike, so one of them goes on.
    if kind != "checkpoint":
        assert call_main(*flags, "--resume") == 0
        assert read_metrics(folder) == read_metrics(undisturbed)
        for name in ("samples.jsonl", "model.safetensors"):
            assert digests(folder)[name] == digests(undisturbed)[name], name
        assert (folder / "report.json").exists()


def test_a_disk_that_is_full_from_the_start(call_main, during, demo_model, tmp_path, capsys):
    with during(measurement, "make_record", largest_file(0)):
        assert call_main("--model-name", demo_model, *FLAGS) == 1
    assert reason_of_stop(capsys, "trained_model", steps=0) == "File too large"


@pytest.mark.parametrize(
    ("name", "size"),
    [("save_model", 3_000_000), ("draw", 2_000), ("write_report", 1_000)],
    ids=["model", "picture", "report"],
)
def test_a_disk_that_is_full_in_the_end_leaves_an_earlier_model_as_it_was(
    build, make_learner, make_settings, during, undisturbed, name, size
):
    def save(more):
        with claim_output(settings.output_dir, resume=True):
            built = build(settings)
            scorer, scale = train_rlhf.load_reward(settings, built.rows, torch.device("cpu"))
            learner = make_learner(built, scorer, scale)
            evaluation.measure_and_save(learner, built.rows, [], METRICS * more)

    settings = make_settings("--eval-samples", "2", "--max-new-tokens", "2")
    folder = Path(settings.output_dir)
    shutil.copytree(undisturbed, folder)
    before = digests(folder)
    with (
        pytest.raises(Exception, match=r"File too large|os error 27"),
        during(evaluation, name, largest_file(size)),
    ):
        save(more=1)
    assert digests(folder) == before
    assert names_in(folder / "checkpoint") == ["lock", "state.pt"]  # the room is given back

    save(more=2)
    after = digests(folder)
    assert after.keys() == before.keys()
    changed = {"model.safetensors", "report.json", "training.png", "README.md"}
    assert changed <= {name for name in before if after[name] != before[name]}
    AutoModelForCausalLM.from_pretrained(folder)


# --------------------------------------------------------------------------- the report
def test_what_is_told_of_a_run(build, make_settings):
    settings = make_settings("--seed", "7")
    metrics = [{"samples": 8, "seconds": 1.0}, {"samples": 16, "seconds": 4.0}]
    model = build(settings).policy.pretrained_model
    report = describe_run(model, settings, metrics, ["one", "two"])
    assert 100 < report.pop("peak_memory_mb") < 10_000
    libraries = ("torch", "transformers", "trl", "peft", "accelerate")
    assert report == {
        "task": "text-generation",
        "tags": ["one", "two", "lora", "rlhf"],
        "encoder_decoder": False,
        "settings": settings.model_dump(),
        "versions": {name: importlib.metadata.version(name) for name in libraries},
        "device": "CPU with 1 thread",
        "dtype": "float32",
        "samples": 16,
        "seconds": 4.0,
        "samples_per_second": 4.0,
    }
    assert report["settings"]["seed"] == 7
    base = AutoModelForCausalLM.from_pretrained(settings.model_name)  # without an adapter
    report = describe_run(base, settings, metrics, ["one"], task="text-classification")
    assert (report["task"], report["tags"]) == ("text-classification", ["one", "rlhf"])


def test_where_nothing_tells_of_memory_the_report_says_null(monkeypatch):
    """As on Windows, which lacks that module."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert output.peak_memory(torch.device("cpu")) is None
