"""Compare finished runs of train_rlhf.py: one table and one picture from several OUTPUT_DIRs.

    python benchmarks/compare.py trained_model trained_model-1    # comparison.md, comparison.png
    python benchmarks/compare.py runs/* --output runs/prices      # runs/prices.md, runs/prices.png

Runs whose settings differ in SEED alone are one row, with means over the seeds; a row is named
after the settings in which it differs from the others. What was not measured alike, such as scores
of two rewards, is refused: a line for each reason, and exit status 2.
"""

import argparse
import itertools
import json
import math
import statistics
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any, NamedTuple

from learning import ROOT, read_lines

sys.path.insert(0, str(ROOT))

from finetune.errors import shorten
from finetune.files import is_file
from finetune.progress import recent

# Settings that say what a number means: numbers under others can't be compared.
MEASURED = (
    *("reward", "positive_words", "reward_label", "success_threshold"),
    *("prompts", "eval_prompts", "eval_share", "prompt_field", "chat_template"),
    *("max_new_tokens", "temperature", "eval_samples"),
)
# Settings without effect on what is learned; all others name a row, new ones too.
WITHOUT_EFFECT = {
    *("output_dir", "resume", "save_every", "save_adapter"),  # where it is kept, and when
    *("log_every", "report_to"),  # what is shown of it
    *("device", "gradient_checkpointing", "eval_batch_size"),  # the same but for rounding
}
OF_OTHER_SCRIPTS = ("packing", "score", "seed_tasks")  # of SFT, reward model, instructions
NUMBERS = ("samples", "score", "standard_error", "kl", "win_rate", "distinct")
FIGURES = (
    *NUMBERS,
    "success_rate",
    "kl_minimum",
    "perplexity_under_base",
    "first_sample",
)
LONGEST = 23  # characters of a row's name, so that a table has at most 100 columns
MOST = 10  # rows, for there are ten colours
LEGEND = """±: the standard deviation between seeds, of a single run the standard error of its samples.
wins: how often a response scores higher than the base model's. least: the least KL with which any
policy has that mean score."""


class Refused(Exception):
    """What can't be compared: each argument names a folder or a setting, and the remedy."""


class Run(NamedTuple):
    """A finished run: its folder, and what report.json and metrics.jsonl say."""

    folder: str
    settings: dict[str, Any]
    report: dict[str, Any]
    metrics: list[dict[str, Any]]


class Row(NamedTuple):
    """Runs that are one row of the table; meaning: all in which it differs from other rows."""

    name: str
    runs: list[Run]
    meaning: str = ""


# ----------------------------------------------------------------------------- the runs
def read_runs(folders):
    """Return the runs in these folders, or raise all that is wrong with them at once."""
    runs, problems = {}, []
    for folder in folders:
        place = Path(folder).resolve()
        try:
            if place in runs:
                raise Refused(f"{folder} is given twice: give it once")
            runs[place] = read_run(folder)
        except Refused as error:
            problems += error.args
    if problems:
        raise Refused(*problems)
    return list(runs.values())


def read_run(folder):
    """Return a finished run; refuse what is not whole."""
    path = Path(folder)
    if not (path / "report.json").is_file():
        problem = "is no folder of a run:"
        if (path / "metrics.jsonl").exists() or (path / "checkpoint").exists():
            problem = "has no report.json, for its run did not end: add --resume to its line, or"
        raise Refused(f"{folder} {problem} leave it out")

    problem = f"{folder}: its report.json or metrics.jsonl"
    try:
        text = (path / "report.json").read_text(encoding="utf-8")
        report = json.loads(text)
        settings = report["settings"]
        if any(name in settings for name in OF_OTHER_SCRIPTS):
            raise Refused(f"{folder} is of another script than train_rlhf.py: leave it out")
        run = Run(folder, settings, report, read_lines(path / "metrics.jsonl"))
        check_whole(run)
    except (OSError, ValueError) as error:
        remedy = "copy it again, or leave it out"
        raise Refused(f"{problem} can't be read ({shorten(error)}): {remedy}") from error
    except (KeyError, TypeError, IndexError) as error:
        lacking = error.args[0] if isinstance(error, KeyError) else "what it should hold"
        remedy = "another version wrote it, so train it anew, or leave it out"
        raise Refused(f"{problem} lacks {lacking}: {remedy}") from error
    check_ends(run)
    return run


