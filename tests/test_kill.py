"""Runs killed at any moment: what is on the disk is whole, and the run goes on as if untouched."""

import collections
import json
import os
import random
import sys
from types import SimpleNamespace

import pytest
from helpers import digests, read_metrics
from safetensors.torch import load_file

from finetune.checkpoint import read_checkpoint

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs the signals of Linux")

FULL = bool(os.environ.get("CI_FULL"))
STEPS, KILLS = 9, int(os.environ.get("KILLS", "8"))
BY_TIME, IN_A_WRITE, AT_ONCE = -27, -25, -9  # SIGPROF, SIGXFSZ, SIGKILL: nothing can catch them
FLAGS = "--device cpu --training-epochs 6 --batch-size 4 --mini-batch-size 2 --ppo-epochs 2"
FLAGS += " --lora-rank 2 --max-new-tokens 4 --eval-samples 6 --save-every 1 --scale-samples 6"
REWARD = """
def some_letters(prompts, completions, **kwargs):
    return [len(set(text.lower()) & set("aeinorst")) for text in completions]
"""


@pytest.fixture(scope="module")
def start_run(run_script, gpt2, tmp_path_factory):
    """Return how a run ended, in a process of its own; with seconds or a death it is killed."""
    folder = tmp_path_factory.mktemp("reward")
    (folder / "reward.py").write_text(REWARD)
    reward = f"{folder}/reward.py:some_letters"
    flags = ["--model-name", gpt2, "--reward", reward, *FLAGS.split()]

    def start(output, *more, **kill):
        return run_script(folder, *flags, "--output-dir", output, *more, **kill)

    return start


@pytest.fixture(scope="module")
def undisturbed(start_run, tmp_path_factory):
    """Return the end of a run that nobody disturbs, its notes, and how long it takes.

    last_seconds is how long it takes from its last step.
    """
    output = tmp_path_factory.mktemp("undisturbed") / "trained_model"
    run = start_run(output)
    assert run.status == 0, run.stderr
    end = read_end(output)
    assert len(end["metrics"]) == STEPS
    steps = [json.loads(line)["step"] for line in end["samples"]]
    assert steps == [step for step in range(1, STEPS + 1) for _ in range(4)]
    scale = end["measured"][0]
    assert scale["mean"] > 0  # it is a graded reward, so this was measured
    after_last_step = start_run(output, "--resume")
    assert after_last_step.status == 0, after_last_step.stderr
    assert read_end(output) == end
    return SimpleNamespace(
        end=end,
        notes=run.notes,
        seconds=run.seconds,
        last_seconds=after_last_step.seconds,
    )


def read_end(output):
    """Return all in OUTPUT_DIR that each run leaves alike: times and memory are not."""
    report = json.loads((output / "report.json").read_text())
    state = read_checkpoint(output)
    metrics = [record | {"seconds": 0} for record in state["metrics"]]
    assert metrics == read_metrics(output)
    assert state["scale"] == report["scale"]
    moments = state["optimizer"]["state"]
    files = digests(output)
    return {
        "files": files.keys(),
        "model": files["model.safetensors"],
        "metrics": metrics,
        "samples": (output / "samples.jsonl").read_text(encoding="utf-8").splitlines(),
        "measured": [report[name] for name in ("scale", "learned", "base", "trained")],
        "weights": tolist(state["weights"]),
        "optimizer": {index: tolist(tensors) for index, tensors in moments.items()},
        "groups": state["optimizer"]["param_groups"],
    }


def tolist(tensors):
    return {name: tensor.tolist() for name, tensor in tensors.items()}


def has_checkpoint(output):
    return (output / "checkpoint" / "state.pt").exists()


def seconds_left(output, undisturbed):
    """Return how long the run in the folder still takes, from its checkpoint if there is one."""
    left = STEPS
    if has_checkpoint(output):
        left -= len(read_checkpoint(output)["metrics"])
    training = undisturbed.seconds - undisturbed.last_seconds
    return undisturbed.last_seconds + training * left / STEPS


def go_on(start_run, output, **kill):
    """Resume the run where there is a checkpoint, else start it."""
    resume = ["--resume"] if has_checkpoint(output) else []
    return start_run(output, *resume, **kill)


def check_killed(start_run, output, undisturbed):
    """Check that what a killed run left is whole, and no checkpoint is nothing to resume."""
    if has_checkpoint(output):
        weights = read_checkpoint(output)["weights"]
        assert weights.keys() == undisturbed.end["weights"].keys()
    else:
        files = digests(output.parent)
        refused = start_run(output, "--resume")
        assert refused.status == 2
        reason = "RESUME is True: it can't be used (there is no checkpoint in"
        assert reason in refused.stderr
        assert digests(output.parent) == files
    model = output / "model.safetensors"
    if model.exists():
        assert load_file(model)
        assert digests(output)[model.name] == undisturbed.end["model"]
    for path in output.glob("*.json"):
        json.loads(path.read_text())


def die(start_run, output, undisturbed, death):
    """Let the run go on to its death, at the place that was noted, and check what is left."""
    ended = go_on(start_run, output, death=death)
    assert ended.status == (AT_ONCE if death[2] is None else IN_A_WRITE), ended.stderr
    assert ended.notes[-1].startswith(death[0])
    check_killed(start_run, output, undisturbed)


def finish(start_run, output, undisturbed):
    """Let the run go on to its end, check that it is the undisturbed one's; return how it went."""
    last = go_on(start_run, output)
    assert (last.status, last.stderr) == (0, "")
    check_end(output, undisturbed)
    return last


