"""What the screen shows while a run goes on, and how it shows what went wrong."""

import io
import json
import math
import sys
import textwrap
import unicodedata

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
    """Open the log of 4 steps; a batch has 2 responses."""
    monkeypatch.setenv("COLUMNS", "10000")

    def start(metrics, total=4, log_every=2):
        (tmp_path / "trained_model").mkdir(exist_ok=True)
        flags = ("--batch-size", "2", "--log-every", log_every)
        return train_rlhf.open_log(make_settings(*map(str, flags)), metrics, total)

    return start


ROWS = [{"prompt": "Life is", "answer": 7}, {"prompt": "I feel so"}]
TEXTS = [" good", " sad"]
SAMPLE = "    Life is | good"


def take(log, metrics, *records, rows=ROWS, texts=TEXTS, kls=(0.5, 0.25)):
    """Log steps each of which took 30 seconds."""
    for each in records:
        seconds = metrics[-1]["seconds"] if metrics else 0
        metrics.append(each | {"seconds": seconds + 30})
        log(metrics, rows, texts, [1.0, -1.0], kls)


def steps_in(screen):
    """Return how each line of progress begins."""
    return [line.split(",")[0] for line in screen.getvalue().splitlines() if "left" in line]


# ---------------------------------------------------------------------------------- the progress
def test_a_terminal_gets_one_live_bar(show, open_log):
    out, err = show(terminal=True)
    metrics = []
    with open_log(metrics) as log:
        take(log, metrics, *(record(step, 0.25 * step) for step in range(1, 5)))
    last = err.getvalue().split("\r")[-1]
    assert last.startswith("4/4 |") and "left" in last
    assert "success  88%" in last  # the mean of the last 100 samples, 75 and 100 %
    assert "score +0.75" in last and "KL 0.88" in last
    assert err.getvalue().count("\n") == 1
    assert out.getvalue().splitlines() == [SAMPLE] * 2  # of the second step and the fourth


def test_a_pipe_gets_a_line_every_few_steps_and_no_bar(show, open_log):
    out, err = show(terminal=False)
    metrics = []
    with open_log(metrics) as log:
        take(log, metrics, *map(record, range(1, 5)))
    assert out.getvalue().splitlines() == [
        "step 2/4, 01:00 left, success  50%, score +0.00, KL 0.38",
        SAMPLE,
        "step 4/4, 00:00 left, success  50%, score +0.00, KL 0.88",
        SAMPLE,
    ]
    assert err.getvalue() == ""


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_without_a_threshold_there_is_no_success_to_show(show, open_log, terminal):
    screens = show(terminal)
    metrics = []
    with open_log(metrics) as log:
        take(log, metrics, *(record(step) | {"success_rate": None} for step in (1, 2)))
    shown = screens[terminal].getvalue()  # the bar is on stderr
    assert "left, score +0.00, KL 0.38" in shown
    assert "success" not in shown and "nan" not in shown


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
        take(log, metrics, record(3))
        written = path.read_text()  # while it is still open
        assert [json.loads(line) for line in written.splitlines()] == metrics
        take(log, metrics, record(4))
    assert len(path.read_text().splitlines()) == 4
    if terminal:
        assert "2/4 |" in err.getvalue() and "0/4" not in err.getvalue()
    else:
        assert steps_in(out) == ["step 4/4"]


def test_what_is_left_is_told_by_the_seconds_of_the_whole_run(show, open_log):
    """Of 80 seconds for 2 steps, and 30 for a third, the mean is what the fourth will take."""
    out, _ = show(terminal=False)
    metrics = [record(1) | {"seconds": 40.0}, record(2) | {"seconds": 80.0}]
    with open_log(metrics, log_every=1) as log:
        take(log, metrics, record(3), record(4))
    assert [line[:20] for line in out.getvalue().splitlines()[::2]] == [
        "step 3/4, 00:36 left",
        "step 4/4, 00:00 left",
    ]


