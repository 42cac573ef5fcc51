"""Compare finished runs of train_rlhf.py: one table and one picture from several OUTPUT_DIRs.

    python benchmarks/compare.py trained_model trained_model-1       # comparison.md, comparison.png
    python benchmarks/compare.py runs/* --output runs/prices    # runs/prices.md, runs/prices.png

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
OTHER_SCRIPTS = {  # a setting that no script has but this one
    "packing": "train_sft.py",
    "score": "train_reward_model.py",
    "seed_tasks": "make_instructions.py",
}
FIGURES = ("samples", "score", "standard_error", "success_rate", "kl", "kl_minimum", "win_rate")
FIGURES += ("distinct", "perplexity_under_base", "first_sample")
LONGEST = 23  # characters of a row's name, so that a table has at most 100 columns
MOST = 20  # rows whose lines can still be told apart
TITLE = "# Comparison of "


class Refused(Exception):
    """What can't be compared: each argument names a folder or a setting, and the remedy."""


# ---------------------------------------------------------------------------------------- the runs
def read_runs(folders):
    """Return the runs in these folders, or raise all that is wrong with them at once."""
    runs, problems, places = [], [], set()
    for folder in folders:
        place = Path(folder).resolve()
        try:
            if place in places:
                raise Refused(f"{folder} is given twice, perhaps by another path: give it once")
            runs.append(read_run(folder))
        except Refused as error:
            problems += error.args
        places.add(place)
    if problems:
        raise Refused(*problems)
    return runs


def read_run(folder):
    """Return folder, settings, report and metrics of a finished run, all that is needed there."""
    if not Path(folder, "report.json").is_file():
        if Path(folder, "metrics.jsonl").exists() or Path(folder, "checkpoint").exists():
            remedy = "run the line that began it again, with --resume, or leave it out"
            raise Refused(
                f"{folder} has no report.json, for its run did not come to its end: {remedy}"
            )
        raise Refused(f"{folder} is no folder of a run: leave it out")
    report = read(Path(folder, "report.json"), lambda path: json.loads(path.read_text("utf-8")))
    try:
        settings = report["settings"]
        for name, script in OTHER_SCRIPTS.items():
            if name in settings:
                raise Refused(f"{folder} is of {script}, which has no scores: leave it out")
        metrics = read(Path(folder, "metrics.jsonl"), read_lines)
        for model, prompts, name in itertools.product(("base", "trained"), report["base"], FIGURES):
            report[model][prompts][name]
        report["scale"]["threshold"], report["base"]["train_prompts"]
        for name in ("versions", "device", "dtype", "samples_per_second", "learned"):
            report[name]
        for name in ("seed", "model_name", "reward"):
            settings[name]
        ends = [[each[name] for name in ("samples", "seconds")] for each in (report, metrics[-1])]
    except (KeyError, TypeError, IndexError) as error:
        lacking = f"lacks {error.args[0]}" if isinstance(error, KeyError) else "has another form"
        problem = f"{folder}: its report or metrics {lacking}, for another version wrote them"
        raise Refused(f"{problem}: train it anew, or leave it out") from error
    if ends[0] != ends[1]:
        problem = (
            f"{folder}: report.json is of {ends[0][0]} samples in {ends[0][1]:.1f} seconds, but"
        )
        problem += (
            f" metrics.jsonl of {ends[1][0]} in {ends[1][1]:.1f}, since another run began there"
        )
        raise Refused(f"{problem}: finish that one with --resume, or leave it out")
    return SimpleNamespace(folder=str(folder), settings=settings, report=report, metrics=metrics)


def read(path, function):
    """Return what the function reads from a file."""
    try:
        return function(path)
    except (OSError, ValueError) as error:
        reason = shorten(getattr(error, "strerror", None) or error)
        raise Refused(f"{path} can't be read ({reason}): copy it again, or leave it out") from error


def name_of(runs):
    """Return how several runs are named on a line."""
    more = f" and {len(runs) - 1} more" if len(runs) > 1 else ""
    return f"{runs[0].folder}{more}"


