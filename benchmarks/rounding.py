"""Measure how much of what PPO taught a model is lost where its adapter is merged into 16 bits.

    python benchmarks/rounding.py    # rounding.md; a quarter of an hour

The demo model learns its words, a random Llama of 246 million parameters to write letters, which
few of its 32,000 tokens have: 90 steps each, with the defaults. Then the same numbers sample
from the model with the adapter beside its weights, and with the adapter merged into them, as it
is saved and reported.
"""

import os
import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

os.environ["OMP_NUM_THREADS"] = "1"  # before torch reads it

import peft
import torch
from learning import commit, run_stage
from throughput import make_model

from finetune.command import silence_libraries
from finetune.models import load_base_model, set_sampling
from finetune.processes import random_numbers
from finetune.sampling import sample_responses
from finetune.saving import as_saved
from finetune.tokens import encode, load_tokenizer
from train_rlhf import positive_word_reward

MODELS = ["demo_model", "246 M"]
SAMPLES = 240
COLUMNS = "score | KL | KL from the other way"


def letters(prompts: list[str], completions: list[str], **kwargs: object) -> list[float]:
    """Return how many letters each completion has: a reward for train_rlhf.py."""
    counts = [sum(map(str.isalpha, completion)) for completion in completions]
    return [float(count) for count in counts]


def prompts_of(settings):
    """Return the prompts of all samples, in turns."""
    return (settings.prompts * SAMPLES)[:SAMPLES]


def train(name, folder, output):
    """Train with PPO; return the run's settings."""
    flags = ["--model-name", str(folder), "--dtype", "bfloat16", "--eval-samples", "6"]
    if name != "demo_model":
        flags += ["--reward", f"{__file__}:letters"]
    report, _ = run_stage("train_rlhf", output, flags)
    return SimpleNamespace(**report["settings"])


def load(folder, output, settings):
    """Return the trained model with its adapter beside the weights, and its tokenizer."""
    tokenizer = load_tokenizer(str(folder))
    model = load_base_model(str(folder), "cpu", "bfloat16", "none")
    set_sampling(model, tokenizer, settings)
    model = peft.PeftModel.from_pretrained(model, output / "adapter")
    return model.eval(), tokenizer


def logprobs_of(model, query, response):
    """Return the logprobs of all tokens at the places of a response, (length, vocabulary)."""
    ids = torch.cat([query, response])[None]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[0, len(query) - 1 : -1]
    return logits.float().log_softmax(-1)


def kls_from(model, passes, queries, responses):
    """Return KL(pass || model) of each response in nats, summed over its places.

    passes: what logprobs_of returned of each, of the same model in another state.
    """
    kls = []
    for logprobs, query, response in zip(passes, queries, responses):
        others = logprobs_of(model, query, response)
        kls.append((logprobs.exp() * (logprobs - others)).sum().item())
    return kls


def measure(model, tokenizer, settings, merged):
    """Return texts, KLs from the base model, and KLs from the same adapter the other way."""
    rows = [{"prompt": prompt} for prompt in prompts_of(settings)]
    queries = encode(tokenizer, rows, chat_template=False)
    numbers = random_numbers((1, 0, 0), SAMPLES, settings.max_new_tokens)

    def way(is_merged):
        """Let the adapter be merged, or beside the weights."""
        return as_saved(model, tempfile.gettempdir()) if is_merged else nullcontext()

    with way(merged):
        responses, texts = sample_responses(model, tokenizer, queries, numbers, batch_size=40)
        passes = [logprobs_of(model, *pair) for pair in zip(queries, responses)]
    with model.disable_adapter():
        kls = kls_from(model, passes, queries, responses)
    with way(not merged):
        differences = kls_from(model, passes, queries, responses)
    return texts, kls, differences


def rows_of(name):
    """Train one model, and return the rows of the table: beside the weights, and merged."""
    with tempfile.TemporaryDirectory() as folder:
        model_folder = make_model(name, Path(folder, "model"))
        output = Path(folder, "trained_model")
        settings = train(name, model_folder, output)
        model, tokenizer = load(model_folder, output, settings)

        prompts = prompts_of(settings)
        score = positive_word_reward if name == "demo_model" else letters
        rows = []
        for merged in (False, True):
            texts, kls, differences = measure(model, tokenizer, settings, merged)
            scores = score(prompts, texts)
            means = [statistics.mean(figures) for figures in (scores, kls, differences)]
            place = "merged" if merged else "beside the weights"
            cells = [f"{mean:.3f}" for mean in means]
            rows.append(f"| {name} | {place} | {' | '.join(cells)} |")
    return rows


def main():
    """Measure all, and print and write the table."""
    silence_libraries()
    lines = [
        f"Commit {commit()}, 90 steps of PPO with the defaults in bfloat16, then {SAMPLES} responses",
        "with the same random numbers, a CPU with one thread. Score: +1 or -1 for the demo model, of the",
        "random one the number of letters. KL in nats per response.",
        "",
        f"| model | adapter | {COLUMNS} |",
        "|---|---|---|---|---|",
    ]
    for name in MODELS:
        rows = rows_of(name)
        lines += rows
        print("\n".join(rows), flush=True)
    Path(__file__).with_suffix(".md").write_text("\n".join([*lines, ""]))


if __name__ == "__main__":
    main()
