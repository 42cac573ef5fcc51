"""finetune/command.py: a script as a command, which starts at once and ends with a status."""

import errno
import io
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
from helpers import digests, refusals
from safetensors import SafetensorError

from finetune import command
from finetune.errors import RunError, SettingsError, Stopped

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ["train_rlhf", "train_sft", "train_reward_model", "make_instructions"]
SIGNALS = (signal.SIGINT, signal.SIGTERM)
NOTHING = "there was nothing to save yet"


# -------------------------------------------------------------------------------------- the start
LIBRARIES = {"accelerate", "datasets", "huggingface_hub", "numpy", "peft", "torch", "transformers"}
LIBRARIES |= {"trl"}
WRONG = {  # for each script flags, and the beginnings of the lines that tell what is wrong
    "train_rlhf": {
        "--colour": "--colour is no flag",
        "--gamma=2": "GAMMA is 2: give a number from 0 to 1",
        "--prompts=none.txt": "PROMPTS is none.txt: it can't be used (",
        "--mini-batch-size=3": "MINI_BATCH_SIZE is 3: give 0 or a divisor of BATCH_SIZE, 10",
        "--output-dir=..": "OUTPUT_DIR is ..: it can't be used (",
    },
    "train_sft": {
        "--data=none.jsonl": "DATA is none.jsonl: it can't be used (",
        "--report-to=x": "REPORT_TO is x: give any of tensorboard, wandb and trackio",
    },
    "train_reward_model": {
        "--max-length=1": "MAX_LENGTH is 1: give a whole number from 2 to 1000000",
        "--data=none.jsonl": "DATA is none.jsonl: it can't be used (",
    },
    "make_instructions": {
        "--seed-tasks=none.jsonl": "SEED_TASKS is none.jsonl: it can't be used (",
        "--output-dir=..": "OUTPUT_DIR is ..: it can't be used (",
    },
}


