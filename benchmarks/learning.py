"""Measure how well train_rlhf.py learns, over models, seeds and variants of its settings; write learning.md.

    python benchmarks/learning.py            # the table of the defaults: 5 seeds of each model
    python benchmarks/learning.py --ablation # what each part of the learner is worth, on the same seeds

Every run is a process of its own with one thread, as many at once as there are cores. stories260K, a model that is not
part of the project, is left out where its folder is absent.
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
        *[
            "--model-name",
            str(STORIES),
            "--prompts",
            *STORY_PROMPTS,
            "--eval-prompts",
            *STORY_EVAL_PROMPTS,
        ]
    ],
    "stories260K, default prompts": ["--model-name", str(STORIES)],
}
VARIANTS = {  # name: flags, and Python that changes train_rlhf before it runs
    "as it is": ([], ""),
    "LEARNING_RATE / 3": (["--learning-rate", "1e-4"], ""),
    "LEARNING_RATE * 3": (["--learning-rate", "9e-4"], ""),
    "one rate, not adapted": (["--target-approx-kl", "0"], ""),
    "the last token gets the score": (["--score-prefixes", "false"], ""),
    "KL in the reward alone": (
        [],
        "def loss(self, *a, **k):\n"
        "    result = exact_loss(self, *a, **k)\n"
        "    return (train_rlhf.PPOTrainer.loss(self, *a, **k)[0], *result[1:])\n"
        "exact_loss, train_rlhf.ExactKLTrainer.loss = train_rlhf.ExactKLTrainer.loss, loss",
    ),
    "advantages whitened": (
        [],
        "train_rlhf.ExactKLTrainer.compute_advantages = train_rlhf.PPOTrainer.compute_advantages",
    ),
    "the critic does not see what was earned": (
        [],
        "forward = train_rlhf.PolicyWithValueHead.forward\n"
        "train_rlhf.PolicyWithValueHead.forward = lambda self, earned=0.0, **inputs: forward(self, **inputs)",
    ),
    "target falls as a straight line": (
        [],
        "adapt, full = train_rlhf.adapt_learning_rate, train_rlhf.TARGET_APPROX_KL\n"
        "train_rlhf.adapt_learning_rate = lambda rate, kl, target: adapt(rate, kl, full * (target / full) ** (1 / 3))",
    ),
    "LAM 1": (["--lam", "1"], ""),
    "TARGET_APPROX_KL * 4": (["--target-approx-kl", "0.01"], ""),
    "KL_COEF / 2": (["--kl-coef", "0.05"], ""),
    "KL_COEF * 2": (["--kl-coef", "0.2"], ""),
}
COLUMNS = "last 200 | worst seed | samples to 80 % | trained | held out | KL | least KL | distinct"


def run(model, variant, seed):
    """Return the figures of one run; a run that fails stops the benchmark with what it printed."""
    flags, patch = VARIANTS[variant]
    program = f"import sys, train_rlhf\n{patch}\nsys.exit(train_rlhf.main(sys.argv[1:]))"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "trained_model")
        command = [sys.executable, "-c", program, *MODELS[model], *flags]
        result = subprocess.run(
            [*command, "--seed", str(seed), "--output-dir", str(output), "--save-every", "0"],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
        )
        if result.returncode:
            raise SystemExit(
                f"{model}, {variant}, seed {seed} failed:\n{result.stdout}{result.stderr}"
            )
        report = json.loads((output / "report.json").read_text())
        metrics = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    batch = report["settings"]["batch_size"]
    rates = [record["success_rate"] for record in metrics]
    running = {
        (i + 1) * batch: statistics.mean(rates[i + 1 - 100 // batch : i + 1])
        for i in range(9, len(rates))
    }
    trained, held_out = report["trained"]["train_prompts"], report["trained"]["eval_prompts"]
    return {
        "base": report["base"]["train_prompts"]["success_rate"],
        "last_200": statistics.mean(rates[-200 // batch :]),
        "samples_to_80": next((samples for samples, rate in running.items() if rate >= 0.8), None),
        "trained": trained["success_rate"],
        "held_out": held_out["success_rate"],
        **{name: trained[name] for name in ("kl", "kl_minimum", "distinct")},
    }


def row(name, runs):
    """Return a Markdown row: means over the seeds, the lowest and highest in brackets where they tell something."""

    def mean(key, form):
        values = [figures[key] for figures in runs]
        return f"{statistics.mean(values):{form}} ({min(values):{form}} to {max(values):{form}})"

    reached = [figures["samples_to_80"] for figures in runs]
    median = statistics.median(value or 10**9 for value in reached)
    cells = [
        f"{name} (base {statistics.mean(figures['base'] for figures in runs):.0%})",
        f"{statistics.mean(figures['last_200'] for figures in runs):.1%}",
        f"{min(figures['last_200'] for figures in runs):.0%}",
        "never" if median == 10**9 else f"{median:.0f}",
        *(mean(key, ".0%") for key in ("trained", "held_out")),
        mean("kl", ".1f"),
        f"{statistics.mean(figures['kl_minimum'] for figures in runs):.1f}",
        mean("distinct", ".0%"),
    ]
    return "| " + " | ".join(cells) + " |"


def main():
    """Run, and print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--ablation", action="store_true", help="all variants in place of the defaults alone"
    )
    parser.add_argument(
        "--seeds", type=int, default=5, help="seeds 0 to this less one (default: %(default)s)"
    )
    parser.add_argument(
        "--jobs", type=int, default=os.cpu_count(), help="runs at once (default: %(default)s)"
    )
    options = parser.parse_args()
    variants = list(VARIANTS) if options.ablation else list(VARIANTS)[:1]
    models = [model for model in MODELS if STORIES.is_dir() or model == "demo_model"]
    if options.ablation:
        models = models[:2]
    tasks = [(m, v, seed) for m in models for v in variants for seed in range(options.seeds)]
    with ThreadPoolExecutor(options.jobs) as pool:
        results = dict(zip(tasks, pool.map(lambda task: run(*task), tasks)))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout
    lines = [
        f"Commit {commit.strip()}, seeds 0 to {options.seeds - 1}, 900 samples, a CPU with one thread a run.",
        "",
    ]
    lines += [f"| | {COLUMNS} |", "|---|" + "---|" * len(COLUMNS.split("|"))]
    for model in models:
        for variant in variants:
            name = f"{model}: {variant}" if options.ablation else model
            lines.append(
                row(name, [results[model, variant, seed] for seed in range(options.seeds)])
            )
    table = "\n".join(lines) + "\n"
    print(table)
    (ROOT / "benchmarks" / ("ablation.md" if options.ablation else "learning.md")).write_text(table)


if __name__ == "__main__":
    main()
