"""Write data for the two stages before PPO, small enough for demo_model, whose truth is known.

    python examples/make_data.py    # texts.jsonl and pairs.jsonl, in the folder where you are

Both are sampled from demo_model. texts.jsonl, for train_sft.py, has what it says of family.
pairs.jsonl, for train_reward_model.py, has two continuations of a prompt; chosen is the one with
more good words, less bad ones: what people would tell us, here told by `gold`.
"""

import argparse
import json
import re
from pathlib import Path

DEMO_MODEL = Path(__file__).resolve().parent.parent / "demo_model"
PROMPTS = [
    "I feel so", "This makes me", "I am really", "Today I am", "Life is", "I'm feeling",
    "Right now I am", "My day was", "It makes me feel", "Tonight I feel",
]  # fmt: skip
GOOD = "happy glad good great smile joy love wonderful amazing excited pleased delighted cheerful"
GOOD += " grateful blessed fantastic beautiful proud hopeful lucky"
BAD = "sad bad terrible angry tired lonely worried afraid upset miserable nervous awful ashamed"
BAD += " disappointed hurt lost bored sick gray dark"
FAMILY = "mother father sister brother son daughter wife husband family parents grandmother aunt"


def count(text, words):
    """Return how many of the words stand in a text, each as often as it does."""
    pattern = rf"\b({words.replace(' ', '|')})\b"
    return len(re.findall(pattern, text, re.IGNORECASE))


def gold(text):
    """Return the true score of a text: its good words less its bad ones."""
    return count(text, GOOD) - count(text, BAD)


def speaks_of_family(text):
    """Return whether a text has the skill that texts.jsonl teaches."""
    return count(text, FAMILY) > 0


def sample(model, tokenizer, prompt, number, new_tokens):
    """Return so many continuations of a prompt, as texts with the space before them."""
    import torch

    query = tokenizer(prompt, return_tensors="pt")
    length = query["input_ids"].shape[1]
    with torch.no_grad():
        sequences = model.generate(
            **query,
            do_sample=True,
            top_k=0,
            num_return_sequences=number,
            max_new_tokens=new_tokens,
        )
    return tokenizer.batch_decode(sequences[:, length:], skip_special_tokens=True)


def main():
    """Sample, choose and write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    add = parser.add_argument
    add("--pairs", type=int, default=1000, help="rows of pairs.jsonl (default: %(default)s)")
    add("--texts", type=int, default=600, help="rows of texts.jsonl (default: %(default)s)")
    add("--output-dir", type=Path, default=Path("."), help="where they go (default: here)")
    add("--seed", type=int, default=0, help="of the samples (default: %(default)s)")
    options = parser.parse_args()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, logging

    logging.disable_progress_bar()
    torch.manual_seed(options.seed)
    tokenizer = AutoTokenizer.from_pretrained(DEMO_MODEL)
    model = AutoModelForCausalLM.from_pretrained(DEMO_MODEL, dtype=torch.float32)

    texts, pairs = [], []
    while len(texts) < options.texts:
        for prompt in PROMPTS:
            found = sample(model, tokenizer, prompt, 200, 24)
            early = [text for text in found if speaks_of_family(text[:40])]  # about ten tokens
            texts += [{"text": prompt + text} for text in early]
    while len(pairs) < options.pairs:
        for prompt in PROMPTS:
            found = sample(model, tokenizer, prompt, 100, 10)
            for one, other in zip(found[::2], found[1::2]):
                worse, better = sorted((one, other), key=gold)
                if gold(worse) < gold(better):  # of a tie nobody knows
                    pairs.append({"prompt": prompt, "chosen": better, "rejected": worse})
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows, wanted in (("texts", texts, options.texts), ("pairs", pairs, options.pairs)):
        order = torch.randperm(len(rows))[:wanted].tolist()
        lines = [json.dumps(rows[place], ensure_ascii=False) + "\n" for place in order]
        path = options.output_dir / f"{name}.jsonl"
        path.write_text("".join(lines), encoding="utf-8")
        print(f"{path}: {len(lines)} rows")


if __name__ == "__main__":
    main()
