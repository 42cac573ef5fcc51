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
        states, values = built.policy(**batch.inputs)
        all_logprobs = built.policy.head(states).log_softmax(-1)
    rows = zip(all_logprobs, values, batch.mask.bool())
    return [(logprobs[where], value[where]) for logprobs, value, where in rows]


def write_run(
    folder, steps, batch_size=10, texts=(" so", " happy", "."), total=None, places=None, **settings
):
    """Write what a run of train_rlhf.py leaves after so many steps: no model, no report.

    texts: of the tokens of each response, the second of which earns 2. settings: others than those
    that a page needs. places: after how many tokens the score was asked; None = after each.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {"model_name": "demo_model", "reward": "positive_word_reward", "seed": 0}
    known |= {"positive_words": ["happy"], "kl_coef": 0.1, "score_prefixes": True}
    known |= {"max_new_tokens": len(texts)}
    run = {"script": "train_rlhf", "total_steps": total or steps, "settings": known | settings}
    run["scored_places"] = places or [*range(len(texts))]
    (folder / "run.json").write_text(json.dumps(run), encoding="utf-8")
    metrics, samples = [], []
    for step in range(1, steps + 1):
        kls = [round(0.001 * step + 0.01 * place, 6) for place in range(batch_size)]
        mean_kl = sum(kls) * len(texts) / batch_size
        record = {"step": step, "samples": step * batch_size, "success_rate": 1.0, "score": 1.0}
        record |= {"kl": mean_kl, "kl_coef": 0.1, "reward": 1 - 0.1 * mean_kl}
        metrics.append(record | {"seconds": 0.5 * step})
        for place, kl in enumerate(kls):
            zeros = [0.0] * len(texts)
            tokens = {"text": [*texts], "score": [0.0, 2.0, *zeros[2:]], "kl": [kl] * len(texts)}
            tokens |= {"value": zeros, "advantage": [0.5 - place, *zeros[1:]]}
            tokens |= {"logprob": zeros, "ref_logprob": [-1.0] * len(texts)}
            sample = {"step": step, "prompt": f"Prompt {place}", "response": "".join(texts)}
            sample |= {"score": place / 10, "kl": kl * len(texts), "tokens": tokens}
            samples.append(sample)
    for name, rows in (("metrics", metrics), ("samples", samples)):
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


def page_content(path):
    """Return what a page was given to show."""
    text = path.read_text(encoding="utf-8")
    _, _, rest = text.partition('<script type="application/json" id="content">')
    content, end, _ = rest.partition("</script>")
    assert end
    return json.loads(content)


def read_rows(path):
    """Return the rows of a file of JSON lines, of which each is whole."""
    *lines, rest = path.read_text(encoding="utf-8").split("\n")
    assert rest == ""
    return [json.loads(line) for line in lines]
