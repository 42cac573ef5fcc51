"""The two stages before PPO as programs: stopped, killed, gone on with, refused, and as a chain."""

import importlib.util
import json
import math
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file
from test_resources import largest_file

import train_reward_model
import train_rlhf
import train_sft
from train_rlhf import read_checkpoint

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
KILLS = int(os.environ.get("KILLS", "2"))


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


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def all_of(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def read_metrics(output):
    lines = (output / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) | {"seconds": 0} for line in lines]


def read_end(output):
    """Return all in OUTPUT_DIR that each run leaves alike: times and memory are not."""
    report, state = json.loads((output / "report.json").read_text()), read_checkpoint(output)
    for name in ("seconds", "samples_per_second", "peak_memory_mb"):
        assert report.pop(name) > 0
    for name in ("resume", "output_dir", "data"):
        report["settings"].pop(name)
    return {
        "metrics": read_metrics(output),
        "report": report,
        "weights": {name: weight.tolist() for name, weight in state["weights"].items()},
        "model": (output / "model.safetensors").read_bytes(),
        "adapter": (output / "adapter" / "adapter_model.safetensors").read_bytes(),
    }


# ---------------------------------------------------------------------------------------- the runs
@pytest.fixture(scope="module", params=STAGES)
def stage(request, demo_model, tmp_path_factory):
    """Return one of the two scripts, its data, and the flags of every run of it."""
    name = request.param
    data = tmp_path_factory.mktemp(name) / "rows.jsonl"
    write_rows(data, examples_of(name))
    flags = ["--model-name", str(demo_model), "--data", str(data), *FLAGS, *FLAGS_OF[name]]
    module = STAGES[name]
    return SimpleNamespace(name=name, module=module, data=data, flags=flags)


@pytest.fixture(scope="module")
def start(run_script, stage, tmp_path_factory):
    """Return how a run ended, in a process of its own."""
    folder = tmp_path_factory.mktemp("start")

    def start_run(output, *more, **options):
        flags = [*stage.flags, "--output-dir", output, *more]
        return run_script(folder, *flags, **{"script": stage.name, **options})

    return start_run


@pytest.fixture(scope="module")
def undisturbed(start, stage, tmp_path_factory):
    """Return the end of a run that nobody disturbs, what it printed, and its notes."""
    output = tmp_path_factory.mktemp("undisturbed") / "out"
    ended = start(output)
    assert ended.status == 0, ended.stderr
    end = read_end(output)
    assert [record["step"] for record in end["metrics"]] == [*range(1, STEPS + 1)]
    return SimpleNamespace(end=end, output=output, ended=ended)


@pytest.fixture
def call(stage, monkeypatch, tmp_path, capsys):
    """Call main in a fresh folder; return its status and what it told on stderr, in lines."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "10000")
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def call_main(*more):
        capsys.readouterr()
        status = stage.module.main([*stage.flags, "--output-dir", "out", *map(str, more)])
        return status, capsys.readouterr().err.splitlines()

    return call_main


@pytest.fixture
def on_log(monkeypatch):
    """Call a function with the step's number before it is noted, in a run of this process."""
    of_recorder = train_sft.Recorder.on_log

    def watch(act):
        def watched(self, *args, **more):
            act(len(self.metrics) + 1, self)
            of_recorder(self, *args, **more)

        monkeypatch.setattr(train_sft.Recorder, "on_log", watched)

    return watch


def copy_run(undisturbed, output):
    """Copy a finished run, which then goes on as if it were another's."""
    shutil.copytree(undisturbed.output, output)
    return output


def assert_same_end(output, undisturbed):
    for name, value in read_end(output).items():
        assert value == undisturbed.end[name], f"{name} is not that of the undisturbed run"


# ----------------------------------------------------------------------------------- an ordinary run
LINES_OF_A_RUN = [
    *(
        r"Model     \S+, [\d,]+ parameters, [\d,]+ of them trained",
        r"Device    CPU with 1 thread, ",
    ),
    *(r"Data      \S+: 24 rows ", r"Training  6 steps of 4, seed 0$", r"Output    \S+/$"),
    *(rf"step {n}/6, [\d:]+ left, loss \d+\.\d+, held out \d+\.\d+$" for n in (2, 4, 6)),
]