def check_end(output, undisturbed):
    for name, value in read_end(output).items():
        assert value == undisturbed.end[name], f"{name} is not that of the undisturbed run"


def phase_of(ended):
    return ended.notes[-1].split()[0] if ended.notes else "loading"


def places_in(ended, phase):
    """Return where death can come in a phase, each place once, in the order of the run."""
    return [*dict.fromkeys(note for note in ended.notes if note.startswith(phase))]


def is_before_a_write(note):
    """Return whether a file is written after the note, in the middle of which death can come."""
    return " " not in note or " open " in note


# -------------------------------------------------------------------------------- tests
def test_a_run_killed_at_any_time_goes_on_as_if_untouched(start_run, undisturbed, tmp_path, capsys):
    chance = random.Random(0)
    phases, kills_of_runs = collections.Counter(), collections.Counter()
    # Each moment is a share of the time that the run still needs, and the last one comes first.
    moments = [(i + chance.random()) / KILLS for i in range(KILLS)]
    chance.shuffle(moments)
    moments.append(moments.pop(moments.index(min(moments))))  # surely before a checkpoint
    of_50 = {"loading": 3, "training": 8, "measuring": 2, "results": 5}
    least = {phase: count * KILLS // 50 for phase, count in of_50.items()}
    least_refused = max(1, 3 * KILLS // 50)
    refused, pace = 0, 1.0  # of the machine, by the last run that came to its end
    for number in range(3 * KILLS):
        output, kills, again = tmp_path / str(number) / "trained_model", 0, True
        output.parent.mkdir()
        while moments and again:
            seconds = seconds_left(output, undisturbed)
            ended = go_on(start_run, output, seconds=moments[-1] * seconds * pace)
            if ended.status == 0:  # it was faster than thought
                check_end(output, undisturbed)
                pace, moments[-1] = ended.seconds / seconds, moments[-1] * 0.97
                break
            assert ended.status == BY_TIME, ended.stderr
            moments.pop()
            phases[phase_of(ended)] += 1
            refused += not has_checkpoint(output)
            check_killed(start_run, output, undisturbed)
            kills, again = kills + 1, chance.random() < 0.65
        else:
            seconds = seconds_left(output, undisturbed)
            pace = finish(start_run, output, undisturbed).seconds / seconds
        kills_of_runs[kills] += 1
        enough = all(phases[phase] >= count for phase, count in least.items())
        if not moments and enough and refused >= least_refused:
            break
        # How long a phase takes is the machine's, so more moments come until each had its share.
        moments = moments or [chance.random()]
    with capsys.disabled():
        print(f"\n{phases.total()} kills: {dict(phases)}, {refused} before a checkpoint;")
        print(f"runs by kills: {dict(sorted(kills_of_runs.items()))}")
    assert phases.total() >= KILLS
    assert refused >= least_refused
    assert max(kills_of_runs) >= (3 if KILLS >= 50 else 2)
    assert enough, phases


def test_a_run_killed_while_it_saves_a_checkpoint_goes_on(start_run, undisturbed, tmp_path, capsys):
    places = places_in(undisturbed, "checkpoint")
    names = [place.partition(" ")[2] for place in places]
    assert names[:3] == ["", "open state.pt", "os.rename state.pt"]
    # The first time in a fresh run there is no checkpoint yet.
    ways = [(1000, 1), (16_000, 3)]
    if FULL:
        ways += [(1000, 3), (16_000, 1)]
    kills = 0
    for number, place in enumerate(places):
        output = tmp_path / str(number) / "trained_model"
        output.parent.mkdir()
        at_once = [(None, times) for times in (1, 3)]
        for size, times in ways if is_before_a_write(place) else at_once:
            die(start_run, output, undisturbed, (place, times, size))
            kills += 1
        finish(start_run, output, undisturbed)
    with capsys.disabled():
        print(f"\n{kills} kills in Checkpoint.save: at {', '.join(places)}")


def test_a_run_killed_while_it_notes_samples_has_each_of_them_once(
    start_run, undisturbed, tmp_path
):
    output, place = tmp_path / "trained_model", "training open samples.jsonl"
    die(start_run, output, undisturbed, ("checkpoint", 3, None))  # with a checkpoint of step 2
    die(start_run, output, undisturbed, (place, 1, None))
    # From where the samples of the steps before are looked through, nothing more can be written.
    assert go_on(start_run, output, death=(place, 1, 100)).status == IN_A_WRITE
    check_killed(start_run, output, undisturbed)
    of_two_steps = undisturbed.end["samples"][: 2 * 4]
    begun = sum(len(line.encode()) + 1 for line in of_two_steps) + 50
    die(start_run, output, undisturbed, (place, 2, begun))  # in the first line of step 3
    assert (output / "samples.jsonl").stat().st_size == begun
    finish(start_run, output, undisturbed)


def test_a_run_killed_while_it_saves_its_results_goes_on(start_run, undisturbed, tmp_path, capsys):
    places = places_in(undisturbed, "results")
    assert len(places) >= 10
    if not FULL:
        places = [places[0], *places[1:-1:4], places[-1]]
    output, kills = tmp_path / "trained_model", 0
    # From the last to the first: what one kill leaves is removed first, and that is noted.
    for place in reversed(places):
        sizes = (100,) if is_before_a_write(place) else (None,)
        for size in (500, 200_000) if place == "results" else sizes:
            die(start_run, output, undisturbed, (place, 1, size))
            kills += 1
    finish(start_run, output, undisturbed)
    with capsys.disabled():
        names = ", ".join(place.removeprefix("results ") for place in places)
        print(f"\n{kills} kills in whole_results: at {names}")
