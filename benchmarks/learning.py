"""Measure how well train_rlhf.py learns, over models, seeds and variants of its settings.

    python benchmarks/learning.py             # 5 seeds of each model with the defaults: learning.md
    python benchmarks/learning.py --ablation  # what each part of the learner is worth: ablation.md
    python benchmarks/learning.py --rare      # words that the base model hardly says: rare_words.md

Any flag of train_rlhf.py may follow; then the table is shown, but not written. Every run is a
process of its own with one thread, as many at once as there are cores. stories260K, a model that is
not part of the project, is left out where its folder is absent.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
STORIES = ROOT.parent / "shared" / "models" / "stories260K"
STORY_PROMPTS = ["Once upon a time, there was a", "Lily was very", "The little dog felt"]
STORY_PROMPTS += ["Tom saw his friend and was", "One day, the girl felt", "The boy said he was"]
STORY_EVAL_PROMPTS = ["The old man felt", "Sue and Ben were", "Mom said that it was"]
STORY_EVAL_PROMPTS += ["The cat was very", "They played and were", "Then the bird was"]
MODELS = {
    "demo_model": ["--model-name", str(ROOT / "demo_model")],
    "stories260K, story prompts": [
        *("--model-name", str(STORIES)),
        *("--prompts", *STORY_PROMPTS),
        *("--eval-prompts", *STORY_EVAL_PROMPTS),
    ],
    "stories260K, default prompts": ["--model-name", str(STORIES)],
}
CALM = "demo_model: calm, serene, peaceful"
RARE = {  # words that the base model hardly says
    CALM: [*MODELS["demo_model"], "--positive-words", "calm", "serene", "peaceful"],
}
RARE[f"{CALM}; 40 tokens"] = [*RARE[CALM], "--max-new-tokens", "40"]
for words in ("big", "dog, cat, bird", "play, playing, toy, park"):
    story_flags = MODELS["stories260K, story prompts"]
    RARE[f"stories260K: {words}"] = [*story_flags, "--positive-words", *words.split(", ")]
VARIANTS = {  # name: flags, and Python that changes train_rlhf before it runs
    "as it is": ([], ""),
    "LEARNING_RATE / 3": (["--learning-rate", "1e-4"], ""),
    "LEARNING_RATE * 3": (["--learning-rate", "9e-4"], ""),
    "one rate, not adapted": (["--target-approx-kl", "0"], ""),
    "the last token gets the score": (["--score-prefixes", "false"], ""),
    "KL in the reward alone": (
        [],
        "token_statistics = train_rlhf.token_statistics\n"
        "def without_gradient(*arguments):\n"
        "    statistics = token_statistics(*arguments)\n"
        "    return statistics._replace(kl=statistics.kl.detach())\n"
        "train_rlhf.token_statistics = without_gradient",
    ),
    "advantages whitened": (
        [],
        "from trl.core import masked_whiten\n"
        "loss = train_rlhf.policy_loss\n"
        "def of_whitened(logprobs, old_logprobs, advantages, mask, clip_range):\n"
        "    advantages = masked_whiten(advantages, mask)\n"  # an update has the whole batch
        "    return loss(logprobs, old_logprobs, advantages, mask, clip_range)\n"
        "train_rlhf.policy_loss = of_whitened",
    ),
    "the critic does not see what was earned": (
        [],
        "forward = train_rlhf.PolicyWithValueHead.forward\n"
        "def blind(self, earned, **inputs):\n"
        "    return forward(self, earned=0 * earned, **inputs)\n"
        "train_rlhf.PolicyWithValueHead.forward = blind",
    ),
    "target falls as a cube": (
        [],
        "def cube(metrics, total_steps, settings, scale):\n"
        "    return settings.target_approx_kl * (1 - len(metrics) / total_steps) ** 3\n"
        "train_rlhf.target_of_next_step = cube",
    ),
    "LAM 1": (["--lam", "1"], ""),
    "TARGET_APPROX_KL * 4": (["--target-approx-kl", "0.032"], ""),
    "PPO_EPOCHS 4": (["--ppo-epochs", "4"], ""),
    "KL_COEF / 2": (["--kl-coef", "0.05"], ""),
    "KL_COEF * 2": (["--kl-coef", "0.2"], ""),
}
COLUMNS = "last 200 | worst seed | samples to 80 % | trained | held out | KL | least KL | distinct"


def run_script(patch, flags, seed):
    """Return report and metrics of a run of train_rlhf.py, changed by a patch in Python."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "trained_model")
        return run_stage("train_rlhf", output, [*flags, "--seed", str(seed)], patch)


