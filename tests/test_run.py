"""Whole runs of the script, each in a process of its own."""

import hashlib
import io
import json
import logging
import math
import re
import signal
import struct
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import train_rlhf

LEARNING = ["--training-epochs", "50", "--eval-samples", "60"]
SHORT = [
    "--training-epochs",
    "2",
    "--batch-size",
    "5",
    "--eval-samples",
    "6",
]  # 12 samples asked for, 15 taken
METRICS = {
    *(
        "step",
        "samples",
        "epoch",
        "success_rate",
        "score",
        "reward",
        "kl",
        "kl_coef",
        "learning_rate",
    ),
    *(
        "policy_loss",
        "value_loss",
        "approx_kl",
        "clip_fraction",
        "entropy",
        "distinct",
        "skipped_updates",
        "seconds",
    ),
}


def read_metrics(folder):
    return [
        json.loads(line)
        for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    ]


def read_report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def without_seconds(metrics):
    return [
        {name: value for name, value in record.items() if name != "seconds"} for record in metrics
    ]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.fixture(scope="session")
def learned(run_script, demo_model, tmp_path_factory):
    """Return an undisturbed run that is long enough to learn."""
    cwd = tmp_path_factory.mktemp("learned")
    result = run_script(cwd, "--model-name", demo_model, *LEARNING)
    assert result.status == 0, result.stderr
    folder = cwd / "trained_model"
    return SimpleNamespace(
        **vars(result),
        cwd=cwd,
        folder=folder,
        metrics=read_metrics(folder),
        report=read_report(folder),
    )


# --------------------------------------------------------------------------------------------------------- learning
def test_the_run_raises_the_success_rate(learned):
    base, trained = (learned.report[model]["train_prompts"] for model in ("base", "trained"))
    assert trained["success_rate"] >= base["success_rate"] + 0.25
    assert learned.report["learned"] is True
    rates = [record["success_rate"] for record in learned.metrics]
    assert sum(rates[-8:]) > sum(rates[:8])
    assert "did not learn" not in learned.stdout


def test_the_saved_model_does_in_plain_transformers_what_the_report_says(
    learned, monkeypatch, tmp_path
):
    monkeypatch.chdir(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(learned.folder)
    model = AutoModelForCausalLM.from_pretrained(learned.folder)
    torch.manual_seed(0)
    scores = []
    for prompt in train_rlhf.PROMPTS:
        inputs = tokenizer([prompt] * 40, return_tensors="pt")
        ids = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :]
        texts = tokenizer.batch_decode(ids, skip_special_tokens=True)
        scores += map(train_rlhf.positive_word_reward, texts)
    told = learned.report["trained"]["train_prompts"]["success_rate"]
    assert train_rlhf.success_rate(scores) == pytest.approx(told, abs=0.2)
    assert (
        train_rlhf.success_rate(scores)
        > learned.report["base"]["train_prompts"]["success_rate"] + 0.2
    )


