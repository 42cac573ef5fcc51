"""What the screen shows while a run goes on, and what is written down."""

import io
import json
import math
import sys
import unicodedata

import pytest

from finetune import progress


class Screen(io.StringIO):
    """A stream that is a terminal or is none."""

    def __init__(self, terminal):
        super().__init__()
        self.terminal = terminal

    def isatty(self):
        return self.terminal


on_both = pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])


@pytest.fixture
def show(monkeypatch):
    """Put screens in the place of stdout and stderr; return both."""

    def start(stdout, stderr=None):
        terminals = {"stdout": stdout, "stderr": stdout if stderr is None else stderr}
        for name, terminal in terminals.items():
            monkeypatch.setattr(sys, name, Screen(terminal))
        return sys.stdout, sys.stderr

    return start


@pytest.fixture
def open_log(make_settings, tmp_path, monkeypatch):
    """Open the log of 4 steps; a batch has 2 responses."""
    monkeypatch.setenv("COLUMNS", "10000")

    def start(metrics, total=4, log_every=2):
        (tmp_path / "trained_model").mkdir(exist_ok=True)
        settings = make_settings("--log-every", str(log_every))
        return progress.MetricsLog(settings, metrics, total, "train_rlhf", samples_per_step=2)

    return start


def records(*steps):
    """Return the records of steps each of which took 30 seconds."""
    return [{"step": step, "seconds": 30.0 * step} for step in steps]


def sample(response, prompt="Life is", **more):
    return {"prompt": prompt, "response": response} | more


SAMPLES = [sample(" good"), sample(" sad", prompt="I feel so")]
SHOWN = "    Life is | good"


def take(log, steps, samples=SAMPLES, warnings=()):
    """Log the records of some steps, with a text that names the step."""
    for record in steps:
        log.metrics.append(record)
        log.write(log.metrics, f"score {record['step']}", samples, warnings)


def read_lines(path):
    return [json.loads(line) for line in path.read_bytes().splitlines()]