def test_a_run_without_a_terminal_prints_lines_and_no_noise(undisturbed):
    assert undisturbed.ended.stderr == ""
    before, title, card = undisturbed.ended.stdout.partition("\n# ")
    lines = [line for line in before.splitlines() if line]
    assert len(lines) == len(LINES_OF_A_RUN)
    for line, wanted in zip(lines, LINES_OF_A_RUN):
        assert re.match(wanted, line), line
    assert title and "\r" not in before and "\x1b" not in before
    assert f"# {card}".strip()[:200] in (undisturbed.output / "README.md").read_text()


def test_what_a_run_leaves(stage, undisturbed):
    names = {path.name for path in undisturbed.output.iterdir()}
    wanted = {"README.md", "adapter", "checkpoint", "config.json", "metrics.jsonl"}
    wanted |= {"model.safetensors", "report.json", "tokenizer.json", "training.png"}
    assert wanted <= names
    assert {path.name for path in (undisturbed.output / "checkpoint").iterdir()} == {
        "lock",
        "state.pt",
    }
    report = undisturbed.end["report"]
    kept = {"loss"} if stage.name == "train_sft" else {"accuracy", "score_mean", "score_std"}
    assert report["base"].keys() >= kept and report["trained"].keys() >= kept
    assert report["trained"]["loss"] < report["base"]["loss"]
    # The steps' own held-out losses are of the same examples as the report's.
    losses = {record["step"]: record["eval_loss"] for record in undisturbed.end["metrics"]}
    assert [step for step, loss in losses.items() if loss is not None] == [2, 4]
    assert report["trained"]["loss"] < losses[4] < losses[2] < report["base"]["loss"]


def test_the_rate_rises_and_then_falls_along_a_cosine(undisturbed):
    """A warmup of 3 % of six steps is none; step k is taken at half of 1 + cos(pi (k - 1) / 6)."""
    rates = [record["learning_rate"] for record in undisturbed.end["metrics"]]
    wanted = [3e-3 * (1 + math.cos(math.pi * step / STEPS)) / 2 for step in range(STEPS)]
    assert rates == pytest.approx(wanted)


def test_every_row_is_trained_on_once_in_an_epoch(stage):
    settings = SimpleNamespace(batch_size=4, seed=0, group_by_length=True)
    examples = [{"input_ids": [0] * (1 + n % 5)} for n in range(10)]
    for settings.group_by_length in (True, False):
        order = train_sft.order_of(examples, 5, settings)
        assert sorted(order[:10]) == sorted(order[10:]) == [*range(10)]
        assert order[:10] != order[10:]
        assert order == train_sft.order_of(examples, 5, settings)
        assert order[:12] == train_sft.order_of(examples, 3, settings)


# ---------------------------------------------------------------------------- killed and gone on with
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
    ends = []
    for place in chance.sample(places, KILLS):
        ended = go_on(start, output, death=place)
        ends.append(ended.status)
        check_whole(output, undisturbed)
    ends.append(go_on(start, output, seconds=0.7 * undisturbed.ended.seconds).status)
    check_whole(output, undisturbed)
    assert {*ends} <= {0, BY_TIME, IN_A_WRITE, AT_ONCE} and {*ends} != {0}
    last = go_on(start, output)
    assert (last.status, last.stderr) == (0, "")
    assert_same_end(output, undisturbed)


# ---------------------------------------------------------------------------------------- signals
SAVED = "what was learned up to step {} is saved. To go on, run the same line with --resume"


def test_a_signal_stops_after_the_step_and_the_run_goes_on_to_the_bit(start, undisturbed, tmp_path):
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
    last = go_on(start, output)
    assert (last.status, last.stderr) == (0, "")
    assert "Going on after step 4" in last.stdout
    assert_same_end(output, undisturbed)


def test_a_second_signal_stops_at_once(start, tmp_path):
    signals = [(3, signal.SIGINT), (3, signal.SIGTERM)]
    stopped = start(tmp_path / "out", signals=signals)
    assert stopped.status == 143
    assert stopped.stderr.endswith(f"\nStopped: by a signal; {SAVED.format(2)}\n")
    assert len(read_metrics(tmp_path / "out")) == 2


# ----------------------------------------------------------------------------- resumed, or refused
def test_a_finished_run_measures_again_and_trains_no_step(
    stage, call, on_log, undisturbed, tmp_path
):
    steps = []
    on_log(lambda step, recorder: steps.append(step))
    output = copy_run(undisturbed, tmp_path / "out")
    (output / "report.json").unlink()
    assert call("--resume") == (0, [])
    assert steps == []
    assert_same_end(output, undisturbed)


