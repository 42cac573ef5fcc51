"""Whole runs of the script, in processes of their own where a signal or a fresh start matters."""

import hashlib
import io
import json
import logging
import math
import re
import signal
import struct
import subprocess
import sys
import textwrap
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


def read_report(folder):
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def read_card(folder):
    return (folder / "README.md").read_text(encoding="utf-8")


def without_seconds(metrics):
    return [record | {"seconds": 0} for record in metrics]


def digest(path):
    return hashlib.sha256(path.read_bytes()).hexdigest()


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
    return run


# ---------------------------------------------------------------------------------------- learning
def test_the_run_raises_the_success_rate(learned):
    base, trained = (learned.report[model]["train_prompts"] for model in ("base", "trained"))
    assert trained["success_rate"] >= base["success_rate"] + 0.25
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
        scores += map(train_rlhf.positive_word_reward, texts)
    told, base = (learned.report[model]["train_prompts"] for model in ("trained", "base"))
    assert train_rlhf.success_rate(scores) == pytest.approx(told["success_rate"], abs=0.2)
    assert train_rlhf.success_rate(scores) > base["success_rate"] + 0.2


# ------------------------------------------------------------------------------------ what it leaves
def test_all_that_the_run_leaves_is_in_its_folder(learned):
    assert [path.name for path in learned.cwd.iterdir()] == ["trained_model"]
    model = "config.json generation_config.json model.safetensors tokenizer.json"
    results = "tokenizer_config.json metrics.jsonl report.json training.png README.md checkpoint"
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


def test_the_report(learned, demo_model):
    report = learned.report
    names = {name.lower() for _, _, _, names in train_rlhf.RULES for name in names.split()}
    assert set(report["settings"]) == names
    given = {"model_name": str(demo_model), "training_epochs": 50, "eval_samples": 60}
    assert report["settings"] | given == report["settings"]
    assert report["versions"]["trl"] == "0.11.4"
    assert report["versions"]["torch"].startswith(torch.__version__.split("+")[0])
    assert (report["device"], report["dtype"]) == ("CPU with 1 thread", "float32")
    wanted = {"train_prompts": train_rlhf.PROMPTS, "eval_prompts": train_rlhf.EVAL_PROMPTS}
    for model in ("base", "trained"):
        assert set(report[model]) == set(wanted)
        for name, part in report[model].items():
            assert part["samples"] == 60
            assert 0 <= part["success_rate"] <= 1 and 0 < part["distinct"] <= 1
            assert part["score"] == pytest.approx(2 * part["success_rate"] - 1)
            assert part["perplexity_under_base"] > 1
            assert part["kl"] >= 0 and part["kl_minimum"] >= 0
            assert [*part["first_sample"]] == wanted[name]
    assert report["base"]["train_prompts"]["kl"] == 0
    trained = report["trained"]["train_prompts"]
    assert trained["kl"] > trained["kl_minimum"]
    assert report["samples"] == learned.metrics[-1]["samples"]
    assert report["seconds"] == learned.metrics[-1]["seconds"]
    assert report["samples_per_second"] == pytest.approx(report["samples"] / report["seconds"])
    assert 100 < report["peak_memory_mb"] < 10_000


def test_both_models_are_measured_on_enough_samples_by_default():
    assert train_rlhf.EVAL_SAMPLES >= 200


def test_a_processor_is_named_with_its_threads(monkeypatch):
    for threads, name in (1, "CPU with 1 thread"), (4, "CPU with 4 threads"):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        assert train_rlhf.device_name("cpu") == name


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
            assert f"{part['success_rate']:.3f}" in card
            assert f"{part['perplexity_under_base']:.3f}" in card
            for prompt, text in part["first_sample"].items():
                assert prompt in card
                assert " ".join(text.split()) in card
    assert "(training.png)" in card
    assert "from_pretrained('.')" in card


def test_the_loading_snippet_works_as_it_stands(learned, monkeypatch, capsys):
    assert "AutoModelForCausalLM.from_pretrained('./trained_model')" in learned.stdout
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