def told(value):
    """Return the value of a setting as text."""
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "empty"
    return f"{value:g}" if isinstance(value, float) else str(value)


# --------------------------------------------------------------------------- what can be compared
def check_alike(runs):
    """Refuse runs whose numbers mean different things; return what a reader has to know besides."""
    rewards = {run.settings["reward"] for run in runs}
    without_words = rewards != {"positive_word_reward"}
    without_label = any(name == "positive_word_reward" or ".py" in name for name in rewards)
    unused = ["positive_words"] * without_words + ["reward_label"] * without_label
    problems, notes = [], []
    for name in [name for name in MEASURED if name not in unused]:
        known = [run for run in runs if name in run.settings]
        others = [run for run in known if run.settings[name] != known[0].settings[name]]
        if others:
            alike = [run for run in known if run not in others]
            problems.append(tell_difference(name, alike, others))
        if len(known) < len(runs):
            unknown = name_of([run for run in runs if run not in known])
            notes.append(
                f"{unknown}: another version of the script, which tells no {name.upper()}."
            )
    problems += [] if problems else check_contents(runs, notes)
    if problems:
        raise Refused(*problems)
    models = list(dict.fromkeys(run.settings["model_name"] for run in runs))
    if len(models) > 1:
        notes.append(f"Each KL is against the run's own base model, of {', '.join(models)}.")
    if rewards != {"positive_word_reward"}:
        notes.append(
            "The reward is known by its name alone: it should not have changed in between."
        )
    if len({run.report["device"] for run in runs}) > 1:
        notes.append("Seconds are of different devices, and say nothing about the settings.")
    versions = {library for run in runs for library in run.report["versions"].items()}
    changed = {one for (one, _), (other, _) in itertools.combinations(versions, 2) if one == other}
    if changed:
        notes.append(f"The runs had different versions of {', '.join(sorted(changed))}.")
    idle = [run for run in runs if not run.report["learned"]]
    if idle:
        notes.append(f"Not learned beyond chance: {', '.join(run.folder for run in idle)}.")
    return notes


def tell_difference(name, alike, others):
    """Return what differs between runs in a setting that says what their numbers mean."""
    values = [runs[0].settings[name] for runs in (alike, others)]
    if all(isinstance(value, list) for value in values):  # of two long ones, what tells
        own = [[each for each in a if each not in b] for a, b in (values, values[::-1])]
        values = own if all(own) else values
    texts = [f"{shorten(told(v))} in {name_of(r)}" for v, r in zip(values, (alike, others))]
    remedy = "compare them apart, or train anew with the same"
    if name == "eval_samples":  # which --resume may change
        remedy = "run the line of one again with --resume and the other's, which measures anew"
    return f"{name.upper()} is {texts[0]}, but {texts[1]}: {remedy}"


def check_contents(runs, notes):
    """Return what differs behind the same names: a file of prompts, a reward; note another model."""
    problems = {}
    for one, other in itertools.combinations(runs, 2):
        bases, both = (
            [run.report["base"] for run in (one, other)],
            f"{one.folder} and {other.folder}",
        )
        if one.settings["seed"] != other.settings["seed"]:
            continue  # a seed holds out its own part of a file, and samples other responses
        asked = [[set(base[part]["first_sample"]) for part in base] for base in bases]
        if asked[0] != asked[1]:
            problem = f"PROMPTS are not what they were between {both}, though they are named alike"
            problems.setdefault("prompts", f"{problem}: train anew on the same file")
        if one.settings["model_name"] != other.settings["model_name"] or problems:
            continue
        names = ("first_sample", "perplexity_under_base")
        said = [[base["train_prompts"][name] for name in names] for base in bases]
        scores = [base["train_prompts"]["score"] for base in bases]
        machines = [[run.report[name] for name in ("versions", "device")] for run in (one, other)]
        if said[0] == said[1] and scores[0] != scores[1]:
            told_scores = f"{scores[0]:.4g} in {one.folder}, but {scores[1]:.4g} in {other.folder}"
            problem = (
                f"REWARD is {one.settings['reward']}, which gave the same responses of the base"
            )
            problem += f" model {told_scores}: it has changed, so train one of them anew"
            problems["reward"] = problem
        elif said[0] != said[1] and machines[0] == machines[1]:
            note = (
                f"{one.settings['model_name']} may be two models: with one seed it says different"
            )
            notes.append(f"{note} things in {both}.")
    return [*problems.values()]