def test_what_would_make_the_rest_another_run_is_refused(stage, call, undisturbed, tmp_path):
    output = copy_run(undisturbed, tmp_path / "out")
    before = all_of(output)
    given = "give that or start anew"
    wanted = [f"- LEARNING_RATE is 0.001, but 0.003 in the checkpoint: {given}"]
    changes = ["--learning-rate", "1e-3"]
    if stage.name == "train_sft":
        changes += ["--template", "{instruction}"]
        shown = train_rlhf.shorten(TEMPLATE)
        wanted.append(f"- TEMPLATE is {{instruction}}, but {shown} in the checkpoint: {given}")
    status, lines = call("--resume", *changes)
    assert (status, lines) == (2, ["Nothing was started or changed:", *wanted])

    content = stage.data.read_text()
    stage.data.write_text(content.replace("mother", "father"))
    status, lines = call("--resume")
    stage.data.write_text(content)
    told = f"- {stage.data} has changed since the checkpoint: put it back or start anew"
    assert (status, lines) == (2, ["Nothing was started or changed:", told])
    assert all_of(output) == before


# ------------------------------------------------------------------------------------- what goes wrong
def test_a_full_disk_leaves_the_last_checkpoint_and_the_run_can_go_on(
    stage, call, on_log, undisturbed, tmp_path
):
    trouble = largest_file(10)
    on_log(lambda step, recorder: trouble.__enter__() if step == 3 else None)
    status, lines = call()
    trouble.__exit__(None, None, None)
    remedy = "make room in OUTPUT_DIR, out, and let what is printed be read to its end"
    reason = f"something can't be written (File too large): {remedy}"
    assert (status, lines) == (1, ["", f"Stopped: {reason}; {SAVED.format(2)}"])
    assert {path.name for path in (tmp_path / "out/checkpoint").iterdir()} == {"lock", "state.pt"}

    on_log(lambda step, recorder: None)
    assert call("--resume") == (0, [])
    assert_same_end(tmp_path / "out", undisturbed)


@pytest.fixture
def spoil(stage, monkeypatch):
    """Make a run's loss, or only its gradients, not finite in some steps."""
    fit = train_sft.fit

    def start(losses=(), gradients=()):
        def spoiled_fit(kind, model, *others):
            first = next(weight for weight in model.parameters() if weight.requires_grad)
            seen = SimpleNamespace(step=0)
            begin = train_sft.Recorder.on_step_begin

            def on_step_begin(self, *args, **more):
                seen.step += 1
                begin(self, *args, **more)

            def spoil_output(module, inputs, output):
                return output * math.nan if model.training and seen.step in losses else output

            def spoil_gradient(gradient):
                return gradient * math.inf if seen.step in gradients else gradient

            monkeypatch.setattr(train_sft.Recorder, "on_step_begin", on_step_begin)
            model.get_input_embeddings().register_forward_hook(spoil_output)
            first.register_hook(spoil_gradient)
            return fit(kind, model, *others)

        monkeypatch.setattr(stage.module, "fit", spoiled_fit)

    return start


def test_an_update_that_is_not_finite_is_left_out_and_counted(stage, call, spoil, on_log, tmp_path):
    spoil(losses=[2], gradients=[4])
    weights = {}

    def look(step, recorder):
        (group,) = recorder.trainer.optimizer.param_groups
        weights[step] = [weight.detach().clone() for weight in group["params"]]

    on_log(look)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "metrics.jsonl").write_text("an earlier run's")
    status, lines = call("--report-to", "tensorboard")
    assert (status, lines) == (0, [])
    metrics = read_metrics(tmp_path / "out")
    assert [record["skipped_updates"] for record in metrics] == [0, 1, 0, 1, 0, 0]
    assert [record["loss"] is None for record in metrics] == [n == 2 for n in range(1, 7)]
    assert [record["grad_norm"] is None for record in metrics] == [n in (2, 4) for n in range(1, 7)]
    for step in range(2, STEPS + 1):
        same = all(map(torch.equal, weights[step - 1], weights[step]))
        assert same == (step in (2, 4))
    for weight in load_file(tmp_path / "out" / "model.safetensors").values():
        assert weight.isfinite().all()
    # What lay there before was moved aside, and the metrics are in tensorboard too.
    assert (tmp_path / "out-1" / "metrics.jsonl").read_text() == "an earlier run's"
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(tmp_path / "out" / "tensorboard")).Reload()
    losses = {event.step: event.value for event in events.Scalars("loss")}
    assert losses == {
        step: pytest.approx(record["loss"])
        for step, record in enumerate(metrics, start=1)
        if record["loss"] is not None
    }


