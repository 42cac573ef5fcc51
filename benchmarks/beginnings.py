"""Measure what it costs to score every beginning of a response by a classifier.

    python benchmarks/beginnings.py            # writes beginnings.md, half an hour
    python benchmarks/beginnings.py 10 40      # prints the lines of these lengths alone

A random policy of 27 million parameters and a random causal classifier of 11 million, which share
a tokenizer. Each run is a process of its own with one thread: the response alone scored, all its
beginnings in one pass, and all one by one. They take turns, and the medians of their steps are told.
One by one takes so long that it is run once at 120 tokens, and not at 400.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path

from learning import commit

ROOT = Path(__file__).resolve().parent.parent
LENGTHS = (10, 40, 120, 400)
STEPS = 4  # the first of which is not counted
ROUNDS = 3
ONE_BY_ONE = (
    "import finetune.classifiers\nfinetune.classifiers.reads_beginnings = lambda *_: False\n"
)
WAYS = {  # name: flags, and Python that comes before the run
    "the response alone": (["--no-score-prefixes"], ""),
    "all beginnings, one pass": ([], ""),
    "all beginnings, one by one": ([], ONE_BY_ONE),
}


def save_models(folder):
    """Save both models, with the tokenizer of demo_model."""
    import torch
    from transformers import (
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
        AutoTokenizer,
        LlamaConfig,
    )

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo_model")
    # Of a longer text the end alone is judged, so that its beginnings are other texts.
    tokenizer.model_max_length = 1024
    torch.manual_seed(0)
    shapes = {"policy": (512, 8, 1408), "classifier": (384, 6, 1024)}
    for name, (width, layers, inner) in shapes.items():
        config = LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=width,
            num_hidden_layers=layers,
            num_attention_heads=8,
            intermediate_size=inner,
            max_position_embeddings=1024,
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            num_labels=1,
        )
        is_policy = name == "policy"
        auto_class = AutoModelForCausalLM if is_policy else AutoModelForSequenceClassification
        model = auto_class.from_config(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        print(f"{name}: {model.num_parameters() / 1e6:.0f} million parameters", flush=True)


def measure(folder, length, way):
    """Return the median seconds of a step, and the peak memory of the process in GB."""
    flags, code = WAYS[way]
    output = tempfile.mkdtemp(dir=folder)
    steps = code + "import resource, sys, train_rlhf\n"
    steps += "train_rlhf.measure_and_save = lambda *others: None\n"  # the steps alone
    steps += "status = train_rlhf.main(sys.argv[1:])\n"
    steps += "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)\n"
    steps += "sys.exit(status)\n"
    line = [
        *(sys.executable, "-c", steps, "--model-name", folder / "policy", "--device", "cpu"),
        *("--dtype", "float32", "--reward", folder / "classifier", "--scale-samples", "0"),
        *("--max-new-tokens", length, "--save-every", "0", "--output-dir", f"{output}/run"),
        *("--training-epochs", STEPS * 10 / 6, "--eval-prompts", *flags),
    ]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    ended = subprocess.run(
        [*map(str, line)],
        check=True,
        env=environment,
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
    )
    kilobytes = int(ended.stdout.splitlines()[-1])
    metrics = Path(output, "run", "metrics.jsonl").read_text().splitlines()
    seconds = [json.loads(record)["seconds"] for record in metrics]
    steps_alone = [after - before for before, after in pairwise(seconds)]
    return statistics.median(steps_alone), kilobytes / 1e6


def main():
    """Measure all ways at each length, and write the table."""
    lengths = [*map(int, sys.argv[1:])] or LENGTHS
    lines = [
        "| tokens | scored | seconds a step | times the response alone | peak memory |",
        "|---|---|---|---|---|",
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_models(folder)
        for length in lengths:
            # In turns, for what else the machine does.
            runs = {way: [] for way in WAYS}
            for number in range(ROUNDS):
                for way in WAYS:
                    slow = way == "all beginnings, one by one"
                    if not slow or length < 120 or (length == 120 and number == 0):
                        runs[way].append(measure(folder, length, way))

            alone = statistics.median(seconds for seconds, _ in runs["the response alone"])
            for way, figures in runs.items():
                if not figures:
                    continue
                seconds = statistics.median(seconds for seconds, _ in figures)
                memory = max(memory for _, memory in figures)
                figures = f"{seconds:.2f} | {seconds / alone:.2f} | {memory:.1f} GB"
                lines.append(f"| {length} | {way} | {figures} |")
                print(lines[-1], flush=True)
    if sys.argv[1:]:
        return
    head = f"Commit {commit()}, random models, batch 10, a CPU with one thread, medians of 3 runs."
    Path(__file__).with_suffix(".md").write_text("\n".join([head, "", *lines, ""]))


if __name__ == "__main__":
    main()
