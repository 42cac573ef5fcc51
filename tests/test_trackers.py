"""What REPORT_TO sends to TensorBoard, Weights & Biases (offline) and Trackio, and how it fails."""

import json
import os
import re
import signal
import sqlite3
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from accelerate.tracking import TensorBoardTracker, TrackioTracker, WandBTracker

import train_rlhf
from finetune.errors import RunError
from finetune.processes import join_processes
from finetune.trackers import Trackers

ALL = ["tensorboard", "wandb", "trackio"]
SHORT = ["--device", "cpu", "--batch-size", "2", "--max-new-tokens", "5", "--log-every", "2"]
SHORT += ["--ppo-epochs", "1", "--target-approx-kl", "0", "--save-every", "2"]
STEPS, SHOWN = [1, 2, 3, 4, 5], [2, 4, 5]
RLHF = [*SHORT, "--training-epochs", "5", "--prompts", "I feel so", "Life is"]
RLHF += ["--eval-prompts", "--eval-samples", "4"]
COLUMNS = ["step", "prompt", "response", "score", "kl"]


def read_lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module", autouse=True)
def joined():
    """Give accelerate its state, as a run does before anything else."""
    join_processes("cpu")


# -------------------------------------------------------------- what each has been told
def read_tensorboard(folder):
    """Return {step: {name: value}}."""
    name = "tensorboard.backend.event_processing.event_accumulator"
    events = pytest.importorskip(name).EventAccumulator(str(folder / "tensorboard"))
    records, tags = {}, events.Reload().Tags()["scalars"]
    for name in tags:
        steps = [event.step for event in events.Scalars(name)]
        assert len(steps) == len(set(steps))  # none twice
        for event in events.Scalars(name):
            records.setdefault(event.step, {})[name] = event.value
    return records


def read_wandb(run):
    """Return {step: {name: value}} of the folder of a run, out of its log.

    The log has the form of LevelDB's: blocks of 32 KiB, and in them pieces of records, each after
    a checksum, its length, and whether it is a whole record, the first, a middle or the last piece.
    """
    protocol = pytest.importorskip("wandb.proto.wandb_internal_pb2")
    (path,) = run.glob("run-*.wandb")
    data, place, piece, records = path.read_bytes(), 7, b"", {}
    while place < len(data):
        if 32768 - place % 32768 < 7:  # where no header fits there is padding
            place += 32768 - place % 32768
        _checksum, length, kind = struct.unpack("<IHB", data[place : place + 7])
        piece += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            record = protocol.Record.FromString(piece)
            piece = b""
            if record.HasField("history"):
                values = records.setdefault(record.history.step.num, {})
                for item in record.history.item:
                    values[".".join(item.nested_key)] = json.loads(item.value_json)
    return records


def read_trackio(folder, project="train_rlhf"):
    """Return a list of runs, oldest first, each of them {step: {name: value}}."""
    with sqlite3.connect(folder / f"{project}.db") as database:
        rows = [*database.execute("select run_id, step, metrics from metrics order by id")]
    runs = {}
    for run, step, metrics in rows:
        assert step not in runs.setdefault(run, {})  # none twice
        runs[run][step] = json.loads(metrics)
    return [*runs.values()]


def assert_told(folder, **records):
    """Check that each tracker has every metric of every step of the run in a folder.

    records: {step: {name: value}} by the name of the tracker, besides TensorBoard's.
    """
    metrics = read_lines(folder / "metrics.jsonl")
    steps = [record["step"] for record in metrics]
    records["tensorboard"] = read_tensorboard(folder)
    for tracker, told in records.items():
        assert [*told] == steps
        for record in metrics:
            values = told[record["step"]]
            for name, value in record.items():
                # TensorBoard's numbers are float32.
                if tracker == "tensorboard" and value is not None:
                    value = pytest.approx(value, rel=1e-5)
                # Trackio has its own step.
                assert values.get(name, values.get(f"__{name}")) == value, name