def make_groups(runs):
    """Return {name: runs} of those that differ in SEED alone, and {name: all that differs}.

    Where a seed is there twice, something differs that no setting tells: each is a row of its own.
    """
    names = dict.fromkeys(name for run in runs for name in run.settings)
    names = [name for name in names if name not in {*MEASURED, *WITHOUT_EFFECT, "seed"}]
    found = {}
    for run in runs:
        values = tuple(told(run.settings.get(name, "unknown")) for name in names)
        found.setdefault(values, []).append(run)
    rows = []
    for values, alike in found.items():
        seeds = {run.settings["seed"] for run in alike}
        parts = [alike] if len(seeds) == len(alike) else [[run] for run in alike]
        rows += [(values, part) for part in parts]
    if len(rows) > MOST:
        raise Refused(
            f"{len(rows)} rows are too many for one picture: give folders of {MOST} at most"
        )
    differing = [i for i in range(len(names)) if len({values[i] for values in found}) > 1]
    full = [[f"{names[i].upper()} {values[i]}" for i in differing] for values, _ in rows]
    full = [", ".join(texts) for texts in full]
    groups, meanings = {}, {}
    for number, ((_, part), text) in enumerate(zip(rows, full), start=1):
        label = text
        if not text or len(text) > LONGEST or full.count(text) > 1:
            label = Path(part[0].folder).resolve().name
        if len(label) > LONGEST or label in groups:
            label = f"{number} {shorten(label, LONGEST - 3)}"
        groups[label], meanings[label] = part, text
    return groups, meanings


# --------------------------------------------------------------------------------------- the table
def success_or_score(runs):
    """Return what is compared: the success rate where all runs have one alike, else the score."""
    thresholds = {run.report["scale"]["threshold"] for run in runs}
    return "score" if len(thresholds) > 1 or None in thresholds else "success_rate"


def figures(runs, name, model="trained", prompts="train_prompts"):
    """Return a figure of each run's report."""
    return [run.report[model][prompts][name] for run in runs]


def with_spread(values, errors, form, error_form):
    """Return the mean ± the standard deviation between seeds; of one, its standard error if known."""
    spread = statistics.stdev(values) if len(values) > 1 else errors[0]
    text = f"{statistics.mean(values):{form}}"
    return text if spread is None else f"{text} ± {spread:{error_form}}"


def score_cell(runs, metric, model, prompts="train_prompts"):
    """Return success rate or score of the base or the trained model, with its spread."""
    values = figures(runs, metric, model, prompts)
    if metric == "score":
        errors = figures(runs, "standard_error", model, prompts)
        return with_spread(values, errors, ".3g", ".1g")
    counts = figures(runs, "samples", model, prompts)
    errors = [math.sqrt(p * (1 - p) / count) for p, count in zip(values, counts)]
    return with_spread(values, errors, ".0%", ".0%")


def make_row(label, runs, metric, model="trained"):
    """Return the cells of a row."""
    least = figures(runs, "kl_minimum", model)
    cells = [label, str(len(runs)), score_cell(runs, metric, model), "-"]
    if "eval_prompts" in runs[0].report[model]:
        cells[-1] = score_cell(runs, metric, model, "eval_prompts").split(" ±")[0]
    cells += [f"{statistics.mean(figures(runs, 'win_rate', model)):.0%}"]
    cells += [with_spread(figures(runs, "kl", model), [None], "z.1f", ".1f")]
    cells += ["-" if None in least else f"{statistics.mean(least):.1f}"]
    return [*cells, f"{statistics.mean(figures(runs, 'distinct', model)):.0%}"]