def test_a_last_step_is_shown_whatever_log_every_is(show, open_log):
    out, _ = show(terminal=False)
    metrics = []
    with open_log(metrics, total=3, log_every=5) as log:
        take(log, metrics, *map(record, range(1, 4)))
    assert steps_in(out) == ["step 3/3"]
    assert out.getvalue().splitlines()[1:] == [SAMPLE]


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
def test_skipped_updates_are_told_at_once_and_once(show, open_log, terminal):
    out, _ = show(terminal)
    told = "step 3: updates skipped, since their numbers were not finite: 4"
    metrics = []
    with open_log(metrics) as log:
        take(log, metrics, record(1), record(2))
        assert "skipped" not in out.getvalue()
        take(log, metrics, record(3, skipped_updates=4))
        assert out.getvalue().splitlines()[-1] == told
        take(log, metrics, record(4))
    assert out.getvalue().count("skipped") == 1


def test_a_kl_that_rounding_takes_below_0_is_shown_as_0(show, open_log):
    out, _ = show(terminal=False)
    metrics = []
    with open_log(metrics) as log:
        take(log, metrics, record(1, kl=-0.0001), record(2, kl=-0.0001))
    assert out.getvalue().splitlines()[0].endswith("KL 0.00")


def test_what_was_not_finite_is_left_out_of_the_progress(show, open_log):
    out, _ = show(terminal=False)
    metrics = []
    with open_log(metrics) as log:
        take(log, metrics, record(1, kl=1.0))
        take(log, metrics, *(record(step) | {"kl": None} for step in (2, 3, 4)))
    lines = out.getvalue().splitlines()
    assert lines[0].endswith("KL 1.00")
    assert lines[2].endswith("KL nan")


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
    [(True, True, True), (True, False, False), (False, True, False)],
    ids=["terminal", "stderr in a file", "stdout in a file"],
)
def test_a_bar_is_for_those_who_watch(open_log, monkeypatch, stdout, stderr, watched):
    """A bar in a file would be noise, and a file without the progress would be of no use."""
    out, err = Screen(stdout), Screen(stderr)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "stderr", err)
    metrics = []
    with open_log(metrics) as log:
        take(log, metrics, *map(record, range(1, 5)))
    assert ("4/4 |" in err.getvalue()) is watched
    assert steps_in(out) == ([] if watched else ["step 2/4", "step 4/4"])


def test_a_closed_output_is_no_obstacle(show, open_log, monkeypatch, tmp_path):
    show(terminal=False)
    monkeypatch.setattr(sys, "stdout", None)  # as it is after >&-
    metrics = []
    with open_log(metrics) as log:
        take(log, metrics, record(1), record(2, skipped_updates=1))
    assert len((tmp_path / "trained_model" / "metrics.jsonl").read_text().splitlines()) == 2


# ------------------------------------------------------------------- the progress of a measurement
def test_a_measurement_of_several_pieces_has_a_bar_that_goes_when_it_is_done(show):
    out, err = show(terminal=True)
    shown = []
    for number in train_rlhf.progress(range(0, 12, 4)):
        shown.append(number)
    assert shown == [0, 4, 8]
    assert "0/3" in out.getvalue() and "|" in out.getvalue()
    assert out.getvalue().split("\r")[-2].strip() == ""  # the line is wiped
    assert err.getvalue() == "" and "\n" not in out.getvalue()


@pytest.mark.parametrize(
    ("terminal", "steps"), [(True, range(1)), (True, range(0)), (False, range(5))]
)
def test_a_single_piece_and_a_pipe_have_no_bar(show, terminal, steps):
    screens = show(terminal)
    assert [*train_rlhf.progress(steps)] == [*steps]
    assert [screen.getvalue() for screen in screens] == ["", ""]


def test_a_measurement_needs_no_output(show, monkeypatch):
    """After 2>&- transformers, which is imported before, makes stderr a file that takes all."""
    show(terminal=False)
    monkeypatch.setattr(sys, "stdout", None)  # as it is after >&-
    assert [*train_rlhf.progress(range(3))] == [0, 1, 2]


# ----------------------------------------------------------------------------------- the samples
def columns_of(text):
    """Return how many columns a text takes on a terminal."""
    return sum(1 + (unicodedata.east_asian_width(letter) in "WF") for letter in text)


