"""Whole runs of the script, in processes of their own where a signal or a fresh start matters."""

import hashlib
import io
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
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import train_rlhf

FAST = ["--device", "cpu", "--ppo-epochs", "1", "--target-approx-kl", "0"]
# It takes 15 samples where 12 are asked for.
SHORT = [*FAST, "--training-epochs", "2", "--batch-size", "5", "--eval-samples", "6"]
LEARNING = ["--training-epochs", "50", "--eval-samples", "60"]
METRICS = (
    "step samples epoch success_rate score reward kl kl_coef learning_rate policy_loss value_loss "
    "approx_kl clip_fraction entropy distinct skipped_updates seconds"
)


def read_metrics(folder):
    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


def read_samples(folder):
    lines = (folder / "samples.jsonl").read_text(encoding="utf-8").split("\n")
    assert lines.pop() == ""
    return [json.loads(line) for line in lines]


def read_report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def read_card(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def without_seconds(metrics):
    return [record | {"seconds": 0} for record in metrics]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


def assert_ended_alike(folder, other):
    """Check that two runs gave the same: metrics but the seconds, samples, report, model."""
    assert without_seconds(read_metrics(folder)) == without_seconds(read_metrics(other))
    for name in ("samples.jsonl", "model.safetensors"):
        assert digest(folder / name) == digest(other / name), name
    ours, theirs = read_report(folder), read_report(other)
    for name in ("scale", "base", "trained", "learned"):
        assert ours[name] == theirs[name], name


def digests(folder):
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): digest(path) for path in files}


@pytest.fixture(scope="session")
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


# ---------------------------------------------------------------------------------------- learning
def test_the_run_raises_the_success_rate(learned):
    base, trained = (learned.report[model]["train_prompts"] for model in ("base", "trained"))
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
        inputs = tokenizer([prompt] * 40, return_tensors="pt")
        ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        scores += train_rlhf.positive_word_reward(prompts=[prompt] * 40, completions=texts)
    told, base = (learned.report[model]["train_prompts"] for model in ("trained", "base"))
    rate = train_rlhf.success_rate(scores, threshold=0)
    assert rate == pytest.approx(told["success_rate"], abs=0.2)
    assert rate > base["success_rate"] + 0.2


