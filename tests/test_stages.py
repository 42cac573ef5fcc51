"""The two stages before PPO as programs: stopped, killed, gone on with, refused, and as a chain."""

import json
import logging
import math
import os
import random
import re
import runpy
import shutil
import signal
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import digests, read_metrics, refusals
from safetensors.torch import load_file
from test_examples import write
from test_output import largest_file

import train_reward_model
import train_rlhf
import train_sft
from finetune.checkpoint import read_checkpoint
from finetune.classifiers import load_classifier
from finetune.supervised import Recorder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs the signals of Linux")

STAGES = {"train_sft": train_sft, "train_reward_model": train_reward_model}
STEPS = 6
TEMPLATE = "Question: {instruction}\n\nHint: {input}\n\nAnswer:"
FLAGS = ["--device", "cpu", "--batch-size", "4", "--mini-batch-size", "2", "--lora-rank", "2"]
FLAGS += ["--learning-rate", "3e-3", "--lora-dropout", "0.2", "--eval-every", "2"]
FLAGS += ["--training-epochs", "1", "--save-every", "1", "--log-every", "2"]
FLAGS_OF = {
    "train_sft": ["--template", TEMPLATE, "--max-new-tokens", "3"],
    "train_reward_model": [],
}
BY_TIME, IN_A_WRITE, AT_ONCE = -27, -25, -9  # SIGPROF, SIGXFSZ, SIGKILL: nothing can catch them
FULL = bool(os.environ.get("CI_FULL"))
KILLS = int(os.environ.get("KILLS", 6 if FULL else 2))


def examples_of(name):
    """Return 27 rows, of which 24 are trained on."""
    chance = random.Random(0)
    words = ["day", "mother", "friend", "house", "morning", "walk", "song"]

    def say(count):
        return " ".join(chance.choices(words, k=count))

    if name == "train_sft":
        given = [{"instruction": say(3), "input": say(2) * (n % 2)} for n in range(27)]
        return [row | {"output": say(4)} for row in given]
    pairs = [(f"I am happy {say(n % 4)}", f"I am sad {say(3)}") for n in range(27)]
    return [{"chosen": one, "rejected": other} for one, other in pairs]


def read_end(output):
    """Return all in OUTPUT_DIR that each run leaves alike: times and memory are not."""
    report = json.loads((output / "report.json").read_text())
    for name in ("seconds", "samples_per_second", "peak_memory_mb"):
        assert report.pop(name) > 0
    for name in ("resume", "output_dir", "data"):
        report["settings"].pop(name)
    weights = read_checkpoint(output)["weights"]
    adapter = output / "adapter" / "adapter_model.safetensors"
    return {
        "metrics": read_metrics(output),
        "report": report,
        "weights": {name: weight.tolist() for name, weight in weights.items()},
        "model": (output / "model.safetensors").read_bytes(),
        "adapter": adapter.read_bytes(),
    }


# -------------------------------------------------------------- the runs
@pytest.fixture(scope="module", params=STAGES)
def stage(request, demo_model, tmp_path_factory):
    """Return one of the two scripts, its data, and the flags of every run of it."""
    name = request.param
    data = tmp_path_factory.mktemp(name) / "rows.json"
    write(data, examples_of(name))
    flags = ["--model-name", str(demo_model), "--data", str(data), *FLAGS, *FLAGS_OF[name]]
    return SimpleNamespace(name=name, module=STAGES[name], data=data, flags=flags)


@pytest.fixture(scope="module")
def start(run_script, stage, tmp_path_factory):
    """Return how a run ended, in a process of its own."""
    folder = tmp_path_factory.mktemp("start")

    def start_run(output, *more, **options):
        flags = [*stage.flags, "--output-dir", output, *more]
        return run_script(folder, *flags, **{"script": stage.name, **options})

    return start_run


