"""Measure what it costs to measure a model as it is saved, its adapter merged.

    python benchmarks/saving.py    # saving.md; a few minutes

The two random models of throughput.py in bfloat16, with the adapter beside the weights and with the
weights merged, what they were before in a file, in turns: the seconds of sampling, of a pass of the
base model over the samples, and of merging and taking apart.
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


def sample(model, tokenizer):
    """Return the seconds of sampling, and those of a pass of the base model."""
    rows = [{"prompt": f"I feel so {number}"} for number in range(SAMPLES)]
    queries = encode(tokenizer, rows, chat_template=False)
    numbers = random_numbers((0, 0, 0), SAMPLES, NEW_TOKENS)
    start = time.perf_counter()
    sample_responses(model, tokenizer, queries, numbers, batch_size=SAMPLES)
    end_of_sampling = time.perf_counter()

    inputs = tokenizer(["I feel so very very very very very"] * SAMPLES, return_tensors="pt")
    with torch.no_grad(), model.disable_adapter():
        model(input_ids=inputs["input_ids"])
    return end_of_sampling - start, time.perf_counter() - end_of_sampling


def measure(model, tokenizer, as_it_is_saved, folder):
    """Return the seconds of sampling, of the base model's pass, and of what surrounds both."""
    start = time.perf_counter()
    with as_saved(model, folder) if as_it_is_saved else nullcontext():
        sampling, base_pass = sample(model, tokenizer)
    return sampling, base_pass, time.perf_counter() - start - sampling - base_pass


def main():
    """Measure both ways of both shapes in turns, and print and write the table."""
    names = sys.argv[1:] or list(SHAPES)
    lines = [
        f"Commit {commit()}, {SAMPLES} samples of {NEW_TOKENS} tokens, bfloat16, a CPU with one thread,",
        f"medians of {ROUNDS} rounds in turns; the most memory of the process until then, which made",
        "the model too. On disk a file as large as the weights that are adapted, without a name, for",
        "as long as is measured.",
        "",
        "| shape | adapter | sampling, s | base model's pass, s | merging, s | peak memory |",
        "|---|---|---|---|---|---|",
    ]
    for name in names:
        with tempfile.TemporaryDirectory() as folder:
            model, tokenizer = load(make_model(name, folder))
            rounds = {"beside the weights": [], "merged": []}
            memory = {}
            for _ in range(ROUNDS):
                for way, seconds in rounds.items():
                    seconds.append(measure(model, tokenizer, way == "merged", folder))
                    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
                    memory.setdefault(way, peak)
        for way, seconds in rounds.items():
            medians = [f"{statistics.median(part):.1f}" for part in zip(*seconds)]
            lines.append(f"| {name} | {way} | {' | '.join(medians)} | {memory[way]:.1f} GB |")
            print(lines[-1], flush=True)
    if not sys.argv[1:]:
        Path(__file__).with_suffix(".md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