def of_models(runs):
    """Return {base model's name in a row: one run of each seed}, which sampled it alike."""
    models = {}
    for run in runs:
        models.setdefault(run.settings["model_name"], {})[run.settings["seed"]] = run
    names = {model: shorten(f"base: {Path(model).name}", LONGEST) for model in models}
    alike = len({*names.values()}) < len(names)
    return {
        f"base model {number}" if alike else names[model]: [*seeds.values()]
        for number, (model, seeds) in enumerate(models.items(), start=1)
    }


def make_table(groups, metric):
    """Return the lines of the table in Markdown, each row's columns below each other."""
    runs = [run for group in groups.values() for run in group]
    title = "success" if metric == "success_rate" else "score"
    rows = [["", "seeds", title, "held out", "wins", "KL", "least", "distinct"]]
    rows += [make_row(label, alike, metric, "base") for label, alike in of_models(runs).items()]
    rows += [make_row(label, group, metric) for label, group in groups.items()]
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    widths = [max(map(len, column)) for column in zip(*rows)]
    rows.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths)] for row in rows]
    return [f"| {' | '.join(row)} |" for row in padded]


def describe(label, meaning, runs):
    """Return what a row is: its settings, samples, scores, time and folders."""
    before, after = (score_cell(runs, "score", model) for model in ("base", "trained"))
    ways = ("base", "trained")
    unusual = [statistics.mean(figures(runs, "perplexity_under_base", model)) for model in ways]
    seconds, rate = (
        statistics.mean(run.report[name] for run in runs)
        for name in ("seconds", "samples_per_second")
    )
    devices = ", ".join(dict.fromkeys(run.report["device"] for run in runs))
    folders = ", ".join(f"{run.folder} (seed {run.settings['seed']})" for run in runs)
    text = f"**{label}**: " + f"{meaning}; " * (meaning not in ("", label))
    text += (
        f"score {before} before, {after} after; perplexity under the base model {unusual[0]:.1f}"
    )
    text += f" before, {unusual[1]:.1f} after; {runs[0].report['samples']} samples in"
    return f"{text} {seconds:.0f} seconds, {rate:.1f} a second, on {devices}; {folders}"


def make_text(groups, meanings, notes, metric, picture):
    """Return the whole comparison in Markdown."""
    runs = [run for group in groups.values() for run in group]
    asked = figures(runs, "samples")[0]
    spread = (
        f"Measured with {asked} samples. ±: the standard deviation between seeds; of a single run"
    )
    spread += (
        " the standard error of its samples. wins: how often a response scores higher than the"
    )
    spread += " base model's. least: the least KL at which any policy has that mean score."
    items = [describe(label, meanings[label], group) for label, group in groups.items()]
    items = [textwrap.fill(item, 98, break_on_hyphens=False) for item in [*items, *notes]]
    items = [f"- {item}".replace("\n", "\n  ") for item in items]
    lines = [f"{TITLE}{len(runs)} run{'s' * (len(runs) > 1)}", "", *make_table(groups, metric), ""]
    lines += [textwrap.fill(spread, 100), "", *items, ""]
    return "\n".join([*lines, f"![Learning, and what it costs](<{picture}>)", ""])


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
        found = zip(figures(runs, "kl_minimum"), figures(runs, "score"))
        return [(0.0, base), *sorted(point for point in found if point[0] is not None)]
    best = max(figures(runs, "success_rate"))
    if not 0 < base < best:
        return [(0.0, base)]
    rates = [base + (best - base) * number / 100 for number in range(101)]
    return [(binary_kl(rate, base), rate) for rate in rates]


def binary_kl(rate, base):
    """Return the KL in nats of a success rate against that of the base model."""
    pairs = ((rate, base), (1 - rate, 1 - base))
    return sum(p * math.log(p / q) for p, q in pairs if p > 0)