def check_whole(run):
    """Raise KeyError for what a run lacks, or TypeError where a figure is no number."""
    report = run.report
    require(run.metrics[-1], "samples", "seconds")
    require(report, "samples", "seconds", "samples_per_second", "device", "learned")
    require(run.settings, "seed", "model_name", "reward")
    require(report["base"], "train_prompts")
    require(report["scale"], "threshold")
    for model in ("base", "trained"):
        for part in report["base"]:
            measured = report[model][part]
            require(measured, *FIGURES)
            for name in NUMBERS:
                if not isinstance(measured[name], int | float):
                    raise TypeError(name)


def require(table, *names):
    """Raise KeyError with the first of the names that a table lacks."""
    for name in names:
        if name not in table:
            raise KeyError(name)


def check_ends(run):
    """Refuse a folder whose two files are of two runs."""
    last = run.metrics[-1]
    samples, seconds = run.report["samples"], run.report["seconds"]
    if (samples, seconds) == (last["samples"], last["seconds"]):
        return
    of_report = f"{samples} samples in {seconds:.1f} s"
    of_metrics = f"{last['samples']} samples in {last['seconds']:.1f} s"
    problem = f"{run.folder}: report.json has {of_report}, but {of_metrics} in metrics.jsonl"
    remedy = "they are of two runs: add --resume to the line of the last, or leave it out"
    raise Refused(f"{problem}: {remedy}")


def figures(runs, name, model="trained", part="train_prompts"):
    """Return a figure of each run's report."""
    return [run.report[model][part][name] for run in runs]


def mean_of(runs, name, model="trained"):
    """Return the mean over runs of a figure on the prompts of the training."""
    return statistics.mean(figures(runs, name, model))


