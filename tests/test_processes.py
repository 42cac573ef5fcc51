"""finetune/processes.py, and two processes that do the run which one does; then torchrun itself.

Most runs are children of the driver that forks, since importing takes seconds; those of torchrun
are processes of their own.
"""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import accelerate
import pytest
import torch
from fork_driver import environment
from helpers import digests, read_metrics
from safetensors.torch import load_file

from finetune import processes
from finetune.checkpoint import read_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs the signals of Linux")

STEPS = 10
PROMPTS = ["I feel so", "This makes me", "I am really", "Today I am", "Life is"]
FLAGS = ["--device", "cpu", "--batch-size", "6", "--max-new-tokens", "8", "--scale-samples", "15"]
FLAGS += ["--prompts", *PROMPTS, "--eval-prompts", "My day was", "--eval-samples", "15"]
FLAGS += ["--training-epochs", "12", "--save-every", "0", "--output-dir", "out"]
# Of a single sample one of two processes has nothing to do.
SHORT = ["--training-epochs", "3", "--eval-samples", "1"]

# The reward also writes down the weights of each process, and fails where it is told to; at the end
# the main process keeps a thread of the other waiting, if it is told to.
REWARD = """
import os
import time
from pathlib import Path

import torch
import train_rlhf
from finetune.checkpoint import trained_weights

rank, failing = os.environ.get("RANK", "0"), os.environ.get("FAILING_CALL")
held = torch.zeros(1)
calls, measure_and_save, wait = [], train_rlhf.measure_and_save, time.sleep


def save_weights_and_measure(learner, *others):
    torch.save(trained_weights(learner.policy), f"weights-{rank}.pt")
    measure_and_save(learner, *others)
    if "LATE" in os.environ:
        wait(2 if rank == "0" else 0)
        work = torch.distributed.all_reduce(held, async_op=True)
        if rank == "0":
            work.wait()


def wait_until_told(seconds):
    Path(f"waits-{rank}").write_text(str(seconds))
    while not Path("waited-enough").exists():
        wait(0.02)


def some_letters(prompts, completions, **kwargs):
    calls.append(len(prompts))
    if failing and len(calls) >= int(failing) and rank == "1":
        time.sleep = wait_until_told
        raise OSError("the judge is asleep")
    return [len(set(text.lower()) & set("aeinorst")) for text in completions]


train_rlhf.measure_and_save = save_weights_and_measure
"""


# ------------------------------------------------------------------- one process by itself
def test_a_processor_is_named_with_its_threads(monkeypatch):
    for threads, name in (1, "CPU with 1 thread"), (4, "CPU with 4 threads"):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert processes.device_name(torch.device("cpu")) == name
    monkeypatch.setattr(accelerate, "PartialState", lambda: SimpleNamespace(num_processes=3))
    assert processes.device_name(torch.device("cpu")) == "3 processes, each CPU with 4 threads"


@pytest.mark.parametrize(
    ("cores", "launched", "given", "threads"),
    [(6, "2", None, [3]), (1, "2", None, [1]), (2, "2", "7", [7]), (6, None, None, [])],
)
def test_processes_of_a_machine_share_its_cores(monkeypatch, cores, launched, given, threads):
    taken = []
    for name, value in ("LOCAL_WORLD_SIZE", launched), ("OMP_NUM_THREADS", given):
        monkeypatch.setenv(name, value or "")
        if value is None:
            monkeypatch.delenv(name)
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    monkeypatch.setattr(torch, "set_num_threads", taken.append)
    assert processes.join_processes("cpu") == torch.device("cpu")
    assert taken == threads
    # Libraries that are loaded later find there how many threads to take.
    assert os.environ.get("OMP_NUM_THREADS") == (str(*threads) or None)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


# -------------------------------------------------------------------------------- the runs
def variables(port, rank):
    """Return what torchrun puts into the environment of one of two processes."""
    ours = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    ours |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return {name: str(value) for name, value in ours.items()}


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def flags(demo_model, tmp_path_factory):
    """Return the flags of every run; its files lie in the folder where it is started."""
    reward = tmp_path_factory.mktemp("reward") / "reward.py"
    reward.write_text(REWARD)
    return ["--model-name", str(demo_model), "--reward", f"{reward}:some_letters", *FLAGS]


@pytest.fixture(scope="module")
def start(start_script, flags):
    """Start so many processes in a folder; one of them is sent the signals."""

    def start_all(count, folder, *more, signals=(), signalled=1, **environment):
        folder.mkdir(exist_ok=True)
        port, children = free_port(), []
        for rank in range(count):
            own = variables(port, rank) if count > 1 else {}
            sent = signals if rank == signalled % count else ()
            options = own | environment | {"signals": sent}
            children.append(start_script(folder, *flags, *more, **options))
        return children

    return start_all


