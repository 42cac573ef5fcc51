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
from types import SimpleNamespace

from learning import ROOT, read_lines

sys.path.insert(0, str(ROOT))

from train_rlhf import recent, shorten

MEASURED = (  # settings that say what a number means: numbers under others can't be compared
    *("reward", "positive_words", "reward_label", "success_threshold"),
    *("prompts", "eval_prompts", "prompt_field", "chat_template"),
    *("max_new_tokens", "temperature", "eval_samples"),
)
WITHOUT_EFFECT = {  # on what is learned; all others name a row, new ones too
    *("output_dir", "resume", "save_every", "save_adapter"),  # where it is kept, and when
    *("log_every", "report_to"),  # what is shown of it
    *("device", "gradient_checkpointing", "eval_batch_size"),  # the same numbers, but for rounding
}
OF_OTHER_SCRIPTS = ("packing", "score", "seed_tasks")  # settings of SFT, reward model, instructions
NUMBERS = ("samples", "score", "standard_error", "kl", "win_rate", "distinct")
FIGURES = (*NUMBERS, "success_rate", "kl_minimum", "perplexity_under_base", "first_sample")
LONGEST = 23  # characters of a row's name, so that a table has at most 100 columns
MOST = 10  # rows, for there are ten colours
LEGEND = """±: the standard deviation between seeds, of a single run the standard error of its samples.
wins: how often a response scores higher than the base model's. least: the least KL with which any
policy has that mean score."""


class Refused(Exception):
    """What can't be compared: each argument names a folder or a setting, and the remedy."""


# ---------------------------------------------------------------------------------------- the runs
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
    return [*runs.values()]


def read_run(folder):
    """Return folder, settings, report and metrics of a finished run; refuse what is not whole."""
    path = Path(folder)
    if not (path / "report.json").is_file():
        begun = (path / "metrics.jsonl").exists() or (path / "checkpoint").exists()
        unfinished = "has no report.json, for its run did not end: add --resume to its line, or"
        problem = unfinished if begun else "is no folder of a run:"
        raise Refused(f"{folder} {problem} leave it out")
    problem = f"{folder}: its report.json or metrics.jsonl"
    try:
        report = json.loads((path / "report.json").read_text(encoding="utf-8"))
        settings = report["settings"]
        if any(name in settings for name in OF_OTHER_SCRIPTS):
            raise Refused(f"{folder} is of another script than train_rlhf.py: leave it out")
        metrics = read_lines(path / "metrics.jsonl")
        ends = [(each["samples"], each["seconds"]) for each in (report, metrics[-1])]
        for model, part in itertools.product(("base", "trained"), report["base"]):  # all is there?
            [report[model][part][name] for name in FIGURES]
            [report[model][part][name] + 0 for name in NUMBERS]  # an error where one is none
        [settings[name] for name in ("seed", "model_name", "reward")]
        [report[name] for name in ("device", "samples_per_second", "learned")]
        report["base"]["train_prompts"], report["scale"]["threshold"]
    except (OSError, ValueError) as error:
        remedy = "copy it again, or leave it out"
        raise Refused(f"{problem} can't be read ({shorten(error)}): {remedy}") from error
    except (KeyError, TypeError, IndexError) as error:
        lacking = error.args[0] if isinstance(error, KeyError) else "what it should hold"
        remedy = "another version wrote it, so train it anew, or leave it out"
        raise Refused(f"{problem} lacks {lacking}: {remedy}") from error
    if ends[0] != ends[1]:
        of_each = "{0[0]} samples in {0[1]:.1f} s, but {1[0]} samples in {1[1]:.1f} s".format(*ends)
        remedy = "they are of two runs: add --resume to the line of the last, or leave it out"
        raise Refused(f"{folder}: report.json has {of_each} in metrics.jsonl: {remedy}")
    return SimpleNamespace(folder=folder, settings=settings, report=report, metrics=metrics)


def figures(runs, name, model="trained", part="train_prompts"):
    """Return a figure of each run's report."""
    return [run.report[model][part][name] for run in runs]