# ------------------------------------------------------------------------------------------------------ what it leaves
def test_all_that_the_run_leaves_is_in_its_folder(learned):
    assert [path.name for path in learned.cwd.iterdir()] == ["trained_model"]
    names = {path.name for path in learned.folder.iterdir()}
    model = {
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert names >= model | {
        "metrics.jsonl",
        "report.json",
        "training.png",
        "README.md",
        "checkpoint",
    }
    assert not [
        name
        for name in names
        if name.endswith((".new", ".old", ".bin", ".pt")) or "adapter" in name
    ]


def test_the_metrics_of_each_step(learned):
    batch_size = train_rlhf.BATCH_SIZE
    assert len(learned.metrics) == math.ceil(50 * len(train_rlhf.PROMPTS) / batch_size)
    for number, record in enumerate(learned.metrics, start=1):
        assert set(record) == METRICS
        assert record["step"] == number
        assert record["samples"] == number * batch_size
        assert record["epoch"] == pytest.approx(number * batch_size / len(train_rlhf.PROMPTS))
        assert record["score"] == pytest.approx(2 * record["success_rate"] - 1)
        assert record["reward"] == pytest.approx(record["score"] - record["kl_coef"] * record["kl"])
        assert (
            0 <= record["success_rate"] <= 1
            and 0 < record["distinct"] <= 1
            and 0 <= record["clip_fraction"] <= 1
        )
        assert record["kl"] > -1e-6 and record["approx_kl"] >= 0 and record["entropy"] > 0
        assert record["learning_rate"] >= 0 and record["kl_coef"] >= 0
        assert record["skipped_updates"] == 0
    assert learned.metrics[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert learned.metrics[0]["learning_rate"] == train_rlhf.LEARNING_RATE
    seconds = [record["seconds"] for record in learned.metrics]
    assert seconds == sorted(seconds) and seconds[0] > 0


def test_the_report(learned, demo_model):
    report = learned.report
    assert set(report["settings"]) == {name.lower() for name in train_rlhf.constants()}
    given = {"model_name": str(demo_model), "training_epochs": 50, "eval_samples": 60}
    assert report["settings"] | given == report["settings"]
    assert report["versions"]["trl"] == "0.11.4"
    assert report["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert "CPU" in report["device"]
    for model in ("base", "trained"):
        for prompts in ("train_prompts", "eval_prompts"):
            part = report[model][prompts]
            assert {"success_rate", "kl", "kl_minimum", "distinct", "perplexity_under_base"} <= set(
                part
            )
            assert part["samples"] == 60
            assert (
                0 <= part["success_rate"] <= 1
                and 0 < part["distinct"] <= 1
                and part["perplexity_under_base"] > 1
            )
            assert part["kl"] >= 0 and part["kl_minimum"] >= 0
            assert set(part["first_sample"]) == set(
                report["settings"]["prompts" if "train" in prompts else prompts]
            )
    assert report["base"]["train_prompts"]["kl"] == 0
    assert (
        report["trained"]["train_prompts"]["kl"] > report["trained"]["train_prompts"]["kl_minimum"]
    )
    assert report["samples"] == learned.metrics[-1]["samples"]
    assert report["seconds"] == learned.metrics[-1]["seconds"]
    assert report["samples_per_second"] == pytest.approx(report["samples"] / report["seconds"])
    assert 100 < report["peak_memory_mb"] < 10_000


def test_both_models_are_measured_on_enough_samples_by_default():
    assert train_rlhf.EVAL_SAMPLES >= 200


def test_the_picture(learned):
    data = (learned.folder / "training.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert 800 <= width <= 3000 and 300 <= height <= 2000
    assert 10_000 < len(data) < 1_000_000


def test_the_model_card(learned):
    card = (learned.folder / "README.md").read_text(encoding="utf-8")
    for model in ("base", "trained"):
        for prompts in ("train_prompts", "eval_prompts"):
            part = learned.report[model][prompts]
            assert f"{part['success_rate']:.3f}" in card
            assert f"{part['perplexity_under_base']:.3f}" in card
            for prompt, text in part["first_sample"].items():
                assert prompt in card
                assert not text.split() or text.split()[0] in card
    assert "training.png" in card
    assert train_rlhf.loading_snippet(".", train_rlhf.PROMPTS[0]) in card


def test_the_loading_snippet_works_as_it_stands(learned, monkeypatch, capsys):
    assert "AutoModelForCausalLM.from_pretrained('./trained_model')" in learned.stdout
    snippet = learned.stdout[learned.stdout.index("from transformers import") :]
    monkeypatch.chdir(learned.cwd)
    exec(snippet, {})
    assert train_rlhf.PROMPTS[0] in capsys.readouterr().out


# ------------------------------------------------------------------------------------------------------ what it shows
def test_piped_output_is_calm(learned):
    assert learned.stderr == ""
    assert "\r" not in learned.stdout and "\x1b" not in learned.stdout
    assert "Warning" not in learned.stdout


def test_what_will_happen_is_told_first(learned, demo_model):
    head = learned.stdout.split("step ")[0]
    steps = len(learned.metrics)
    for text in (
        str(demo_model),
        "CPU",
        "float32",
        f"{steps * train_rlhf.BATCH_SIZE} samples",
        f"{steps} steps",
    ):
        assert text in head
    trained, total = sorted(
        int(number.replace(",", "")) for number in re.findall(r"\d{1,3}(?:,\d{3})+", head)
    )
    assert 10_000 < trained < total


def test_progress_comes_in_plain_lines(learned):
    steps, every = len(learned.metrics), train_rlhf.LOG_EVERY
    shown = [line for line in learned.stdout.splitlines() if line.startswith("step ")]
    assert len(shown) == math.ceil(steps / every)
    for line in shown:
        assert re.fullmatch(
            r"step \d+/\d+, \d+:\d\d:\d\d left, success +\d+%, score [+-]\d\.\d\d, KL -?\d+\.\d\d",
            line,
        )
    rates = [
        record["success_rate"]
        for record in learned.metrics[-math.ceil(100 / train_rlhf.BATCH_SIZE) :]
    ]
    assert f"success {sum(rates) / len(rates):4.0%}" in shown[-1]


def test_samples_before_and_after_are_shown(learned):
    for prompt in train_rlhf.PROMPTS + train_rlhf.EVAL_PROMPTS:
        assert re.search(rf"^{re.escape(prompt)}  ", learned.stdout, re.MULTILINE)
    assert "BEFORE" in learned.stdout and "AFTER" in learned.stdout and "HELD-OUT" in learned.stdout


# ------------------------------------------------------------------------------------------------- stopped and resumed
def stop(process, folder, steps, number):
    """Send a signal once that many steps are done; return exit status, stdout and stderr."""
    try:
        while not (folder / "metrics.jsonl").exists() or len(read_metrics(folder)) < steps:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        process.send_signal(number)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    return SimpleNamespace(status=process.returncode, stdout=stdout, stderr=stderr)


@pytest.fixture(scope="session")
def disturbed(start_script, run_script, demo_model, tmp_path_factory):
    """Return a run with the settings of the undisturbed one, that was stopped, terminated and killed on its way."""
    cwd = tmp_path_factory.mktemp("disturbed")
    folder = cwd / "trained_model"
    flags = ["--model-name", demo_model, *LEARNING]
    stops = []
    for steps, number in (5, signal.SIGINT), (12, signal.SIGTERM), (23, signal.SIGKILL):
        stopped = stop(
            start_script(cwd, *flags, *(["--resume"] if stops else [])), folder, steps, number
        )
        stopped.steps = len(read_metrics(folder))
        stopped.checkpoint = (folder / "checkpoint").is_dir()
        stopped.names = [path.name for path in folder.iterdir()]
        stops.append(stopped)
    result = run_script(cwd, *flags, "--resume")
    assert result.status == 0, result.stderr
    return SimpleNamespace(
        **vars(result), cwd=cwd, folder=folder, metrics=read_metrics(folder), stops=stops
    )


@pytest.mark.parametrize(("index", "status"), [(0, 130), (1, 143)], ids=["Ctrl-C", "SIGTERM"])
def test_a_stopped_run_saves_a_checkpoint_and_says_how_to_go_on(disturbed, index, status):
    stopped = disturbed.stops[index]
    assert stopped.status == status
    assert stopped.checkpoint
    assert "--resume" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    assert "report.json" not in stopped.names  # it is no finished run


def test_a_resumed_run_ends_like_an_undisturbed_one(learned, disturbed):
    assert without_seconds(disturbed.metrics) == without_seconds(learned.metrics)
    assert digest(disturbed.folder / "model.safetensors") == digest(
        learned.folder / "model.safetensors"
    )
    ours, theirs = read_report(disturbed.folder), learned.report
    assert (ours["base"], ours["trained"]) == (theirs["base"], theirs["trained"])


def test_a_resumed_run_says_where_it_goes_on(disturbed):
    assert f"going on after step {disturbed.stops[0].steps}" in disturbed.stops[1].stdout
    killed_at = disturbed.stops[2].steps
    (start,) = map(int, re.findall(r"going on after step (\d+)", disturbed.stdout))
    assert disturbed.stops[1].steps <= start <= killed_at


def test_a_resumed_run_is_not_moved_aside(disturbed):
    assert [path.name for path in disturbed.cwd.iterdir()] == ["trained_model"]


# ------------------------------------------------------------------------------------------------------- several runs
@pytest.fixture(scope="session")
def twice(run_script, demo_model, tmp_path_factory):
    """Return two short runs in one folder: one of another seed with TensorBoard, and one that can't learn."""
    cwd = tmp_path_factory.mktemp("twice")
    folder = cwd / "trained_model"
    first = run_script(
        cwd, "--model-name", demo_model, *SHORT, "--seed", "1", "--report-to", "tensorboard"
    )
    assert first.status == 0, first.stderr
    first.files = {
        path.relative_to(folder): digest(path) for path in folder.rglob("*") if path.is_file()
    }
    first.metrics = read_metrics(folder)
    unable = ["--learning-rate", "1e-12", "--target-approx-kl", "0"]
    second = run_script(cwd, "--model-name", demo_model, *SHORT, *unable)
    assert second.status == 0, second.stderr
    second.metrics, second.report = read_metrics(folder), read_report(folder)
    return SimpleNamespace(cwd=cwd, first=first, second=second)


def test_an_earlier_run_is_moved_aside_and_not_deleted(twice):
    assert sorted(path.name for path in twice.cwd.iterdir()) == ["trained_model", "trained_model-1"]
    aside = twice.cwd / "trained_model-1"
    assert {
        path.relative_to(aside): digest(path) for path in aside.rglob("*") if path.is_file()
    } == twice.first.files
    assert "was moved to trained_model-1" in twice.second.stdout
    assert "was moved" not in twice.first.stdout


def test_another_seed_gives_another_run(twice):
    first, second = twice.first.metrics[0], twice.second.metrics[0]
    assert first["entropy"] != second["entropy"]


def test_a_last_step_that_is_filled_up_is_told(twice):
    assert [record["samples"] for record in twice.first.metrics] == [5, 10, 15]
    assert "15 samples (12 asked for, the last step filled up) in 3 steps" in twice.first.stdout


def test_a_run_that_did_not_learn_says_so_and_what_to_try(twice):
    assert twice.second.report["learned"] is False
    assert "did not learn" in twice.second.stdout
    assert "Try more TRAINING_EPOCHS" in twice.second.stdout
    assert twice.second.report["trained"]["train_prompts"]["kl"] < 1e-6


def test_a_fixed_learning_rate_stays_as_it_is(twice):
    assert {record["learning_rate"] for record in twice.second.metrics} == {1e-12}


def test_tensorboard_gets_every_metric_of_every_step(twice):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    events = accumulator.EventAccumulator(
        str(twice.cwd / "trained_model-1" / "tensorboard")
    ).Reload()
    assert set(events.Tags()["scalars"]) == METRICS
    for name in METRICS:
        values = [(event.step, event.value) for event in events.Scalars(name)]
        assert values == [
            (record["step"], pytest.approx(record[name], rel=1e-5))
            for record in twice.first.metrics
        ]
    assert not (twice.cwd / "trained_model" / "tensorboard").exists()
    assert twice.first.stderr == ""


# ------------------------------------------------------------------------------------------------------- other models
def test_a_model_that_nobody_here_trained_learns_too(run_script, shared_model, tmp_path):
    result = run_script(
        tmp_path,
        "--model-name",
        shared_model("stories260K"),
        "--training-epochs",
        "80",
        "--eval-samples",
        "60",
    )
    assert (result.status, result.stderr) == (0, "")
    report = read_report(tmp_path / "trained_model")
    base, trained = (
        report[model]["train_prompts"]["success_rate"] for model in ("base", "trained")
    )
    assert base < 0.2
    assert trained >= base + 0.25
    assert report["learned"] is True


def test_two_steps_of_a_random_model_with_the_tokenizer_of_tinyllama(
    run_script, save_random_model, shared_model, tmp_path
):
    source = shared_model("tinyllama-shape")
    small = {
        "num_hidden_layers": 2,
        "hidden_size": 64,
        "intermediate_size": 176,
        "num_attention_heads": 4,
    }
    config = LlamaConfig.from_pretrained(source, **small, dtype="float32")
    assert config.vocab_size == 32000
    save_random_model(config, AutoTokenizer.from_pretrained(source), tmp_path / "random")
    result = run_script(
        *(
            tmp_path,
            "--model-name",
            "random",
            "--training-epochs",
            "2",
            "--batch-size",
            "6",
            "--eval-samples",
            "6",
        )
    )
    assert (result.status, result.stderr) == (0, "")
    first, second = read_metrics(tmp_path / "trained_model")
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert second["kl"] > 0
    assert "did not learn" in result.stdout
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "trained_model")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "trained_model")
    assert model.config.vocab_size == 32000
    assert len(model.generate(**tokenizer("Life is", return_tensors="pt"))[0]) > 3


# ------------------------------------------------------------------------------------------------- in this process
@pytest.mark.parametrize("kind", ["llama", "gpt2", "8bit", "4bit"])
def test_libraries_say_nothing_in_between(
    call_main, demo_model, request, kind, capsys, caplog, recwarn
):
    model = request.getfixturevalue("gpt2") if kind == "gpt2" else demo_model
    quantization = kind if kind.endswith("bit") else "none"
    assert (
        call_main("--model-name", model, *SHORT, "--device", "cpu", "--quantization", quantization)
        == 0
    )
    assert capsys.readouterr().err == ""
    assert [str(warning.message) for warning in recwarn] == []
    assert {
        record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING
    } == set()


def test_a_finished_run_can_go_on(call_main, demo_model, tmp_path, capsys):
    flags = ["--model-name", demo_model, *SHORT, "--device", "cpu"]
    assert call_main(*flags) == 0
    folder = tmp_path / "trained_model"
    metrics, model = read_metrics(folder), digest(folder / "model.safetensors")
    assert call_main(*flags, "--resume") == 0  # with nothing left to do
    assert (read_metrics(folder), digest(folder / "model.safetensors")) == (metrics, model)
    assert call_main(*flags, "--resume", "--training-epochs", "4") == 0
    assert read_metrics(folder)[:3] == metrics
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3, 4, 5]
    assert digest(folder / "model.safetensors") != model


def test_a_console_that_lacks_a_character_stops_no_run(
    call_main, demo_model, tmp_path, monkeypatch
):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    assert call_main("--model-name", demo_model, *SHORT, "--device", "cpu") == 0
    assert (tmp_path / "trained_model" / "report.json").exists()


def test_a_reward_that_fails_in_the_middle_is_told_with_its_reason(
    call_main, demo_model, tmp_path, capsys
):
    (tmp_path / "mine.py").write_text(
        "def score(text):\n    return float('nan')\n", encoding="utf-8"
    )
    assert (
        call_main(
            "--model-name", demo_model, *SHORT, "--device", "cpu", "--reward", "mine.py:score"
        )
        == 1
    )
    err = capsys.readouterr().err
    assert err.startswith("\nStopped: REWARD, score, gave nan for ")
    assert err.endswith(
        ": it has to return one finite number for one text; there was nothing to save yet\n"
    )


REWARD = """
import pathlib

def score(text):
    calls = pathlib.Path("calls")
    calls.write_text(calls.read_text() + "." if calls.exists() else ".")
    if calls.stat().st_size == {last}:
        raise ValueError("enough")
    return len(text) / 10
"""


def test_a_reward_that_fails_in_the_middle_costs_no_finished_step(
    call_main, demo_model, tmp_path, capsys
):
    flags = ["--model-name", demo_model, *SHORT, "--device", "cpu", "--reward", "mine.py:score"]
    flags += ["--score-prefixes", "false"]  # so that each step calls it 5 times
    (tmp_path / "mine.py").write_text(REWARD.format(last=12), encoding="utf-8")
    assert call_main(*flags) == 1
    err = capsys.readouterr().err
    assert err.startswith("\nStopped: REWARD, score, raised ValueError('enough') for ")
    saved = "what was learned up to step 2 is saved. To go on, run the same line with --resume\n"
    assert err.endswith(f": mend it; {saved}")
    metrics = read_metrics(tmp_path / "trained_model")
    assert len(metrics) == 2

    (tmp_path / "mine.py").write_text(REWARD.format(last=-1), encoding="utf-8")
    assert call_main(*flags, "--resume") == 0
    resumed = read_metrics(tmp_path / "trained_model")
    assert resumed[:2] == metrics
    assert call_main(*flags, "--output-dir", "undisturbed") == 0
    assert without_seconds(resumed) == without_seconds(read_metrics(tmp_path / "undisturbed"))


def test_a_run_that_blows_up_stops_before_it_saves_what_it_learned(
    call_main, demo_model, tmp_path, capsys
):
    flags = [
        "--device",
        "cpu",
        "--learning-rate",
        "1e18",
        "--target-approx-kl",
        "0",
        "--save-every",
        "1",
    ]
    assert call_main("--model-name", demo_model, *SHORT, *flags) == 1
    reason = "three steps in a row had updates with numbers that are not finite"
    remedy = (
        "lower TARGET_APPROX_KL, or start anew with a lower LEARNING_RATE or with DTYPE float32"
    )
    assert (
        capsys.readouterr().err == f"\nStopped: {reason}: {remedy}; there was nothing to save yet\n"
    )
    assert all(record["skipped_updates"] for record in read_metrics(tmp_path / "trained_model"))
    assert not (tmp_path / "trained_model" / "checkpoint" / "state.safetensors").exists()
    assert not (tmp_path / "trained_model" / "report.json").exists()
    assert not (tmp_path / "trained_model" / "model.safetensors").exists()