def as_text(value):
    """Return the value of a setting as text."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "empty"
    return str(value).removesuffix(".0")


# --------------------------------------------------------------------- what is compared
def check_alike(runs):
    """Refuse runs whose numbers mean different things; return the settings that say so."""
    unused = unused_settings(runs)
    names = [name for name in MEASURED if name not in unused]
    problems = {}
    for name in names:
        known = [run for run in runs if name in run.settings]
        for run in known[1:]:
            if run.settings[name] != known[0].settings[name]:
                problems.setdefault(name, tell_difference(name, known[0], run))
    if not problems:
        for one, other in itertools.combinations(runs, 2):
            problems |= compare_bases(one, other)
    if problems:
        raise Refused(*problems.values())
    return names


def unused_settings(runs):
    """Return those of MEASURED that mean nothing for these runs."""
    rewards = {run.settings["reward"] for run in runs}
    unused = set()
    if not is_by_words(runs):
        unused.add("positive_words")
    if any(name == "positive_word_reward" or ".py" in name for name in rewards):
        unused.add("reward_label")

    # A share is held out of files alone.
    prompts = [entry for run in runs for entry in run.settings.get("prompts", [])]
    if not any(is_file(entry) for entry in prompts):
        unused.add("eval_share")
    return unused


def is_by_words(runs):
    """Return whether all runs were rewarded for words."""
    return {run.settings["reward"] for run in runs} == {"positive_word_reward"}


def tell_difference(name, one, other):
    """Return what differs between two runs in a setting that says what their numbers mean."""
    first, second = one.settings[name], other.settings[name]
    if isinstance(first, list) and isinstance(second, list):
        # Of long lists, what differs.
        first_alone = [value for value in first if value not in second]
        second_alone = [value for value in second if value not in first]
        if first_alone and second_alone:
            first, second = first_alone, second_alone
    first, second = shorten(as_text(first)), shorten(as_text(second))

    remedy = "compare them apart, or train one anew"
    if name == "eval_samples":
        remedy = "add --resume to the line of one, with the number of the other: it measures anew"
    problem = f"{name.upper()} is {first} in {one.folder}, but {second} in {other.folder}"
    return f"{problem}: {remedy}"


def compare_bases(one, other):
    """Return {setting: problem} where a file of prompts or a reward changed, but not its name.

    With one seed the base model is asked the same; what it says, and the score of that, stay too.
    """
    # A seed holds out its own part of a file, and samples other responses.
    if one.settings["seed"] != other.settings["seed"]:
        return {}
    both = f"in {one.folder} and {other.folder}, but changed in between: train one of them anew"
    asked = [set(prompts) for prompts in of_base(one, "first_sample")]
    if asked != [set(prompts) for prompts in of_base(other, "first_sample")]:
        return {"prompts": f"PROMPTS have the same names {both}"}

    perplexity = of_base(one, "perplexity_under_base")
    says_the_same = perplexity == of_base(other, "perplexity_under_base")
    if says_the_same and of_base(one, "score") != of_base(other, "score"):
        return {"reward": f"REWARD is {one.settings['reward']} {both}"}
    return {}


def of_base(run, name):
    """Return a figure of the base model on each set of prompts."""
    return [measured[name] for measured in run.report["base"].values()]


def notes_on(runs, names):
    """Return what a reader has to know; names: of the settings that have to be alike."""
    notes = []
    unknown = [
        f"{name.upper()} of {run.folder}"
        for name in names
        for run in runs
        if name not in run.settings
    ]
    if unknown:
        missing = ", ".join(unknown)
        notes.append(f"Not told by another version, and taken for alike: {missing}.")
    if len({run.settings["model_name"] for run in runs}) > 1:
        notes.append("A KL is against the run's own base model, so compare it within a model.")
    if not is_by_words(runs):
        notes.append("Whether the reward changed in between is seen only where seeds are alike.")
    if len({run.report["device"] for run in runs}) > 1:
        notes.append("Seconds on different devices tell nothing about settings.")
    if len({json.dumps(run.report.get("versions")) for run in runs}) > 1:
        notes.append("The runs had different versions of the libraries.")
    idle = [run.folder for run in runs if not run.report["learned"]]
    if idle:
        notes.append(f"Did not learn beyond chance: {', '.join(idle)}.")
    return notes


# ----------------------------------------------------------------------------- the rows
def make_rows(runs):
    """Return the rows: of runs that differ in SEED alone.

    Where a seed is there twice, something differs that no setting tells: each is a row of its own.
    """
    groups = []
    for meaning, alike in group_by_settings(runs):
        seeds = {run.settings["seed"] for run in alike}
        if len(seeds) == len(alike):
            groups.append((meaning, alike))
        else:
            groups += [(meaning, [run]) for run in alike]
    if len(groups) > MOST:
        raise Refused(f"{len(groups)} rows are too many for a picture: give {MOST} at most")

    meanings = [meaning for meaning, _ in groups]
    rows = []
    for number, (meaning, alike) in enumerate(groups, start=1):
        name = meaning
        if not 0 < len(meaning) <= LONGEST or meanings.count(meaning) > 1:
            folder = Path(alike[0].folder).resolve().name
            name = f"{number} {shorten(folder, LONGEST - 3)}"
        rows.append(Row(name, alike, meaning))
    return rows


def group_by_settings(runs):
    """Return (in what they differ from the others, runs) for runs whose settings are alike."""
    without_name = {*MEASURED, *WITHOUT_EFFECT, "seed"}
    names = dict.fromkeys(name for run in runs for name in run.settings)
    names = [name for name in names if name not in without_name]
    groups = {}
    for run in runs:
        values = tuple(as_text(run.settings.get(name, "unknown")) for name in names)
        groups.setdefault(values, []).append(run)

    columns = [set(column) for column in zip(*groups)]
    differing = [place for place, column in enumerate(columns) if len(column) > 1]
    named = []
    for values, alike in groups.items():
        parts = [f"{names[place].upper()} {values[place]}" for place in differing]
        named.append((", ".join(parts), alike))
    return named


def base_rows(runs):
    """Return a row for each base model, with one run of each seed, which samples it alike."""
    models = {}
    for run in runs:
        of_model = models.setdefault(run.settings["model_name"], {})
        of_model[run.settings["seed"]] = run
    rows = []
    for name, of_model in models.items():
        title = shorten(f"base: {Path(name).name}", LONGEST)
        rows.append(Row(title, list(of_model.values())))
    return rows


# ---------------------------------------------------------------------------- the table
def spread(values, form, error=None, error_form=""):
    """Return the mean ± the standard deviation between seeds; of one, ± its error if known."""
    if len(values) > 1:
        error = statistics.stdev(values)
    text = f"{statistics.mean(values):{form}}"
    return text if error is None else f"{text} ± {error:{error_form or form}}"


def result(runs, metric, model, part="train_prompts"):
    """Return the success rate or score of base or trained model, with its spread."""
    values = figures(runs, metric, model, part)
    if metric == "score":
        errors = figures(runs, "standard_error", model, part)
        return spread(values, ".3g", errors[0], ".1g")
    samples = figures(runs, "samples", model, part)[0]
    variance = values[0] * (1 - values[0])
    return spread(values, ".0%", math.sqrt(variance / samples))


def cells_of(row, metric, model):
    """Return the cells of a row of the table."""
    runs = row.runs
    held_out = "-"
    if "eval_prompts" in runs[0].report[model]:
        held_out = result(runs, metric, model, "eval_prompts").partition(" ±")[0]
    least = figures(runs, "kl_minimum", model)
    return [
        row.name,
        str(len(runs)),
        result(runs, metric, model),
        held_out,
        f"{mean_of(runs, 'win_rate', model):.0%}",
        spread(figures(runs, "kl", model), "z.1f"),
        "-" if None in least else f"{statistics.mean(least):.1f}",
        f"{mean_of(runs, 'distinct', model):.0%}",
    ]


def make_table(rows, bases, metric):
    """Return the lines of the table in Markdown."""
    title = "success" if metric == "success_rate" else "score"
    lines = [["", "seeds", title, "held out", "wins", "KL", "least", "distinct"]]
    lines += [cells_of(row, metric, "base") for row in bases]
    lines += [cells_of(row, metric, "trained") for row in rows]
    lines = [[cell.replace("|", "/") for cell in cells] for cells in lines]

    widths = [max(map(len, column)) for column in zip(*lines)]
    lines.insert(1, ["-" * width for width in widths])
    table = []
    for cells in lines:
        padded = [cell.ljust(width) for cell, width in zip(cells, widths)]
        table.append(f"| {' | '.join(padded)} |")
    return table


def describe(row):
    """Return what a row is: settings, samples, scores, time and folders."""
    runs, reports = row.runs, [run.report for run in row.runs]
    title = row.name
    if row.meaning not in ("", row.name):
        title = f"{row.name}: {row.meaning}"
    before, after = result(runs, "score", "base"), result(runs, "score", "trained")
    seconds = statistics.mean(report["seconds"] for report in reports)
    rate = statistics.mean(report["samples_per_second"] for report in reports)
    facts = [
        title,
        f"score {before} before, {after} after",
        f"perplexity under the base model {mean_of(runs, 'perplexity_under_base'):.1f}",
        f"{reports[0]['samples']} samples in {seconds:.0f} seconds, {rate:.1f} a second",
        ", ".join(dict.fromkeys(report["device"] for report in reports)),
        ", ".join(f"{run.folder} (seed {run.settings['seed']})" for run in runs),
    ]
    return "; ".join(facts)


def make_text(rows, bases, notes, metric, picture):
    """Return the whole comparison in Markdown."""
    runs = [run for row in rows for run in row.runs]
    samples = figures(runs, "samples")[0]
    legend = f"Measured with {samples} samples. {LEGEND}"

    lines = [f"# Comparison of runs: {len(runs)}", ""]
    lines += [*make_table(rows, bases, metric), ""]
    lines += [textwrap.fill(legend, 100), ""]
    for item in [*map(describe, rows), *notes]:
        lines.append(textwrap.fill(f"- {item}", 100, subsequent_indent="  "))
    lines += ["", f"![Learning, and what it costs](<{picture}>)", ""]
    return "\n".join(lines)


# -------------------------------------------------------------------------- the picture
def learning_curve(metrics, name):
    """Return {samples: mean over the last 100 of them}, from where there are so many."""
    first = min(100, metrics[-1]["samples"])
    curve = {}
    for step, record in enumerate(metrics, start=1):
        if record["samples"] >= first:
            curve[record["samples"]] = recent(metrics[:step], name)
    return curve


def least_kls(base, runs, metric):
    """Return points (KL, success rate or score) of the least KL, from the base model upwards.

    For a success rate they follow from the base model's; for scores they are those of the runs.
    """
    points = [(0.0, base)]
    if metric == "score":
        pairs = zip(figures(runs, "kl_minimum"), figures(runs, "score"))
        return points + sorted(pair for pair in pairs if pair[0] is not None)

    best = max(figures(runs, "success_rate"))
    if not 0 < base < best:
        return points
    for number in range(1, 101):
        rate = base + (best - base) * number / 100
        least = rate * math.log(rate / base)
        if rate < 1:
            least += (1 - rate) * math.log((1 - rate) / (1 - base))
        points.append((least, rate))
    return points


def draw(rows, bases, metric, path):
    """Draw the learning curves, and what was measured at the end against KL with the least KL."""
    # They take a second to load.
    from matplotlib.figure import Figure
    from matplotlib.ticker import PercentFormatter

    # A font may lack letters of a folder's name.
    warnings.filterwarnings("ignore", "Glyph")

    runs = [run for row in rows for run in row.runs]
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set(title="Learning: means of the last 100 samples", xlabel="samples")
    left.set_ylabel("success rate" if metric == "success_rate" else "mean score")
    if metric == "success_rate":
        left.yaxis.set_major_formatter(PercentFormatter(1))
    right.set(xlabel="KL against the base model (nats per response)")
    right.set(title="What it costs: measured at the end")

    for number, row in enumerate(rows):
        draw_curve(left, row, metric, f"C{number}")
        draw_end(right, row, metric, f"C{number}")
    for row, style in zip(bases, itertools.cycle(["-", "--", ":"])):
        draw_base(left, right, row, runs, metric, style)

    title = "square: base model, star: trained"
    if len(runs) > len(rows):
        title = "square: base model, dot: a seed,\nstar: mean, band: ± deviation"
    place = "outside right upper"
    figure.legend(loc=place, fontsize="small", title=title, title_fontsize="small")
    figure.savefig(path, dpi=100)


def draw_curve(axes, row, metric, color):
    """Draw how a row has learned: the mean of its seeds, and their deviation as a band."""
    curves = [learning_curve(run.metrics, metric) for run in row.runs]
    samples = [count for count in curves[0] if all(count in curve for curve in curves)]
    columns = [[curve[count] for curve in curves] for count in samples]
    means = [statistics.mean(column) for column in columns]

    # A dollar sign would begin a formula.
    label = row.name.replace("$", r"\$")
    axes.plot(samples, means, color=color, label=label)
    if len(row.runs) > 1:
        deviations = [statistics.stdev(column) for column in columns]
        low = [mean - deviation for mean, deviation in zip(means, deviations)]
        high = [mean + deviation for mean, deviation in zip(means, deviations)]
        axes.fill_between(samples, low, high, color=color, alpha=0.2, linewidth=0)


def draw_end(axes, row, metric, color):
    """Draw what was measured of a row at the end: each seed, and their mean."""
    kls, values = figures(row.runs, "kl"), figures(row.runs, metric)
    if len(row.runs) > 1:
        axes.plot(kls, values, ".", color=color)
    axes.plot(statistics.mean(kls), statistics.mean(values), "*", color=color, markersize=13)


def draw_base(left, right, row, runs, metric, style):
    """Draw a base model, and the line of the least KL that begins there."""
    base = mean_of(row.runs, metric, "base")
    left.plot(0, base, "ks")
    right.plot(0, base, "ks")

    model_name = row.runs[0].settings["model_name"]
    of_model = [run for run in runs if run.settings["model_name"] == model_name]
    kls, values = zip(*least_kls(base, of_model, metric))
    right.plot(kls, values, "k" + style, label=f"least KL, {row.name}")
    if metric == "score":
        # It is known at the scores of the runs alone.
        right.plot(kls, values, "kx", markersize=5)


# --------------------------------------------------------------------------------- main
def main(argv=None):
    """Compare runs; return the exit status: 0 done, 2 refused, with the reasons on stderr."""
    options = read_options(argv)
    output = Path(options.output)
    if output.is_dir():
        output = output / "comparison"
    table, picture = Path(f"{output}.md"), Path(f"{output}.png")
    try:
        text = compare(options.folders, picture)
        table.write_text(text, encoding="utf-8")
    except Refused as error:
        return refuse(error.args)
    except OSError as error:
        problem = f"--output is {options.output}: it can't be written ({error}): name another"
        return refuse([problem])
    print(text)
    print(f"Written: {table} and {picture}")
    return 0


def read_options(argv):
    """Return what the command line says: folders and output."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("folders", nargs="+", metavar="FOLDER", help="OUTPUT_DIR of a finished run")
    names = "a folder, or how the names of table and picture begin (default: %(default)s)"
    parser.add_argument("--output", default="comparison", help=names)
    return parser.parse_args(argv)


def compare(folders, picture):
    """Return the comparison of the runs in these folders in Markdown, and draw the picture."""
    runs = read_runs(folders)
    notes = notes_on(runs, names=check_alike(runs))
    rows, bases = make_rows(runs), base_rows(runs)

    # Success is compared where all runs know it alike.
    thresholds = {run.report["scale"]["threshold"] for run in runs}
    is_known = len(thresholds) == 1 and None not in thresholds
    metric = "success_rate" if is_known else "score"
    text = make_text(rows, bases, notes, metric, picture.name)
    draw(rows, bases, metric, picture)
    return text


def refuse(problems):
    """Tell why nothing was compared; return the exit status."""
    print("Nothing was compared:", *problems, sep="\n- ", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main())