# ------------------------------------------------------------------------------------ what it leaves
def test_all_that_the_run_leaves_is_in_its_folder(learned):
    assert [path.name for path in learned.cwd.iterdir()] == ["trained_model"]
    model = "config.json generation_config.json model.safetensors tokenizer.json"
    logs, results = "metrics.jsonl samples.jsonl", "report.json training.png README.md checkpoint"
    results += " adapter"
    names = {path.name for path in learned.folder.iterdir()}
    assert names == {*model.split(), "tokenizer_config.json", *logs.split(), *results.split()}
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
        assert record["reward"] == pytest.approx(record["score"] - record["kl_coef"] * record["kl"])
        assert 0 <= record["success_rate"] <= 1 and 0 < record["distinct"] <= 1
        assert 0 <= record["clip_fraction"] <= 1
        assert record["kl"] > -1e-6 and record["approx_kl"] >= 0 and record["entropy"] > 0
        assert record["learning_rate"] >= 0 and record["kl_coef"] == train_rlhf.KL_COEF
        assert record["skipped_updates"] == 0
    assert learned.metrics[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert learned.metrics[0]["learning_rate"] == train_rlhf.LEARNING_RATE
    seconds = [record["seconds"] for record in learned.metrics]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_the_samples_of_each_step(learned):
    size = train_rlhf.BATCH_SIZE
    assert len(learned.samples) == size * len(learned.metrics)
    for record in learned.metrics:
        batch = learned.samples[size * (record["step"] - 1) : size * record["step"]]
        assert {sample["step"] for sample in batch} == {record["step"]}
        for sample in batch:
            assert set(sample) == {"step", "prompt", "response", "score", "kl"}
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
    said = {score: [s for s in learned.samples if s["score"] == score] for score in (1, -1)}
    words = set(train_rlhf.POSITIVE_WORDS)
    assert all(words & set(re.findall(r"\w+", each["response"].lower())) for each in said[1])


def test_the_report(learned, demo_model):
    report = learned.report
    names = {name.lower() for _, _, _, names in train_rlhf.RULES for name in names.split()}
    assert set(report["settings"]) == names
    given = {"model_name": str(demo_model), "training_epochs": 50, "eval_samples": 60}
    assert report["settings"] | given == report["settings"]
    assert report["versions"]["trl"] == "0.11.4"
    assert report["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert (report["device"], report["dtype"]) == ("CPU with 1 thread", "float32")
    as_it_is = {"mean": 0.0, "deviation": 1.0, "graded": False, "threshold": 0.0}
    assert report["scale"] == as_it_is
    assert report["chat"] is False
    wanted = {"train_prompts": train_rlhf.PROMPTS, "eval_prompts": train_rlhf.EVAL_PROMPTS}
    for model in ("base", "trained"):
        assert set(report[model]) == set(wanted)
        for name, part in report[model].items():
            assert part["samples"] == 60
            assert 0 <= part["success_rate"] <= 1 and 0 < part["distinct"] <= 1
            assert part["score"] == pytest.approx(2 * part["success_rate"] - 1)
            deviation = math.sqrt(1 - part["score"] ** 2)  # of +1 and -1
            assert part["standard_error"] == pytest.approx(deviation / math.sqrt(60))
            assert part["perplexity_under_base"] > 1
            assert part["kl"] >= 0 and part["kl_minimum"] >= 0
            assert [*part["first_sample"]] == wanted[name]
    base, trained = (report[model]["train_prompts"] for model in ("base", "trained"))
    assert (base["kl"], base["kl_minimum"], base["win_rate"]) == (0, 0, 0.5)
    assert trained["kl"] > trained["kl_minimum"]
    # Of two scores, what is won more often than lost is the rise of the success rate.
    rise = trained["success_rate"] - base["success_rate"]
    assert trained["win_rate"] == pytest.approx(0.5 + rise / 2)
    assert report["samples"] == learned.metrics[-1]["samples"]
    assert report["seconds"] == learned.metrics[-1]["seconds"]
    assert report["samples_per_second"] == pytest.approx(report["samples"] / report["seconds"])
    assert 100 < report["peak_memory_mb"] < 10_000


def test_both_models_are_measured_on_enough_samples_by_default():
    assert train_rlhf.EVAL_SAMPLES >= 200


def test_a_processor_is_named_with_its_threads(monkeypatch):
    for threads, name in (1, "CPU with 1 thread"), (4, "CPU with 4 threads"):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert train_rlhf.device_name(torch.device("cpu")) == name


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


# ------------------------------------------------------------------------------------ what it shows
def test_piped_output_is_calm(learned):
    assert learned.stderr == ""
    assert "\r" not in learned.stdout and "\x1b" not in learned.stdout
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


def test_progress_comes_in_plain_lines(learned):
    steps, every = len(learned.metrics), train_rlhf.LOG_EVERY
    shown = [line for line in learned.stdout.splitlines() if line.startswith("step ")]
    assert len(shown) == math.ceil(steps / every)
    figures = r"\d+:\d\d left, success +\d+%, score [+-]\d\.\d\d, KL \d+\.\d\d"
    for number, line in enumerate(shown, start=1):
        assert re.fullmatch(rf"step {number * every}/{steps}, {figures}", line)
    last = learned.metrics[-100 // train_rlhf.BATCH_SIZE :]
    rates = [record["success_rate"] for record in last]
    assert f"00:00 left, success {sum(rates) / len(rates):4.0%}" in shown[-1]


def test_a_sample_of_the_step_comes_with_every_line_of_progress(learned):
    lines = learned.stdout.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("step "):
            step = int(re.match(r"step (\d+)/", line)[1])
            first = learned.samples[(step - 1) * train_rlhf.BATCH_SIZE]
            text = " ".join(f"{first['prompt']} | {first['response']}".split())
            assert lines[number + 1] == f"    {text}"


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


def test_without_held_out_prompts_a_run_is_whole(call_main, demo_model, tmp_path, capsys):
    assert call_main("--model-name", demo_model, *SHORT, "--eval-prompts") == 0
    screen, errors = capsys.readouterr()
    folder = tmp_path / "trained_model"
    report, card = read_report(folder), read_card(folder)
    assert errors == ""
    assert "Prompts   6 to train on, 0 held out\n" in screen
    assert report["settings"]["eval_prompts"] == []
    assert [*report["base"]] == [*report["trained"]] == ["train_prompts"]
    for text in (screen.partition("\n# ")[2], card):
        assert "|   base | trained |\n" in text
        assert "held out" not in text and "eval_prompts" not in text
        assert all(prompt in text for prompt in train_rlhf.PROMPTS)


def test_a_model_that_never_succeeds_has_nothing_to_learn_from(
    call_main, demo_model, tmp_path, capsys
):
    assert call_main("--model-name", demo_model, *SHORT, "--positive-words", "zebra") == 0
    words = "Score: -1.00 ± 0.00 before, -1.00 ± 0.00 after, a win rate of 50%,\n"
    words += "at 0.0 nats from the base model. Success: 0.0% before, 0.0% after.\n"
    words += "All responses score the same: try words or prompts with which some are better.\n"
    for text in (capsys.readouterr().out, read_card(tmp_path / "trained_model")):
        assert words in text
        assert "did not learn" not in text
    report = read_report(tmp_path / "trained_model")
    assert report["trained"]["train_prompts"]["kl_minimum"] is None
    assert report["learned"] is False


def test_the_advice_after_far_too_large_steps_does_not_contradict_itself(
    call_main, demo_model, tmp_path, capsys
):
    assert call_main("--model-name", demo_model, *SHORT, "--learning-rate", 1) == 0
    report = read_report(tmp_path / "trained_model")
    assert report["close_to_base"] is False
    for text in (capsys.readouterr().out, read_card(tmp_path / "trained_model")):
        advice = text.partition("\nLittle is left of it: lower LEARNING_RATE")[2]
        assert advice.partition("\n\n")[0].endswith(" or raise KL_COEF.")
        assert "lower KL_COEF" not in text and "TRAINING_EPOCHS" not in text


# ------------------------------------------------------------------------------ stopped and resumed
@pytest.fixture(scope="session")
def disturbed(run_script, demo_model, tmp_path_factory):
    """Return two runs alike, but one was stopped, terminated and killed on its way."""
    flags = ["--model-name", demo_model, "--device", "cpu", "--training-epochs", 8]
    flags += ["--batch-size", 4, "--ppo-epochs", 2, "--save-every", 4, "--eval-samples", 12]
    places = {name: tmp_path_factory.mktemp(name) for name in ("calm", "disturbed")}
    calm = run_script(places["calm"], *flags)
    assert calm.status == 0, calm.stderr

    cwd = places["disturbed"]
    folder, stops = cwd / "trained_model", []
    for step, number in (3, signal.SIGINT), (6, signal.SIGTERM), (10, signal.SIGKILL):
        resume = ["--resume"] if stops else []
        stopped = run_script(cwd, *flags, *resume, signals=[(step, number)])
        stopped.metrics = read_metrics(folder)
        stopped.names = {path.name for path in folder.iterdir()}
        stops.append(stopped)
    end = run_script(cwd, *flags, "--resume")
    assert end.status == 0, end.stderr
    return SimpleNamespace(
        calm=places["calm"] / "trained_model", cwd=cwd, folder=folder, stops=stops, end=end
    )


@pytest.mark.parametrize(
    ("index", "status", "step"), [(0, 130, 3), (1, 143, 6)], ids=["Ctrl-C", "SIGTERM"]
)
def test_a_stopped_run_saves_a_checkpoint_and_says_how_to_go_on(disturbed, index, status, step):
    stopped = disturbed.stops[index]
    assert stopped.status == status
    assert len(stopped.metrics) == step  # the step was taken to its end, and no further one
    saved = f"what was learned up to step {step} is saved. To go on, run the same line with"
    once_more = "\nStopping after this step; once more to stop at once\n"
    assert stopped.stderr == f"{once_more}\nStopped: by a signal; {saved} --resume\n"
    assert stopped.names == {"checkpoint", "metrics.jsonl", "samples.jsonl"}  # not a finished run


def test_a_stop_while_the_libraries_are_imported_shows_no_stack_trace(script, demo_model, tmp_path):
    slow = "import pathlib, time\npathlib.Path('importing').touch()\ntime.sleep(60)\n"
    (tmp_path / "torch.py").write_text(slow)  # which is found before the library
    command = [sys.executable, str(script), "--model-name", str(demo_model)]
    options = {"cwd": tmp_path, "env": os.environ | {"PYTHONPATH": str(tmp_path)}}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, **options, **pipes)
    while not (tmp_path / "importing").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    told = b"\nStopped: by a signal; there was nothing to save yet\n"
    assert process.communicate(timeout=60) == (b"", told)
    assert process.returncode == 128 + signal.SIGINT


def test_a_second_signal_stops_at_once(run_script, demo_model, tmp_path):
    signals = [(2, signal.SIGINT), (2, signal.SIGINT)]
    stopped = run_script(tmp_path, "--model-name", demo_model, *SHORT, signals=signals)
    assert stopped.status == 130
    assert stopped.stderr.endswith("\nStopped: by a signal; there was nothing to save yet\n")
    assert len(read_metrics(tmp_path / "trained_model")) == 1


def test_a_resumed_run_ends_like_an_undisturbed_one(disturbed):
    assert_ended_alike(disturbed.folder, disturbed.calm)
    steps = [sample["step"] for sample in read_samples(disturbed.folder)]
    assert steps == [step for step in range(1, 12 + 1) for _ in range(4)]


def test_a_resumed_run_says_where_it_goes_on(disturbed):
    ends = [*disturbed.stops[1:], disturbed.end]
    for end, step in zip(ends, (3, 6, 8)):  # killed in step 10, with a checkpoint every 4
        assert f"Output    trained_model/, going on after step {step}\n" in end.stdout
    killed = disturbed.stops[2]
    assert (killed.status, killed.stderr, len(killed.metrics)) == (-signal.SIGKILL, "", 9)


def test_a_resumed_run_is_not_moved_aside(disturbed):
    assert [path.name for path in disturbed.cwd.iterdir()] == ["trained_model"]


@pytest.mark.parametrize("end", ["finished", "refused", "stopped"])
def test_main_gives_the_signals_back(call_main, demo_model, monkeypatch, end):
    numbers, own = (signal.SIGINT, signal.SIGTERM), lambda number, frame: None
    before = [signal.signal(number, own) for number in numbers]
    during = []

    def run(settings):
        during.extend(signal.getsignal(number) for number in numbers)
        if end == "stopped":
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(train_rlhf, "run", run)
    try:
        wrong = ["--batch-size", "none"] if end == "refused" else []
        status = call_main("--model-name", demo_model, *FAST, *wrong)
        assert [signal.getsignal(number) for number in numbers] == [own, own]
    finally:
        for number, handler in zip(numbers, before):
            signal.signal(number, handler)
    assert status == {"finished": 0, "refused": 2, "stopped": 143}[end]
    assert own not in during


# ------------------------------------------------------------------------------------- several runs
@pytest.fixture(scope="session")
def twice(run_script, demo_model, tmp_path_factory):
    """Return two runs in one folder: of another seed with TensorBoard, and one that can't learn."""
    cwd = tmp_path_factory.mktemp("twice")
    folder, flags = cwd / "trained_model", ["--model-name", demo_model, *SHORT]
    first = run_script(cwd, *flags, "--seed", 1, "--report-to", "tensorboard")
    assert first.status == 0, first.stderr
    first.files, first.metrics = digests(folder), read_metrics(folder)
    second = run_script(cwd, *flags, "--learning-rate", "1e-12")
    assert second.status == 0, second.stderr
    second.metrics, second.report = read_metrics(folder), read_report(folder)
    return SimpleNamespace(cwd=cwd, first=first, second=second)


def test_an_earlier_run_is_moved_aside_and_not_deleted(twice):
    assert sorted(path.name for path in twice.cwd.iterdir()) == ["trained_model", "trained_model-1"]
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


def test_a_run_that_did_not_learn_says_so_and_what_to_try(twice):
    assert twice.second.report["learned"] is False
    words = "Beyond chance this run did not learn: raise TRAINING_EPOCHS or lower KL_COEF.\n"
    assert words in twice.second.stdout
    assert twice.second.report["trained"]["train_prompts"]["kl"] < 1e-6


def test_a_fixed_learning_rate_stays_as_it_is(twice):
    assert {record["learning_rate"] for record in twice.second.metrics} == {1e-12}


def test_tensorboard_gets_every_metric_of_every_step(twice):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(str(twice.cwd / "trained_model-1" / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == set(METRICS.split())
    for name in METRICS.split():
        values = [(event.step, event.value) for event in events.Scalars(name)]
        records = twice.first.metrics
        assert values == [(r["step"], pytest.approx(r[name], rel=1e-5)) for r in records]
    assert not (twice.cwd / "trained_model" / "tensorboard").exists()
    assert twice.first.stderr == ""


# ----------------------------------------------------------------- prompts and a reward in own files
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


@pytest.fixture(scope="session")
def own_files(run_script, demo_model, tmp_path_factory):
    """Return two runs alike, of a table of prompts and a graded reward that reads its answers.

    One was killed on its way, and resumed with files that were changed before they were put back.
    """
    cwd = tmp_path_factory.mktemp("own_files")
    rows = [*LETTERS.items(), ("I feel", "e"), ("They went on and on, " * 200, "t")]
    table = "".join(f'"{prompt}",{letter}\n' for prompt, letter in rows)
    contents = {"prompts.csv": f"prompt,answer\n{table}", "rewards.py": LETTER_REWARD}
    for name, text in contents.items():
        (cwd / name).write_text(text, encoding="utf-8")
    flags = ["--model-name", demo_model, *FAST, "--training-epochs", 2, "--batch-size", 4]
    flags += ["--eval-samples", 24, "--scale-samples", 24, "--save-every", 2]
    flags += ["--learning-rate", "0.003"]  # far enough that a scale measured anew would differ
    flags += ["--prompts", "prompts.csv", "--reward", "rewards.py:letters"]

    calm = run_script(cwd, *flags, "--output-dir", "calm")
    assert (calm.status, calm.stderr) == (0, "")
    killed = run_script(cwd, *flags, signals=[(6, signal.SIGKILL)])
    assert killed.status == -signal.SIGKILL
    assert len(read_metrics(cwd / "trained_model")) == 5  # and the checkpoint has 4
    before, refused = digests(cwd / "trained_model"), {}
    (cwd / "prompts.csv").write_text(contents["prompts.csv"] + "\n", encoding="utf-8")
    refused["prompts.csv"] = run_script(cwd, *flags, "--resume")
    (cwd / "prompts.csv").write_text(contents["prompts.csv"], encoding="utf-8")
    after = digests(cwd / "trained_model")
    resumed = run_script(cwd, *flags, "--resume")
    shutil.copytree(cwd / "trained_model", cwd / "copy")
    again = [*flags, "--output-dir", "copy", "--resume", "--training-epochs", 3]
    refused["eval"] = run_script(cwd, *again, "--eval-prompts")
    folders = {"calm": cwd / "calm", "resumed": cwd / "trained_model"}
    runs = {"calm_run": calm, "refused": refused, "resumed_run": resumed}
    return SimpleNamespace(**folders, **runs, before=before, after=after)


def test_a_run_of_own_prompts_and_a_graded_reward_resumes_exactly(own_files):
    assert (own_files.resumed_run.status, own_files.resumed_run.stderr) == (0, "")
    assert "going on after step 4\n" in own_files.resumed_run.stdout
    assert_ended_alike(own_files.resumed, own_files.calm)
    steps = [sample["step"] for sample in read_samples(own_files.resumed)]
    assert steps == [step for step in range(1, 9 + 1) for _ in range(4)]


def test_a_run_is_not_resumed_with_changed_prompts(own_files):
    refused, told = own_files.refused["prompts.csv"], "has changed since the checkpoint"
    assert refused.status == 2
    line = f"- prompts.csv {told}: put it back or start anew\n"
    assert refused.stderr == f"Nothing was started or changed:\n{line}"
    assert own_files.after == own_files.before


def test_a_run_is_not_resumed_with_what_would_train_on_prompts_that_were_held_out(own_files):
    refused = own_files.refused["eval"]
    assert refused.status == 2
    assert "EVAL_PROMPTS" in refused.stderr


def test_own_prompts_are_shuffled_and_a_tenth_is_held_out(own_files):
    report, samples = read_report(own_files.calm), read_samples(own_files.calm)
    trained_on, held_out = (
        [*report["base"][part]["first_sample"]] for part in ("train_prompts", "eval_prompts")
    )
    assert 2 <= len(held_out) <= 3  # of 21, if the one that is too long is among them
    assert sorted([*trained_on, *held_out]) == sorted(LETTERS)
    prompts, size = [sample["prompt"] for sample in samples], len(trained_on)
    epochs = [prompts[:size], prompts[size : 2 * size]]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(trained_on)
    assert epochs[0] != epochs[1]
    assert set(prompts) == set(trained_on)


def test_prompts_that_are_left_out_are_told(own_files):
    (line,) = re.findall("^Prompts .*", own_files.calm_run.stdout, re.M)
    assert re.fullmatch(r"Prompts   1\d to train on, [23] held out, 2 left out: .*", line)


def test_a_graded_reward_with_an_answer_from_its_row(own_files):
    report, metrics = read_report(own_files.calm), read_metrics(own_files.calm)
    samples = read_samples(own_files.calm)
    for sample in samples:
        assert sample["score"] == sample["response"].count(LETTERS[sample["prompt"]])
    scale = report["scale"]
    assert scale["mean"] > 0 and scale["deviation"] > 0
    assert scale["graded"] is True and scale["threshold"] is None
    for record in metrics:
        assert record["success_rate"] is None
        scores = [sample["score"] for sample in samples if sample["step"] == record["step"]]
        scaled = [math.asinh((each - scale["mean"]) / scale["deviation"]) for each in scores]
        reward = sum(scaled) / len(scaled) - record["kl_coef"] * record["kl"]
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
    assert "Scale  " not in own_files.resumed_run.stdout  # it is that of the checkpoint
    assert re.search(r"^step 5/9, \d\d:\d\d left, score \+\d\.\d\d, KL \d\.\d\d$", screen, re.M)
    for text in (screen, read_card(own_files.calm)):
        assert re.search(r"^\| success_rate +\|( +- \|){4}$", text, re.M)
        assert "Score: +" in text and "Success" not in text


# ------------------------------------------------------------------------------------- other models
def test_a_model_that_nobody_here_trained_learns_too(call_main, shared_model, tmp_path, capsys):
    flags = ["--device", "cpu", *LEARNING, "--eval-prompts"]
    assert call_main("--model-name", shared_model("stories260K"), *flags) == 0
    assert capsys.readouterr().err == ""
    report = read_report(tmp_path / "trained_model")
    parts = [report[model]["train_prompts"] for model in ("base", "trained")]
    base, trained = (part["success_rate"] for part in parts)
    assert base < 0.2
    assert trained >= base + 0.25
    assert report["learned"] is True


def test_two_steps_of_a_random_model_with_the_tokenizer_of_tinyllama(
    call_main, save_random_model, shared_model, tmp_path, capsys
):
    source = shared_model("tinyllama-shape")
    small = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 176}
    config = LlamaConfig.from_pretrained(source, **small, num_attention_heads=4, dtype="float32")
    assert config.vocab_size == 32000
    save_random_model(config, AutoTokenizer.from_pretrained(source), tmp_path / "random")
    reward = "def score(completions, **kwargs):\n    return [len(text) for text in completions]\n"
    (tmp_path / "mine.py").write_text(reward)
    capsys.readouterr()
    flags = [*FAST, "--training-epochs", "2", "--batch-size", "6", "--eval-samples", "6"]
    assert call_main("--model-name", "random", "--reward", "mine.py:score", *flags) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    first, second = read_metrics(tmp_path / "trained_model")
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert second["kl"] > 1e-3
    assert "Scale     " in output
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trained_model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained_model")
    assert model.config.vocab_size == 32000
    assert len(model.generate(**tokenizer("Life is", return_tensors="pt"))[0]) > 3


# ---------------------------------------------------------------------------------- in this process
@pytest.mark.parametrize("kind", ["llama", "gpt2", "8bit", "4bit"])
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


def test_a_finished_run_can_go_on(call_main, demo_model, tmp_path, monkeypatch, capsys):
    flags = ["--model-name", demo_model, *SHORT]
    assert call_main(*flags) == 0
    folder = tmp_path / "trained_model"
    metrics, model = read_metrics(folder), digest(folder / "model.safetensors")

    for watched in (False, True):  # with nothing left to do, there is no progress to show
        capsys.readouterr()
        for stream in (sys.stdout, sys.stderr):
            monkeypatch.setattr(stream, "isatty", lambda watched=watched: watched)
        assert call_main(*flags, "--resume") == 0
        output, errors = capsys.readouterr()
        assert "going on after step 3" in output
        assert not re.search(r"(\d|\?) left", output + errors) and "step 3/3" not in output
        assert (read_metrics(folder), digest(folder / "model.safetensors")) == (metrics, model)

    assert call_main(*flags, "--resume", "--training-epochs", "4") == 0
    assert "5/5 |" in capsys.readouterr().err  # here is a bar
    assert read_metrics(folder)[:3] == metrics
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3, 4, 5]
    assert digest(folder / "model.safetensors") != model


def test_samples_that_end_in_half_a_character_do_not_hinder_a_run_to_go_on(
    call_main, demo_model, tmp_path
):
    flags = ["--model-name", demo_model, *SHORT]
    assert call_main(*flags) == 0
    samples = tmp_path / "trained_model" / "samples.jsonl"
    whole = samples.read_bytes()
    samples.write_bytes(whole + '{"step": 4, "prompt": "The café'.encode()[:-1])  # as a kill may
    assert call_main(*flags, "--resume") == 0
    assert samples.read_bytes() == whole


def test_a_console_that_lacks_a_character_stops_no_run(
    call_main, demo_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert (
        call_main("--model-name", demo_model, *SHORT, "--prompts", "Så är", "--batch-size", 1) == 0
    )
    assert b"    S? ?r\n" in sys.stdout.buffer.getvalue()
    assert (tmp_path / "trained_model" / "report.json").exists()


# ------------------------------------------------------------------------------- rewards that fail
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
FAILURES = pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("raise ValueError('enough')", "enough"),
        ("scores[-1] = float('nan')", " has what is not finite or too large"),
    ],
    ids=["raises", "is not finite"],
)
# The first call is a try, the second measures the scale, and there is one in each step.
MINE = [*SHORT, "--reward", "mine.py:score", "--scale-samples", "6"]


def write_reward(folder, last, end):
    """Write a reward function that fails from its last call on."""
    (folder / "mine.py").write_text(REWARD.format(end=end), encoding="utf-8")
    (folder / "last").write_text(str(last))


@FAILURES
def test_a_reward_that_fails_at_once_leaves_an_earlier_run_where_it_was(
    call_main, demo_model, tmp_path, capsys, end, reason
):
    folder = tmp_path / "trained_model"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("an earlier run")
    before = digests(folder)
    write_reward(tmp_path, last=1, end=end)
    assert call_main("--model-name", demo_model, *MINE) == 2
    first, line = capsys.readouterr().err.splitlines()
    assert first == "Nothing was started or changed:"
    assert line.startswith("- REWARD is score: ValueError(") and reason in line
    assert line.endswith(f": {REMEDY}")
    assert digests(folder) == before
    assert not (tmp_path / "trained_model-1").exists()


@FAILURES
def test_a_reward_that_fails_in_the_first_step_is_told_with_its_reason(
    call_main, demo_model, tmp_path, capsys, end, reason
):
    write_reward(tmp_path, last=3, end=end)
    assert call_main("--model-name", demo_model, *MINE) == 1
    err = capsys.readouterr().err
    assert err.startswith("\nStopped: REWARD is score: ValueError(") and reason in err
    assert err.endswith(f": {REMEDY}; there was nothing to save yet\n")


def test_a_reward_that_fails_in_the_middle_costs_no_finished_step(
    call_main, demo_model, tmp_path, capsys
):
    flags = ["--model-name", demo_model, *MINE]
    write_reward(tmp_path, last=5, end="raise ValueError('enough')")
    assert call_main(*flags) == 1
    err = capsys.readouterr().err
    assert err.startswith("\nStopped: REWARD is score: ValueError('enough') for ")
    saved = "what was learned up to step 2 is saved. To go on, run the same line with --resume\n"
    assert err.endswith(f": {REMEDY}; {saved}")
    folder, undisturbed = tmp_path / "trained_model", tmp_path / "undisturbed"
    metrics = read_metrics(folder)
    assert len(metrics) == 2

    (tmp_path / "last").write_text("1000")  # what made the function fail is mended
    assert call_main(*flags, "--resume") == 0
    assert read_metrics(folder)[:2] == metrics
    assert call_main(*flags, "--output-dir", undisturbed) == 0
    assert_ended_alike(folder, undisturbed)


@pytest.mark.parametrize(("epochs", "good"), [(2, 0), (1, 1)], ids=["at once", "after a good step"])
def test_a_run_that_blows_up_keeps_the_checkpoint_from_before(
    call_main, demo_model, tmp_path, capsys, epochs, good
):
    """Nothing is wrong with the first update but its size, which the second one meets."""
    flags = ["--learning-rate", "1e18", "--ppo-epochs", epochs, "--save-every", "1"]
    flags += ["--training-epochs", "4"]
    assert call_main("--model-name", demo_model, *SHORT, *flags) == 1
    reason = "three steps in a row had updates that are not finite"
    remedy = "lower TARGET_APPROX_KL, or start anew with a lower LEARNING_RATE or DTYPE float32"
    saved = "there was nothing to save yet"
    if good:
        saved = "what was learned up to step 1 is saved. To go on, run the same line with --resume"
    folder = tmp_path / "trained_model"
    skipped = [bool(record["skipped_updates"]) for record in read_metrics(folder)]
    assert skipped == [False] * good + [True] * 3
    assert capsys.readouterr().err == f"\nStopped: {reason}: {remedy}; {saved}\n"
    names = {path.name for path in folder.rglob("*")} - {"state.pt"}
    assert names == {"checkpoint", "lock", "metrics.jsonl", "samples.jsonl"}
    assert (folder / "checkpoint" / "state.pt").exists() == bool(good)