@pytest.fixture(scope="module")
def undisturbed(start, tmp_path_factory):
    """Return the end of a run that nobody disturbs, what it printed, and its notes."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    ended = start(output)
    assert ended.status == 0, ended.stderr
    end = read_end(output)
    assert [record["step"] for record in end["metrics"]] == [*range(1, STEPS + 1)]
    return SimpleNamespace(end=end, output=output, ended=ended)


@pytest.fixture
def call(stage, monkeypatch, tmp_path, capsys):
    """Call main in a fresh folder; return its status and what it told on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "10000")

    def call_main(*more):
        capsys.readouterr()
        logger = logging.getLogger("transformers")
        logger.setLevel(logging.WARNING)  # as transformers does while it is loaded
        status = stage.module.main([*stage.flags, "--output-dir", "out", *more])
        assert logger.level == logging.ERROR
        return status, capsys.readouterr().err

    return call_main


@pytest.fixture
def before_records(monkeypatch):
    """Call a function with the step's number before it is noted, in a run of this process."""
    on_log = Recorder.on_log

    def watch(act):
        def watched(self, *args, **more):
            act(len(self.training.metrics) + 1)
            on_log(self, *args, **more)

        monkeypatch.setattr(Recorder, "on_log", watched)

    return watch


def assert_same_end(output, undisturbed):
    for name, value in read_end(output).items():
        assert value == undisturbed.end[name], f"{name} is not that of the undisturbed run"


# ------------------------------------------------------- an ordinary run
LINES_OF_A_RUN = [
    r"Model     \S+, [\d,]+ parameters, [\d,]+ of them trained",
    r"Device    CPU with 1 thread, ",
    r"Data      \S+: 24 (examples|rows) ",
    r"Training  6 steps of 4, seed 0, learning rate 0\.003$",
    r"Output    \S+/$",
    *(rf"step {n}/6, [\d:]+ left, loss \d+\.\d+, held out \d+\.\d+$" for n in (2, 4, 6)),
]


def test_a_run_without_a_terminal_prints_lines_and_no_noise(undisturbed):
    assert undisturbed.ended.stderr == ""
    before, title, card = undisturbed.ended.stdout.partition("\n# ")
    lines = [line for line in before.splitlines() if line]
    for line, wanted in zip(lines, LINES_OF_A_RUN, strict=True):
        assert re.match(wanted, line), line
    assert title and "\r" not in before and "\x1b" not in before
    assert f"# {card}".strip()[:200] in (undisturbed.output / "README.md").read_text()


def test_what_a_run_leaves(stage, undisturbed):
    names = {path.name for path in undisturbed.output.iterdir()}
    wanted = {"README.md", "adapter", "checkpoint", "config.json", "metrics.jsonl"}
    wanted |= {"model.safetensors", "report.json", "tokenizer.json", "training.png"}
    wanted |= {"run.json", "watch.html"}
    assert wanted <= names
    checkpoint = {path.name for path in (undisturbed.output / "checkpoint").iterdir()}
    assert checkpoint == {"lock", "state.pt"}
    report = undisturbed.end["report"]
    kept = {"loss"} if stage.name == "train_sft" else {"accuracy", "score_mean", "score_std"}
    assert report["base"].keys() >= kept and report["trained"].keys() >= kept
    assert report["trained"]["loss"] < report["base"]["loss"]
    # The steps' own held-out losses are of the same examples as the report's.
    losses = {record["step"]: record["eval_loss"] for record in undisturbed.end["metrics"]}
    assert [step for step, loss in losses.items() if loss is not None] == [2, 4]
    assert report["trained"]["loss"] < losses[4] < losses[2] < report["base"]["loss"]


# ----------------------------------------------- killed and gone on with
def go_on(start, output, **kill):
    """Resume the run where there is a checkpoint, else start it."""
    resume = ["--resume"] if (output / "checkpoint" / "state.pt").exists() else []
    return start(output, *resume, **kill)