def start(name, folder, *flags):
    """Run a script; return status, stdout, stderr, the modules that it imported, and seconds."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    line = [sys.executable, "-X", "importtime", ROOT / f"{name}.py", *flags]
    done = subprocess.run(line, cwd=folder, capture_output=True, encoding="utf-8")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    lines, imports = [], set()
    for line in done.stderr.splitlines():
        if line.startswith("import time:"):
            imports.add(line.rpartition("|")[2].strip().partition(".")[0])
        else:
            lines.append(line)
    seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return done.returncode, done.stdout, "\n".join(lines), imports, seconds


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_does_not_wait_for_libraries(name, tmp_path):
    """They take seconds to import, and whoever looks up a flag wants none of them."""
    status, shown, message, imports, seconds = start(name, tmp_path, "-h", "--colour")
    assert (status, message) == (0, "")
    assert shown.startswith(f"usage: {name}.py [--flag VALUE …]")
    assert "\n--model-name = " in shown
    assert "argparse" in imports and not imports & LIBRARIES
    assert seconds < 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_bad_settings_are_told_before_libraries_are_loaded(name, tmp_path):
    (tmp_path / "a_file").write_text("")  # so that the folder above the next is no run's
    folder = tmp_path / "here"
    folder.mkdir()
    status, shown, message, imports, seconds = start(name, folder, *WRONG[name])
    assert shown == ""
    problems = refusals(status, message)
    assert len(problems) == len(WRONG[name])
    for beginning in WRONG[name].values():
        assert sum(problem.startswith(beginning) for problem in problems) == 1, beginning
    assert not imports & LIBRARIES
    assert seconds < 1


SLOW = "import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(60)\n"


@pytest.mark.parametrize(("name", "number"), [*zip(SCRIPTS, SIGNALS * 2)])
def test_a_stop_while_libraries_are_loaded_shows_no_stack_trace(name, number, tmp_path):
    (tmp_path / "torch.py").write_text(SLOW)  # which is found before the library
    row = {"prompt": "Hi", "completion": " you", "chosen": " you", "rejected": " me"}
    (tmp_path / "data.jsonl").write_text(json.dumps([row, row | {"prompt": "Oh"}]))
    data = [] if name in ("train_rlhf", "make_instructions") else ["--data", "data.jsonl"]
    process = subprocess.Popen(
        [sys.executable, ROOT / f"{name}.py", *data],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        encoding="utf-8",
    )
    while not (tmp_path / "importing").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    process.send_signal(number)
    told = f"\nStopped: by a signal; {NOTHING}\n"
    assert process.communicate(timeout=60) == ("", told)
    assert process.returncode == 128 + number


# ------------------------------------------------------------------------------------- its statuses
@pytest.fixture
def launch(read_settings, monkeypatch, capsys):
    """Launch a run; return status and stderr, after a look at whether signals are given back."""
    monkeypatch.setattr(command, "silence_libraries", lambda: None)

    def call(run, settings=None):
        before = [signal.signal(number, signal.SIG_DFL) for number in SIGNALS]
        try:
            status = command.launch(run, settings or read_settings("--output-dir", "out"))
            assert [signal.getsignal(number) for number in SIGNALS] == [signal.SIG_DFL] * 2
        finally:
            for number, handler in zip(SIGNALS, before):
                signal.signal(number, handler)
        output, message = capsys.readouterr()
        assert output == ""
        return status, message

    return call


def failing(error, note=None):
    """Return a run that ends with an error, with a note of what is saved."""

    def run(settings):
        if note:
            error.add_note(note)
        raise error

    return run


def test_a_run_that_is_done(launch, read_settings):
    ran = []
    assert launch(ran.append) == (0, "")
    assert ran == [read_settings("--output-dir", "out")]


def test_input_that_turns_out_to_be_bad(launch):
    status, message = launch(failing(SettingsError("A is 1: give 2", "B is 3: give 4")))
    assert refusals(status, message) == ["A is 1: give 2", "B is 3: give 4"]


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal(launch, number):
    told = f"\nStopped: by a signal; {NOTHING}\n"
    assert launch(lambda settings: signal.raise_signal(number)) == (128 + number, told)
    told = "\nStopped: by a signal; step 7 is saved\n"
    assert launch(failing(Stopped(number), "step 7 is saved")) == (128 + number, told)


FULL_DISK = OSError(errno.ENOSPC, "No space left on device")
RUST = SafetensorError("Error while serializing: IoError(Os { code: 27 })")
ROOM = "make room in OUTPUT_DIR, out, and let what is printed be read to its end"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (RunError("the score is no number: mend it"), "the score is no number: mend it"),
        (FULL_DISK, f"something can't be written (No space left on device): {ROOM}"),
        (RUST, f"something can't be written ({RUST}): {ROOM}"),
    ],
)
def test_a_failure_that_can_be_mended(launch, error, reason):
    assert launch(failing(error)) == (1, f"\nStopped: {reason}; {NOTHING}\n")
    saved = "what was learned up to step 7 is saved"
    assert launch(failing(error, saved)) == (1, f"\nStopped: {reason}; {saved}\n")


def test_the_end_of_another_process_is_no_bug_of_this_one(launch, monkeypatch):
    error = RuntimeError("[/gloo/transport/tcp/pair.cc] Connection closed by peer")
    with pytest.raises(RuntimeError):
        launch(failing(error))
    for name, value in {
        "WORLD_SIZE": "2",
        "RANK": "0",
        "MASTER_ADDR": "a",
        "MASTER_PORT": "1",
    }.items():
        monkeypatch.setenv(name, value)
    reason = "another process of this run has ended, and tells why"
    assert launch(failing(error)) == (1, f"\nStopped: {reason}; {NOTHING}\n")


def test_a_bug_keeps_its_traceback(launch):
    with pytest.raises(KeyError):
        launch(failing(KeyError("a bug")))


# -------------------------------------------------------------------------------- several processes
def test_a_process_that_is_not_the_main_one_shows_nothing(launch, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank, shown in ("1", ""), ("0", "what one says\n"):
        monkeypatch.setenv("RANK", rank)
        assert command.launch(lambda settings: print("what one says"), None) == 0
        assert capsys.readouterr() == (shown, "")


def test_a_process_that_is_not_the_main_one_lets_that_one_tell(launch, monkeypatch):
    waited, handlers = [], []

    def sleep(seconds):
        waited.append(seconds)
        handlers.append(signal.getsignal(signal.SIGINT))

    monkeypatch.setattr(command.time, "sleep", sleep)
    ends = [SettingsError("A"), RunError("B")]
    for error in ends:
        command.launch(failing(error), None)
    assert waited == []
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    handler = signal.getsignal(signal.SIGINT)
    for error in ends:
        command.launch(failing(error), None)
    signal.signal(signal.SIGINT, handler)
    assert waited == [8, 8]  # for a launcher ends all with the first that ends
    assert handlers == [signal.SIG_IGN] * 2


# -------------------------------------------------------------------------------------------- stops
@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_waits_for_the_end_of_a_step_and_a_second_does_not(number, capsys):
    before, reached = signal.getsignal(number), []
    for signals in (1, 2):
        with pytest.raises(Stopped) as stopped, command.stop_on_signal(after_step=True) as stop:
            for _ in range(signals):
                signal.raise_signal(number)
                reached.append(stop.requested)
        assert stopped.value.args == (number,)
        assert signal.getsignal(number) == before
    assert reached == [number, number]  # not a third time
    told = "\nStopping after this step; once more to stop at once\n"
    assert capsys.readouterr().err == told * 2


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_outside_of_training_stops_at_once(number):
    before, reached = signal.getsignal(number), []
    with pytest.raises(Stopped) as stopped, command.stop_on_signal():
        signal.raise_signal(number)
        reached.append("what comes after it")
    assert stopped.value.args == (number,)
    assert reached == []
    assert signal.getsignal(number) == before


def test_without_a_signal_nothing_is_raised():
    with command.stop_on_signal(after_step=True) as stop:
        pass
    assert stop.requested == 0


def test_what_a_launcher_passes_on_is_no_second_signal(monkeypatch):
    """All processes of a terminal get Ctrl-C, and within two seconds once more by the launcher."""
    now, waits = [100.0], []
    monkeypatch.setattr(command.time, "monotonic", lambda: now[0])
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(Stopped), command.stop_on_signal(after_step=True) as stop:
        for wait in (0, 1.9, 2):
            now[0] += wait
            signal.raise_signal(signal.SIGINT)
            waits.append(wait)
            assert stop.requested == signal.SIGINT
    assert waits == [0, 1.9]  # the last one has stopped it at once


# --------------------------------------------------------------------------------------- the screen
def test_a_screen_that_lacks_signs_shows_others(monkeypatch):
    narrow = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", narrow)
    command.prepare_screen()
    print("a smile: ☺", flush=True)
    assert narrow.buffer.getvalue() == b"a smile: ?\n"
    monkeypatch.setattr(sys, "stdout", io.StringIO())  # a notebook's, which needs none of this
    command.prepare_screen()
    assert str(10**5000)  # numbers of any length are shown, too


def test_what_libraries_say_of_themselves_is_silenced_by_name():
    with warnings.catch_warnings(record=True) as shown:
        warnings.simplefilter("always")
        command.silence_libraries()
        warnings.warn("`PPOTrainer` is deprecated and will be removed", stacklevel=1)
        warnings.warn("No dataset is provided", stacklevel=1)
        warnings.warn("a reward function's own", stacklevel=1)
        with pytest.raises(UserWarning):  # an adapter that could not be merged
            warnings.warn("Found missing adapter keys while loading", stacklevel=1)
    assert [str(warning.message) for warning in shown] == ["a reward function's own"]


# ---------------------------------------------------------------------------------- whole programs
def test_a_refusal_after_loading_everything_is_all_that_the_screen_shows(
    run_script, demo_model, tmp_path
):
    result = run_script(tmp_path, "--model-name", demo_model, "--lora-targets", "x_proj")
    assert result.stdout == ""
    (problem,) = refusals(result.status, result.stderr)
    assert problem.startswith("LORA_TARGETS is ['x_proj']: ")
    assert list(tmp_path.iterdir()) == []


# Runs the program that it is given as python does, and writes down what Python opens meanwhile.
WATCHER = """
import os, runpy, sys
def note(event, args):
    if event == "open":
        print(args[0], file=opened)