@pytest.mark.parametrize("terminal", [True, False], ids=["terminal", "pipe"])
@pytest.mark.parametrize("columns", [24, 40, 81])
@pytest.mark.parametrize(
    ("prompt", "text"),
    [("I feel so", " good" * 40), ("나는", " 행복해요" * 40), ("I am", " 행복 a" * 40)],
    ids=["narrow", "wide", "mixed"],
)
def test_a_sample_is_cut_to_the_width_of_the_screen(
    show, open_log, monkeypatch, terminal, columns, prompt, text
):
    out, _ = show(terminal)
    monkeypatch.setenv("COLUMNS", str(columns))
    metrics = []
    with open_log(metrics) as log:
        rows = [{"prompt": prompt}, *ROWS[1:]]
        take(log, metrics, record(1), record(2), rows=rows, texts=[text, " sad"])
    sample = out.getvalue().splitlines()[-1]
    assert sample.startswith(f"    {prompt}") and sample.endswith("…")
    assert f"{prompt} |{text}".startswith(sample.strip(" …"))
    assert columns_of(sample) < columns
    assert columns_of(sample) > (columns * 3 / 4 if text.isascii() else columns / 3)


def test_a_sample_is_one_line_and_of_a_conversation_its_last_message(show, open_log, monkeypatch):
    out, _ = show(terminal=False)
    monkeypatch.setenv("COLUMNS", "40")
    messages = [{"role": "system", "content": "Be kind"}, {"role": "user", "content": "Say\n\nhi"}]
    rows, metrics = [{"prompt": messages}, *ROWS[1:]], []
    with open_log(metrics) as log:
        texts = ["\tHello,\r\n  you ", " sad"]
        take(log, metrics, record(1), record(2), rows=rows, texts=texts)
    assert out.getvalue().splitlines()[1:] == ["    Say hi | Hello, you"]


def test_samples_jsonl_has_a_line_for_each_response(show, open_log, tmp_path):
    show(terminal=False)
    messages = [{"role": "user", "content": "Say hi"}]
    rows, texts, metrics = [{"prompt": messages}, {"prompt": "나는"}], ["\n행복", ' "é"\u2028'], []
    path = tmp_path / "trained_model" / "samples.jsonl"
    with open_log(metrics) as log:
        take(log, metrics, record(1))
        assert len(path.read_bytes().splitlines()) == 2  # while it is still open
        take(log, metrics, record(2), rows=rows, texts=texts, kls=[math.nan, 3.0])
    lines = path.read_bytes().decode("utf-8").split("\n")
    assert lines.pop() == ""
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "prompt": "Life is", "response": " good", "score": 1.0, "kl": 0.5},
        {"step": 1, "prompt": "I feel so", "response": " sad", "score": -1.0, "kl": 0.25},
        {"step": 2, "prompt": messages, "response": "\n행복", "score": 1.0, "kl": None},
        {"step": 2, "prompt": "나는", "response": ' "é"\u2028', "score": -1.0, "kl": 3.0},
    ]
    assert "행복" in lines[2] and "나는" in lines[3]  # to be read as they are


def test_the_samples_of_a_run_that_goes_on_are_those_of_its_steps(show, open_log, tmp_path):
    """What came after the checkpoint is forgotten, a line that was never finished too."""
    show(terminal=False)
    path, metrics = tmp_path / "trained_model" / "samples.jsonl", []
    with open_log(metrics) as log:
        take(log, metrics, *map(record, (1, 2, 3)), texts=[" a\u2028b", "\x85c"])
    written = path.read_bytes()
    path.write_bytes(written + b'{"step": 4, "pro')
    del metrics[2:]
    with open_log(metrics) as log:
        assert path.read_bytes().split(b"\n") == [*written.split(b"\n")[:4], b""]
        take(log, metrics, *map(record, (3, 4)))
    steps = [json.loads(line)["step"] for line in path.read_bytes().splitlines()]
    assert steps == [1, 1, 2, 2, 3, 3, 4, 4]


# ------------------------------------------------------------------------------------- the result
@pytest.mark.parametrize("chat", [False, True])
def test_the_snippet_that_loads_the_model_is_python_that_quotes_what_it_is_given(chat):
    names = ("score", "standard_error", "win_rate", "success_rate", "kl", "kl_minimum", "distinct")
    prompt = 'say "so"'
    measured = dict.fromkeys([*names, "perplexity_under_base"], 0.5)
    measured |= {"first_sample": {prompt: " and so"}}
    report = {
        "chat": chat,
        "encoder_decoder": False,
        "settings": {"model_name": "a/model", "prompts": [prompt], "seed": 0},
        "scale": train_rlhf.AS_IT_IS,
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
    assert code.count("""pipeline("text-generation", "./it's")""") == 1
    assert """'say "so"'""" in code
    assert ("[{'role': 'user', 'content': 'say \"so\"'}]" in code) is chat
