"""Measure time and memory of a run on a model of TinyLlama-1.1B's exact shape with random weights.

    python benchmarks/tinyllama_shape.py --steps 2          # any flag of train_rlhf.py may follow

The model is made in a temporary folder (2.2 GB in bfloat16, the result up to 4.4 GB) and trained as
a user would train it. Its words mean nothing, so only seconds and memory do.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

ROOT = Path(__file__).resolve().parent.parent


def make_model(folder):
    """Save a random model of TinyLlama-1.1B-Chat-v1.0's shape, with the demo model's tokenizer."""
    config = LlamaConfig(
        vocab_size=32000,
        hidden_size=2048,
        intermediate_size=5632,
        num_hidden_layers=22,
        num_attention_heads=32,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        bos_token_id=1,
        eos_token_id=2,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ROOT / "demo_model").save_pretrained(folder)


def main():
    """Make the model, train it and print what it took."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=2, help="PPO steps (default: %(default)s)")
    options, flags = parser.parse_known_args()
    with tempfile.TemporaryDirectory() as folder:
        make_model(Path(folder, "model"))
        command = [sys.executable, ROOT / "train_rlhf.py", "--model-name", "model"]
        command += ["--prompts", "I feel so", "--eval-samples", "10"]
        command += ["--training-epochs", str(10 * options.steps), *flags]
        start = time.perf_counter()
        subprocess.run(command, cwd=folder, check=True)
        total = time.perf_counter() - start
        output = Path(folder, "trained_model")
        report = json.loads((output / "report.json").read_text())
        metrics = (output / "metrics.jsonl").read_text().splitlines()
        disk = sum(path.stat().st_size for path in output.rglob("*") if path.is_file()) / 1e9
    seconds = [json.loads(line)["seconds"] for line in metrics]
    figures = [*report["base"].values(), *report["trained"].values()]
    measured = sum(figure["samples"] for figure in figures)
    steps = [round(after - before, 1) for before, after in zip([0, *seconds], seconds)]
    if len(steps) > 8:
        steps = [*steps[:3], *steps[-3:]]
    speed, memory = report["samples_per_second"], report["peak_memory_mb"] / 1000
    print(f"\n{report['device']}, {report['dtype']}: {steps} s a step,")
    print(f"{total - seconds[-1]:.0f} s for loading, saving and measuring {measured} samples,")
    print(f"{speed:.2f} samples a second, {memory:.1f} GB at the peak, {disk:.1f} GB on the disk")


if __name__ == "__main__":
    main()
