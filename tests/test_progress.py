import io
import json
import sys

import pytest

import train_rlhf


class Terminal(io.StringIO):
    def isatty(self):
        return True


def record(step, rate=0.5):
    return {
        "step": step,
        "success_rate": rate,
        "score": 2 * rate - 1,
        "kl": 0.25 * step,
        "skipped_updates": 0,
    }


@pytest.fixture
def log(make_settings, tmp_path, monkeypatch):
    """Start a log of 4 steps of 50 samples, after some that are done."""

    def start(stream, done=()):
        monkeypatch.setattr(sys, "stderr", stream)
        monkeypatch.setattr(train_rlhf, "is_terminal", stream.isatty)
        (tmp_path / "trained_model").mkdir()
        return train_rlhf.Log(4, [*done], make_settings("--batch-size", "50", "--log-every", "2"))

    return start


def test_a_terminal_gets_one_live_bar(log, capsys):
    screen = Terminal()
    metrics, progress = [], log(screen)
    for step in range(1, 5):
        metrics.append(record(step, 0.25 * step))
        progress.write(metrics)
    progress.close()
    last = screen.getvalue().split("\r")[-1]
    assert last.startswith("4/4 |") and "left" in last
    assert "success  88%" in last  # the mean of the last 100 samples, 75 and 100 %
    assert "score +0.75" in last and "KL 0.88" in last
    assert screen.getvalue().count("\n") == 1
    assert capsys.readouterr().out == ""


def test_a_pipe_gets_a_line_every_few_steps_and_no_bar(log, capsys):
    pipe = io.StringIO()
    metrics, progress = [], log(pipe)
    for step in range(1, 5):
        metrics.append(record(step))
        progress.write(metrics)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0] for line in lines] == ["step 2/4", "step 4/4"]
    assert lines[-1].endswith("success  50%, score +0.00, KL 0.88")
    assert pipe.getvalue() == ""


def test_the_records_of_a_run_that_goes_on_stay_in_its_file(log, tmp_path):
    metrics = [record(1), record(2)]
    progress = log(io.StringIO(), metrics)
    metrics.append(record(3))
    progress.write(metrics)
    written = (tmp_path / "trained_model" / "metrics.jsonl").read_text()  # while it is still open
    assert [json.loads(line) for line in written.splitlines()] == metrics
    progress.close()


@pytest.mark.parametrize("screen", [Terminal(), io.StringIO()], ids=["terminal", "pipe"])
def test_skipped_updates_are_told_at_once_and_once(log, capsys, screen):
    metrics, progress = [], log(screen)
    for step, skipped in ((1, 0), (2, 0), (3, 4)):
        metrics.append(record(step) | {"skipped_updates": skipped})
        progress.write(metrics)
    assert (
        capsys.readouterr().out.splitlines()[-1]
        == "step 3: updates skipped, since their numbers were not finite: 4"
    )
    metrics.append(record(4))
    progress.write(metrics)
    progress.close()
    assert "skipped" not in capsys.readouterr().out


def test_what_was_not_finite_is_left_out_of_the_progress(log, capsys):
    metrics, progress = [], log(io.StringIO())
    for step, kl in enumerate((1.0, None, None, None), start=1):
        metrics.append(record(step) | {"kl": kl, "skipped_updates": 0})
        progress.write(metrics)
    progress.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("KL 1.00")
    assert lines[1].endswith("KL nan")


@pytest.mark.parametrize(("samples", "wanted"), [(50, 4.0), (100, 3.5), (120, 3.0), (10_000, 2.5)])
def test_recent_steps_are_those_of_the_last_samples(make_settings, samples, wanted):
    metrics = [{"x": value} for value in (1.0, 2.0, 3.0, 4.0)]
    assert train_rlhf.recent(metrics, "x", make_settings("--batch-size", "50"), samples) == wanted


def test_the_loading_snippet_is_python_that_quotes_what_it_is_given():
    code = train_rlhf.loading_snippet("./it's", 'say "so"')
    compile(code, "snippet", "exec")
    assert """from_pretrained("./it's")""" in code
    assert """'say "so"'""" in code