def end_as_launched(children):
    """Return how the processes of a run ended; as by a launcher all end where the first fails."""
    main, *others = children
    ended = [main.end()]
    for other in others:
        if ended[0].status:
            other.send_signal(signal.SIGTERM)
        ended.append(other.end())
    return ended


@pytest.fixture(scope="module")
def run(start):
    """Do a run to its end; return its folder and how each of its processes ended."""

    def run_all(*args, **options):
        ended = end_as_launched(start(*args, **options))
        return SimpleNamespace(out=args[1] / "out", folder=args[1], ended=ended)

    return run_all


@pytest.fixture(scope="module")
def one(run, tmp_path_factory):
    """Return the end of a whole run of one process."""
    return check_success(run(1, tmp_path_factory.mktemp("one")))


@pytest.fixture(scope="module")
def two(run, tmp_path_factory):
    """Return the end of the same run of two processes."""
    return check_success(run(2, tmp_path_factory.mktemp("two")))


def check_success(result):
    for ended in result.ended:
        assert (ended.status, ended.stderr) == (0, "")
    return result


def read_report(out):
    return json.loads((out / "report.json").read_text())


def read_samples(out):
    lines = (out / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def check_same_run(out, other, steps=STEPS):
    """Check that two finished runs had so many steps, and the same samples and metrics."""
    metrics, others = read_metrics(out), read_metrics(other)
    assert len(metrics) == len(others) == steps
    for record, wanted in zip(metrics, others):
        for name in ("learning_rate", "approx_kl"):  # which are far smaller than the others
            assert record.pop(name) == pytest.approx(wanted.pop(name), rel=2e-2, abs=1e-6)
        assert record == about(wanted)
    samples, others = read_samples(out), read_samples(other)
    assert len(samples) == len(others)
    for sample, wanted in zip(samples, others):
        assert sample.pop("kl") == pytest.approx(wanted.pop("kl"), abs=1e-4)
        check_same_tokens(sample.pop("tokens"), wanted.pop("tokens"))
        assert sample == wanted


def check_same_tokens(tokens, others):
    """Check that the figures of each token are the same, to rounding, whichever process had it."""
    assert tokens.pop("text") == others.pop("text")
    assert tokens.keys() == others.keys()
    for name, numbers in tokens.items():
        assert numbers == pytest.approx(others[name], rel=1e-2, abs=1e-3), name


def check_same_report(out, other):
    """Check that two reports have the same figures, to rounding."""
    report, wanted = read_report(out), read_report(other)
    assert report["scale"] == about(wanted["scale"])
    settings = [each["settings"] | {"resume": False} for each in (report, wanted)]
    assert settings[0] == settings[1]
    for name in ("learned", "close_to_base", "samples", "dtype", "chat"):
        assert report[name] == wanted[name]
    for model in ("base", "trained"):
        for prompts, figures in report[model].items():
            expected = wanted[model][prompts]
            assert figures.pop("first_sample") == expected.pop("first_sample")
            assert figures == about(expected)


def about(figures):
    """Return what is equal to the same figures, to rounding; some may be None."""
    return {
        name: figure if figure is None else pytest.approx(figure, rel=1e-4, abs=1e-4)
        for name, figure in figures.items()
    }


# --------------------------------------------------------------- the same as of one process
def test_two_processes_draw_the_same_responses_and_learn_the_same_from_them(one, two):
    assert len(set(map(str, read_samples(one.out)))) > STEPS
    check_same_run(two.out, one.out)
    # It moved: what was compared is not the base model.
    assert read_metrics(one.out)[-1]["kl"] > 0.05


@pytest.mark.parametrize(
    "more",
    [
        ["--batch-size", "5"],
        ["--mini-batch-size", "3", "--gradient-checkpointing"],
        ["--mini-batch-size", "2", "--ppo-epochs", "3", "--no-score-prefixes"],
    ],
    ids=["uneven", "uneven minibatches", "minibatches"],
)
def test_two_processes_learn_the_same_however_a_batch_is_divided(run, tmp_path, more):
    results = [run(count, tmp_path / str(count), *SHORT, *more) for count in (1, 2)]
    one, two = map(check_success, results)
    check_same_run(two.out, one.out, steps=3)
    check_same_report(two.out, one.out)
    assert read_report(one.out)["base"]["eval_prompts"]["samples"] == 1


def test_two_processes_measure_the_same_and_save_the_same_model(one, two):
    check_same_report(two.out, one.out)
    report = read_report(two.out)
    assert report["base"]["train_prompts"]["samples"] == 15  # which two can't share evenly
    assert report["scale"]["deviation"] != 1  # of samples that were shared out too
    assert report["device"] == "2 processes, each CPU with 1 thread"
    model, wanted = (load_file(result.out / "model.safetensors") for result in (two, one))
    base = load_file(report["settings"]["model_name"] + "/model.safetensors")
    assert model.keys() == wanted.keys()
    for name, weight in model.items():
        torch.testing.assert_close(weight, wanted[name], atol=1e-4, rtol=0)
    moved = [(wanted[name] - base[name].float()).abs().max().item() for name in base]
    assert max(moved) > 1e-3


def test_both_processes_end_with_the_same_weights(two):
    weights, others = (torch.load(two.folder / f"weights-{rank}.pt") for rank in (0, 1))
    saved = read_checkpoint(two.out)["weights"]
    assert weights.keys() == others.keys() == saved.keys()
    assert any("v_head" in name for name in weights) and any("lora" in name for name in weights)
    for name, weight in weights.items():
        assert torch.equal(weight, others[name]) and torch.equal(weight, saved[name]), name


def test_only_the_main_process_prints_and_writes(one, two):
    main, other = two.ended
    assert (other.stdout, other.stderr) == ("", "")
    assert {len(note.split()) for note in other.notes} == {1}  # phases it went through, no file
    # The page is written beside itself, in a file with the number of the process in its name.
    written = [
        {re.sub(r"[.]\d+[.]", ".", note) for note in ended.notes} for ended in (main, *one.ended)
    ]
    assert written[0] == written[1]
    assert main.stdout.count("Model     ") == main.stdout.count("Scale     ") == 1
    assert sum(line.startswith("step ") for line in main.stdout.splitlines()) == STEPS // 5
    assert digests(two.out).keys() == digests(one.out).keys()


def test_a_process_ends_whatever_a_thread_of_its_group_still_has_to_do(start, tmp_path):
    """Such a thread needs Python's lock to let go of a tensor, and is waited for at the end."""
    children = start(2, tmp_path, *SHORT, LATE="1")
    outputs = [child.communicate(timeout=60) for child in children]
    assert [child.returncode for child in children] == [0, 0], outputs


# ---------------------------------------------------------------------- stops and failures
def check_stopped(stopped, number, steps):
    """Check that a signal stopped both processes after a step, and that it was told once."""
    main, other = stopped.ended
    assert main.status == 128 + number
    assert other.status == -signal.SIGTERM  # it waited, until this test ended it as a launcher
    assert main.stderr.count("Stopped: ") == 1
    told = f"\nStopped: by a signal; what was learned up to step {steps} is saved. "
    assert main.stderr.endswith(f"{told}To go on, run the same line with --resume\n")
    assert (other.stdout, other.stderr) == ("", "")
    assert len(read_checkpoint(stopped.out)["metrics"]) == steps


@pytest.mark.parametrize("rank", [0, 1])
def test_ctrl_c_in_one_process_stops_both(run, tmp_path, rank):
    stopped = run(2, tmp_path, signals=[(2, signal.SIGINT)], signalled=rank)
    check_stopped(stopped, signal.SIGINT, 2)
    asked = stopped.ended[0].stderr.count("Stopping after this step; once more to stop at once")
    assert asked == (rank == 0)


def test_one_process_goes_on_where_two_were_stopped_by_a_signal_to_the_other(run, one, tmp_path):
    stopped = run(2, tmp_path, signals=[(6, signal.SIGTERM)])
    check_stopped(stopped, signal.SIGTERM, 6)
    check_success(run(1, tmp_path, "--resume"))
    check_same_run(stopped.out, one.out)
    check_same_report(stopped.out, one.out)


def test_two_processes_go_on_where_one_stopped(run, one, tmp_path):
    stopped = run(1, tmp_path, signals=[(4, signal.SIGTERM)])
    assert stopped.ended[0].status == 128 + signal.SIGTERM
    assert len(read_checkpoint(stopped.out)["metrics"]) == 4
    check_success(run(2, tmp_path, "--resume"))
    check_same_run(stopped.out, one.out)
    check_same_report(stopped.out, one.out)


def test_a_reward_that_fails_in_one_process_ends_both(start, tmp_path):
    # One call tries it, one measures the scale, and each step asks once.
    main, other = start(2, tmp_path, FAILING_CALL="6")
    ended = main.end()
    assert other.poll() is None
    assert 5 < float((tmp_path / "waits-1").read_text()) < 30  # after which torchrun would kill it
    assert other.read("stderr") == ""  # until then only the main one has told
    (tmp_path / "waited-enough").touch()
    assert (ended.status, other.end().status) == (1, 1)
    told, _, saved = ended.stderr.partition("; ")
    assert other.read("stdout") == "" and other.read("stderr").startswith(f"{told}; ")
    assert told.startswith("\nStopped: REWARD is some_letters: OSError('the judge is asleep') for ")
    assert saved.startswith("what was learned up to step 3 is saved. To go on, run the same line")
    assert ended.stderr.count("\n") == 2
    state = read_checkpoint(tmp_path / "out")
    assert len(state["metrics"]) == 3
    assert all(weight.isfinite().all() for weight in state["weights"].values())


def test_a_bad_setting_is_told_once_and_both_end(start, tmp_path):
    main, other = start(2, tmp_path, "--batch-size", "1")
    ended = main.end()
    assert (ended.status, ended.stdout) == (2, "")
    told = "BATCH_SIZE is 1: give at least 2, a response for each process"
    assert ended.stderr == f"Nothing was started or changed:\n- {told}\n"
    other.send_signal(signal.SIGTERM)
    ended = other.end()
    assert (ended.stdout, ended.stderr) == ("", "")
    assert not (tmp_path / "out").exists()


# -------------------------------------------------------------------------------- torchrun
@pytest.fixture
def start_torchrun(script, flags, tmp_path):
    """Start torchrun with two processes, in a process group of its own."""
    launchers = []

    def start_group(*more):
        line = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        with open(tmp_path / "stdout", "wb") as out, open(tmp_path / "stderr", "wb") as err:
            launcher = subprocess.Popen(
                [*line, "--nproc-per-node", "2", script, *flags, *more],
                cwd=tmp_path,
                env=environment(tmp_path),
                stdout=out,
                stderr=err,
                start_new_session=True,
            )
        launchers.append(launcher)
        return launcher

    yield start_group
    for launcher in launchers:
        if launcher.poll() is None:
            for workers in Path("/proc", str(launcher.pid), "task").glob("*/children"):
                for worker in map(int, workers.read_text().split()):
                    os.kill(worker, signal.SIGKILL)  # which it started in sessions of their own
            launcher.kill()
            launcher.wait()


def wait_for(condition, process):
    """Wait until something is so, as long as the process lives and for some minutes at most."""
    deadline = time.monotonic() + 240
    while True:
        # A process may do it and end between two looks: so the end is looked for first.
        has_ended = process.poll() is not None
        if condition():
            return
        assert not has_ended and time.monotonic() < deadline
        time.sleep(0.05)


def test_torchrun_does_a_run_to_its_end(start_torchrun, one, tmp_path):
    launcher = start_torchrun()
    assert launcher.wait(timeout=240) == 0, (tmp_path / "stderr").read_text()
    check_same_run(tmp_path / "out", one.out)
    check_same_report(tmp_path / "out", one.out)
    out = (tmp_path / "stdout").read_text()
    assert out.count("Model     ") == out.count("To load it:") == 1


def test_a_signal_to_all_of_torchrun_leaves_a_checkpoint(start_torchrun, tmp_path):
    launcher = start_torchrun("--training-epochs", "10000")
    out, err = tmp_path / "out", tmp_path / "stderr"
    wait_for(lambda: (out / "metrics.jsonl").exists() and len(read_metrics(out)) > 3, launcher)
    os.killpg(launcher.pid, signal.SIGINT)
    wait_for(lambda: "Stopped: " in err.read_text(), launcher)
    steps = len(read_checkpoint(out)["metrics"])
    assert steps == len(read_metrics(out)) > 3
    assert err.read_text().count("Stopped: ") == 1
    told = f"Stopped: by a signal; what was learned up to step {steps} is saved. To go on"
    assert told in err.read_text()


# ---------------------------------------------------------------- others that do not come
WAIT = """
import sys
sys.path.insert(0, {root!r})
from finetune import command, processes
with command.stop_on_signal():
    import torch
    with processes.waiting_for_others(patience=0.2):
        torch.distributed.init_process_group("gloo")
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_process_that_waits_for_others_says_so_and_ends_on_a_signal(number):
    """What waits is no Python, so that its handlers of signals are not called meanwhile."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = str(server.getsockname()[1])
    launch = {"WORLD_SIZE": "3", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    child = subprocess.Popen(
        [sys.executable, "-c", WAIT.format(root=str(Path(__file__).parent.parent))],
        env=os.environ | launch,
        stderr=subprocess.PIPE,
        text=True,
    )
    line = child.stderr.readline()
    assert line == f"Waiting for 2 other processes at 127.0.0.1, port {port}; Ctrl-C ends it\n"
    child.send_signal(number)
    assert child.wait(timeout=20) == 128 + number
    assert "Stopped: by a signal, while it waited for other processes" in child.stderr.read()