def test_the_result_is_shown_as_in_the_card(learned):
    shown = learned.stdout.partition("\n# ")[2]
    told = read_card(learned.folder).removeprefix("# ")
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
    words = "The base model never succeeded, so there was nothing to learn from:\n"
    words += "try words or prompts with which it succeeds now and then.\n"
    for text in (capsys.readouterr().out, read_card(tmp_path / "trained_model")):
        assert (
            f"Success: 0.0% before, 0.0% after, at 0.0 nats from the base model.\n{words}" in text
        )
        assert "did not learn" not in text


def test_the_advice_after_far_too_large_steps_does_not_contradict_itself(
    call_main, demo_model, tmp_path, capsys
):
    assert call_main("--model-name", demo_model, *SHORT, "--learning-rate", 1) == 0
    report = read_report(tmp_path / "trained_model")
    assert report["close_to_base"] is False
    for text in (capsys.readouterr().out, read_card(tmp_path / "trained_model")):
        advice = text.partition(" Little is left of it: try a lower LEARNING_RATE")[2]
        assert advice.partition("\n\n")[0].endswith(" or a higher KL_COEF.")
        assert "a lower KL_COEF" not in text and "TRAINING_EPOCHS" not in text


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
    assert stopped.stderr == f"{once_more}\nStopped; {saved} --resume\n"
    assert stopped.names == {"checkpoint", "metrics.jsonl"}  # it is no finished run


