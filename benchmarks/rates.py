"""Measure LEARNING_RATE auto of the two stages before PPO beside a grid of rates.

    python benchmarks/rates.py                     # 3 seeds of each model and stage: rates.md
    python benchmarks/rates.py gpt2 stories260K    # prints the rows of these models alone

SFT on texts about family, and a reward model from pairs, both sampled from demo_model by
examples/make_data.py. gpt2 and qwen2 are small models of these families, taught here for some
minutes what demo_model says; stories260K is not part of the project. Every run is a process
of its own with one thread, as many at once as there are cores.
"""

import os
import statistics
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from learning import ROOT, STORIES, commit, run_stage

DEMO = ROOT / "demo_model"
SEEDS = range(3)
GRID = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
STAGES = {"train_sft": "texts.jsonl", "train_reward_model": "pairs.jsonl"}
FLAGS = ["--device", "cpu", "--dtype", "float32", "--eval-every", "0"]
MADE = ("gpt2", "qwen2")
MODELS = ("demo_model", "stories260K", *MADE)


def make_model(family, folder, width=128, steps=1200):
    """Teach a small model of a family the probabilities that demo_model has, and save it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    teacher = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32)
    config = AutoConfig.for_model(
        family,
        vocab_size=len(tokenizer),
        hidden_size=width,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=4 * width,
        max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = AutoModelForCausalLM.from_config(config)
    optimizer = torch.optim.AdamW(model.parameters())
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    start = torch.full((64, 1), tokenizer.bos_token_id)
    for step in range(steps):
        with torch.no_grad():
            # Each sample is learned from a few times.
            if step % 5 == 0:
                ids = teacher.generate(start, do_sample=True, top_k=0, max_new_tokens=32)
                is_token = ids != tokenizer.pad_token_id
                wanted = teacher(input_ids=ids).logits[is_token].softmax(-1)
        logits = model(input_ids=ids).logits[is_token]
        torch.nn.functional.cross_entropy(logits, wanted).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(stage, model, data, rate, seed):
    """Return the held-out figures of a run, and the rate that it took."""
    flags = ["--model-name", model, "--data", data, "--learning-rate", rate, "--seed", seed]
    with tempfile.TemporaryDirectory() as folder:
        report, _ = run_stage(stage, Path(folder, "model"), [*flags, *FLAGS])
    print(
        stage, Path(model).name, rate, seed, report["trained"]["loss"], file=sys.stderr, flush=True
    )
    return report["trained"], report["learning_rate"]


def rows_of(name, stage, runs):
    """Return the rows of a table: the means over the seeds at auto, and at each rate of the grid."""
    means = {}
    for rate, results in runs.items():
        losses = [figures["loss"] for figures, _ in results]
        means[rate] = statistics.mean(losses)
    best = min(means.values())

    rows = []
    for rate, results in runs.items():
        taken = f"auto, {results[0][1]:.2g}" if rate == "auto" else f"{rate:g}"
        right = "-"
        if stage == "train_reward_model":
            right = f"{statistics.mean(figures['accuracy'] for figures, _ in results):.1%}"
        cells = f"{means[rate]:.3f} | {means[rate] / best - 1:+.1%} | {right}"
        rows.append(f"| {name} | {stage} | {taken} | {cells} |")
    return rows


def main():
    """Run, and print and write the table."""
    names = sys.argv[1:] or [name for name in MODELS if name != "stories260K" or STORIES.is_dir()]
    lines = [
        f"Commit {commit()}, seeds 0 to {SEEDS[-1]}, float32, a CPU with one thread a run.",
        "",
        "| model | stage | LEARNING_RATE | held-out loss | above the best | right |",
        "|---|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(os.cpu_count()) as pool:
        make = [sys.executable, ROOT / "examples" / "make_data.py", "--output-dir", folder]
        subprocess.run([*map(str, make)], check=True, capture_output=True)
        paths = {"demo_model": DEMO, "stories260K": STORIES}
        for name in names:
            if name in MADE:
                paths[name] = Path(folder, name)
                make_model(name, paths[name])

        tasks = []
        for name in names:
            for stage, data in STAGES.items():
                for rate in ("auto", *GRID):
                    for seed in SEEDS:
                        tasks.append((stage, paths[name], Path(folder, data), rate, seed))
        results = dict(zip(tasks, pool.map(lambda task: measure(*task), tasks)))
        for name in names:
            for stage, data in STAGES.items():
                runs = {}
                for rate in ("auto", *GRID):
                    keys = [(stage, paths[name], Path(folder, data), rate, seed) for seed in SEEDS]
                    runs[rate] = [results[key] for key in keys]
                lines += rows_of(name, stage, runs)
    print("\n".join(lines))
    if not sys.argv[1:]:
        Path(__file__).with_suffix(".md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