# ------------------------------------------------------------------------- the progress
def test_run_json_is_whole_whenever_a_run_is_killed(show, open_log, tmp_path, monkeypatch):
    show(False)
    path = tmp_path / "trained_model" / "run.json"
    with open_log([]):
        before = path.read_text()
    assert json.loads(before)["scored_places"] is None

    def kill(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(progress.os, "replace", kill)
    with pytest.raises(KeyboardInterrupt), open_log([], total=9):
        pass
    assert path.read_text() == before


def test_a_terminal_gets_one_live_bar(show, open_log):
    out, err = show(True)
    with open_log([]) as log:
        take(log, records(1, 2, 3, 4))
    last = err.getvalue().split("\r")[-1]
    assert last.startswith("4/4 |") and "left, score 4" in last
    assert err.getvalue().count("\n") == 1
    assert out.getvalue().splitlines() == [SHOWN] * 2  # of the second step and the fourth


@pytest.mark.parametrize("terminals", [(False, False), (True, False), (False, True)])
def test_a_pipe_gets_a_line_every_few_steps_and_no_bar(show, open_log, terminals):
    """A bar in a file would be noise, and a file without the progress would be of no use."""
    out, err = show(*terminals)
    with open_log([]) as log:
        take(log, records(1, 2, 3, 4))
    assert out.getvalue().splitlines() == [
        "step 2/4, 01:00 left, score 2",
        SHOWN,
        "step 4/4, 00:00 left, score 4",
        SHOWN,
    ]
    assert err.getvalue() == ""


@on_both
def test_nothing_is_shown_where_nothing_is_left_to_do(show, open_log, tmp_path, terminal):
    metrics = records(1, 2, 3, 4)
    out, err = show(terminal)
    with open_log(metrics):
        pass
    assert out.getvalue() == err.getvalue() == ""
    assert read_lines(tmp_path / "trained_model" / "metrics.jsonl") == metrics


@on_both
def test_a_run_that_goes_on_counts_on(show, open_log, tmp_path, terminal):
    path = tmp_path / "trained_model" / "metrics.jsonl"
    out, err = show(terminal)
    with open_log(records(1, 2)) as log:
        take(log, records(3))
        assert read_lines(path) == records(1, 2, 3)  # while it is still open
        take(log, records(4))
    assert read_lines(path) == records(1, 2, 3, 4)
    if terminal:
        assert "2/4 |" in err.getvalue() and "0/4" not in err.getvalue()
    else:
        assert out.getvalue().splitlines()[::2] == ["step 4/4, 00:00 left, score 4"]


def test_what_is_left_is_told_by_the_seconds_of_the_whole_run(show, open_log):
    """Of 80 seconds for 2 steps, and 30 for a third, the mean is what the fourth will take."""
    out, _ = show(False)
    seconds = {1: 40.0, 2: 80.0, 3: 110.0, 4: 140.0}
    steps = [{"step": step, "seconds": seconds[step]} for step in seconds]
    with open_log(steps[:2], log_every=1) as log:
        take(log, steps[2:])
    assert [line[:20] for line in out.getvalue().splitlines()[::2]] == [
        "step 3/4, 00:36 left",
        "step 4/4, 00:00 left",
    ]


def test_a_last_step_is_shown_whatever_log_every_is(show, open_log):
    out, _ = show(False)
    with open_log([], total=3, log_every=5) as log:
        take(log, records(1, 2, 3))
    assert out.getvalue().splitlines() == ["step 3/3, 00:00 left, score 3", SHOWN]


@on_both
def test_a_warning_is_told_at_once(show, open_log, terminal):
    out, _ = show(terminal)
    with open_log([]) as log:
        take(log, records(1, 2))
        before = out.getvalue().splitlines()
        take(log, records(3), warnings=["updates skipped"])
        assert out.getvalue().splitlines() == [*before, "step 3: updates skipped"]


def test_a_closed_output_is_no_obstacle(show, open_log, monkeypatch, tmp_path):
    show(False)
    monkeypatch.setattr(sys, "stdout", None)  # as it is after >&-
    with open_log([]) as log:
        take(log, records(1, 2), warnings=["updates skipped"])
    assert read_lines(tmp_path / "trained_model" / "metrics.jsonl") == records(1, 2)


@pytest.mark.parametrize(
    ("batch_size", "wanted"), [(200, 4.0), (100, 4.0), (50, 3.5), (40, 3.0), (10, 2.5)]
)
def test_recent_steps_are_those_of_the_last_100_samples(batch_size, wanted):
    metrics = [{"samples": batch_size * step, "x": float(step)} for step in range(1, 5)]
    assert progress.recent(metrics, "x") == wanted


def test_recent_leaves_out_what_was_not_finite():
    metrics = [{"samples": step, "x": x} for step, x in ((1, 2.0), (2, None), (3, 4.0))]
    assert progress.recent(metrics, "x") == 3
    assert math.isnan(progress.recent([{"samples": 1, "x": None}], "x"))


# -------------------------------------------------------- the progress of a measurement
def test_a_measurement_of_several_pieces_has_a_bar_that_goes_when_it_is_done(show):
    out, err = show(True)
    assert [*progress.progress(range(0, 12, 4))] == [0, 4, 8]
    assert "0/3" in out.getvalue() and "|" in out.getvalue()
    assert out.getvalue().split("\r")[-2].strip() == ""  # the line is wiped
    assert err.getvalue() == "" and "\n" not in out.getvalue()


@pytest.mark.parametrize(
    ("terminal", "steps"), [(True, range(1)), (True, range(0)), (False, range(5))]
)
def test_a_single_piece_and_a_pipe_have_no_bar(show, terminal, steps):
    out, err = show(terminal)
    assert [*progress.progress(steps)] == [*steps]
    assert out.getvalue() == err.getvalue() == ""


def test_a_measurement_needs_no_output(show, monkeypatch):
    """After 2>&- transformers, which is imported before, makes stderr a file that takes all."""
    show(False)
    monkeypatch.setattr(sys, "stdout", None)  # as it is after >&-
    assert [*progress.progress(range(3))] == [0, 1, 2]


# -------------------------------------------------------------------------- the samples
def columns_of(text):
    """Return how many columns a text takes on a terminal."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


@pytest.mark.parametrize("columns", [24, 40, 81])
@pytest.mark.parametrize(
    ("prompt", "text"),
    [("I feel so", " good" * 40), ("나는", " 행복해요" * 40), ("I am", " 행복 a" * 40)],
    ids=["narrow", "wide", "mixed"],
)
def test_a_sample_is_cut_to_the_width_of_the_screen(
    show, open_log, monkeypatch, columns, prompt, text
):
    out, _ = show(False)
    monkeypatch.setenv("COLUMNS", str(columns))
    with open_log([]) as log:
        take(log, records(1, 2), samples=[sample(text, prompt), SAMPLES[1]])
    shown = out.getvalue().splitlines()[-1]
    assert shown.startswith(f"    {prompt}") and shown.endswith("…")
    assert f"{prompt} |{text}".startswith(shown.strip(" …"))
    assert columns_of(shown) < columns
    assert columns_of(shown) > (columns * 3 / 4 if text.isascii() else columns / 3)


def test_a_sample_is_one_line_and_of_a_conversation_its_last_message(show, open_log, monkeypatch):
    out, _ = show(False)
    monkeypatch.setenv("COLUMNS", "40")
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Say\n\nhi"}]
    with open_log([]) as log:
        take(log, records(1, 2), samples=[sample("\tHello,\r\n  you ", messages)])
    assert out.getvalue().splitlines()[1:] == ["    Say hi | Hello, you"]


def test_samples_jsonl_has_a_line_for_each_response(show, open_log, tmp_path):
    show(False)
    messages = [{"role": "user", "content": "Say hi"}]
    first = [sample(" good", kl=0.5, score=1.0), sample(" sad", kl=-math.inf, score=-1.0)]
    second = [sample("\n행복", messages, kl=math.nan), sample(' "é"\u2028', "나는", kl=3.0)]
    path = tmp_path / "trained_model" / "samples.jsonl"
    with open_log([]) as log:
        take(log, records(1), samples=first)
        assert len(path.read_bytes().splitlines()) == 2  # while it is still open
        take(log, records(2), samples=second)
    assert path.read_bytes().decode("utf-8").split("\n") == [
        '{"prompt": "Life is", "response": " good", "kl": 0.5, "score": 1.0}',
        '{"prompt": "Life is", "response": " sad", "kl": null, "score": -1.0}',
        '{"prompt": [{"role": "user", "content": "Say hi"}], "response": "\\n행복", "kl": null}',
        '{"prompt": "나는", "response": " \\"é\\"\u2028", "kl": 3.0}',  # to be read as they are
        "",
    ]


def test_the_samples_of_a_run_that_goes_on_are_those_of_its_steps(show, open_log, tmp_path):
    """What came after the checkpoint is forgotten, a line that was never finished too."""
    show(False)
    path = tmp_path / "trained_model" / "samples.jsonl"
    with open_log([]) as log:
        for step in (1, 2, 3):
            take(log, records(step), samples=[sample(" a\u2028b", n=step), sample("\x85c", n=step)])
    written = path.read_bytes()
    path.write_bytes(written + b'{"prompt": "Li')
    with open_log(records(1, 2)) as log:
        assert path.read_bytes().split(b"\n") == [*written.split(b"\n")[:4], b""]
        take(log, records(3), samples=[sample(" d", n=3), sample(" e", n=3)])
    assert [line["n"] for line in read_lines(path)] == [1, 1, 2, 2, 3, 3]