def draw(groups, metric, path):
    """Draw the learning curves, and what was measured at the end against KL with the least KL."""
    from matplotlib.figure import Figure  # here, since it takes a second to load
    from matplotlib.ticker import PercentFormatter

    warnings.filterwarnings("ignore", "Glyph")  # a font may lack letters of a folder's name
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    left.set(title="Learning: means of the last 100 samples", xlabel="samples")
    left.set_ylabel("success rate" if metric == "success_rate" else "mean score")
    if metric == "success_rate":
        left.yaxis.set_major_formatter(PercentFormatter(1))
    right.set(title="What it costs: measured at the end")
    right.set(xlabel="KL against the base model (nats per response)")
    for number, (label, group) in enumerate(groups.items()):
        style = {"color": f"C{number % 10}", "linestyle": ("-", "--")[number // 10]}
        curves = [learning_curve(run.metrics, metric) for run in group]
        samples = [each for each in curves[0] if all(each in curve for curve in curves)]
        columns = [[curve[each] for curve in curves] for each in samples]
        means = [statistics.mean(column) for column in columns]
        label = label.replace("$", r"\$")  # or it would be a formula
        left.plot(samples, means, label=f" {label}", **style)  # "_" in front would hide a label
        kls, values = figures(group, "kl"), figures(group, metric)
        if len(group) > 1:
            spreads = [statistics.stdev(column) for column in columns]
            low, high = ([m + sign * s for m, s in zip(means, spreads)] for sign in (-1, 1))
            left.fill_between(samples, low, high, color=style["color"], alpha=0.2, linewidth=0)
            right.plot(kls, values, ".", color=style["color"])
        mark = ("*", "D")[number // 10]
        mean = statistics.mean(kls), statistics.mean(values)
        right.plot(*mean, mark, color=style["color"], markersize=13 - 5 * (mark == "D"))
    runs = [run for group in groups.values() for run in group]
    for (label, alike), line in zip(of_models(runs).items(), itertools.cycle(["-", "--", ":"])):
        base = statistics.mean(figures(alike, metric, "base"))
        model = alike[0].settings["model_name"]
        own = [run for run in runs if run.settings["model_name"] == model]
        left.plot(0, base, "ks", markersize=5)
        right.plot(0, base, "ks", markersize=5)
        right.plot(*zip(*least_kls(base, own, metric)), "k" + line, label=f"least KL, {label}")
    several = len(runs) > len(groups)
    right.plot([], [], "ks", markersize=5, label="base model")
    right.plot([], [], "k*", markersize=10, label="mean over seeds" if several else "trained model")
    if several:
        right.plot([], [], "k.", label="each seed")
        left.fill_between([], [], color="k", alpha=0.2, label="± deviation between seeds")
    figure.legend(loc="outside right upper", fontsize="small")
    figure.savefig(path, dpi=100)


# -------------------------------------------------------------------------------------------- main
def find_places(output):
    """Return the paths of table and picture: in a folder, or with a path as their beginning."""
    path = Path(output)
    if path.suffix in (".md", ".png"):
        path = path.with_suffix("")
    if path.is_dir():
        path = path / "comparison"
    table, picture = Path(f"{path}.md"), Path(f"{path}.png")
    if not path.parent.is_dir():
        raise Refused(
            f"--output is {output}: there is no folder {path.parent}: make it, or name another"
        )
    if table.exists() and not table.read_bytes().startswith(TITLE.encode()):
        raise Refused(f"--output is {output}: {table} is no comparison: name another")
    return table, picture


def main(argv=None):
    """Compare runs; return the exit status: 0 done, 2 refused, with the reasons on stderr."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("folders", nargs="+", metavar="FOLDER", help="OUTPUT_DIR of a finished run")
    told = "a folder, or how the names of table and picture begin (default: %(default)s)"
    add("--output", default="comparison", help=told)
    options = parser.parse_args(argv)
    try:
        table, picture = find_places(options.output)
        runs = read_runs(options.folders)
        notes = check_alike(runs)
        groups, meanings = make_groups(runs)
        metric = success_or_score(runs)
        text = make_text(groups, meanings, notes, metric, picture.name)
        draw(groups, metric, picture)
        table.write_text(text, encoding="utf-8")
    except (Refused, OSError) as error:
        reasons = error.args if isinstance(error, Refused) else [f"{error}: name another --output"]
        print("Nothing was compared:", *reasons, sep="\n- ", file=sys.stderr)
        return 2
    print(text)
    print(f"Written: {table} and {picture}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
