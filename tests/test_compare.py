"""Runs side by side: means over seeds, rows named after settings, nothing measured otherwise."""

import copy
import json
import math
import shutil
import statistics
import sys

import pytest
from conftest import ROOT, SMALL
from matplotlib.figure import Figure

import make_instructions
import train_reward_model
import train_rlhf
import train_sft
from finetune.measurement import kl_minimum

sys.path.insert(0, str(ROOT / "benchmarks"))

import compare

SETTINGS = [*train_rlhf.Settings.model_fields]
SAME_LEARNING = {"output_dir", "resume", "save_every", "save_adapter", "log_every", "report_to"}
SAME_LEARNING |= {"device", "gradient_checkpointing", "eval_batch_size", "seed"}


@pytest.fixture(scope="module")
def real_run(demo_model, tmp_path_factory):
    """Return the folder of a real run of 120 samples, whose form all the others here have."""
    folder = tmp_path_factory.mktemp("real") / "trained_model"
    flags = [*SMALL, "--batch-size", "20", "--training-epochs", "20", "--max-new-tokens", "4"]
    flags += ["--model-name", demo_model, "--output-dir", folder, "--save-every", "0"]
    assert train_rlhf.main([*map(str, flags)]) == 0
    return folder


@pytest.fixture(scope="module")
def form(real_run):
    """Return report and metrics of the real run."""
    report = json.loads((real_run / "report.json").read_text())
    return report, compare.read_lines(real_run / "metrics.jsonl")


@pytest.fixture
def make(form, tmp_path, monkeypatch):
    """Write a run by hand, in the form of the real one; return its folder's name."""
    monkeypatch.chdir(tmp_path)

    def write(folder, figures=None, base=None, of_report=None, rates=None, **settings):
        report, metrics = copy.deepcopy(form)
        report["settings"] |= {"output_dir": folder} | settings
        report["trained"]["train_prompts"] |= figures or {}
        report["base"]["train_prompts"] |= base or {}
        report |= of_report or {}
        for record, rate in zip(metrics, rates or []):
            record["success_rate"] = rate
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "report.json").write_text(json.dumps(report))
        lines = "".join(json.dumps(record) + "\n" for record in metrics)
        (tmp_path / folder / "metrics.jsonl").write_text(lines)
        return folder

    return write


@pytest.fixture
def table_of(monkeypatch, tmp_path, capsys):
    """Compare folders, without a picture; return {first cell: {column: cell}} of the table."""
    monkeypatch.setattr(compare, "draw", lambda *arguments: None)

    def call(*folders):
        assert compare.main([*folders]) == 0
        text = (tmp_path / "comparison.md").read_text(encoding="utf-8")
        assert capsys.readouterr().out.startswith(text)
        lines = [line for line in text.splitlines() if line.startswith("|")]
        assert max(map(len, lines)) <= 100
        names, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
        call.text = text
        return {row[0]: dict(zip(names, row)) for row in rows}

    return call


@pytest.fixture
def refusal_of(monkeypatch, tmp_path, capsys):
    """Compare folders that can't be; return the lines that say so."""
    monkeypatch.chdir(tmp_path)

    def call(*folders):
        assert compare.main([*folders]) == 2
        out, err = capsys.readouterr()
        first, *lines = err.splitlines()
        assert (out, first) == ("", "Nothing was compared:")
        assert not [*tmp_path.glob("comparison.*")]
        return lines

    return call


def other(value):
    """Return another value of a setting."""
    if isinstance(value, bool):
        return not value
    if isinstance(value, list):
        return [*value, "another"]
    return f"{value} too" if isinstance(value, str) else value + 1