def check_whole(output, undisturbed):
    """Check that nothing which a killed run left is torn."""
    state, wanted = read_checkpoint(output), undisturbed.end
    if state:
        assert state["weights"].keys() == wanted["weights"].keys()
    for path in output.glob("*.json"):
        json.loads(path.read_text())
    if (output / "model.safetensors").exists():
        assert (output / "model.safetensors").read_bytes() == wanted["model"]


def test_a_run_killed_anywhere_goes_on_as_if_untouched(start, undisturbed, tmp_path):
    """At any note of what it does, in the middle of a write, and after some processor time."""
    chance, output = random.Random(1), tmp_path / "out"
    counts, places = Counter(), []
    for note in undisturbed.ended.notes:
        counts[note] += 1
        places.append((note, counts[note], None))
        if " open " in note:
            places.append((note, counts[note], chance.choice([1, 100, 5000])))
    deaths = [{"death": place} for place in chance.sample(places, KILLS)]
    deaths.append({"seconds": 0.7 * undisturbed.ended.seconds})
    ends = []
    for death in deaths:
        ends.append(go_on(start, output, **death).status)
        check_whole(output, undisturbed)
    assert {*ends} <= {0, BY_TIME, IN_A_WRITE, AT_ONCE} and {*ends} != {0}
    last = go_on(start, output)
    assert (last.status, last.stderr) == (0, "")
    assert_same_end(output, undisturbed)


# --------------------------------------------------------------- signals
SAVED = "what was learned up to step {} is saved. To go on, run the same line with --resume"


def copy_of(script, folder):
    """Copy a script and the folder that it imports from to another place; return its path."""
    shutil.copytree(Path(script).with_name("finetune"), folder / "finetune")
    return shutil.copy(script, folder)


def test_a_signal_stops_after_the_step_and_the_run_goes_on_to_the_bit(
    stage, start, undisturbed, tmp_path
):
    """It goes on as a program in another place."""
    output = tmp_path / "out"
    for step, number, status in ((2, signal.SIGINT, 130), (4, signal.SIGTERM, 143)):
        stopped = go_on(start, output, signals=[(step, number)])
        assert stopped.status == status
        assert stopped.stderr.splitlines() == [
            "",
            "Stopping after this step; once more to stop at once",
            "",
            f"Stopped: by a signal; {SAVED.format(step)}",
        ]
        assert not (output / "report.json").exists()
    script = copy_of(stage.module.__file__, tmp_path)
    last = start(output, "--resume", script=script)
    assert (last.status, last.stderr) == (0, "")
    assert "Going on after step 4" in last.stdout
    assert_same_end(output, undisturbed)


def test_a_second_signal_stops_at_once(start, tmp_path):
    signals = [(3, signal.SIGINT), (3, signal.SIGTERM)]
    stopped = start(tmp_path / "out", signals=signals)
    assert stopped.status == 143
    assert stopped.stderr.endswith(f"\nStopped: by a signal; {SAVED.format(2)}\n")
    assert len(read_metrics(tmp_path / "out")) == 2


# --------------------------------------------------- resumed, or refused
@pytest.fixture
def finished(undisturbed, tmp_path):
    """Return a copy of the finished run, which then goes on as if it were another's."""
    return shutil.copytree(undisturbed.output, tmp_path / "out")


def test_a_finished_run_measures_again_and_trains_no_step(
    call, before_records, undisturbed, finished
):
    steps = []
    before_records(steps.append)
    (finished / "report.json").unlink()
    assert call("--resume") == (0, "")
    assert steps == []
    assert_same_end(finished, undisturbed)


def test_what_would_make_the_rest_another_run_is_refused(stage, call, finished):
    before = digests(finished)
    problems = refusals(*call("--resume", "--learning-rate", "1e-3"))
    change = "LEARNING_RATE is 0.001, but 0.003 in the checkpoint"
    assert problems == [f"{change}: give that or start anew"]
    content = stage.data.read_text()
    stage.data.write_text(content.replace("mother", "father"))
    problems = refusals(*call("--resume"))
    stage.data.write_text(content)
    change = f"{stage.data} has changed since the checkpoint"
    assert problems == [f"{change}: put it back or start anew"]
    assert digests(finished) == before


