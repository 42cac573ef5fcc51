"""Measure all three stages on demo_model: how far a learned reward can be trusted.

    python benchmarks/three_stages.py    # three_stages.md and three_stages.png

SFT teaches demo_model to speak of family. Reward models learn another wish, more good words and
less bad ones, from 100, 300 and 1,000 pairs, and PPO follows each of them at several KL_COEF. What
the reward model says of the responses (proxy) stands beside the truth that made the pairs (gold).
Every run is a process of its own with one thread, as many at once as there are cores.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from learning import ROOT, commit, read_lines, run_stage

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it: runs stand side by side
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]

import torch
from make_data import gold, speaks_of_family

from finetune.classifiers import load_classifier
from finetune.command import silence_libraries, silence_loggers

PAIRS = (100, 300, 1000)
KL_COEFS = (0.3, 0.1, 0.03, 0.01)
FRESH_PAIRS = 2000  # on which reward models are measured; they learned from none of them
CRITIC = """
import torch
make_policy = train_rlhf.make_policy
def with_a_critic(model, tokenizer, settings):
    policy = make_policy(model, tokenizer, settings)
    auto_class = train_rlhf.transformers.AutoModelForSequenceClassification
    judge = auto_class.from_pretrained(settings.reward)
    head = policy.v_head.summary  # what is still to come: the score as it looks, less what is earned
    with torch.no_grad():
        head.weight[0] = judge.score.weight[0] / judge.config.score_std
        head.bias.copy_(torch.tensor([-judge.config.score_mean / judge.config.score_std, -1.0]))
    return policy
train_rlhf.make_policy = with_a_critic
"""


def main():
    """Run all stages, and print and write table and picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--seeds", type=int, default=3, help="of PPO (default: %(default)s)")
    seeds = range(parser.parse_args().seeds)
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        folder = Path(folder)
        sft, rewards = first_stages(folder, pool)
        tasks = [(pairs, None, 0, "") for pairs in PAIRS]  # the SFT model as it is
        for kl_coef in KL_COEFS:
            tasks += [(pairs, kl_coef, seed, "") for pairs in PAIRS for seed in seeds]
        tasks += [(max(PAIRS), 0.1, seed, CRITIC) for seed in seeds]
        runs = dict(zip(tasks, pool.map(lambda task: run_ppo(folder, *task), tasks)))
        base = measure(run_ppo(folder, max(PAIRS), None, 0, "", ROOT / "demo_model"))
    text = "\n".join(tables(sft, rewards, base, runs, seeds)) + "\n"
    print(text)
    (ROOT / "benchmarks" / "three_stages.md").write_text(text, encoding="utf-8")
    draw(runs, seeds, ROOT / "benchmarks" / "three_stages.png")


def first_stages(folder, pool):
    """Write the data, train the SFT model and the reward models; return what they report."""
    for name, pairs, seed in (("data", max(PAIRS), 0), ("fresh", FRESH_PAIRS, 1)):
        command = [sys.executable, ROOT / "examples" / "make_data.py", "--pairs", pairs]
        command += ["--seed", seed, "--output-dir", folder / name]
        subprocess.run([*map(str, command)], check=True, capture_output=True)
    flags = ["--model-name", ROOT / "demo_model", "--data", folder / "data" / "texts.jsonl"]
    flags += ["--learning-rate", "3e-3"]
    sft, _ = run_stage("train_sft", folder / "sft_model", flags)
    return sft, dict(zip(PAIRS, pool.map(lambda pairs: train_reward(folder, pairs), PAIRS)))