@pytest.fixture(scope="module")
def start(run_script, tmp_path_factory):
    """Do a run in a folder of its own, unless one is given, and with trackers' folders there."""
    for name in ALL:
        pytest.importorskip(name)

    def run(*flags, cwd=None, **more):
        cwd = cwd or tmp_path_factory.mktemp("tracked")
        options = {
            f"WANDB_{name}_DIR": str(cwd / "wandb's") for name in ("CACHE", "DATA", "CONFIG")
        }
        options |= {"WANDB_MODE": "offline", "TRACKIO_DIR": str(cwd / "trackio's")}
        done = run_script(cwd, *flags, **options | more)
        done.cwd, done.folder = cwd, cwd / "trained_model"
        return done

    return run


@pytest.fixture(scope="module")
def runs(start, demo_model):
    """Return a stopped run, the rest of it, and another one in the same folder."""
    flags = ["--model-name", demo_model, *RLHF, "--report-to", *ALL]
    stopped = start(*flags, signals=[(3, signal.SIGINT)])
    resumed = start(*flags, "--resume", cwd=stopped.cwd)
    fresh = start(*flags, "--seed", 1, cwd=stopped.cwd)
    return SimpleNamespace(cwd=stopped.cwd, stopped=stopped, resumed=resumed, fresh=fresh)


# ------------------------------------------------------------------------- what arrives
def test_each_gets_every_metric_of_every_step(runs):
    (offline_run,) = runs.fresh.folder.glob("wandb/offline-run-*")
    trackio = read_trackio(runs.cwd / "trackio's")[-1]
    assert [*trackio] == STEPS
    assert_told(runs.fresh.folder, wandb=read_wandb(offline_run), trackio=trackio)


def test_the_samples_of_a_step_that_is_shown_are_a_table(runs):
    folder, tables = runs.fresh.folder, {}
    samples = read_lines(folder / "samples.jsonl")
    # Tables are told of responses, and not of their tokens.
    assert all(sample.pop("tokens") for sample in samples)
    samples = [[*sample.values()] for sample in samples]
    wanted = {step: [sample for sample in samples if sample[0] == step] for step in SHOWN}
    for path in folder.glob("wandb/offline-run-*/files/media/table/*.json"):
        table = json.loads(path.read_text(encoding="utf-8"))
        assert table["columns"] == COLUMNS
        tables[table["data"][0][0]] = table["data"]
    assert tables == wanted
    told = read_trackio(runs.cwd / "trackio's")[-1]
    tables = {
        step: told[step]["responses"]["_value"] for step in STEPS if "responses" in told[step]
    }
    assert [*tables[2][0]] == COLUMNS
    assert {step: [[*row.values()] for row in tables[step]] for step in tables} == wanted


def test_the_settings_are_told(runs):
    settings = json.loads((runs.fresh.folder / "report.json").read_text())["settings"]
    with sqlite3.connect(runs.cwd / "trackio's" / "train_rlhf.db") as database:
        configs = [json.loads(text) for (text,) in database.execute("select config from configs")]
    assert [config["seed"] for config in configs] == [0, 1]
    assert settings.items() <= configs[-1].items()


def test_nothing_of_them_is_on_the_screen_or_beside_the_run(runs, start, demo_model):
    plain = start("--model-name", demo_model, *RLHF, "--seed", 1)
    assert (plain.status, plain.stderr) == (0, "")
    assert (runs.fresh.status, runs.fresh.stderr) == (0, "")
    moved, screen = runs.fresh.stdout.split("\n", 1)
    assert moved == "The earlier run in trained_model/ was moved to trained_model-1/"
    times = r"\d\d:\d\d left|in \d+ seconds"
    assert re.sub(times, "", screen) == re.sub(times, "", plain.stdout)
    names = {path.name for path in runs.cwd.iterdir()}
    assert names == {"trained_model", "trained_model-1", "trackio's", "wandb's"}
    more = {path.name for path in runs.fresh.folder.iterdir()}
    assert more == {path.name for path in plain.folder.iterdir()} | {"tensorboard", "wandb"}