def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_can_go_on(
    call, before_records, undisturbed, tmp_path
):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text("an earlier run's")
    with ExitStack() as trouble:

        def fill_the_disk(step):
            if step == 3:
                trouble.enter_context(largest_file(10))

        before_records(fill_the_disk)
        status, told = call()
    remedy = "make room in OUTPUT_DIR, out, and let what is printed be read to its end"
    reason = f"something can't be written (File too large): {remedy}"
    assert (status, told) == (1, f"\nStopped: {reason}; {SAVED.format(2)}\n")
    names = {path.name for path in (tmp_path / "out" / "checkpoint").iterdir()}
    assert names == {"lock", "state.pt"}
    assert (tmp_path / "out-1" / "metrics.jsonl").read_text() == "an earlier run's"

    before_records(lambda step: None)
    assert call("--resume") == (0, "")
    assert_same_end(tmp_path / "out", undisturbed)


# ------------------------------------------------------------- the chain
def test_the_documented_commands_as_a_chain(demo_model, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "10000")
    make_data = runpy.run_path(demo_model.parent / "examples" / "make_data.py")
    del make_data["PROMPTS"][1:]  # less to sample
    monkeypatch.setattr(sys, "argv", ["make_data.py", "--pairs", "24", "--texts", "12"])
    make_data["main"]()
    small = ["--device", "cpu", "--training-epochs", "2", "--batch-size"]
    rate = ["8", "--learning-rate", "3e-3"]
    given = ["--model-name", str(demo_model), "--data", "texts.jsonl", "--max-new-tokens", "4"]
    assert train_sft.main([*given, *small, *rate]) == 0
    given = ["--model-name", "sft_model", "--data", "pairs.jsonl"]
    assert train_reward_model.main([*given, *small, *rate]) == 0
    seen = []
    make_policy = train_rlhf.make_policy

    def see_the_model(model, *others):
        seen.append({name: weight.clone() for name, weight in model.named_parameters()})
        return make_policy(model, *others)

    monkeypatch.setattr(train_rlhf, "make_policy", see_the_model)
    given = ["--model-name", "sft_model", "--reward", "reward_model", "--max-new-tokens", "6"]
    given += ["--eval-samples", "6", "--eval-prompts", "--dtype", "float32"]
    assert train_rlhf.main([*given, *small, "6"]) == 0

    # The policy starts as the SFT model.
    (weights,) = seen
    saved, untaught = (load_file(f"{path}/model.safetensors") for path in ("sft_model", demo_model))
    shared = saved.keys() & weights.keys()
    assert all(torch.equal(weights[name], saved[name].float()) for name in shared)
    assert not all(torch.equal(weights[name], untaught[name].float()) for name in shared)

    # The reward model is what scores its samples.
    losses = [record["loss"] for record in read_metrics(Path("reward_model"))]
    assert losses[-1] < math.log(2)  # which is a guess's
    score, scale = load_classifier("REWARD", "reward_model", "", 40, torch.device("cpu"))
    lines = Path("trained_model", "samples.jsonl").read_text(encoding="utf-8").splitlines()
    samples = [json.loads(line) for line in lines]
    texts = [sample["prompt"] + sample["response"] for sample in samples]
    scores = score([""] * len(texts), texts)
    assert [sample["score"] for sample in samples] == pytest.approx(scores, abs=1e-3)
    metrics = read_metrics(Path("trained_model"))
    assert metrics[0]["success_rate"] == sum(number > 0 for number in scores[:6]) / 6
    report = json.loads(Path("trained_model", "report.json").read_text())
    assert report["scale"]["accuracy"] == scale.accuracy
    assert report["trained"]["train_prompts"]["success_rate"] is not None
    assert f"agrees with {scale.accuracy:.0%} of held-out" in capsys.readouterr().out
