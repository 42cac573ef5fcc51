"""The two stages before PPO on two processes: what one process does, and written once."""

import signal
import sys
from types import SimpleNamespace

import pytest
from helpers import read_metrics
from safetensors.torch import load_file
from test_examples import write
from test_processes import (
    about,
    check_success,
    end_as_launched,
    free_port,
    read_report,
    variables,
)
from test_stages import examples_of
from torch.testing import assert_close

from finetune.checkpoint import read_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs the signals of Linux")

STEPS = 20
# Of 24 rows the last step takes what the first took before. 3 of 27 rows are held out, which two
# can't share evenly.
FLAGS = ["--device", "cpu", "--dtype", "float32", "--batch-size", "4", "--training-epochs", "3.3"]
FLAGS += ["--learning-rate", "3e-3", "--lora-rank", "2", "--eval-every", "5", "--save-every", "0"]
FLAGS += ["--output-dir", "out"]
FLAGS_OF = {"train_sft": ["--max-new-tokens", "3"], "train_reward_model": []}


@pytest.fixture(scope="module", params=FLAGS_OF)
def run(request, start_script, demo_model, tmp_path_factory):
    """Do a run of one of the scripts on so many processes; return how each of them ended."""
    data = tmp_path_factory.mktemp(request.param) / "rows.json"
    write(data, examples_of(request.param))
    flags = ["--model-name", str(demo_model), "--data", str(data), *FLAGS]

    def run_all(count, folder, *more, signals=()):
        folder.mkdir(exist_ok=True)
        port, children = free_port(), []
        for rank in range(count):
            own = variables(port, rank) if count > 1 else {}
            own["signals"] = signals if rank == count - 1 else ()
            own["script"] = request.param
            children.append(start_script(folder, *flags, *FLAGS_OF[request.param], *more, **own))

        ended = end_as_launched(children)
        return SimpleNamespace(out=folder / "out", ended=ended, name=request.param)

    return run_all


@pytest.fixture(scope="module")
def one(run, tmp_path_factory):
    """Return the end of a whole run of one process."""
    return check_success(run(1, tmp_path_factory.mktemp("one")))


@pytest.fixture(scope="module")
def two(run, tmp_path_factory):
    """Return the end of the same run of two processes."""
    return check_success(run(2, tmp_path_factory.mktemp("two")))


def check_same_run(result, wanted, steps=STEPS):
    """Check that two runs had the same losses, the same figures and the same model, to rounding."""
    metrics, others = read_metrics(result.out), read_metrics(wanted.out)
    assert len(metrics) == len(others) == steps
    for record, other in zip(metrics, others):
        assert record == about(other)

    report, other = read_report(result.out), read_report(wanted.out)
    for model in ("base", "trained"):
        assert report[model].keys() == other[model].keys()
        for name in ("first_sample", "calibration"):
            figures, expected = report[model].pop(name, {}), other[model].pop(name, {})
            assert len(figures) == len(expected)
        assert report[model] == about(other[model])

    weights, others = (load_file(end.out / "model.safetensors") for end in (result, wanted))
    assert weights.keys() == others.keys()
    for name, weight in weights.items():
        assert_close(weight, others[name], atol=1e-4, rtol=0)


def test_two_processes_learn_the_same_as_one(one, two):
    check_same_run(two, one)
    # It moved: what was compared is not the base model.
    report = read_report(one.out)
    assert report["trained"]["loss"] < report["base"]["loss"] - 0.05
    assert read_report(two.out)["device"] == "2 processes, each CPU with 1 thread"
    answers = [read_report(end.out)["trained"]["first_sample"].keys() for end in (one, two)]
    assert answers[0] == answers[1] or one.name == "train_reward_model"


@pytest.mark.parametrize(
    "more",
    [
        ["--mini-batch-size", "2", "--gradient-checkpointing"],
        ["--no-group-by-length", "--batch-size", "6"],
    ],
    ids=["minibatches", "batches"],
)
def test_however_a_batch_is_divided(run, tmp_path, more):
    short = ["--training-epochs", "0.8", *more]
    results = [check_success(run(count, tmp_path / str(count), *short)) for count in (1, 2)]
    steps = 4 if "6" in more else 5
    check_same_run(results[1], results[0], steps=steps)


def test_only_the_main_process_prints_and_writes(one, two):
    main, other = two.ended
    assert (other.stdout, other.stderr) == ("", "")
    assert {len(note.split()) for note in other.notes} == {1}  # phases it went through, no file
    assert main.stdout.count("Model     ") == 1
    assert {path.name for path in two.out.rglob("*")} == {path.name for path in one.out.rglob("*")}


@pytest.mark.parametrize(("first", "second"), [(2, 1), (1, 2)])
def test_another_number_of_processes_goes_on(run, one, tmp_path, first, second):
    stopped = run(first, tmp_path, signals=[(7, signal.SIGTERM)])
    main, *others = stopped.ended
    assert main.status == 128 + signal.SIGTERM
    assert main.stderr.count("Stopped: by a signal; what was learned up to step 7 is saved") == 1
    assert all(other.stderr == "" for other in others)
    assert len(read_checkpoint(stopped.out)["metrics"]) == 7
    check_success(run(second, tmp_path, "--resume"))
    check_same_run(stopped, one)


def test_a_batch_that_the_processes_can_not_share_evenly_is_refused(run, tmp_path):
    flags = ["--batch-size", "9", "--mini-batch-size", "3"]
    main, other = run(2, tmp_path, *flags).ended
    remedy = "give a multiple of 2, the number of processes"
    assert main.stderr == f"Nothing was started or changed:\n- MINI_BATCH_SIZE is 3: {remedy}\n"
    assert (main.status, main.stdout, other.stdout, other.stderr) == (2, "", "", "")
    assert not (tmp_path / "out").exists()
