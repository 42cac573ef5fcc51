"""Measure how train_rlhf.py learns graded rewards, and what their scale is for.

    python benchmarks/graded_rewards.py    # 3 seeds of each on demo_model: graded_rewards.md

The rewards are the functions below. Every run is a process of its own with one thread, as many at
once as there are cores.
"""

import os
import statistics
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from learning import ROOT, commit, run_script

SEEDS = range(3)
VARIANTS = {  # name: flags, and Python that changes train_rlhf before it runs
    "as it is": ([], ""),
    "far scores as they are": (
        [],
        "def straight(scale, scores):\n"
        "    return (scores - scale.mean) / scale.deviation\n"
        "train_rlhf.Scale.apply = straight",
    ),
    "no scale": (["--scale-samples", "0"], ""),
}


def characters(prompts, completions, **kwargs):
    """Prefer long responses: about 44, give or take 6, for the base model."""
    return [len(completion) for completion in completions]


def brevity(prompts, completions, **kwargs):
    """Prefer short responses: about -1.1."""
    return [-len(completion) / 40 for completion in completions]


def variety(prompts, completions, **kwargs):
    """Prefer different characters, a share from 0 to 1: about 0.42."""
    return [len(set(text.lower())) / max(len(text), 12) for text in completions]


def rarity(prompts, completions, **kwargs):
    """Prefer words that the base model seldom says, from 0 to 1: about 0.03."""
    weights = {"love": 0.4, "family": 0.3, "wonderful": 0.3}
    scores = []
    for completion in completions:
        score = sum(weight * completion.count(word) for word, weight in weights.items())
        scores.append(min(1.0, score))
    return scores


REWARDS = (characters, brevity, variety, rarity)


def run(reward, variant, seed):
    """Return the report of one run."""
    flags, patch = VARIANTS[variant]
    function = f"{Path(__file__).resolve()}:{reward.__name__}"
    flags = ["--model-name", str(ROOT / "demo_model"), "--reward", function, *flags]
    report, _ = run_script(patch, flags, seed)
    return report


def row(reward, variant, reports):
    """Return a Markdown row: means over the seeds, with the lowest and highest of the KL."""
    before, after = ([r[part]["train_prompts"] for r in reports] for part in ("base", "trained"))

    def mean(parts, name):
        return statistics.mean(part[name] for part in parts)

    kls = [part["kl"] for part in after]
    cells = [
        f"{reward.__name__}: {variant}",
        f"{mean(before, 'score'):.3g} ± {mean(before, 'standard_error'):.1g}",
        f"{mean(after, 'score'):.3g} ± {mean(after, 'standard_error'):.1g}",
        f"{mean(after, 'win_rate'):.0%}",
        f"{statistics.mean(kls):.1f} ({min(kls):.1f} to {max(kls):.1f})",
        f"{mean(after, 'kl_minimum'):.1f}",
        f"{mean(after, 'distinct'):.0%}",
        f"{sum(report['learned'] for report in reports)} of {len(reports)}",
    ]
    return "| " + " | ".join(cells) + " |"


def main():
    """Run, and print and write the table."""
    tasks = [
        (reward, variant, seed) for reward in REWARDS for variant in VARIANTS for seed in SEEDS
    ]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        results = dict(zip(tasks, pool.map(lambda task: run(*task), tasks)))
    columns = "| | base score | trained | win rate | KL | least KL | distinct | learned |"
    where = (
        f"demo_model, seeds 0 to {max(SEEDS)}, 900 samples, float32, a CPU with one thread a run"
    )
    lines = [f"Commit {commit()}, {where}.", "", columns, "|---" * 8 + "|"]
    for reward in REWARDS:
        for variant in VARIANTS:
            lines.append(row(reward, variant, [results[reward, variant, s] for s in SEEDS]))
    table = "\n".join(lines) + "\n"
    print(table)
    (ROOT / "benchmarks" / "graded_rewards.md").write_text(table)


if __name__ == "__main__":
    main()