def test_a_stage_tells_its_metrics_under_its_own_name(start, demo_model, tmp_path):
    rows = [{"text": f"Today I am happy number {n}."} for n in range(12)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    flags = ["--model-name", demo_model, "--data", "rows.jsonl", "--output-dir", "trained_model"]
    flags += ["--device", "cpu", "--batch-size", "4", "--training-epochs", "1"]
    flags += ["--report-to", "tensorboard", "trackio"]
    done = start(*flags, cwd=tmp_path, script="train_sft")
    assert (done.status, done.stderr) == (0, "")
    (trackio,) = read_trackio(tmp_path / "trackio's", project="train_sft")
    assert len(trackio) > 1
    assert_told(done.folder, trackio=trackio)


# ------------------------------------------------------------------------- several runs
def test_a_signal_stops_a_tracked_run_after_its_step(runs):
    line = "what was learned up to step 3 is saved. To go on, run the same line with --resume"
    assert runs.stopped.status == 128 + signal.SIGINT
    assert runs.stopped.stderr.splitlines() == [
        "",
        "Stopping after this step; once more to stop at once",
        "",
        f"Stopped: by a signal; {line}",
    ]


def test_resume_goes_on_in_the_same_runs(runs):
    assert (runs.resumed.status, runs.resumed.stderr) == (0, "")
    folder = runs.cwd / "trained_model-1"  # the run after it moved it there
    parts = sorted(folder.glob("wandb/offline-run-*"))
    before, after = map(read_wandb, parts)
    assert ([*before], [*after]) == ([1, 2, 3], [4, 5])
    names = {part.name.rpartition("-")[2] for part in parts}
    (fresh,) = runs.fresh.folder.glob("wandb/offline-run-*")
    assert len(names) == 1 and fresh.name.rpartition("-")[2] not in names
    trackio, _ = read_trackio(runs.cwd / "trackio's")
    assert_told(folder, wandb=before | after, trackio=trackio)


def test_tensorboard_forgets_the_steps_after_the_checkpoint(settings):
    pytest.importorskip("tensorboard")
    settings.report_to = ["tensorboard"]
    for done, steps, value in ((0, [1, 2, 3, 4], 0.5), (2, [3, 4, 5], 0.25)):
        with Trackers(settings, done, "train_rlhf") as trackers:
            for step in steps:
                trackers.track({"step": step, "score": value}, ())
    told = read_tensorboard(Path(settings.output_dir))
    assert [told[step]["score"] for step in STEPS] == [0.5, 0.5, 0.25, 0.25, 0.25]


def test_a_run_that_wandb_joins_later_is_a_new_one_there(settings, started):
    settings.report_to = ["wandb"]
    with Trackers(settings, 3, "train_rlhf"):
        assert started["wandb"]["id"] is None


# -------------------------------------------------------- without the trackers' servers
@pytest.fixture
def started(monkeypatch):
    """Return what each tracker was started with; what it is told stays in its attribute told."""
    started = {}
    for kind in (TensorBoardTracker, WandBTracker, TrackioTracker):
        pytest.importorskip(kind.name)

        def start(self):
            started[self.name] = self.init_kwargs | {"tracker": self}
            self.told = []

        def log(self, values, step=None):
            self.told.append((step, values))

        for name, function in {"start": start, "log": log, "finish": lambda self: None}.items():
            monkeypatch.setattr(kind, name, function)
        monkeypatch.setattr(sys.modules[kind.name], "finish", lambda: None, raising=False)
    return started


def test_of_a_conversation_what_was_said_last_is_told(settings, started):
    settings.report_to = ["wandb", "trackio"]
    turns = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi, you."}]
    values = [[1, turns, " Hello.", -1.0, None], [1, "Life is", " so good", 2.0, 0.25]]
    samples = [dict(zip(COLUMNS, row)) for row in values]
    record = {"step": 1, "success_rate": None, "score": 0.5}
    with Trackers(settings, 0, "train_rlhf") as trackers:
        trackers.track(record, samples)
    values[0][1] = "Hi, you."
    for name in settings.report_to:
        ((step, told),) = started[name]["tracker"].told
        table = told.pop("responses")
        assert (step, told) == (1, record)
        assert type(table) is sys.modules[name].Table
        wanted = values if name == "wandb" else [dict(zip(COLUMNS, row)) for row in values]
        assert table.data == wanted
    assert samples[0]["prompt"] == turns  # which is whole in samples.jsonl


# ------------------------------------------------------------------------ what can fail
def test_wandb_without_a_key_is_refused_before_anything_is_loaded(start, tmp_path):
    environment = {"WANDB_MODE": "online", "WANDB_API_KEY": "", "HOME": str(tmp_path)}
    done = start("--model-name", "none", "--report-to", "wandb", **environment)
    first, line = done.stderr.splitlines()
    assert (done.status, done.stdout, first) == (2, "", "Nothing was started or changed:")
    assert line.startswith("- REPORT_TO is wandb: it can't be used (")
    assert line.endswith("): run: wandb login, or set WANDB_MODE=offline")
    assert [path.name for path in done.cwd.iterdir()] in ([], ["wandb's"])


def test_wandb_that_is_disabled_does_nothing(make_settings, monkeypatch, tmp_path, capsys):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "disabled")
    monkeypatch.chdir(tmp_path)
    with Trackers(make_settings("--report-to", "wandb"), 0, "train_rlhf") as trackers:
        trackers.track({"step": 1}, [{"prompt": "Life is", "response": " good"}])
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]
    assert capsys.readouterr() == ("", "")


