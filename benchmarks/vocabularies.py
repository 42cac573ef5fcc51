"""Measure how seconds and memory of a step grow with the vocabulary and the length of responses.

    python benchmarks/vocabularies.py                   # prints a table
    python benchmarks/vocabularies.py --beside FOLDER   # and beside another checkout, in turns

vocabularies.md has what was printed, and which commands did it.

A random Llama of 4 layers and width 256, whose output head is its embedding; 10 responses a step,
of which the last token gets the score. Each is a process of its own of two steps, the second of
which is counted; its memory is the most that the process had.
"""

import argparse
import contextlib
import io
import itertools
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

from learning import ROOT, commit, read_lines

VOCABULARIES = (32_000, 151_936, 262_144)
LENGTHS = (10, 100, 300)
MINI_BATCH_SIZES = (0, 2)


def make_model(vocabulary, folder):
    """Save a random model with so many tokens, and with the demo model's tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

    tokenizer = AutoTokenizer.from_pretrained(ROOT / "demo_model")
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=256,
        intermediate_size=1024,
        num_hidden_layers=4,
        num_attention_heads=4,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=vocabulary - 1,
    )
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def take_two_steps(checkout, model, length, mini_batch_size, flags):
    """Return the figures of the second step of train_rlhf.py in a checkout, and the peak memory."""
    sys.path.insert(0, str(checkout))
    import train_rlhf

    generated = [0.0]
    name = "sample_responses" if hasattr(train_rlhf, "sample_responses") else "rollout"
    sample = getattr(train_rlhf, name)

    def timed(*arguments, **options):
        start = time.perf_counter()
        result = sample(*arguments, **options)
        generated.append(time.perf_counter() - start)
        return result

    setattr(train_rlhf, name, timed)
    with tempfile.TemporaryDirectory() as folder:
        flags = [*flags, "--model-name", str(model), "--output-dir", str(Path(folder, "out"))]
        flags += ["--max-new-tokens", str(length), "--mini-batch-size", str(mini_batch_size)]
        flags += ["--training-epochs", str(20 / 6), "--eval-prompts", "--eval-samples", "1"]
        flags += ["--scale-samples", "0", "--score-prefixes", "false", "--save-every", "0"]
        with contextlib.redirect_stdout(io.StringIO()) as screen:
            status = train_rlhf.main(flags)
        assert status == 0, screen.getvalue()
        first, second = read_lines(Path(folder, "out", "metrics.jsonl"))
    return {
        "seconds": second["seconds"] - first["seconds"],
        "generation": generated[2],
        "memory": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
    }


def measure(checkout, model, length, mini_batch_size, flags):
    """Return what take_two_steps does in a process of its own; None where memory does not hold it."""
    command = [sys.executable, __file__, "--checkout", checkout, "--model", model]
    command += ["--lengths", length, "--mini-batch-sizes", mini_batch_size, *flags]
    done = subprocess.run([*map(str, command)], capture_output=True, text=True)
    if done.returncode == -9:
        return None
    if done.returncode:
        raise SystemExit(f"{command} failed:\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def cells(figures):
    """Return the cells of a table for what was measured."""
    if figures is None:
        return "killed | - | more than there is"
    seconds, generation = (f"{figures[name]:.1f}" for name in ("seconds", "generation"))
    return f"{seconds} | {generation} | {figures['memory']:.1f}"


def main():
    """Run, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--beside", type=Path, help="another checkout, measured in turns")
    add("--vocabularies", nargs="+", type=int, default=VOCABULARIES)
    add("--lengths", nargs="+", type=int, default=LENGTHS, help="of the responses, in tokens")
    add("--mini-batch-sizes", nargs="+", type=int, default=MINI_BATCH_SIZES)
    for name in ("--checkout", "--model"):
        add(name, type=Path, help=argparse.SUPPRESS)  # of the processes that this one starts
    options, flags = parser.parse_known_args()
    if options.checkout:
        warnings.simplefilter("ignore")
        size = (options.lengths[0], options.mini_batch_sizes[0])
        print(json.dumps(take_two_steps(options.checkout, options.model, *size, flags)))
        return

    checkouts = [ROOT]
    columns = ["vocabulary", "tokens", "`MINI_BATCH_SIZE`"]
    columns += ["s/step", "of these generation", "peak, GB"]
    if options.beside:
        checkouts.append(options.beside)
        columns += [f"{commit(options.beside)}: s/step", "of these generation", "peak, GB"]
    print(f"Commit {commit()}, a CPU with {os.cpu_count()} cores.\n")
    print(f"| {' | '.join(columns)} |")
    print("|---" * len(columns) + "|", flush=True)
    for vocabulary in options.vocabularies:
        with tempfile.TemporaryDirectory() as model:
            make_model(vocabulary, model)
            for size in itertools.product(options.lengths, options.mini_batch_sizes):
                found = [cells(measure(checkout, model, *size, flags)) for checkout in checkouts]
                print(
                    f"| {vocabulary:,} | {size[0]} | {size[1]} | {' | '.join(found)} |", flush=True
                )


if __name__ == "__main__":
    main()
