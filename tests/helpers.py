"""What several test files do alike: read what a run left, and look at what it must not touch."""

import hashlib
import json

import torch

REFUSED = "Nothing was started or changed:"


def read_metrics(folder):
    """Return the records of a run without their seconds; NaN and Infinity are no JSON."""

    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) | {"seconds": 0} for line in lines]


def digests(folder):
    """Return the checksum of each file in a folder and in folders there, by its path in it."""
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in paths
        if "__pycache__" not in path.parts
    }


def greedy(model, tokenizer, prompts, max_new_tokens=8):
    """Return the likeliest continuation of each prompt, prompt included."""
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        with torch.no_grad():
            ids = model.generate(
                **inputs,
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=tokenizer.pad_token_id,
            )
        texts.append(tokenizer.decode(ids[0]))
    return texts


def refusals(status, stderr):
    """Return the problems for which a call of main started nothing, each without its dash."""
    first, *lines = stderr.splitlines()
    assert (status, first) == (2, REFUSED)
    assert all(line.startswith("- ") for line in lines)
    return [line.removeprefix("- ") for line in lines]


def make_batch(built, queries, responses):
    """Return responses as a batch, each token of which earns 1."""
    token_scores = [torch.ones(len(response)) for response in responses]
    return built.trainer.make_batch(queries, responses, token_scores)


def evaluate(built, queries, responses):
    """Return all logprobs and values of each response, of padded ones in a batch."""
    batch = make_batch(built, queries, responses)
    with torch.no_grad():
        all_logprobs, values = built.policy(**batch.inputs)
    rows = zip(all_logprobs, values, batch.mask.bool())
    return [(logprobs[where], value[where]) for logprobs, value, where in rows]