# ---------------------------------------------------------------------------- the table
def test_a_single_real_run_is_a_table_of_one(real_run, form, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    spaced = tmp_path / "my runs"
    shutil.copytree(real_run, spaced, ignore=shutil.ignore_patterns("*.safetensors"))
    assert compare.main([str(spaced), "--output", "my comparison"]) == 0
    out = capsys.readouterr().out
    trained = form[0]["trained"]["train_prompts"]
    assert f"| {trained['success_rate']:.0%} ± " in out
    assert f"| {trained['kl']:.1f} " in out
    assert "my runs (seed 0)" in out
    # Lines are wrapped where they are full.
    words = " ".join(out.split())
    assert "120 samples in" in words and form[0]["device"] in words
    assert (tmp_path / "my comparison.png").read_bytes().startswith(b"\x89PNG")
    assert "](<my comparison.png>)" in (tmp_path / "my comparison.md").read_text(encoding="utf-8")


def test_seeds_are_one_row_with_mean_and_deviation(make, table_of):
    folders = []
    for seed, (rate, kl, least) in enumerate(
        [(0.90, 2.0, 1.0), (0.94, 3.0, 1.2), (0.98, 4.0, 1.4)]
    ):
        figures = {"success_rate": rate, "kl": kl, "kl_minimum": least}
        folders.append(make(f"run {seed}", figures=figures, seed=seed, kl_coef=0.2))
    figures = {"success_rate": 0.8, "samples": 100, "kl": 1.25}
    table = table_of(*folders, make("alone", figures=figures, kl_coef=0.5))
    assert list(table) == ["base: demo_model", "KL_COEF 0.2", "KL_COEF 0.5"]
    row = table["KL_COEF 0.2"]
    assert (row["seeds"], row["success"], row["KL"]) == ("3", "94% ± 4%", "3.0 ± 1.0")
    assert row["least"] == "1.2"
    row = table["KL_COEF 0.5"]  # √(0.8 · 0.2 / 100) is 4 %
    assert (row["seeds"], row["success"], row["KL"]) == ("1", "80% ± 4%", "1.2")
    assert "run 0 (seed 0), run 1 (seed 1)," in table_of.text


def test_the_base_model_is_the_mean_over_seeds_each_counted_once(make, table_of):
    folders = [
        make(f"run{n}", base={"success_rate": rate}, seed=seed, kl_coef=float(n))
        for n, (seed, rate) in enumerate([(0, 0.2), (0, 0.2), (1, 0.4)])  # a seed samples the same
    ]
    row = table_of(*folders)["base: demo_model"]
    assert (row["seeds"], row["success"]) == ("2", "30% ± 14%")  # 0.2 / √2


def test_scores_stand_there_where_success_is_not_known(make, table_of, form):
    graded = {"scale": form[0]["scale"] | {"threshold": None}}
    figures = {"score": 12.345, "standard_error": 0.0456, "kl_minimum": None, "win_rate": 0.75}
    folder = make("graded", figures=figures, of_report=graded, reward="rewards.py:length")
    row = table_of(folder)["1 graded"]
    assert (row["score"], row["wins"], row["least"]) == ("12.3 ± 0.05", "75%", "-")
    assert "Whether the reward changed" in table_of.text


@pytest.mark.parametrize("name", [name for name in SETTINGS if name not in compare.MEASURED])
def test_a_setting_names_a_row_if_it_changes_what_is_learned(make, table_of, form, name):
    value = other(form[0]["settings"][name])
    rows = [*table_of(make("one"), make("another", **{"seed": 1} | {name: value}))]
    if name in SAME_LEARNING:
        assert rows[1:] == ["1 one"]  # nothing differs but the seed
    elif name == "model_name":
        assert rows == ["base: demo_model", "base: demo_model too", "1 one", "2 another"]
        assert "own base model" in table_of.text
    else:
        assert len(rows) == 3
        assert f"{name.upper()} {compare.as_text(value)}" in table_of.text


def test_numbers_that_look_alike_are_two_rows(make, table_of):
    table = table_of(make("one", gamma=0.9999999), make("two", gamma=1.0, seed=1))
    assert [*table][1:] == ["GAMMA 0.9999999", "GAMMA 1"]


def test_the_lists_of_settings_are_of_this_version():
    assert {*compare.MEASURED, *compare.WITHOUT_EFFECT} <= {*SETTINGS}


def test_what_no_setting_tells_is_named_by_folders(make, table_of):
    table = table_of(make("trained_model"), make("trained_model-1"), make("cheap", kl_coef=0.02))
    assert list(table)[1:] == ["1 trained_model", "2 trained_model-1", "KL_COEF 0.02"]
    assert {table[row]["seeds"] for row in list(table)[1:]} == {"1"}


def test_long_names_are_told_below_the_table(make, table_of):
    long = "a_very_long_folder_with_all_that_was_tried"
    flags = {"kl_coef": 0.02, "learning_rate": 0.001, "lora_targets": ["q_proj", "v_proj"]}
    table = table_of(make(f"{long}_0"), make(f"{long}_1", **flags))
    assert len(table) == 3
    text = " ".join(table_of.text.split())
    assert "LORA_TARGETS q_proj, v_proj, LEARNING_RATE 0.001, KL_COEF 0.02; score" in text


def test_what_a_reader_has_to_know_is_noted(make, table_of):
    of_report = {"device": "Tesla T4", "versions": {"torch": "1.0"}, "learned": False}
    table_of(make("one", of_report={"learned": True}), make("two", of_report=of_report, seed=1))
    for note in ("different devices", "different versions", "learn beyond chance: two"):
        assert note in table_of.text


# ------------------------------------------------------------------------- the refusals
WHERE_USED = {"reward_label": {"reward": "my/classifier"}, "eval_share": {"prompts": ["all.csv"]}}


@pytest.mark.parametrize("name", compare.MEASURED)
def test_what_was_measured_otherwise_is_refused(make, refusal_of, form, name):
    used = WHERE_USED.get(name, {})
    before = (form[0]["settings"] | used)[name]
    after = 0.5 if name == "success_threshold" else other(before)
    one = make("one", **used)
    (line,) = refusal_of(one, make("two", seed=1, **used | {name: after}))
    assert line.startswith(f"- {name.upper()} is ")
    assert " in one, but " in line and " in two: " in line
    assert ("--resume" in line) == (name == "eval_samples")


def test_what_has_no_meaning_for_the_runs_may_differ(make, table_of):
    """Words and labels of another reward, and the share of a file where there is none."""
    reward = {"reward": "rewards.py:length"}
    flags = {"positive_words": ["calm"], "reward_label": "JOY", "eval_share": 0.0}
    assert len(table_of(make("one", **reward), make("two", seed=1, **reward, **flags))) == 2


def test_of_long_lists_a_refusal_tells_what_differs(make, refusal_of, form):
    words = form[0]["settings"]["positive_words"]
    (line,) = refusal_of(make("one"), make("two", positive_words=[*words[:-1], "calm"]))
    assert f"is {words[-1]} in one, but calm in two" in line


@pytest.mark.parametrize(
    ("setting", "base", "problem"),
    [
        ({"reward": "my.py:f"}, {"score": 0.1}, "REWARD is my.py:f in one and two"),
        (
            {"prompts": ["prompts.csv"]},
            {"first_sample": {"Another": " one"}},
            "PROMPTS have the same names in one and two",
        ),
    ],
)
def test_what_changed_behind_its_name_is_refused(
    make, refusal_of, table_of, setting, base, problem
):
    one, two = make("one", **setting), make("two", base=base, **setting)
    (line,) = refusal_of(one, two)
    assert f"{problem}, but changed in between" in line
    table_of(
        one, make("three", base=base, seed=1, **setting)
    )  # has other samples, holds out others


def test_all_folders_that_are_no_whole_runs_are_told_at_once(make, refusal_of, tmp_path):
    problems = {
        "unfinished": "--resume",
        "foreign": "lacks",
        "torn": "can't be read",
        "list": "lacks",
        "empty": "lacks",
        "nothing": "no folder of a run",
        "headless": "can't be read",
    }
    for name in problems:
        make(name)
    (tmp_path / "unfinished" / "report.json").unlink()
    (tmp_path / "foreign" / "report.json").write_text('{"settings": {}}')
    (tmp_path / "torn" / "report.json").write_text('{"settings": ')
    (tmp_path / "list" / "report.json").write_text("[1, 2]")
    (tmp_path / "empty" / "metrics.jsonl").write_text("")
    shutil.rmtree(tmp_path / "nothing")
    (tmp_path / "headless" / "metrics.jsonl").unlink()
    (tmp_path / "notes.txt").write_text("no run")
    problems |= {"notes.txt": "no folder of a run", "./good": "is given twice: give it once"}
    *folders, again = problems
    lines = refusal_of(*folders, make("good"), again)
    assert len(lines) == len(problems)
    for line, (folder, problem) in zip(lines, problems.items()):
        assert line.startswith(f"- {folder}") and problem in line
        assert "leave it out" in line or folder == again


@pytest.mark.parametrize(
    ("figures", "lacking"),
    [
        ({}, "kl_minimum"),
        ({"kl": None}, "what it should hold"),
        ({"kl": "7"}, "what it should hold"),
    ],
)
def test_a_report_that_lacks_a_figure_is_told(make, refusal_of, form, figures, lacking):
    """As that of an older version does, or one that was edited."""
    trained = copy.deepcopy(form[0]["trained"])
    trained["train_prompts"] |= figures
    if lacking == "kl_minimum":
        del trained["train_prompts"][lacking]
    (line,) = refusal_of(make("good"), make("old", of_report={"trained": trained}))
    assert line.startswith("- old: ") and f"lacks {lacking}" in line


def test_a_setting_that_an_older_version_lacked_is_told(make, table_of, form):
    old = copy.deepcopy(form[0]["settings"])
    for name in ("chat_template", "vf_coef"):  # the one has to be alike, the other may differ
        del old[name]
    table = table_of(make("new"), make("old", of_report={"settings": old | {"seed": 1}}))
    assert list(table)[1:] == ["VF_COEF 0.1", "VF_COEF unknown"]
    assert "taken for alike: CHAT_TEMPLATE of old" in table_of.text


@pytest.mark.parametrize("module", [train_sft, train_reward_model, make_instructions])
def test_runs_of_other_scripts_are_refused(make, refusal_of, module):
    settings = dict.fromkeys(module.Settings.model_fields, 1)
    assert "kl_coef" not in settings
    (line,) = refusal_of(make("good"), make("other", of_report={"settings": settings}))
    assert line.startswith("- other is of another script than train_rlhf.py")


def test_metrics_of_another_run_are_refused(make, refusal_of):
    of_report = {"samples": 60, "seconds": 5.0}  # a longer run has begun there since
    (line,) = refusal_of(make("one", of_report=of_report))
    assert "60 samples in 5.0 s, but 120 samples in" in line and "--resume" in line


def test_more_rows_than_colours_are_refused(make, refusal_of):
    folders = [make(f"run{n}", kl_coef=float(n)) for n in range(11)]
    (line,) = refusal_of(*folders)
    assert line == "- 11 rows are too many for a picture: give 10 at most"


def test_a_place_that_can_not_be_written_is_refused(make, capsys):
    assert compare.main([make("one"), "--output", "nowhere/comparison"]) == 2
    assert "--output is nowhere/comparison: it can't be written" in capsys.readouterr().err


# -------------------------------------------------------------------------- the picture
def test_the_picture_has_a_curve_a_band_and_points_for_each_row(make, monkeypatch):
    figures, base = [], {"success_rate": 0.25}
    monkeypatch.setattr(Figure, "savefig", lambda self, *place, **options: figures.append(self))
    rates = [[0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [0.2, 0.4, 0.4, 0.6, 0.6, 1.0]]
    folders = []
    for seed in (0, 1):
        point = {"kl": 2.0 + seed, "success_rate": 0.8 + 0.1 * seed}
        folders.append(make(f"cheap{seed}", figures=point, base=base, rates=rates[seed], seed=seed))
    point = {"kl": 1.0, "success_rate": 0.5}
    for folder in ("_dear$_$", "same as dear"):
        folders.append(make(folder, figures=point, base=base, kl_coef=0.2))
    assert compare.main(folders) == 0
    (figure,) = figures
    left, right = figure.axes
    assert left.get_xlabel() == "samples" and left.get_ylabel() == "success rate"
    assert "nats per response" in right.get_xlabel()
    curves = [line for line in left.lines if line.get_marker() == "None"]
    assert [*curves[0].get_xdata()] == [100, 120]
    # Five steps of 20 samples: 0.4 and 0.44, then 0.6 and 0.6.
    assert [*curves[0].get_ydata()] == pytest.approx([0.42, 0.6])
    (band,) = left.collections  # of the one row with seeds: 0.42 ± 0.04 / √2
    heights = [y for x, y in band.get_paths()[0].vertices if x == 100]
    spread = 0.04 / math.sqrt(2)
    assert (min(heights), max(heights)) == pytest.approx((0.42 - spread, 0.42 + spread))
    stars = [line for line in right.lines if line.get_marker() == "*"]
    for star, place in zip(stars, [(2.5, 0.85), (1.0, 0.5), (1.0, 0.5)], strict=True):
        assert [*star.get_xydata()[0]] == pytest.approx(place)
    least = next(line for line in right.lines if line.get_label().startswith("least KL"))
    assert max(least.get_ydata()) == pytest.approx(0.9)  # the best of all runs
    (legend,) = figure.legends
    names = [text.get_text() for text in legend.get_texts()]
    assert names[:3] == ["KL_COEF 0.1", r"2 _dear\$_\$", "3 same as dear"]
    assert len({line.get_color() for line in curves}) == 3


def test_the_least_kl_of_a_success_rate_is_that_of_the_script():
    scores = [1.0] * 60 + [-1.0] * 180
    report = {"trained": {"train_prompts": {"success_rate": 0.95}}}
    run = compare.Run("trained_model", settings={}, report=report, metrics=[])
    points = compare.least_kls(60 / 240, [run], "success_rate")
    assert points[0] == (0.0, 0.25) and points[-1][1] == pytest.approx(0.95)
    for kl, rate in points[::10]:
        assert kl == pytest.approx(kl_minimum(2 * rate - 1, scores), abs=1e-3)
    for base in (0.0, 1.0):
        assert compare.least_kls(base, [run], "success_rate") == [(0.0, base)]


def test_the_least_kls_of_scores_are_those_of_the_reports(make):
    runs = [
        compare.read_run(make(f"run{n}", figures={"kl_minimum": kl, "score": score}))
        for n, (kl, score) in enumerate([(1.5, 3.0), (0.5, 2.0), (None, 1.0)])
    ]
    assert compare.least_kls(1.0, runs, "score") == [(0.0, 1.0), (0.5, 2.0), (1.5, 3.0)]


def test_a_learning_curve_begins_where_there_are_100_samples():
    metrics = [{"samples": 40 * n, "score": float(n)} for n in range(1, 6)]
    curve = compare.learning_curve(metrics, "score")
    expected = {120: [1, 2, 3], 160: [2, 3, 4], 200: [3, 4, 5]}  # the steps that have the last 100
    assert curve == {n: statistics.mean(values) for n, values in expected.items()}
    assert compare.learning_curve(metrics[:1], "score") == {40: 1.0}  # of few all there are