@pytest.fixture
def offline(started, monkeypatch):
    """Let Trackio fail to start."""

    def start(self):
        raise OSError("no route to host")

    monkeypatch.setattr(TrackioTracker, "start", start)


def test_a_tracker_that_does_not_start_is_told(settings, offline, monkeypatch):
    ended = []
    monkeypatch.setattr(sys.modules["wandb"], "finish", lambda: ended.append("wandb"))
    settings.report_to = ["wandb", "trackio"]
    with pytest.raises(RunError) as error, Trackers(settings, 0, "train_rlhf"):
        pass
    problem = "REPORT_TO is trackio: it does not start (no route to host): leave it out"
    assert error.value.args == (problem,)
    assert ended == ["wandb"]  # or in a notebook the next run would go on in its own


def test_a_tracker_that_does_not_start_makes_no_process_wait(settings, offline, make_learner):
    """To save, all processes wait for each other, and the others have no tracker that fails."""
    os.makedirs(settings.output_dir)
    settings.report_to = ["trackio"]
    metrics = [{"step": 1, "samples": 10, "seconds": 1.0, "skipped_updates": 0}]  # of a checkpoint
    parts = SimpleNamespace(settings=settings, policy=None, tokenizer=None)
    parts.trainer = SimpleNamespace(optimizer=None)
    with pytest.raises(RunError, match="does not start"):
        # A checkpoint that is None can't save.
        train_rlhf.train(make_learner(parts), [{"prompt": "Life is"}], metrics, None)


def test_a_tracker_that_is_named_twice_is_started_once(settings, started, monkeypatch):
    starts, start = [], TrackioTracker.start
    monkeypatch.setattr(TrackioTracker, "start", lambda self: (starts.append(self), start(self)))
    settings.report_to = ["trackio", "trackio"]
    with Trackers(settings, 0, "train_rlhf"):
        assert len(starts) == 1


@pytest.mark.parametrize("where", ["log", "Table"])
def test_a_tracker_that_fails_on_the_way_is_left_out_and_told_once(
    settings, started, monkeypatch, capsys, where
):
    def log(self, values, step=None):
        if step == 2:
            raise ConnectionError("the service has ended")
        self.told.append((step, values))

    def table(columns, data):
        raise ConnectionError("the service has ended")

    ended = []

    def finish():  # of the library: without it trackio would have more to say at the very end
        ended.append("trackio")
        raise ConnectionError("the service has ended")

    if where == "log":
        monkeypatch.setattr(WandBTracker, "log", log)
    else:
        monkeypatch.setattr(sys.modules["wandb"], "Table", table)
    monkeypatch.setattr(sys.modules["trackio"], "finish", finish)
    settings.report_to = ["wandb", "trackio"]
    with Trackers(settings, 0, "train_rlhf") as trackers:
        for step in (1, 2, 3):
            samples = [{"prompt": "Life is", "response": " good"}] if step == 2 else ()
            trackers.track({"step": step}, samples)
    told = {
        name: [step for step, _ in started[name]["tracker"].told] for name in settings.report_to
    }
    assert told == {"wandb": [1], "trackio": [1, 2, 3]}
    assert ended == ["trackio"]
    assert capsys.readouterr().err == "\nwandb gets no more metrics: the service has ended\n"
