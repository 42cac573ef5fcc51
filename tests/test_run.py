"""Whole runs of train_rlhf.py: that it learns, what it leaves and shows, how it goes on and ends."""

import json
import logging
import math
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import textwrap
from dataclasses import asdict
from types import SimpleNamespace

import pytest
import torch
from fork_driver import environment
from helpers import digests, read_metrics, refusals
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import train_rlhf
from finetune.scale import Scale, success_rate

FULL = bool(os.environ.get("CI_FULL"))
FAST = ["--device", "cpu", "--ppo-epochs", "1", "--target-approx-kl", "0"]
# It takes 15 samples where 12 are asked for.
SHORT = [*FAST, "--training-epochs", "2", "--batch-size", "5", "--eval-samples", "6"]
LEARNING = ["--training-epochs", "50", "--eval-samples", "60"]
NOTHING = "there was nothing to save yet"
UP_TO = "what was learned up to step {} is saved. To go on, run the same line with --resume"
METRICS = (
    "step samples epoch success_rate score reward kl kl_coef learning_rate policy_loss value_loss "
    "approx_kl clip_fraction entropy distinct skipped_updates seconds"
)


def read_samples(folder):
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


def read_report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def read_card(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def figures_of(report):
    """Return what was measured on the prompts of the training, of both models."""
    return report["base"]["train_prompts"], report["trained"]["train_prompts"]


def assert_ended_alike(folder, other):
    """Check that two runs gave the same: metrics but the seconds, samples, report, model."""
    assert read_metrics(folder) == read_metrics(other)
    for name in ("samples.jsonl", "model.safetensors"):
        assert digests(folder)[name] == digests(other)[name], name
    ours, theirs = read_report(folder), read_report(other)
    for name in ("scale", "base", "trained", "learned"):
        assert ours[name] == theirs[name], name


@pytest.fixture(scope="module")
def learned(run_script, demo_model, tmp_path_factory):
    """Return an undisturbed run that is long enough to learn."""
    cwd = tmp_path_factory.mktemp("learned")
    folder = cwd / "trained_model"
    run = run_script(cwd, "--model-name", demo_model, *LEARNING)
    assert run.status == 0, run.stderr
    run.cwd, run.folder = cwd, folder
    run.metrics, run.report = read_metrics(folder), read_report(folder)
    run.samples = read_samples(folder)
    return run


# ----------------------------------------------------------------------------- learning
def test_the_run_raises_the_success_rate(learned):
    base, trained = figures_of(learned.report)
    assert trained["success_rate"] >= base["success_rate"] + 0.25
    assert trained["win_rate"] > 0.5 + 0.1
    assert learned.report["learned"] is True
    rates = [record["success_rate"] for record in learned.metrics]
    assert sum(rates[-8:]) > sum(rates[:8])
    assert "did not learn" not in learned.stdout


def test_the_saved_model_does_in_plain_transformers_what_the_report_says(learned):
    tokenizer = AutoTokenizer.from_pretrained(learned.folder)
    model = AutoModelForCausalLM.from_pretrained(learned.folder)
    torch.manual_seed(0)
    scores = []
    for prompt in train_rlhf.PROMPTS:
        prompts = [prompt] * 40
        inputs = tokenizer(prompts, return_tensors="pt")
        ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        scores += train_rlhf.positive_word_reward(prompts, texts)
    base, trained = figures_of(learned.report)
    rate = success_rate(scores, threshold=0)
    assert rate == pytest.approx(trained["success_rate"], abs=0.2)
    assert rate > base["success_rate"] + 0.2


@pytest.mark.skipif(not FULL, reason="another model learns as demo_model does: CI_FULL=1")
def test_a_model_that_nobody_here_trained_learns_too(run_script, shared_model, tmp_path):
    model = shared_model("stories260K")
    ended = run_script(tmp_path, "--model-name", model, "--device", "cpu", *LEARNING)
    assert (ended.status, ended.stderr) == (0, "")
    report = read_report(tmp_path / "trained_model")
    base, trained = figures_of(report)
    assert base["success_rate"] < 0.2
    assert trained["success_rate"] >= base["success_rate"] + 0.25
    assert report["learned"] is True


# ----------------------------------------------------------------------- what it leaves
def test_all_that_the_run_leaves_is_in_its_folder(learned):
    assert [path.name for path in learned.cwd.iterdir()] == ["trained_model"]
    model = "config.json generation_config.json model.safetensors tokenizer.json"
    model += " tokenizer_config.json adapter"
    results = "metrics.jsonl samples.jsonl report.json training.png README.md checkpoint"
    results += " run.json measured.jsonl watch.html"
    names = {path.name for path in learned.folder.iterdir()}
    assert names == {*model.split(), *results.split()}
    left = {path.name for path in (learned.folder / "checkpoint").iterdir()}
    assert left == {"lock", "state.pt"}


def test_the_metrics_of_each_step(learned):
    batch_size, prompts = train_rlhf.BATCH_SIZE, len(train_rlhf.PROMPTS)
    assert len(learned.metrics) == math.ceil(50 * prompts / batch_size)
    for number, record in enumerate(learned.metrics, start=1):
        assert set(record) == set(METRICS.split())
        assert record["step"] == number
        assert record["samples"] == number * batch_size
        assert record["epoch"] == pytest.approx(number * batch_size / prompts)
        assert record["score"] == pytest.approx(2 * record["success_rate"] - 1)
        price = record["kl_coef"] * record["kl"]
        assert record["reward"] == pytest.approx(record["score"] - price)
        for name in ("success_rate", "distinct", "clip_fraction"):
            assert 0 <= record[name] <= 1
        for name in ("approx_kl", "entropy", "learning_rate"):
            assert record[name] >= 0
        assert record["kl"] > -1e-6
        assert record["kl_coef"] == train_rlhf.KL_COEF
        assert record["skipped_updates"] == 0
    assert learned.metrics[0]["kl"] == 0
    assert learned.metrics[0]["learning_rate"] == train_rlhf.LEARNING_RATE
    lines = (learned.folder / "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(line)["seconds"] for line in lines]
    assert seconds == sorted(seconds) and seconds[0] > 0
    assert seconds[-1] == learned.report["seconds"]


def test_the_samples_of_each_step(learned):
    size = train_rlhf.BATCH_SIZE
    assert len(learned.samples) == size * len(learned.metrics)
    for record in learned.metrics:
        last = size * record["step"]
        batch = learned.samples[last - size : last]
        assert {sample["step"] for sample in batch} == {record["step"]}
        for sample in batch:
            assert set(sample) == {"step", "prompt", "response", "score", "kl", "tokens"}
            assert "".join(sample["tokens"]["text"]) == sample["response"]
            assert sample["score"] in (1.0, -1.0) and sample["kl"] > -1e-6
        for name in ("score", "kl"):
            mean = sum(sample[name] for sample in batch) / size
            assert mean == pytest.approx(record[name], abs=1e-6)
        texts = [sample["response"] for sample in batch]
        assert len(set(texts)) / size == record["distinct"]
    prompts = [sample["prompt"] for sample in learned.samples]
    assert prompts[:6] != train_rlhf.PROMPTS  # in an order of its own, each once an epoch
    for start in range(0, len(prompts), 6):
        assert sorted(prompts[start : start + 6]) == sorted(train_rlhf.PROMPTS)
    for sample in learned.samples:
        if sample["score"] == 1:
            words = re.findall(r"\w+", sample["response"].lower())
            assert set(words) & set(train_rlhf.POSITIVE_WORDS)


def test_the_report(learned, demo_model):
    report = learned.report
    assert set(report["settings"]) == set(train_rlhf.Settings.model_fields)
    assert report["settings"]["model_name"] == str(demo_model)
    assert report["settings"]["eval_samples"] == 60
    # The scores stay as they are.
    assert report["scale"] == asdict(Scale(threshold=0.0, is_rule=True))
    assert (report["dtype"], report["chat"]) == ("float32", False)
    wanted = {"train_prompts": train_rlhf.PROMPTS}
    wanted |= {"eval_prompts": train_rlhf.EVAL_PROMPTS}
    for model in ("base", "trained"):
        assert set(report[model]) == set(wanted)
        for name, part in report[model].items():
            assert part["samples"] == 60
            assert 0 <= part["success_rate"] <= 1
            assert 0 < part["distinct"] <= 1
            assert part["score"] == pytest.approx(2 * part["success_rate"] - 1)
            deviation = math.sqrt(1 - part["score"] ** 2)  # of +1 and -1
            assert part["standard_error"] == pytest.approx(deviation / math.sqrt(60))
            assert part["perplexity_under_base"] > 1
            assert part["kl"] >= 0 and part["kl_minimum"] >= 0
            assert [*part["first_sample"]] == wanted[name]
    base, trained = figures_of(report)
    assert (base["kl"], base["kl_minimum"], base["win_rate"]) == (0, 0, 0.5)
    assert trained["kl"] > trained["kl_minimum"]
    # Of two scores, what is won more often than lost is the rise of the success rate.
    rise = trained["success_rate"] - base["success_rate"]
    assert trained["win_rate"] == pytest.approx(0.5 + rise / 2)
    assert report["samples"] == learned.metrics[-1]["samples"]


def test_both_models_are_measured_on_enough_samples_by_default():
    assert train_rlhf.EVAL_SAMPLES >= 200


def test_the_picture(learned):
    data = (learned.folder / "training.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 800 <= width <= 3000 and 300 <= height <= 2000
    assert 10_000 < len(data) < 1_000_000


def test_the_model_card(learned):
    card = read_card(learned.folder)
    for model in ("base", "trained"):
        for prompts in ("train_prompts", "eval_prompts"):
            part = learned.report[model][prompts]
            for name in ("score", "standard_error", "win_rate", "success_rate"):
                assert f"{part[name]:.3f}" in card
            assert f"{part['perplexity_under_base']:.3f}" in card
            for prompt, text in part["first_sample"].items():
                assert prompt in card
                assert " ".join(text.split()) in card
    assert "(training.png)" in card
    assert """pipeline("text-generation", '.')""" in card


def test_the_loading_snippet_works_as_it_stands(learned, monkeypatch, capsys):
    assert """pipeline("text-generation", './trained_model')""" in learned.stdout
    snippet = learned.stdout[learned.stdout.index("    from transformers import") :]
    monkeypatch.chdir(learned.cwd)
    exec(textwrap.dedent(snippet), {})
    assert train_rlhf.PROMPTS[0] in capsys.readouterr().out


# ------------------------------------------------------------------------ what it shows
def test_piped_output_is_calm(learned):
    assert learned.stderr == ""
    assert not {"\r", "\x1b"} & set(learned.stdout)
    assert "Warning" not in learned.stdout


def test_what_will_happen_is_told_first(learned, demo_model):
    head, steps = learned.stdout.split("step ")[0], len(learned.metrics)
    assert f"Model     {demo_model}, " in head
    assert "Device    CPU with 1 thread, float32 weights\n" in head
    assert "Prompts   6 to train on, 6 held out\n" in head
    samples = steps * train_rlhf.BATCH_SIZE
    assert f"Training  {samples} samples in {steps} steps, seed {train_rlhf.SEED}\n" in head
    counts = re.findall(r"\d{1,3}(?:,\d{3})+", head)
    trained, total = sorted(int(count.replace(",", "")) for count in counts)
    assert 10_000 < trained < total


def test_progress_comes_in_plain_lines_each_with_a_sample_of_its_step(learned):
    steps, every = len(learned.metrics), train_rlhf.LOG_EVERY
    lines = learned.stdout.splitlines()
    shown = [number for number, line in enumerate(lines) if line.startswith("step ")]
    assert len(shown) == math.ceil(steps / every)
    figures = r"\d+:\d\d left, success +\d+%, score [+-]\d\.\d\d, KL \d+\.\d\d"
    for number, place in enumerate(shown, start=1):
        assert re.fullmatch(rf"step {number * every}/{steps}, {figures}", lines[place])
        first = learned.samples[(number * every - 1) * train_rlhf.BATCH_SIZE]
        text = " ".join(f"{first['prompt']} | {first['response']}".split())
        assert lines[place + 1] == f"    {text}"
    last = learned.metrics[-100 // train_rlhf.BATCH_SIZE :]
    rates = [record["success_rate"] for record in last]
    assert f"00:00 left, success {sum(rates) / len(rates):4.0%}" in lines[shown[-1]]


def test_the_result_is_shown_as_in_the_card(learned):
    shown = learned.stdout.partition("\n# ")[2]
    told = read_card(learned.folder).partition("\n---\n\n# ")[2]
    told, picture, _ = told.partition("\n![")
    assert picture
    assert shown == told.replace("'.'", "'./trained_model'") + "\n"
    for prompt in train_rlhf.PROMPTS:
        assert re.search(rf"^    {prompt}\n        before  .*\n        after   ", shown, re.M)
    for prompt in train_rlhf.EVAL_PROMPTS:
        assert f"\n    {prompt} (held out)\n" in shown


# ----------------------------------------------------------------- two runs in a folder
@pytest.fixture(scope="module")
def twice(run_script, demo_model, tmp_path_factory):
    """Return two runs in one folder: of another seed, and one that nothing can be learned in."""
    cwd = tmp_path_factory.mktemp("twice")
    folder = cwd / "trained_model"
    flags = ["--model-name", demo_model, *SHORT]
    first = run_script(cwd, *flags, "--seed", 1)
    assert (first.status, first.stderr) == (0, "")
    first.files, first.metrics = digests(folder), read_metrics(folder)
    more = ["--positive-words", "zebra", "--eval-prompts", "--learning-rate", "1e-12"]
    second = run_script(cwd, *flags, *more)
    assert (second.status, second.stderr) == (0, "")
    second.metrics, second.report = read_metrics(folder), read_report(folder)
    return SimpleNamespace(cwd=cwd, folder=folder, first=first, second=second)


def test_an_earlier_run_is_moved_aside_and_not_deleted(twice):
    names = {path.name for path in twice.cwd.iterdir()}
    assert names == {"trained_model", "trained_model-1"}
    assert digests(twice.cwd / "trained_model-1") == twice.first.files
    line = "The earlier run in trained_model/ was moved to trained_model-1/\n"
    assert twice.second.stdout.startswith(line)
    assert "was moved" not in twice.first.stdout


def test_another_seed_gives_another_run(twice):
    first, second = twice.first.metrics[0], twice.second.metrics[0]
    assert first["entropy"] != second["entropy"]


def test_a_last_step_is_filled_up(twice):
    assert [record["samples"] for record in twice.first.metrics] == [5, 10, 15]
    assert "15 samples in 3 steps" in twice.first.stdout


def test_a_fixed_learning_rate_stays_as_it_is(twice):
    assert {record["learning_rate"] for record in twice.second.metrics} == {1e-12}
    assert twice.second.report["trained"]["train_prompts"]["kl"] < 1e-6


def test_without_held_out_prompts_a_run_is_whole(twice):
    report = twice.second.report
    assert "Prompts   6 to train on, 0 held out\n" in twice.second.stdout
    assert report["settings"]["eval_prompts"] == []
    assert [*report["base"]] == [*report["trained"]] == ["train_prompts"]
    for text in (twice.second.stdout.partition("\n# ")[2], read_card(twice.folder)):
        assert "|   base | trained |\n" in text
        assert "held out" not in text and "eval_prompts" not in text
        assert all(prompt in text for prompt in train_rlhf.PROMPTS)


def test_a_model_that_never_succeeds_has_nothing_to_learn_from(twice):
    words = "Score: -1.00 ± 0.00 before, -1.00 ± 0.00 after, a win rate of 50%,\n"
    words += "at 0.0 nats from the base model. Success: 0.0% before, 0.0% after.\n"
    words += "All responses score the same: try words or prompts with which some are better.\n"
    for text in (twice.second.stdout, read_card(twice.folder)):
        assert words in text
        assert "did not learn" not in text
    assert twice.second.report["trained"]["train_prompts"]["kl_minimum"] is None
    assert twice.second.report["learned"] is False


def test_a_finished_run_can_go_on(twice, call_main, demo_model, tmp_path, monkeypatch, capsys):
    flags = ["--model-name", demo_model, *SHORT, "--seed", 1]
    folder = tmp_path / "trained_model"
    shutil.copytree(twice.cwd / "trained_model-1", folder)
    before, samples = digests(folder), folder / "samples.jsonl"
    # A kill may leave half a line, and half a character.
    with open(samples, "ab") as file:
        file.write('{"step": 4, "prompt": "The café'.encode()[:-1])

    capsys.readouterr()
    assert call_main(*flags, "--resume") == 0
    output, errors = capsys.readouterr()
    assert "going on after step 3" in output
    assert not re.search(r"(\d|\?) left", output + errors)
    assert "step 3/3" not in output
    for name in ("samples.jsonl", "model.safetensors"):
        assert digests(folder)[name] == before[name]
    assert read_metrics(folder) == twice.first.metrics

    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "isatty", lambda: True)
    assert call_main(*flags, "--resume", "--training-epochs", "4") == 0
    assert "5/5 |" in capsys.readouterr().err  # here is a bar
    assert read_metrics(folder)[:3] == twice.first.metrics
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3, 4, 5]
    assert digests(folder)["model.safetensors"] != before["model.safetensors"]


# ------------------------------- prompts and a reward in own files, stopped and resumed
PEOPLE = ("I", "We", "They", "My friends", "Nina and I", "Our neighbours")
LETTERS = {  # prompt: its answer, the letter that its completions are to have
    f"{people} {verb}": letter
    for people, letter in zip(PEOPLE, "eatnsh")
    for verb in ("feel", "are", "think of")
}
LETTERS |= {"Today, I am": "e", "The café is": "a"}
LETTER_REWARD = """
def letters(prompts, completions, answer, **kwargs):
    return [float(text.count(letter)) for text, letter in zip(completions, answer)]
"""
STEPS = 9
STOPS = [(3, signal.SIGINT), (5, signal.SIGTERM), (8, signal.SIGKILL)]


@pytest.fixture(scope="module")
def own_files(run_script, demo_model, tmp_path_factory):
    """Return two runs alike, of a table of prompts and a graded reward that reads its answers.

    One was stopped, terminated and killed on its way. Then its prompts were changed and put back,
    and the code of its reward was changed, too.
    """
    cwd = tmp_path_factory.mktemp("own_files")
    folder = cwd / "trained_model"
    table, code = cwd / "prompts.csv", cwd / "rewards.py"
    rows = [*LETTERS.items(), ("I feel", "e"), ("They went on and on, " * 200, "t")]
    lines = [f'"{prompt}",{letter}\n' for prompt, letter in rows]
    text = "".join(["prompt,answer\n", *lines])
    table.write_text(text, encoding="utf-8")
    code.write_text(LETTER_REWARD, encoding="utf-8")
    flags = ["--model-name", demo_model, "--device", "cpu", "--training-epochs", 2]
    flags += ["--batch-size", 4, "--save-every", 2]
    flags += ["--eval-samples", 24, "--scale-samples", 24]
    flags += ["--learning-rate", "0.003"]  # far enough that a scale measured anew would differ
    flags += ["--prompts", table.name, "--reward", "rewards.py:letters"]
    calm = run_script(cwd, *flags, "--output-dir", "calm")
    assert (calm.status, calm.stderr) == (0, "")

    stops = []
    for step, number in STOPS:
        resume = ["--resume"] if stops else []
        stopped = run_script(cwd, *flags, *resume, signals=[(step, number)])
        stopped.metrics = read_metrics(folder)
        stopped.names = {path.name for path in folder.iterdir()}
        stops.append(stopped)
    before = digests(folder)
    table.write_text(text + "\n", encoding="utf-8")
    refused = run_script(cwd, *flags, "--resume")
    refused.changed = digests(folder) != before
    table.write_text(text, encoding="utf-8")
    code.write_text(LETTER_REWARD + "# It may have been mended.\n", encoding="utf-8")
    end = run_script(cwd, *flags, "--resume")
    runs = {"calm_run": calm, "stops": stops, "refused": refused, "end": end}
    return SimpleNamespace(cwd=cwd, calm=cwd / "calm", folder=folder, **runs)


@pytest.mark.parametrize("index", [0, 1], ids=["Ctrl-C", "SIGTERM"])
def test_a_stopped_run_saves_a_checkpoint_and_says_how_to_go_on(own_files, index):
    stopped, (step, number) = own_files.stops[index], STOPS[index]
    assert stopped.status == 128 + number
    assert len(stopped.metrics) == step  # the step was taken to its end, and no further one
    once_more = "\nStopping after this step; once more to stop at once\n"
    told = f"\nStopped: by a signal; {UP_TO.format(step)}\n"
    assert stopped.stderr == f"{once_more}{told}"
    names = {"checkpoint", "metrics.jsonl", "run.json", "samples.jsonl"}
    assert stopped.names == names  # it is not a finished run


def test_a_resumed_run_ends_like_an_undisturbed_one(own_files):
    assert (own_files.end.status, own_files.end.stderr) == (0, "")
    assert_ended_alike(own_files.folder, own_files.calm)
    steps = [sample["step"] for sample in read_samples(own_files.folder)]
    assert steps == [step for step in range(1, STEPS + 1) for _ in range(4)]
    rates = {record["learning_rate"] for record in read_metrics(own_files.folder)}
    assert len(rates) == STEPS  # each was set by the step before


def test_a_resumed_run_says_where_it_goes_on(own_files):
    ends = [*own_files.stops[1:], own_files.end]
    for end, step in zip(ends, (3, 5, 6)):  # killed in step 8, with a checkpoint every 2
        assert f"Output    trained_model/, going on after step {step}\n" in end.stdout
        assert "Scale  " not in end.stdout  # it is that of the checkpoint
    killed = own_files.stops[2]
    assert (killed.status, killed.stderr) == (-signal.SIGKILL, "")
    assert len(killed.metrics) == 7


def test_a_resumed_run_is_not_moved_aside(own_files):
    folders = {path.name for path in own_files.cwd.iterdir() if path.is_dir()}
    assert folders - {"__pycache__"} == {"calm", "trained_model"}


def test_a_run_is_not_resumed_with_changed_prompts(own_files):
    refused = own_files.refused
    told = "prompts.csv has changed since the checkpoint: put it back or start anew"
    assert refusals(refused.status, refused.stderr) == [told]
    assert not refused.changed


def test_own_prompts_are_shuffled_and_a_tenth_is_held_out(own_files):
    report = read_report(own_files.calm)
    samples = read_samples(own_files.calm)
    trained_on = [*report["base"]["train_prompts"]["first_sample"]]
    held_out = [*report["base"]["eval_prompts"]["first_sample"]]
    assert 2 <= len(held_out) <= 3  # of 21, if the one that is too long is among them
    assert sorted([*trained_on, *held_out]) == sorted(LETTERS)
    prompts, size = [sample["prompt"] for sample in samples], len(trained_on)
    epochs = [prompts[:size], prompts[size : 2 * size]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(trained_on)
    assert epochs[0] != epochs[1]
    assert set(prompts) == set(trained_on)


def test_prompts_that_are_held_out_or_left_out_are_told(own_files):
    (line,) = re.findall("^Prompts .*", own_files.calm_run.stdout, re.M)
    held_out = "[23] held out: EVAL_SHARE 0.1, in place of EVAL_PROMPTS"
    left_out = "left out: 1 given twice, 1 too long"
    assert re.fullmatch(rf"Prompts   1\d to train on, {held_out}; {left_out}", line)


def test_a_graded_reward_with_an_answer_from_its_row(own_files):
    report = read_report(own_files.calm)
    metrics = read_metrics(own_files.calm)
    samples = read_samples(own_files.calm)
    for sample in samples:
        assert sample["score"] == sample["response"].count(LETTERS[sample["prompt"]])
    scale = report["scale"]
    assert scale["mean"] > 0 and scale["deviation"] > 0
    assert scale["graded"] is True and scale["threshold"] is None
    for record in metrics:
        assert record["success_rate"] is None
        own = [sample for sample in samples if sample["step"] == record["step"]]
        scores = torch.tensor([sample["score"] for sample in own])
        scaled = torch.asinh((scores - scale["mean"]) / scale["deviation"])
        reward = scaled.mean().item() - record["kl_coef"] * record["kl"]
        assert record["reward"] == pytest.approx(reward, abs=1e-5)
    for model in ("base", "trained"):
        for part in report[model].values():
            assert part["success_rate"] is None
            assert part["score"] > 0 and part["standard_error"] > 0
            assert 0 <= part["win_rate"] <= 1
    trained = report["trained"]["train_prompts"]
    assert 0 <= trained["kl_minimum"] < trained["kl"]


def test_a_graded_reward_is_shown_by_its_score(own_files):
    screen, report = own_files.calm_run.stdout, read_report(own_files.calm)
    figures = f"{report['scale']['mean']:.3g} ± {report['scale']['deviation']:.3g}"
    assert f"Scale     the base model's {figures} becomes 0 ± 1\n" in screen
    assert re.search(r"^step 5/9, \d\d:\d\d left, score \+\d\.\d\d, KL \d\.\d\d$", screen, re.M)
    for text in (screen, read_card(own_files.calm)):
        assert re.search(r"^\| success_rate +\|( +- \|){4}$", text, re.M)
        assert "Score: +" in text and "Success" not in text


# ------------------------------------------------------------------------- other models
def test_two_steps_of_a_random_model_with_the_tokenizer_of_tinyllama(
    run_script, save_random_model, shared_model, tmp_path
):
    source = shared_model("tinyllama-shape")
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 176}
    small |= {"num_attention_heads": 4, "dtype": "float32"}
    config = LlamaConfig.from_pretrained(source, **small)
    assert config.vocab_size == 32000
    tokenizer = AutoTokenizer.from_pretrained(source)
    save_random_model(config, tokenizer, tmp_path / "random")
    reward = "def score(completions, **kwargs):\n    return [*map(len, completions)]\n"
    (tmp_path / "mine.py").write_text(reward)
    flags = ["--model-name", "random", "--reward", "mine.py:score", *SHORT]
    ended = run_script(tmp_path, *flags, "--batch-size", "6")
    assert (ended.status, ended.stderr) == (0, "")
    first, second = read_metrics(tmp_path / "trained_model")
    assert first["kl"] == 0
    assert second["kl"] > 1e-3
    assert "Scale     " in ended.stdout
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trained_model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained_model")
    assert model.config.vocab_size == 32000
    assert len(model.generate(**tokenizer("Life is", return_tensors="pt"))[0]) > 3


@pytest.mark.parametrize("kind", ["gpt2", "8bit", "4bit"] if FULL else ["gpt2", "4bit"])
def test_libraries_say_nothing_in_between(
    call_main, demo_model, request, kind, capsys, caplog, recwarn
):
    model = request.getfixturevalue("gpt2") if kind == "gpt2" else demo_model
    quantization = kind if kind.endswith("bit") else "none"
    capsys.readouterr()
    assert call_main("--model-name", model, *SHORT, "--quantization", quantization) == 0
    assert capsys.readouterr().err == ""
    assert [str(warning.message) for warning in recwarn] == []
    loud = [record for record in caplog.records if record.levelno >= logging.WARNING]
    assert [record.getMessage() for record in loud] == []


# -------------------------------------------------------------------------- how it ends
REWARD = """
import pathlib

def score(prompts, completions, **kwargs):
    scores, calls = [len(text) / 10 for text in completions], pathlib.Path("calls")
    calls.write_text(calls.read_text() + "." if calls.exists() else ".")
    if calls.stat().st_size >= int(pathlib.Path("last").read_text()):
        {end}
    return scores
"""
REMEDY = "let f(prompts, completions, **kwargs) return a finite number for each completion"
# The first call is a try, the second measures the scale, and there is one in each step.
MINE = [*SHORT, "--reward", "mine.py:score", "--scale-samples", "6"]


def write_reward(folder, last, end):
    """Write a reward function that fails from its last call on."""
    (folder / "mine.py").write_text(REWARD.format(end=end), encoding="utf-8")
    (folder / "last").write_text(str(last))


def test_a_second_signal_stops_at_once(run_script, demo_model, tmp_path):
    signals = [(2, signal.SIGINT), (2, signal.SIGINT)]
    stopped = run_script(tmp_path, "--model-name", demo_model, *SHORT, signals=signals)
    assert stopped.status == 130
    assert stopped.stderr.endswith(f"\nStopped: by a signal; {NOTHING}\n")
    assert len(read_metrics(tmp_path / "trained_model")) == 1


def test_a_reward_that_fails_at_once_leaves_an_earlier_run_where_it_was(
    call_main, demo_model, tmp_path, capsys
):
    folder = tmp_path / "trained_model"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("an earlier run")
    before = digests(folder)
    write_reward(tmp_path, last=1, end="raise ValueError('enough')")
    capsys.readouterr()
    status = call_main("--model-name", demo_model, *MINE)
    (problem,) = refusals(status, capsys.readouterr().err)
    assert problem.startswith("REWARD is score: ValueError('enough') for ")
    assert problem.endswith(f": {REMEDY}")
    assert digests(folder) == before
    assert not (tmp_path / "trained_model-1").exists()


def test_a_reward_that_fails_in_the_first_step_is_told_with_its_reason(
    call_main, demo_model, tmp_path, capsys
):
    write_reward(tmp_path, last=3, end="scores[-1] = float('nan')")
    capsys.readouterr()
    assert call_main("--model-name", demo_model, *MINE) == 1
    told = capsys.readouterr().err
    assert told.startswith("\nStopped: REWARD is score: ValueError(")
    assert " has what is not finite or too large" in told
    assert told.endswith(f": {REMEDY}; {NOTHING}\n")


def test_a_reward_that_fails_in_the_middle_costs_no_finished_step(
    call_main, demo_model, tmp_path, capsys
):
    flags = ["--model-name", demo_model, *MINE]
    write_reward(tmp_path, last=5, end="raise ValueError('enough')")
    capsys.readouterr()
    assert call_main(*flags) == 1
    told = capsys.readouterr().err
    assert told.startswith("\nStopped: REWARD is score: ValueError('enough') for ")
    assert told.endswith(f": {REMEDY}; {UP_TO.format(2)}\n")
    metrics = read_metrics(tmp_path / "trained_model")
    assert len(metrics) == 2

    (tmp_path / "last").write_text("1000")  # what made the function fail is mended
    assert call_main(*flags, "--resume") == 0
    resumed = read_metrics(tmp_path / "trained_model")
    assert (resumed[:2], len(resumed)) == (metrics, 3)


@pytest.mark.parametrize(("epochs", "good"), [(2, 0), (1, 1)], ids=["at once", "after a good step"])
def test_a_run_that_blows_up_keeps_the_checkpoint_from_before(
    call_main, demo_model, tmp_path, capsys, epochs, good
):
    """Nothing is wrong with the first update but its size, which the second one meets."""
    flags = ["--learning-rate", "1e18", "--ppo-epochs", epochs, "--save-every", "1"]
    flags += ["--training-epochs", "4"]
    capsys.readouterr()
    assert call_main("--model-name", demo_model, *SHORT, *flags) == 1
    reason = "three steps in a row had updates that are not finite"
    remedy = "lower TARGET_APPROX_KL, or start anew with a lower LEARNING_RATE or DTYPE float32"
    saved = UP_TO.format(1) if good else NOTHING
    folder = tmp_path / "trained_model"
    skipped = [bool(record["skipped_updates"]) for record in read_metrics(folder)]
    assert skipped == [False] * good + [True] * 3
    assert capsys.readouterr().err == f"\nStopped: {reason}: {remedy}; {saved}\n"
    names = {path.name for path in folder.rglob("*")} - {"state.pt"}
    assert names == {"checkpoint", "lock", "metrics.jsonl", "run.json", "samples.jsonl"}
    assert (folder / "checkpoint" / "state.pt").exists() == bool(good)


# -------------------------------------------------------------------- too little memory
CPU_ERROR = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 1024000000000 bytes. Error code 12 (Cannot allocate memory)"
)
ERRORS = [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError(CPU_ERROR)]
ERRORS += [MemoryError()]
LESS = (
    "there is too little memory: lower MINI_BATCH_SIZE (it is 4) or EVAL_BATCH_SIZE (40) and go "
    "on, or start anew with QUANTIZATION 4bit, a BATCH_SIZE below 4 or a smaller model"
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_too_little_memory_for_the_model_is_no_fault_of_its_files(
    call_main, demo_model, monkeypatch, tmp_path, capsys, error
):
    def from_pretrained(*args, **kwargs):
        raise error

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", from_pretrained)
    assert call_main("--model-name", demo_model, *SHORT, "--batch-size", 4) == 1
    assert capsys.readouterr().err == f"\nStopped: {LESS}; {NOTHING}\n"
    assert not (tmp_path / "trained_model").exists()


def test_a_run_that_lacked_memory_goes_on_with_smaller_batches(
    call_main, demo_model, tmp_path, monkeypatch, capsys
):
    def step(*args, **kwargs):
        if len(read_metrics(tmp_path / "trained_model")) == 2:
            raise MemoryError
        return original(*args, **kwargs)

    original = train_rlhf.ExactKLTrainer.step
    flags = ["--model-name", demo_model, *SHORT, "--save-every", 1, "--batch-size", 4]
    with monkeypatch.context() as patch:
        patch.setattr(train_rlhf.ExactKLTrainer, "step", step)
        capsys.readouterr()
        assert call_main(*flags) == 1
    assert capsys.readouterr().err == f"\nStopped: {LESS}; {UP_TO.format(2)}\n"
    smaller = ["--mini-batch-size", "2", "--eval-batch-size", "20", "--resume"]
    assert call_main(*flags, *smaller) == 0
    assert len(read_metrics(tmp_path / "trained_model")) == 3


# ---------------------------------------------------------- an output that nobody reads
LAUNCH = """
import sys
from dataclasses import asdict
from types import SimpleNamespace
sys.path.insert(0, {root!r})
from finetune import command
command.silence_libraries = lambda: None
def run(settings):
    for number in range({lines}):
        print("Model", number, flush={lines} > 1)
sys.exit(command.launch(run, SimpleNamespace(output_dir="out")))
"""


@pytest.mark.parametrize(
    ("ending", "lines", "shown", "reason"),
    [
        ("| head -1", 10**6, "Model 0\n", "Broken pipe"),
        ("> /dev/full", 10**6, "", "No space left on device"),
        ("> /dev/full", 1, "", "No space left on device"),  # which is written in the end
    ],
    ids=["head", "full", "full in the end"],
)
def test_an_output_that_goes_nowhere_ends_the_run_without_a_stack_trace(
    script, tmp_path, ending, lines, shown, reason
):
    program = tmp_path / "launch.py"
    program.write_text(LAUNCH.format(root=str(script.parent), lines=lines))
    line = f"{sys.executable} {program} {ending}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (1, shown)
    remedy = "make room in OUTPUT_DIR, out, and let what is printed be read to its end"
    told = f"something can't be written ({reason}): {remedy}"
    assert done.stderr == f"\nStopped: {told}; {NOTHING}\n"


@pytest.mark.skipif(not FULL, reason="the next one does so in this process: CI_FULL=1")
def test_a_program_without_an_output_goes_on_to_its_end(script, demo_model, tmp_path):
    flags = " ".join(map(str, ["--model-name", demo_model, *SHORT]))
    line = ["bash", "-c", f"{sys.executable} {script} {flags} >&-"]
    place = {"cwd": tmp_path, "env": environment(tmp_path)}
    done = subprocess.run(line, **place, capture_output=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    assert (tmp_path / "trained_model" / "report.json").exists()


def test_without_an_output_the_run_goes_on_to_its_end(
    call_main, demo_model, monkeypatch, tmp_path, capsys
):
    flags = ["--model-name", demo_model, *SHORT, "--training-epochs", 0.5]
    capsys.readouterr()
    with monkeypatch.context() as patch:
        patch.setattr(sys, "stdout", None)  # as it is after >&-
        assert call_main(*flags) == 0
    assert capsys.readouterr() == ("", "")
    assert (tmp_path / "trained_model" / "report.json").exists()