opened = open("../opened.txt", "w", buffering=1)
sys.addaudithook(note)
del sys.argv[0]
sys.path[0] = os.path.dirname(sys.argv[0])
runpy.run_path(sys.argv[0], run_name="__main__")
"""
TWO_STEPS = ["--training-epochs", "1", "--batch-size", "3", "--eval-samples", "6"]


def test_the_script_and_the_folder_run_wherever_they_are(run_script, script, demo_model, tmp_path):
    folder, watcher = tmp_path / "elsewhere", tmp_path / "watcher.py"
    watcher.write_text(WATCHER)
    leave_out = shutil.ignore_patterns("__pycache__")
    shutil.copytree(script.parent / "finetune", folder / "finetune", ignore=leave_out)
    shutil.copytree(demo_model, folder / "a_model", ignore=leave_out)
    copy = shutil.copy(script, folder)
    before = digests(folder)
    flags = ["--model-name", "a_model", "--device", "cpu", *TWO_STEPS]
    done = run_script(folder, copy, *flags, script=watcher)
    assert (done.status, done.stderr) == (0, "")

    after = digests(folder)
    assert before.items() <= after.items()
    assert {path.partition("/")[0] for path in after.keys() - before.keys()} == {"trained_model"}
    report = json.loads((folder / "trained_model" / "report.json").read_text())
    assert report["samples"] == 6

    opened = (tmp_path / "opened.txt").read_text().splitlines()
    assert any(path.endswith("elsewhere/finetune/settings.py") for path in opened)
    libraries = (sys.prefix, sys.base_prefix)  # which a user may have in a clone's .venv
    ours = [path for path in opened if path.startswith(f"{ROOT}/")]
    assert [path for path in ours if not path.startswith(libraries)] == []


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1"])
def test_a_closed_terminal_and_a_warning_scheduler_stop_a_run_as_sigterm_does(name):
    number = getattr(signal, name)
    # The tests themselves may have been started by nohup.
    handler = signal.signal(number, signal.SIG_DFL)
    try:
        with pytest.raises(Stopped) as error, command.stop_on_signal(after_step=True) as stop:
            signal.raise_signal(number)
            assert stop.requested == number
        assert error.value.args == (number,)
    finally:
        signal.signal(number, handler)


def test_where_nohup_lets_a_closed_terminal_be_ignored_it_is():
    handler = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with command.stop_on_signal(after_step=True) as stop:
            signal.raise_signal(signal.SIGHUP)
            assert stop.requested == 0
    finally:
        signal.signal(signal.SIGHUP, handler)


def test_a_signal_that_comes_while_processes_agree_is_heard_the_next_time(monkeypatch):
    """It was lost: what they had agreed on was written over it."""
    stop = command.Stop(after_step=True)

    def interrupted(numbers):
        if not stop.heard:
            stop.handle(signal.SIGINT, None)
        return numbers

    monkeypatch.setattr("accelerate.utils.gather_object", interrupted)
    stop.agree()
    assert stop.requested == 0  # the others do not know of it yet
    stop.agree()
    assert stop.requested == signal.SIGINT
