"""What the stages before PPO write for whoever watches them: examples and comparisons."""

from pathlib import Path

import torch

from finetune.files import Row
from finetune.labels import Learned, Tokenizer
from finetune.processes import is_main_process
from finetune.progress import write_lines
from finetune.samples import token_texts

# How many examples are shown of those to train on, and of those held out.
EXAMPLES_SHOWN = 6
TOKENS_SHOWN = 1000  # of an example; of a longer one the last, for the answer is at the end

# How many held-out comparisons are shown, each with the scores of its texts.
COMPARISONS_SHOWN = 200


def write_learned(
    tokenizer: Tokenizer,
    learned: Learned,
    eval_learned: Learned,
    path: Path,
) -> None:
    """Write a line for each of a few examples: its tokens, and which of them are learned.

    Only the main process does it.
    """
    if not is_main_process():
        return
    lines = []
    for held_out, shown in ((True, eval_learned), (False, learned)):
        for example, row in zip(shown.examples[:EXAMPLES_SHOWN], shown.rows):
            ids = example["input_ids"][-TOKENS_SHOWN:]
            labels = example["labels"][-TOKENS_SHOWN:]
            line = {
                "held_out": held_out,
                "asked": row["shown"],
                "text": names_and_texts(tokenizer, ids),
                "learned": [label != -100 for label in labels],
            }
            lines.append(line)
    write_lines(path, lines)


def names_and_texts(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    """Return the text of each token; of a special one, which has no text, its name."""
    # Decoding begins behind a token, for the first one may lose its space.
    start = torch.tensor(ids[:1])
    texts = [str(tokenizer.decode(ids[:1]))]
    texts += token_texts(tokenizer, start, torch.tensor(ids[1:]))
    special = set(tokenizer.all_special_ids)
    for place, token in enumerate(ids):
        if token in special:
            texts[place] = str(tokenizer.convert_ids_to_tokens(token))
    return texts


def write_compared(examples: list[Row], scores: list[list[float]], path: Path) -> None:
    """Write a line for each of an even choice of comparisons: its texts, and their scores.

    scores: of the texts of each. Of a text with a label the other text, and its score,
    are None.
    """
    every = -(-len(examples) // COMPARISONS_SHOWN)
    lines = []
    for example, its_scores in zip(examples[::every], scores[::every]):
        line: Row = dict.fromkeys(("better", "better_score", "worse", "worse_score"))
        for text, score, sign in zip(example["texts"], its_scores, example["signs"]):
            name = "better" if sign > 0 else "worse"
            line |= {name: text, f"{name}_score": score}
        lines.append(line)
    write_lines(path, lines)