def test_three_bad_updates_in_a_row_stop_the_run(stage, call, spoil, tmp_path):
    spoil(losses=[3, 4, 5])
    status, lines = call()
    remedy = "start anew with a lower LEARNING_RATE or DTYPE float32"
    reason = f"three steps in a row had updates that are not finite: {remedy}"
    assert (status, lines) == (1, ["", f"Stopped: {reason}; {SAVED.format(2)}"])
    state = read_checkpoint(tmp_path / "out")
    assert all(weight.isfinite().all() for weight in state["weights"].values())


def test_a_second_run_in_the_same_folder_is_refused_and_touches_nothing(call, tmp_path):
    lock = tmp_path / "out" / "checkpoint" / "lock"
    lock.parent.mkdir(parents=True)
    with FileLock(lock):
        before = sorted(tmp_path.rglob("*"))
        status, lines = call()
        assert sorted(tmp_path.rglob("*")) == before
    told = "- OUTPUT_DIR is out: another run is writing there: name another folder"
    assert (status, lines) == (2, ["Nothing was started or changed:", told])


# -------------------------------------------------------------------------------------- the settings
def test_bad_settings_are_told_all_at_once_and_nothing_is_made(stage, call, tmp_path):
    wrong = {
        "--learning-rate": ("0", "LEARNING_RATE is 0: give a number from 1e-30 to 1e+30"),
        "--lora-dropout": ("1", "LORA_DROPOUT is 1: give a number from 0 to 0.9"),
        "--eval-share": ("0", "EVAL_SHARE is 0: give a number from 0.001 to 0.9"),
        "--mini-batch-size": ("3", "MINI_BATCH_SIZE is 3: give 0 or a divisor of BATCH_SIZE, 4"),
        "--output-dir": ("..", "OUTPUT_DIR is ..: "),
    }
    flags = [text for flag, (value, _) in wrong.items() for text in (flag, value)]
    status, (first, *lines) = call(*flags, "--colour")
    assert (status, first) == (2, "Nothing was started or changed:")
    for _, told in wrong.values():
        assert sum(line.startswith(f"- {told}") for line in lines) == 1, told
    assert sum("--colour is no flag" in line for line in lines) == 1
    assert len(lines) == len(wrong) + 1
    assert list(tmp_path.iterdir()) == []


