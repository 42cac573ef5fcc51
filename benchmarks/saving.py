"""Measure what it costs to measure a model as it is saved, its adapter merged layer by layer.

    python benchmarks/saving.py    # saving.md; a few minutes

The two random models of throughput.py in bfloat16: the seconds that sampling takes with the adapter
beside the weights, and with each layer merged while it is at work, in turns.
"""

import os
import resource
import statistics
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it

import torch
from learning import commit
from throughput import SHAPES, make_model

from finetune.models import add_adapter, load_base_model, set_sampling
from finetune.processes import random_numbers
from finetune.sampling import sample_responses
from finetune.saving import as_saved
from finetune.tokens import encode, load_tokenizer

SAMPLES, NEW_TOKENS, ROUNDS = 10, 10, 3
SETTINGS = SimpleNamespace(
    lora_targets=["all-linear"],
    lora_rank=16,
    lora_alpha=32,
    seed=0,
    temperature=1.0,
    max_new_tokens=NEW_TOKENS,
)


def load(folder):
    """Return the model in a folder with an adapter that changes it, and its tokenizer."""
    tokenizer = load_tokenizer(str(folder))
    model = load_base_model(str(folder), "cpu", "bfloat16", "none")
    set_sampling(model, tokenizer, SETTINGS)
    adapted = add_adapter(model, SETTINGS).eval()
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    return adapted, tokenizer


def measure(model, tokenizer):
    """Return the seconds of sampling."""
    rows = [{"prompt": f"I feel so {number}"} for number in range(SAMPLES)]
    queries = encode(tokenizer, rows, chat_template=False)
    numbers = random_numbers((0, 0, 0), SAMPLES, NEW_TOKENS)
    start = time.perf_counter()
    sample_responses(model, tokenizer, queries, numbers, batch_size=SAMPLES)
    return time.perf_counter() - start


def main():
    """Measure both ways of both shapes in turns, and print and write the table."""
    names = sys.argv[1:] or list(SHAPES)
    lines = [
        f"Commit {commit()}, {SAMPLES} samples of {NEW_TOKENS} tokens, bfloat16, a CPU with one thread,",
        f"medians of {ROUNDS} rounds in turns; the most memory of the process until then.",
        "",
        "| shape | adapter | seconds | peak memory |",
        "|---|---|---|---|",
    ]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer = load(make_model(name, folder))
        seconds = {"beside the weights": [], "merged layer by layer": []}
        memory = {}
        for _ in range(ROUNDS):
            for way, taken in seconds.items():
                with nullcontext() if way == "beside the weights" else as_saved(model):
                    taken.append(measure(model, tokenizer))
                peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
                memory.setdefault(way, peak)
        for way, taken in seconds.items():
            cells = f"{statistics.median(taken):.1f} | {memory[way]:.1f} GB"
            lines.append(f"| {name} | {way} | {cells} |")
            print(lines[-1], flush=True)
    if not sys.argv[1:]:
        Path(__file__).with_suffix(".md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