def told(value):
    """Return the value of a setting as text."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "empty"
    return str(value).removesuffix(".0")


# ------------------------------------------------------------------------------ what is compared
def check_alike(runs):
    """Refuse runs whose numbers mean different things; return what a reader has to know besides."""
    rewards = {run.settings["reward"] for run in runs}
    by_words = rewards == {"positive_word_reward"}
    by_classifier = not any(name == "positive_word_reward" or ".py" in name for name in rewards)
    unused = ["positive_words"] * (not by_words) + ["reward_label"] * (not by_classifier)
    problems, unknown = {}, []
    for name in [name for name in MEASURED if name not in unused]:
        known = [run for run in runs if name in run.settings]
        unknown += [f"{name.upper()} of {run.folder}" for run in runs if run not in known]
        for run in known[1:]:
            values = [each.settings[name] for each in (known[0], run)]
            if values[0] != values[1]:
                problems.setdefault(name, tell_difference(name, values, known[0], run))
    if not problems:
        for one, other in itertools.combinations(runs, 2):
            problems |= compare_bases(one, other)
    if problems:
        raise Refused(*problems.values())
    devices = {run.report["device"] for run in runs}
    models = {run.settings["model_name"] for run in runs}
    versions = {json.dumps(run.report.get("versions")) for run in runs}
    idle = ", ".join(run.folder for run in runs if not run.report["learned"])
    notes = {
        f"Not told by another version, and taken for alike: {', '.join(unknown)}.": unknown,
        "A KL is against the run's own base model, so compare it within a model.": len(models) > 1,
        "Whether the reward changed in between is seen only where seeds are alike.": not by_words,
        "Seconds on different devices tell nothing about settings.": len(devices) > 1,
        "The runs had different versions of the libraries.": len(versions) > 1,
        f"Did not learn beyond chance: {idle}.": idle,
    }
    return [note for note, holds in notes.items() if holds]


def tell_difference(name, values, one, other):
    """Return what differs between two runs in a setting that says what their numbers mean."""
    if isinstance(values[0], list) and isinstance(values[1], list):  # of long ones, what tells
        own = [[each for each in a if each not in b] for a, b in (values, values[::-1])]
        values = own if all(own) else values
    texts = [f"{shorten(told(value))} in {run.folder}" for value, run in zip(values, (one, other))]
    remedy = "compare them apart, or train one anew"
    if name == "eval_samples":
        remedy = "add --resume to the line of one, with the number of the other: it measures anew"
    return f"{name.upper()} is {texts[0]}, but {texts[1]}: {remedy}"


def compare_bases(one, other):
    """Return {setting: problem} where a file of prompts or a reward changed, but not its name.

    With one seed the base model is asked the same; what it says, and the score of that, stay too.
    """
    if one.settings["seed"] != other.settings["seed"]:
        return {}  # a seed holds out its own part of a file, and samples other responses
    asked, said, scores = (
        [[base[part][name] for part in base] for base in (one.report["base"], other.report["base"])]
        for name in ("first_sample", "perplexity_under_base", "score")
    )
    asked = [[set(prompts) for prompts in parts] for parts in asked]
    both = f"in {one.folder} and {other.folder}, but changed in between: train one of them anew"
    if asked[0] != asked[1]:
        return {"prompts": f"PROMPTS have the same names {both}"}
    if said[0] == said[1] and scores[0] != scores[1]:
        return {"reward": f"REWARD is {one.settings['reward']} {both}"}
    return {}


def make_groups(runs):
    """Return (name, runs, all that differs) of those that differ in SEED alone.

    Where a seed is there twice, something differs that no setting tells: each is a row of its own.
    """
    names = dict.fromkeys(name for run in runs for name in run.settings)
    names = [name for name in names if name not in {*MEASURED, *WITHOUT_EFFECT, "seed"}]
    found = {}
    for run in runs:
        values = tuple(told(run.settings.get(name, "unknown")) for name in names)
        found.setdefault(values, []).append(run)
    differing = [i for i in range(len(names)) if len({values[i] for values in found}) > 1]
    rows = []
    for values, alike in found.items():
        meaning = ", ".join(f"{names[i].upper()} {values[i]}" for i in differing)
        seeds = {run.settings["seed"] for run in alike}
        parts = [alike] if len(seeds) == len(alike) else [[run] for run in alike]
        rows += [(part, meaning) for part in parts]
    if len(rows) > MOST:
        raise Refused(f"{len(rows)} rows are too many for a picture: give {MOST} at most")
    groups, meanings = [], [meaning for _, meaning in rows]
    for number, (part, meaning) in enumerate(rows, start=1):
        name = meaning
        if not 0 < len(meaning) <= LONGEST or meanings.count(meaning) > 1:
            name = f"{number} {shorten(Path(part[0].folder).resolve().name, LONGEST - 3)}"
        groups.append((name, part, meaning))
    return groups


# --------------------------------------------------------------------------------------- the table
def spread(values, form, error=None, error_form=""):
    """Return the mean ± the standard deviation between seeds; of one, ± its error if it is known."""
    if len(values) > 1:
        error = statistics.stdev(values)
    text = f"{statistics.mean(values):{form}}"
    return text if error is None else f"{text} ± {error:{error_form or form}}"


def result(runs, metric, model, part="train_prompts"):
    """Return the success rate or score of base or trained model, with its spread."""
    values = figures(runs, metric, model, part)
    if metric == "score":
        return spread(values, ".3g", *figures(runs, "standard_error", model, part)[:1], ".1g")
    samples = figures(runs, "samples", model, part)[0]
    return spread(values, ".0%", math.sqrt(values[0] * (1 - values[0]) / samples))


def make_row(name, runs, metric, model):
    """Return the cells of a row."""
    held_out, least = "-", figures(runs, "kl_minimum", model)
    if "eval_prompts" in runs[0].report[model]:
        held_out = result(runs, metric, model, "eval_prompts").partition(" ±")[0]
    return [
        *(name, str(len(runs)), result(runs, metric, model), held_out),
        f"{statistics.mean(figures(runs, 'win_rate', model)):.0%}",
        spread(figures(runs, "kl", model), "z.1f"),
        "-" if None in least else f"{statistics.mean(least):.1f}",
        f"{statistics.mean(figures(runs, 'distinct', model)):.0%}",
    ]


def base_models(runs):
    """Return (name, runs with one of each seed) for each base model, which a seed samples alike."""
    found = {}
    for run in runs:
        found.setdefault(run.settings["model_name"], {})[run.settings["seed"]] = run
    models = [(shorten(f"base: {Path(name).name}", LONGEST), found[name]) for name in found]
    return [(name, [*runs.values()]) for name, runs in models]


def make_table(groups, bases, metric):
    """Return the lines of the table in Markdown."""
    title = "success" if metric == "success_rate" else "score"
    rows = [["", "seeds", title, "held out", "wins", "KL", "least", "distinct"]]
    rows += [make_row(name, runs, metric, "base") for name, runs in bases]
    rows += [make_row(name, runs, metric, "trained") for name, runs, _ in groups]
    rows = [[cell.replace("|", "/") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths)] for row in rows]
    return [f"| {' | '.join(row)} |" for row in padded]


def describe(name, runs, meaning):
    """Return what a row is: settings, samples, scores, time and folders."""
    scores = " before, ".join(result(runs, "score", model) for model in ("base", "trained"))
    unusual = statistics.mean(figures(runs, "perplexity_under_base"))
    seconds = statistics.mean(run.report["seconds"] for run in runs)
    rate = statistics.mean(run.report["samples_per_second"] for run in runs)
    devices = ", ".join(dict.fromkeys(run.report["device"] for run in runs))
    folders = ", ".join(f"{run.folder} (seed {run.settings['seed']})" for run in runs)
    facts = [
        f"{name}: {meaning}" if meaning not in ("", name) else name,
        f"score {scores} after",
        f"perplexity under the base model {unusual:.1f}",
        f"{runs[0].report['samples']} samples in {seconds:.0f} seconds, {rate:.1f} a second",
        devices,
        folders,
    ]
    return "; ".join(facts)


def make_text(groups, bases, notes, metric, picture):
    """Return the whole comparison in Markdown."""
    runs = [run for _, group, _ in groups for run in group]
    meaning = f"Measured with {figures(runs, 'samples')[0]} samples. {LEGEND}"
    lines = [f"# Comparison of runs: {len(runs)}", "", *make_table(groups, bases, metric), ""]
    lines += [textwrap.fill(meaning, 100), ""]
    for item in [*(describe(*group) for group in groups), *notes]:
        lines.append(textwrap.fill(f"- {item}", 100, subsequent_indent="  "))
    return "\n".join([*lines, "", f"![Learning, and what it costs](<{picture}>)", ""])


# ------------------------------------------------------------------------------------- the picture
def learning_curve(metrics, name):
    """Return {samples: mean over the last 100 of them}, from where there are so many."""
    first = min(100, metrics[-1]["samples"])
    steps = [step for step, record in enumerate(metrics, start=1) if record["samples"] >= first]
    return {metrics[step - 1]["samples"]: recent(metrics[:step], name) for step in steps}


def least_kls(base, runs, metric):
    """Return points (KL, success rate or score) of the least KL, from the base model upwards.

    For a success rate they follow from the base model's; for scores they are those of the runs.
    """
    if metric == "score":
        points = zip(figures(runs, "kl_minimum"), figures(runs, "score"))
        return [(0.0, base), *sorted(point for point in points if point[0] is not None)]
    best, points = max(figures(runs, "success_rate")), [(0.0, base)]
    for number in range(1, 101) if 0 < base < best else ():
        rate = base + (best - base) * number / 100
        failures = (1 - rate) * math.log((1 - rate) / (1 - base)) if rate < 1 else 0.0
        points.append((rate * math.log(rate / base) + failures, rate))
    return points


def draw(groups, bases, metric, path):
    """Draw the learning curves, and what was measured at the end against KL with the least KL."""
    from matplotlib.figure import Figure  # here, since it takes a second to load
    from matplotlib.ticker import PercentFormatter

    warnings.filterwarnings("ignore", "Glyph")  # a font may lack letters of a folder's name
    runs = [run for _, group, _ in groups for run in group]
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set(title="Learning: means of the last 100 samples", xlabel="samples")
    left.set_ylabel("success rate" if metric == "success_rate" else "mean score")
    if metric == "success_rate":
        left.yaxis.set_major_formatter(PercentFormatter(1))
    right.set(xlabel="KL against the base model (nats per response)")
    right.set(title="What it costs: measured at the end")
    for (name, group, _), color in zip(groups, (f"C{number}" for number in range(MOST))):
        curves = [learning_curve(run.metrics, metric) for run in group]
        samples = [each for each in curves[0] if all(each in curve for curve in curves)]
        columns = [[curve[each] for curve in curves] for each in samples]
        means = [statistics.mean(column) for column in columns]
        name = name.replace("$", r"\$")  # or it would be a formula
        left.plot(samples, means, color=color, label=name)
        kls, values = figures(group, "kl"), figures(group, metric)
        if len(group) > 1:
            spreads = [statistics.stdev(column) for column in columns]
            low, high = ([m + sign * s for m, s in zip(means, spreads)] for sign in (-1, 1))
            left.fill_between(samples, low, high, color=color, alpha=0.2, linewidth=0)
            right.plot(kls, values, ".", color=color)
        right.plot(statistics.mean(kls), statistics.mean(values), "*", color=color, markersize=13)
    for (name, alike), line in zip(bases, itertools.cycle(["-", "--", ":"])):
        base = statistics.mean(figures(alike, metric, "base"))
        own = [run for run in runs if run.settings["model_name"] == alike[0].settings["model_name"]]
        left.plot(0, base, "ks")
        right.plot(0, base, "ks")
        points = least_kls(base, own, metric)
        right.plot(*zip(*points), "k" + line, label=f"least KL, {name}")
        if metric == "score":
            right.plot(*zip(*points), "kx", markersize=5)  # known at the scores of the runs
    title = "square: base model, star: trained"
    if len(runs) > len(groups):
        title = "square: base model, dot: a seed,\nstar: mean, band: ± deviation"
    figure.legend(loc="outside right upper", fontsize="small", title=title, title_fontsize="small")
    figure.savefig(path, dpi=100)


def main(argv=None):
    """Compare runs; return the exit status: 0 done, 2 refused, with the reasons on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("folders", nargs="+", metavar="FOLDER", help="OUTPUT_DIR of a finished run")
    names = "a folder, or how the names of table and picture begin (default: %(default)s)"
    add("--output", default="comparison", help=names)
    options = parser.parse_args(argv)
    output = Path(options.output)
    output = output / "comparison" if output.is_dir() else output
    table, picture = Path(f"{output}.md"), Path(f"{output}.png")
    try:
        runs = read_runs(options.folders)
        notes = check_alike(runs)
        groups, bases = make_groups(runs), base_models(runs)
        thresholds = {run.report["scale"]["threshold"] for run in runs}
        metric = "score" if len(thresholds) > 1 or None in thresholds else "success_rate"
        text = make_text(groups, bases, notes, metric, picture.name)
        draw(groups, bases, metric, picture)
        table.write_text(text, encoding="utf-8")
    except (Refused, OSError) as error:
        problem = f"--output is {options.output}: it can't be written ({error}): name another"
        problems = error.args if isinstance(error, Refused) else [problem]
        print("Nothing was compared:", *problems, sep="\n- ", file=sys.stderr)
        return 2
    print(text)
    print(f"Written: {table} and {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