def test_a_stop_while_the_libraries_are_imported_shows_no_stack_trace(script):
    command = [sys.executable, str(script), "--model-name", "no/such/model"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        process.communicate(timeout=1.5)  # importing takes several seconds
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == (b"", b"")
    assert process.returncode == -signal.SIGINT


def test_a_second_signal_stops_at_once(run_script, demo_model, tmp_path):
    signals = [(2, signal.SIGINT), (2, signal.SIGINT)]
    stopped = run_script(tmp_path, "--model-name", demo_model, *SHORT, signals=signals)
    assert stopped.status == 130
    assert stopped.stderr.endswith("\nStopped; there was nothing to save yet\n")
    assert len(read_metrics(tmp_path / "trained_model")) == 1


def test_a_resumed_run_ends_like_an_undisturbed_one(disturbed):
    metrics, expected = read_metrics(disturbed.folder), read_metrics(disturbed.calm)
    assert without_seconds(metrics) == without_seconds(expected)
    assert len(metrics) == 12
    model, expected = (digests(place) for place in (disturbed.folder, disturbed.calm))
    assert model["model.safetensors"] == expected["model.safetensors"]
    ours, theirs = read_report(disturbed.folder), read_report(disturbed.calm)
    assert (ours["base"], ours["trained"]) == (theirs["base"], theirs["trained"])


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


def test_a_last_step_that_is_filled_up_is_told(twice):
    assert [record["samples"] for record in twice.first.metrics] == [5, 10, 15]
    assert "15 samples (12 asked for, the last step filled up) in 3 steps" in twice.first.stdout


def test_a_run_that_did_not_learn_says_so_and_what_to_try(twice):
    assert twice.second.report["learned"] is False
    words = "That is no rise beyond chance: this run did not learn.\n"
    assert f"{words}Try more TRAINING_EPOCHS or a lower KL_COEF.\n" in twice.second.stdout
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
    (tmp_path / "mine.py").write_text("def score(text):\n    return text.count('e') - 9\n")
    capsys.readouterr()
    flags = [*FAST, "--training-epochs", "2", "--batch-size", "6", "--eval-samples", "6"]
    assert call_main("--model-name", "random", "--reward", "mine.py:score", *flags) == 0
    output, errors = capsys.readouterr()
    assert errors == ""
    first, second = read_metrics(tmp_path / "trained_model")
    assert first["kl"] == pytest.approx(0, abs=1e-5)
    assert second["kl"] > 1e-3
    assert "nothing to learn from" in output
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
        monkeypatch.setattr(train_rlhf, "is_terminal", lambda watched=watched: watched)
        capsys.readouterr()
        assert call_main(*flags, "--resume") == 0
        output, errors = capsys.readouterr()
        assert "going on after step 3" in output
        assert " left" not in output + errors and "step 3/3" not in output
        assert (read_metrics(folder), digest(folder / "model.safetensors")) == (metrics, model)

    assert call_main(*flags, "--resume", "--training-epochs", "4") == 0
    assert "5/5 |" in capsys.readouterr().err  # here is a bar
    assert read_metrics(folder)[:3] == metrics
    assert [record["step"] for record in read_metrics(folder)] == [1, 2, 3, 4, 5]
    assert digest(folder / "model.safetensors") != model


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

def score(text):
    calls = pathlib.Path("calls")
    calls.write_text(calls.read_text() + "." if calls.exists() else ".")
    if calls.stat().st_size == {last}:
        {end}
    return len(text) / 10
"""
MINE = [*SHORT, "--reward", "mine.py:score", "--score-prefixes", "false"]  # 5 calls a step, and 1


def write_reward(folder, last, end="pass"):
    (folder / "calls").unlink(missing_ok=True)
    (folder / "mine.py").write_text(REWARD.format(last=last, end=end), encoding="utf-8")


@pytest.mark.parametrize("end", ["raise ValueError('enough')", "return float('nan')"])
def test_a_reward_that_fails_at_once_leaves_an_earlier_run_where_it_was(
    call_main, demo_model, tmp_path, capsys, end
):
    folder = tmp_path / "trained_model"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("an earlier run")
    before = digests(folder)
    write_reward(tmp_path, last=1, end=end)
    assert call_main("--model-name", demo_model, *MINE) == 2
    first, line = capsys.readouterr().err.splitlines()
    assert first == "Nothing was started or changed:"
    reason = "enough" if "enough" in end else "nan is too large or not finite"
    assert line.startswith(f"- REWARD is score: ValueError('{reason}') for ")
    assert line.endswith(": let it return one finite number for one text")
    assert digests(folder) == before
    assert not (tmp_path / "trained_model-1").exists()


@pytest.mark.parametrize(
    ("end", "reason"),
    [
        ("raise ValueError('enough')", "enough"),
        ("return float('nan')", "nan is too large or not finite"),
    ],
)
def test_a_reward_that_fails_in_the_first_step_is_told_with_its_reason(
    call_main, demo_model, tmp_path, capsys, end, reason
):
    write_reward(tmp_path, last=3, end=end)
    assert call_main("--model-name", demo_model, *MINE) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"\nStopped: REWARD is score: ValueError('{reason}') for ")
    remedy = "let it return one finite number for one text"
    assert err.endswith(f": {remedy}; there was nothing to save yet\n")


def test_a_reward_that_fails_in_the_middle_costs_no_finished_step(
    call_main, demo_model, tmp_path, capsys
):
    flags = ["--model-name", demo_model, *MINE]
    write_reward(tmp_path, last=13, end="raise ValueError('enough')")
    assert call_main(*flags) == 1
    err = capsys.readouterr().err
    assert err.startswith("\nStopped: REWARD is score: ValueError('enough') for ")
    saved = "what was learned up to step 2 is saved. To go on, run the same line with --resume\n"
    assert err.endswith(f": let it return one finite number for one text; {saved}")
    metrics = read_metrics(tmp_path / "trained_model")
    assert len(metrics) == 2

    write_reward(tmp_path, last=-1)
    assert call_main(*flags, "--resume") == 0
    resumed = read_metrics(tmp_path / "trained_model")
    assert resumed[:2] == metrics
    assert call_main(*flags, "--output-dir", "undisturbed") == 0
    assert without_seconds(resumed) == without_seconds(read_metrics(tmp_path / "undisturbed"))


def test_a_run_that_blows_up_stops_before_it_saves_what_it_learned(
    call_main, demo_model, tmp_path, capsys
):
    flags = ["--learning-rate", "1e18", "--ppo-epochs", "2", "--save-every", "1"]
    assert call_main("--model-name", demo_model, *SHORT, *flags) == 1
    reason = "three steps in a row had updates that are not finite"
    remedy = "lower TARGET_APPROX_KL, or start anew with a lower LEARNING_RATE or DTYPE float32"
    saved = "there was nothing to save yet"
    assert capsys.readouterr().err == f"\nStopped: {reason}: {remedy}; {saved}\n"
    folder = tmp_path / "trained_model"
    assert all(record["skipped_updates"] for record in read_metrics(folder))
    assert {path.name for path in folder.rglob("*")} == {"checkpoint", "lock", "metrics.jsonl"}
