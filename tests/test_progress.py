"""What the screen shows while a run goes on, and how it shows what went wrong."""

import io
import json
import math
import sys
import textwrap
from itertools import pairwise
from types import SimpleNamespace

import pytest

import train_rlhf


class Screen(io.StringIO):
    """A stream that is a terminal or is none."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


def record(step, rate=0.5, kl=None, skipped_updates=0):
    return {
        "step": step,
        "samples": 50 * step,
        "success_rate": rate,
        "score": 2 * rate - 1,
        "kl": 0.25 * step if kl is None else kl,
        "skipped_updates": skipped_updates,
    }


@pytest.fixture
def show(monkeypatch):
    """Put screens in the place of stdout and stderr; return both."""

    def start(terminal):
        for name in ("stdout", "stderr"):
            monkeypatch.setattr(sys, name, Screen(terminal))
        return sys.stdout, sys.stderr

    return start


@pytest.fixture
def open_log(make_settings, tmp_path, monkeypatch):
    """Open the log of 4 steps of 50 samples, each of which takes 30 seconds."""
    clock = SimpleNamespace(now=1000.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr(train_rlhf, "time", clock)

    def start(metrics):
        (tmp_path / "trained_model").mkdir()
        many = ("--prompts", "Life is", "I", "--training-epochs", "100", "--batch-size", "50")
        return train_rlhf.open_log(make_settings(*many, "--log-every", "2"), metrics)

    def tick():
        clock.now += 30

    start.tick = tick
    return start


def take(open_log, log, metrics, *records):
    for each in records:
        open_log.tick()
        metrics.append(each)
        log(metrics)


# ---------------------------------------------------------------------------------- the progress
def test_a_terminal_gets_one_live_bar(show, open_log):
    out, err = show(terminal=True)
    metrics = []
    with open_log(metrics) as log:
        take(open_log, log, metrics, *(record(step, 0.25 * step) for step in range(1, 5)))
    last = err.getvalue().split("\r")[-1]
    assert last.startswith("4/4 |") and "left" in last
    assert "success  88%" in last  # the mean of the last 100 samples, 75 and 100 %
    assert "score +0.75" in last and "KL 0.88" in last
    assert err.getvalue().count("\n") == 1
    assert out.getvalue() == ""


def test_a_pipe_gets_a_line_every_few_steps_and_no_bar(show, open_log):
    out, err = show(terminal=False)
    metrics = []
    with open_log(metrics) as log:
        take(open_log, log, metrics, *map(record, range(1, 5)))
    assert out.getvalue().splitlines() == [
        "step 2/4, 01:00 left, success  50%, score +0.00, KL 0.38",
        "step 4/4, 00:00 left, success  50%, score +0.00, KL 0.88",
    ]
    assert err.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_nothing_is_shown_where_nothing_is_left_to_do(show, open_log, tmp_path, terminal):
    metrics = [record(step) | {"seconds": 30.0 * step} for step in range(1, 5)]
    out, err = show(terminal)
    with open_log(metrics):
        pass
    assert out.getvalue() == err.getvalue() == ""
    written = (tmp_path / "trained_model" / "metrics.jsonl").read_text()
    assert [json.loads(line) for line in written.splitlines()] == metrics


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_a_run_that_goes_on_counts_on(show, open_log, tmp_path, terminal):
    metrics = [record(1) | {"seconds": 40.0}, record(2) | {"seconds": 80.0}]
    path = tmp_path / "trained_model" / "metrics.jsonl"
    out, err = show(terminal)
    with open_log(metrics) as log:
        take(open_log, log, metrics, record(3))
        written = path.read_text()  # while it is still open
        assert [json.loads(line) for line in written.splitlines()] == metrics
        take(open_log, log, metrics, record(4))
    assert [each["seconds"] for each in metrics] == [40, 80, 110, 140]
    assert len(path.read_text().splitlines()) == 4
    if terminal:
        assert "2/4 |" in err.getvalue() and "0/4" not in err.getvalue()
    else:
        assert [line.split(",")[0] for line in out.getvalue().splitlines()] == ["step 4/4"]


def test_a_last_step_is_shown_whatever_log_every_is(show, open_log, make_settings):
    out, _ = show(terminal=False)
    with open_log([]):
        pass
    settings = make_settings("--training-epochs", "2", "--log-every", "5")  # 3 steps of 4
    metrics = []
    with train_rlhf.open_log(settings, metrics) as log:
        take(open_log, log, metrics, *map(record, range(1, 4)))
    assert [line.split(",")[0] for line in out.getvalue().splitlines()] == ["step 3/3"]


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_skipped_updates_are_told_at_once_and_once(show, open_log, terminal):
    out, _ = show(terminal)
    told = "step 3: updates skipped, since their numbers were not finite: 4"
    metrics = []
    with open_log(metrics) as log:
        take(open_log, log, metrics, record(1), record(2))
        assert "skipped" not in out.getvalue()
        take(open_log, log, metrics, record(3, skipped_updates=4))
        assert out.getvalue().splitlines()[-1] == told
        take(open_log, log, metrics, record(4))
    assert out.getvalue().count("skipped") == 1


def test_a_kl_that_rounding_takes_below_0_is_shown_as_0(show, open_log):
    out, _ = show(terminal=False)
    metrics = []
    with open_log(metrics) as log:
        take(open_log, log, metrics, record(1, kl=-0.0001), record(2, kl=-0.0001))
    assert out.getvalue().endswith("KL 0.00\n")


def test_what_was_not_finite_is_left_out_of_the_progress(show, open_log):
    out, _ = show(terminal=False)
    metrics = []
    with open_log(metrics) as log:
        take(open_log, log, metrics, record(1, kl=1.0))
        take(open_log, log, metrics, *(record(step) | {"kl": None} for step in (2, 3, 4)))
    lines = out.getvalue().splitlines()
    assert lines[0].endswith("KL 1.00")
    assert lines[1].endswith("KL nan")


@pytest.mark.parametrize(
    ("batch_size", "wanted"), [(200, 4.0), (100, 4.0), (50, 3.5), (40, 3.0), (10, 2.5)]
)
def test_recent_steps_are_those_of_the_last_100_samples(batch_size, wanted):
    metrics = [{"samples": batch_size * step, "x": float(step)} for step in range(1, 5)]
    assert train_rlhf.recent(metrics, "x") == wanted


def test_recent_leaves_out_what_was_not_finite():
    metrics = [{"samples": step, "x": x} for step, x in ((1, 2.0), (2, None), (3, 4.0))]
    assert train_rlhf.recent(metrics, "x") == 3
    assert math.isnan(train_rlhf.recent([{"samples": 1, "x": None}], "x"))


@pytest.mark.parametrize(
    ("stdout", "stderr", "watched"),
    [
        (Screen(True), Screen(True), True),
        (Screen(True), Screen(False), False),
        (Screen(False), Screen(True), False),
        (None, Screen(True), False),
    ],
    ids=["terminal", "stderr in a file", "stdout in a file", "stdout closed"],
)
def test_a_bar_is_for_those_who_watch(monkeypatch, stdout, stderr, watched):
    monkeypatch.setattr(sys, "stdout", stdout)
    monkeypatch.setattr(sys, "stderr", stderr)
    assert train_rlhf.is_terminal() is watched


# ---------------------------------------------------------------------------------- the messages
PATH = "/a/folder-that/" + "has-a-long-name-" * 8 + "of-its-own"


@pytest.fixture
def longest(read_settings, make_settings):
    """Return the longest messages: of many wrong settings, of memory, of a disk, of a stop."""
    wrong = ["--model-name", PATH, "--lr", "1e-4", "--batch-size", "ten", "--epochs", "3"]
    wrong += ["--prompts", "a", "a", "--eval-prompts", "a", "--quantisation", "4bit"]
    wrong += ["--temperature", "0", "--dtype", "half", "--clip-range", "-1", "--seed", "x y z"]
    with pytest.raises(train_rlhf.SettingsError) as refused:
        read_settings(*wrong)
    assert len(refused.value.problems) == 11
    settings = make_settings("--output-dir", "a/folder")
    failures = [MemoryError(), OSError(28, "No space left on device"), OSError("why " * 60)]
    reasons = [train_rlhf.explain(error, settings) for error in failures]
    saved = "what was learned up to step 12 is saved. To go on, run the same line with --resume"
    return [str(refused.value), *(f"\nStopped: {reason}; {saved}" for reason in reasons)]


@pytest.mark.parametrize("columns", [40, 80, 10_000])
def test_no_word_is_broken_at_the_edge_of_the_screen(longest, monkeypatch, capsys, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    for text in longest:
        assert max(map(len, text.splitlines())) > 150  # or it would tell little
        train_rlhf.tell(text)
        out, err = capsys.readouterr()
        assert out == ""
        assert err.split() == text.split()
        for line in err.splitlines():
            assert len(line) <= columns or line == line.split()[0]  # a path that is longer
        starts = [line for line in err.splitlines() if line.startswith("- ")]
        assert len(starts) == text.count("\n- ")  # each problem begins a line
        if columns == 10_000:
            assert err == text + "\n"


def test_lines_are_as_full_as_they_can_be(longest, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for text in longest[1:]:
        train_rlhf.tell(text)
        lines = capsys.readouterr().err.splitlines()
        assert lines[0] == ""  # what went wrong stands apart from the progress
        for line, following in pairwise(lines[1:]):
            assert len(line) + 1 + len(following.split()[0]) > 80


def test_the_snippet_that_loads_the_model_is_python_that_quotes_what_it_is_given():
    names = ("success_rate", "score", "kl", "kl_minimum", "distinct", "perplexity_under_base")
    prompt = 'say "so"'
    measured = dict.fromkeys(names, 0.5) | {"first_sample": {prompt: " and so"}}
    report = {
        "settings": {"model_name": "a/model", "prompts": [prompt], "seed": 0},
        "base": {"train_prompts": measured},
        "trained": {"train_prompts": measured},
        "learned": False,
        "close_to_base": True,
        "samples": 1,
        "seconds": 1.0,
        "device": "CPU",
    }
    text = train_rlhf.summarize(report, "./it's")
    code = textwrap.dedent(text[text.index("    from transformers") :])
    compile(code, "snippet", "exec")
    assert code.count("""from_pretrained("./it's")""") == 2
    assert """'say "so"'""" in code