def train_reward(folder, pairs):
    """Return the report of a reward model from so many pairs, and its accuracy on fresh ones."""
    data, output = folder / f"{pairs}.jsonl", folder / f"reward_model_{pairs}"
    lines = (folder / "data" / "pairs.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    data.write_text("".join(lines[:pairs]), encoding="utf-8")
    flags = ["--model-name", folder / "sft_model", "--data", data, "--learning-rate", "3e-3"]
    report, _ = run_stage("train_reward_model", output, flags)
    silence_loggers()
    silence_libraries()
    score, _ = load_classifier("REWARD", str(output), "", 64, torch.device("cpu"))
    rows = read_lines(folder / "fresh" / "pairs.jsonl")
    prompts = [row["prompt"] for row in rows]
    better, worse = (score(prompts, [row[name] for row in rows]) for name in ("chosen", "rejected"))
    return report, statistics.mean(one > other for one, other in zip(better, worse))


def run_ppo(folder, pairs, kl_coef, seed, patch, model=None):
    """Return the samples of a PPO run on a reward model; without a KL_COEF nothing is learned."""
    output = folder / f"ppo_{pairs}_{kl_coef}_{seed}_{len(patch)}"
    flags = ["--model-name", model or folder / "sft_model", "--seed", seed, "--eval-samples", "12"]
    flags += ["--reward", folder / f"reward_model_{pairs}"]
    still = ["--target-approx-kl", "0", "--learning-rate", "1e-30"]
    flags += still if kl_coef is None else ["--kl-coef", kl_coef]
    run_stage("train_rlhf", output, flags, patch)
    return read_lines(output / "samples.jsonl")


def measure(samples):
    """Return the figures of some samples, shares and nats."""
    texts = [sample["response"] for sample in samples]
    return {
        "proxy": statistics.mean(sample["score"] > 0 for sample in samples),
        "gold": statistics.mean(gold(text) > 0 for text in texts),
        "family": statistics.mean(map(speaks_of_family, texts)),
        "kl": statistics.mean(sample["kl"] for sample in samples),
        "distinct": len(set(texts)) / len(texts),
    }


def tables(sft, rewards, base, runs, seeds):
    """Return the lines of the tables in Markdown."""
    losses = [sft[model]["loss"] for model in ("base", "trained")]
    still = {pairs: measure(runs[pairs, None, 0, ""]) for pairs in PAIRS}
    family = still[max(PAIRS)]["family"]
    lines = [
        f"Commit {commit()}, demo_model, seeds 0 to {max(seeds)} of PPO, 900 samples a run,",
        "float32, a CPU with one thread a run.",
        "",
        f"SFT on texts about family: {losses[0]:.3f} nats a token before, {losses[1]:.3f} after;",
        f"{base['family']:.0%} of responses speak of family before, {family:.0%} after.",
        "",
        f"| reward model from | held-out pairs right | right of {FRESH_PAIRS:,} fresh pairs |",
        "|---|---|---|",
    ]
    for pairs, (report, share) in rewards.items():
        figures = report["trained"]
        right = f"{figures['accuracy']:.0%} ± {figures['standard_error']:.0%}"
        lines.append(f"| {pairs:,} pairs | {right} | {share:.1%} |")
    lines += [
        "",
        "The last 200 samples; proxy: the reward model scores above 0; gold: more good words than bad.",
        "",
        "| pairs | KL_COEF | proxy | gold (worst seed) | KL | distinct | of family |",
        "|---|---|---|---|---|---|---|",
    ]
    for pairs in PAIRS:
        lines.append(row(f"{pairs:,}", "before PPO", [still[pairs]]))
        for kl_coef in KL_COEFS:
            found = [measure(runs[pairs, kl_coef, seed, ""][-200:]) for seed in seeds]
            lines.append(row(f"{pairs:,}", kl_coef, found))
    found = [measure(runs[max(PAIRS), 0.1, seed, CRITIC][-200:]) for seed in seeds]
    name = "0.1, the critic starts as the reward model"
    lines.append(row(f"{max(PAIRS):,}", name, found))
    first = {}
    for patch in ("", CRITIC):
        shares = [measure(runs[max(PAIRS), 0.1, seed, patch][:300])["proxy"] for seed in seeds]
        first[patch] = statistics.mean(shares)
    told = f"{first['']:.0%}, with a critic that starts as the reward model {first[CRITIC]:.0%}"
    return [*lines, "", f"Proxy over the first 300 samples at KL_COEF 0.1: {told}."]


def row(pairs, kl_coef, found):
    """Return a row of the table: means over the seeds."""
    mean = {name: statistics.mean(each[name] for each in found) for name in found[0]}
    worst = min(each["gold"] for each in found)
    cells = [pairs, kl_coef, f"{mean['proxy']:.0%}", f"{mean['gold']:.0%} ({worst:.0%})"]
    cells += [f"{mean['kl']:.1f}", f"{mean['distinct']:.0%}", f"{mean['family']:.0%}"]
    return "| " + " | ".join(map(str, cells)) + " |"


def draw(runs, seeds, path):
    """Draw proxy and gold against KL, means over the seeds, a line for each KL_COEF."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 4.2), layout="constrained")
    for axes, pairs in zip(figure.subplots(1, len(PAIRS), sharex=True, sharey=True), PAIRS):
        axes.set(title=f"reward model from {pairs:,} pairs", xlabel="KL (nats per response)")
        for number, kl_coef in enumerate(KL_COEFS):
            points = {"kl": [], "proxy": [], "gold": []}
            for end in range(100, 901, 50):
                found = [measure(runs[pairs, kl_coef, seed, ""][end - 100 : end]) for seed in seeds]
                for name in points:
                    points[name].append(statistics.mean(each[name] for each in found))
            label = f"KL_COEF {kl_coef}"
            axes.plot(points["kl"], points["proxy"], "--", color=f"C{number}")
            axes.plot(points["kl"], points["gold"], ".-", color=f"C{number}", label=label)
    axes.plot([], [], "k--", label="proxy: what the reward model says")
    axes.plot([], [], "k.-", label="gold: what is true")
    axes.legend(fontsize="small")
    figure.axes[0].set_ylabel("share of successes")
    figure.savefig(path, dpi=100)


if __name__ == "__main__":
    main()