def test_several_processes_are_refused(call, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", "2")
    told = "- WORLD_SIZE is 2: this stage is one process: start it with python"
    assert call() == (2, ["Nothing was started or changed:", told])
    assert list(tmp_path.iterdir()) == []


def copy_scripts(stage, folder, edit=lambda text: text):
    """Copy a stage, edited, and what it imports into an empty folder; return its path."""
    folder.mkdir()
    others = ["train_rlhf"] if stage.name == "train_sft" else ["train_rlhf", "train_sft"]
    for name in others:
        shutil.copy(STAGES.get(name, train_rlhf).__file__, folder)
    path = folder / f"{stage.name}.py"
    with open(stage.module.__file__, encoding="utf-8") as file:
        path.write_text(edit(file.read()), encoding="utf-8")
    return path


def test_help_lists_every_constant_without_waiting_for_libraries(stage, tmp_path):
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    command = [sys.executable, "-X", "importtime", stage.module.__file__, "--help"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, encoding="utf-8")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
    imports = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "argparse" in imports and not imports & {"torch", "transformers", "numpy", "peft"}
    names = [name for *_, names in stage.module.RULES for name in names.split()]
    shown = re.findall("^(--[a-z-]+) = ", done.stdout, flags=re.M)
    assert sorted(shown) == sorted(map(train_rlhf.flag_of, names))
    assert done.stdout.startswith(f"usage: {stage.name}.py [--flag VALUE …]")


def test_a_constant_of_the_edited_file_that_lacks_its_quotes(stage, tmp_path):
    path = copy_scripts(
        stage,
        tmp_path / "edited",
        lambda text: re.sub("^DEVICE = .*", "DEVICE = cpu", text, flags=re.M),
    )
    done = subprocess.run([sys.executable, path], cwd=tmp_path, capture_output=True, text=True)
    told = 'DEVICE = cpu: give "cpu", in quotes\n'
    assert (done.returncode, done.stdout, done.stderr) == (2, "", told)


def test_a_copy_beside_what_it_imports_does_the_same_run(
    stage, start, undisturbed, demo_model, tmp_path
):
    path = copy_scripts(stage, tmp_path / "copied")
    output = tmp_path / "out"
    done = start(output, script=path)
    assert (done.status, done.stderr) == (0, "")
    assert_same_end(output, undisturbed)


# ------------------------------------------------------------------------------------------ the chain
@pytest.fixture(scope="module")
def make_data(script):
    """Return examples/make_data.py as a module, for two of its prompts and fewer samples."""
    path = script.parent / "examples" / "make_data.py"
    spec = importlib.util.spec_from_file_location("make_data", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    sample = module.sample
    module.PROMPTS = module.PROMPTS[:2]
    module.sample = lambda *args: sample(*args[:3], min(args[3], 60), args[4])
    return module


def test_the_three_documented_commands_as_a_chain(
    make_data, demo_model, monkeypatch, tmp_path, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "10000")
    monkeypatch.setattr(sys, "argv", ["make_data.py", "--pairs", "24", "--texts", "12"])
    make_data.main()
    rows, pairs = (
        [json.loads(line) for line in (tmp_path / name).read_text().splitlines()]
        for name in ("texts.jsonl", "pairs.jsonl")
    )
    assert (len(rows), len(pairs)) == (12, 24)
    assert all(make_data.speaks_of_family(row["text"]) for row in rows)
    for pair in pairs:
        assert make_data.gold(pair["chosen"]) > make_data.gold(pair["rejected"])

    small = ["--device", "cpu", "--batch-size", "8", "--learning-rate", "3e-3"]
    given = ["--model-name", str(demo_model), "--data", "texts.jsonl", "--training-epochs", "2"]
    assert train_sft.main([*given, *small, "--max-new-tokens", "4"]) == 0
    given = ["--model-name", "sft_model", "--data", "pairs.jsonl", "--training-epochs", "2"]
    assert train_reward_model.main([*given, *small]) == 0
    given = ["--model-name", "sft_model", "--reward", "reward_model", "--training-epochs", "2"]
    given += ["--device", "cpu", "--batch-size", "6", "--eval-samples", "6", "--eval-prompts"]
    seen = []
    make_policy = train_rlhf.make_policy

    def see_the_model(model, *others):
        seen.append({name: weight.clone() for name, weight in model.named_parameters()})
        policy = make_policy(model, *others)
        seen.append(policy.pretrained_model)
        return policy

    monkeypatch.setattr(train_rlhf, "make_policy", see_the_model)
    assert train_rlhf.main([*given, "--max-new-tokens", "6"]) == 0

    reports = {
        name: json.loads((tmp_path / name / "report.json").read_text())
        for name in ("sft_model", "reward_model", "trained_model")
    }
    for name in ("base", "trained"):
        assert reports["sft_model"][name]["loss"] > 0
        assert 0 <= reports["reward_model"][name]["accuracy"] <= 1
    measured = reports["reward_model"]["trained"]
    assert read_metrics(tmp_path / "reward_model")[-1]["loss"] < math.log(2)  # which is a guess's
    config = json.loads((tmp_path / "reward_model" / "config.json").read_text())
    for name, figure in (
        ("score_mean", measured["score_mean"]),
        ("score_std", measured["score_std"]),
        ("score_accuracy", measured["accuracy"]),
    ):
        assert config[name] == pytest.approx(figure)
    assert reports["trained_model"]["scale"]["accuracy"] == pytest.approx(measured["accuracy"])
    assert f"agrees with {measured['accuracy']:.0%} of held-out" in capsys.readouterr().out

    # The policy starts as the SFT model, and with its adapter off, which is the reference, is it.
    weights, adapted = seen
    saved, untaught = (load_file(f"{path}/model.safetensors") for path in ("sft_model", demo_model))
    assert all(torch.equal(weights[name], saved[name]) for name in saved.keys() & weights.keys())
    assert any(
        not torch.equal(weights[name], untaught[name]) for name in untaught.keys() & weights.keys()
    )
    for name, weight in adapted.named_parameters():
        if ".base_layer.weight" in name:
            plain = name.removeprefix("base_model.model.").replace(".base_layer", "")
            assert torch.equal(weight, saved[plain])
