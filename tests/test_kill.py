"""Runs killed with SIGKILL at any moment: what is on the disk is whole, and the run goes on as if nothing had been."""

import collections
import hashlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from safetensors.torch import load_file

from train_rlhf import read_checkpoint

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="needs fork and the signals of Linux"
)

STEPS, KILLS = 9, 50
KILLED = (-9, -25)  # by SIGKILL, or by the kernel in the middle of a write, with SIGXFSZ
FLAGS = ["--device", "cpu", "--training-epochs", "6", "--batch-size", "4", "--mini-batch-size", "2"]
FLAGS += [
    "--ppo-epochs",
    "2",
    "--lora-rank",
    "2",
    "--max-new-tokens",
    "4",
    "--eval-samples",
    "6",
    "--save-every",
    "1",
]
REWARD = "def some_letters(text):\n    return len(set(text.lower()) & set('aeinorst')) / 3 - 1\n"


@pytest.fixture(scope="module")
def start_run(gpt2, tmp_path_factory):
    """Start a run in a child of the driver and return how it ended; with a delay or a death it is killed."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "reward.py").write_text(REWARD)
    flags = ["--model-name", str(gpt2), "--reward", f"{folder}/reward.py:some_letters", *FLAGS]
    known = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    known |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false"}
    with subprocess.Popen(
        [sys.executable, str(Path(__file__).with_name("kill_driver.py"))],
        cwd=folder,
        env=known | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "hf_home")},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        encoding="utf-8",
    ) as driver:

        def start(output, *more, delay=None, death=None):
            order = {
                "flags": [*flags, "--output-dir", str(output), *more],
                "delay": delay,
                "death": death,
            }
            print(json.dumps(order), file=driver.stdin, flush=True)
            return SimpleNamespace(**json.loads(driver.stdout.readline()))

        yield start


@pytest.fixture(scope="module")
def undisturbed(start_run, tmp_path_factory):
    """Return the end of a run that nobody disturbs, its notes, and how long it takes, whole and from its last step."""
    output = tmp_path_factory.mktemp("undisturbed") / "trained_model"
    first = start_run(output)  # its imports go into the driver
    assert first.status == 0, first.output
    end = read_end(output)
    again, after_last_step = start_run(output), start_run(output, "--resume")
    assert (again.status, after_last_step.status) == (0, 0), again.output + after_last_step.output
    assert read_end(output) == end
    assert len(end["metrics"]) == STEPS
    return SimpleNamespace(
        end=end, notes=again.notes, seconds=again.seconds, last_seconds=after_last_step.seconds
    )


def read_end(output):
    """Return all in OUTPUT_DIR that has to be the same after each run: times and memory are not."""
    lines = (output / "metrics.jsonl").read_text().splitlines()
    report, state = json.loads((output / "report.json").read_text()), load_file(checkpoint(output))
    return {
        "model": hashlib.sha256((output / "model.safetensors").read_bytes()).hexdigest(),
        "metrics": [
            {name: value for name, value in json.loads(line).items() if name != "seconds"}
            for line in lines
        ],
        "measured": {name: report[name] for name in ("learned", "base", "trained")},
        "state": {name: tensor.numpy().tobytes() for name, tensor in state.items()},
        "files": list_files(output),
    }


def list_files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def checkpoint(output):
    return output / "checkpoint" / "state.safetensors"


def seconds_left(output, undisturbed):
    """Return how long the run in the folder still takes, going on from its checkpoint if there is one."""
    done = (
        len(read_checkpoint(checkpoint(output))[0]["metrics"]) if checkpoint(output).exists() else 0
    )
    return undisturbed.last_seconds + (undisturbed.seconds - undisturbed.last_seconds) * (
        1 - done / STEPS
    )


def go_on(start_run, output, **kill):
    """Resume the run where there is a checkpoint, else start it."""
    return start_run(output, *(["--resume"] if checkpoint(output).exists() else []), **kill)


def check_killed(start_run, output, undisturbed):
    """Check that whatever a killed run left is whole, and that without a checkpoint there is nothing to resume."""
    if checkpoint(output).exists():
        assert load_file(checkpoint(output)).keys() == undisturbed.end["state"].keys()
    else:
        files = list_files(output)
        refused = start_run(output, "--resume")
        assert refused.status == 2
        assert "there is no checkpoint in" in refused.output
        assert list_files(output) == files
    if (model := output / "model.safetensors").exists():
        assert load_file(model)
        assert hashlib.sha256(model.read_bytes()).hexdigest() == undisturbed.end["model"]
    for path in output.glob("*.json"):
        json.loads(path.read_text())


def die(start_run, output, undisturbed, death):
    """Let the run go on to its death, in the phase that the place of it names, and check what is left."""
    ended = go_on(start_run, output, death=death)
    assert ended.status in KILLED, ended.output
    assert phase_of(ended) == death[0].split()[0]
    check_killed(start_run, output, undisturbed)


def finish(start_run, output, undisturbed):
    """Let the run go on to its end, check that it is that of an undisturbed run, and return how it went."""
    last = go_on(start_run, output)
    assert last.status == 0, last.output
    check_end(output, undisturbed)
    return last


def check_end(output, undisturbed):
    for name, value in read_end(output).items():
        assert value == undisturbed.end[name], f"{name} is not that of the undisturbed run"


def phase_of(ended):
    return ended.notes[-1].split()[0] if ended.notes else "loading"


# ----------------------------------------------------------------------------------------------------------- tests
def test_a_run_killed_at_any_time_goes_on_as_if_nothing_had_been(
    start_run, undisturbed, tmp_path, capsys
):
    chance, phases, kills_of_runs, refused = (
        random.Random(0),
        collections.Counter(),
        collections.Counter(),
        0,
    )
    moments = [
        (i + chance.random()) / KILLS for i in range(KILLS)
    ]  # each a share of the time that the run still needs
    chance.shuffle(moments)
    pace = 1.0  # of the machine, by the last run that came to its end
    for number in range(3 * KILLS):
        output, kills, again = tmp_path / str(number) / "trained_model", 0, True
        while moments and again:
            seconds = seconds_left(output, undisturbed)
            ended = go_on(start_run, output, delay=moments[-1] * seconds * pace)
            if ended.status == 0:  # it was faster than thought
                check_end(output, undisturbed)
                pace, moments[-1] = ended.seconds / seconds, moments[-1] * 0.97
                break
            assert ended.status == -9, ended.output
            moments.pop()
            phases[phase_of(ended)] += 1
            refused += not checkpoint(output).exists()
            check_killed(start_run, output, undisturbed)
            kills, again = kills + 1, chance.random() < 0.65
        else:
            seconds = seconds_left(output, undisturbed)
            pace = finish(start_run, output, undisturbed).seconds / seconds
        kills_of_runs[kills] += 1
        if not moments:
            break
    with capsys.disabled():
        print(
            f"\n{KILLS} kills: {dict(phases)}, {refused} before a checkpoint; runs by kills: {dict(kills_of_runs)}"
        )
    assert phases.total() == KILLS
    assert refused >= 3
    assert max(kills_of_runs) >= 3
    least = {"loading": 3, "training": 8, "measuring": 2, "results": 5}
    assert all(phases[phase] >= count for phase, count in least.items()), phases


def test_a_run_killed_while_it_saves_a_checkpoint_goes_on(start_run, undisturbed, tmp_path, capsys):
    places = dict.fromkeys(note for note in undisturbed.notes if note.startswith("checkpoint"))
    assert len(places) >= 2
    kills = 0
    for number, place in enumerate(places):
        output = tmp_path / str(number) / "trained_model"
        for size in (1000, 16000) if is_before_a_write(place) else (None,):
            for times in (1, 3):  # the first time in a fresh run there is no checkpoint yet
                die(start_run, output, undisturbed, (place, times, size))
                kills += 1
        finish(start_run, output, undisturbed)
    with capsys.disabled():
        print(f"\n{kills} kills in save_checkpoint: at {', '.join(places)}")


def test_a_run_killed_while_it_saves_its_results_goes_on(start_run, undisturbed, tmp_path, capsys):
    places = dict.fromkeys(note for note in undisturbed.notes if note.startswith("results"))
    assert len(places) >= 10
    output, kills = tmp_path / "trained_model", 0
    for place in reversed(
        places
    ):  # since what is left of one kill is removed first, which is noted too
        for size in {"results": (500, 200_000)}.get(
            place, (100,) if is_before_a_write(place) else (None,)
        ):
            die(start_run, output, undisturbed, (place, 1, size))
            kills += 1
    finish(start_run, output, undisturbed)
    with capsys.disabled():
        print(
            f"\n{kills} kills in save_results: at {', '.join(place.removeprefix('results ') for place in places)}"
        )


def is_before_a_write(note):
    """Return whether what follows the note is a file being written, which death can come in the middle of."""
    return " " not in note or " open " in note