def run_stage(script, output, flags, patch=""):
    """Return report and metrics of a run of one of the scripts into the folder output.

    It is in float32, also on CPUs with AMX, unless a flag says otherwise. A run that fails
    stops the benchmark with what it printed.
    """
    program = f"import sys, {script}\n{patch}\nsys.exit({script}.main(sys.argv[1:]))"
    command = [sys.executable, "-c", program, "--dtype", "float32", *map(str, flags)]
    command += ["--output-dir", str(output), "--save-every", "0"]
    result = subprocess.run(
        command,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stdout}{result.stderr}")
    report = json.loads((output / "report.json").read_text())
    return report, read_lines(output / "metrics.jsonl")


def read_lines(path):
    """Return what the lines of a .jsonl file hold."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def commit(checkout=ROOT):
    """Return the short name of the commit that is measured."""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, cwd=checkout, capture_output=True, text=True).stdout.strip()


def run(patch, flags, seed):
    """Return the figures of one run."""
    report, metrics = run_script(patch, flags, seed)
    batch = report["settings"]["batch_size"]
    rates = [record["success_rate"] for record in metrics]
    last_100 = max(100 // batch, 1)  # steps
    running = {
        end * batch: statistics.mean(rates[end - last_100 : end])
        for end in range(last_100, len(rates) + 1)
    }
    trained, held_out = report["trained"]["train_prompts"], report["trained"]["eval_prompts"]
    return {
        "samples": report["samples"],
        "dtype": report["dtype"],
        "base": report["base"]["train_prompts"]["success_rate"],
        "last_200": statistics.mean(rates[-200 // batch :]),
        "samples_to_80": next((samples for samples, rate in running.items() if rate >= 0.8), None),
        "trained": trained["success_rate"],
        "held_out": held_out["success_rate"],
        **{name: trained[name] for name in ("kl", "kl_minimum", "distinct")},
    }


def row(name, runs):
    """Return a Markdown row: means over the seeds, with the lowest and highest where they tell."""

    def mean(key, form):
        values = [figures[key] for figures in runs]
        return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    reached = [figures["samples_to_80"] for figures in runs]
    median = statistics.median(value or 10**9 for value in reached)
    cells = [
        f"{name} (base {statistics.mean(figures['base'] for figures in runs):.0%})",
        f"{statistics.mean(figures['last_200'] for figures in runs):.1%}",
        f"{min(figures['last_200'] for figures in runs):.1%}",
        "never" if median == 10**9 else f"{median:.0f}",
        *(mean(key, ".0%") for key in ("trained", "held_out")),
        mean("kl", ".1f"),
        f"{statistics.mean(figures['kl_minimum'] for figures in runs):.1f}",
        mean("distinct", ".0%"),
    ]
    return "| " + " | ".join(cells) + " |"


def main():
    """Run, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--ablation", action="store_true", help="all variants in place of the defaults alone")
    add("--rare", action="store_true", help="words that the base model hardly says")
    add("--seeds", type=int, default=5, help="seeds 0 to this less one (default: %(default)s)")
    add("--models", nargs="+", choices=[*MODELS, *RARE], help="which models (default: all)")
    add("--jobs", type=int, default=os.cpu_count(), help="runs at once (default: %(default)s)")
    options, flags = parser.parse_known_args()

    all_models, file, variants = MODELS, "learning.md", ["as it is"]
    if options.rare:
        all_models, file, variants = RARE, "rare_words.md", ["as it is", "target falls as a cube"]
    elif options.ablation:
        file, variants = "ablation.md", list(VARIANTS)
    models = options.models or list(all_models)
    if not all_models.keys() >= set(models):
        parser.error(f"--models: choose from {', '.join(all_models)}")
    models = [name for name in models if STORIES.is_dir() or name.startswith("demo_model")]
    if options.ablation:
        models = [name for name in models if name != "stories260K, default prompts"]
    tasks = [(m, v, seed) for m in models for v in variants for seed in range(options.seeds)]

    def run_task(task):
        model, variant, seed = task
        variant_flags, patch = VARIANTS[variant]
        return run(patch, [*all_models[model], *variant_flags, *flags], seed)

    with ThreadPoolExecutor(options.jobs) as pool:
        results = dict(zip(tasks, pool.map(run_task, tasks)))
    samples, dtype = results[tasks[0]]["samples"], results[tasks[0]]["dtype"]
    seeds = f"seeds 0 to {options.seeds - 1}, {samples} samples, {dtype}"
    lines = [f"Commit {commit()}, {seeds}, a CPU with one thread a run.", ""]
    lines += [f"| | {COLUMNS} |", "|---|" + "---|" * len(COLUMNS.split("|"))]
    for model in models:
        for variant in variants:
            name = f"{model}: {variant}" if len(variants) > 1 else model
            runs = [results[model, variant, seed] for seed in range(options.seeds)]
            lines.append(row(name, runs))
    table = "\n".join(lines) + "\n"
    print(table)
    if not flags:
        (ROOT / "benchmarks" / file).write_text(table)


if __name__ == "__main__":
    main()
