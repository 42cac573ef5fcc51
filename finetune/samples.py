"""What is written of each response: its score, its KL, and the figures of its tokens."""

import math
from itertools import pairwise
from typing import Any

import torch
import transformers

from finetune.figures import short
from finetune.files import Row
from finetune.processes import is_main_process
from finetune.tokens import texts_of

# So many tokens of a run have figures, and so many of a step: about 7 MB of text.
TOKENS_OF_RUN = 80_000
TOKENS_OF_STEP = 20_000


# ----------------------------------------------------------------------- the responses
def samples_of_step(step: int, rows: list[Row], rollout: Any, figures: Any) -> list[Row]:
    """Return the lines of samples.jsonl for a step, without tokens.

    rollout: what was said, as train_rlhf.py has it. figures: of the tokens, likewise.
    """
    samples = []
    for row, text, score, kl in zip(rows, rollout.texts, rollout.scores, figures.kl, strict=True):
        sample = {
            "step": step,
            "prompt": row["prompt"],
            "response": text,
            "score": score,
            "kl": kl.sum().item(),
        }
        samples.append(sample)
    return samples


# -------------------------------------------------------------------------- the tokens
def keeps_tokens(step: int, total: int, settings: Any) -> bool:
    """Return whether the tokens of a step are written: of all steps, or of every nth and the last.

    n is the least with which the whole run has at most TOKENS_OF_RUN, so the longest
    run leaves a folder of much the same size. Of a run that goes on for longer than it
    was meant to, n is larger from there on.
    """
    tokens = min(settings.batch_size * settings.max_new_tokens, TOKENS_OF_STEP)
    every = math.ceil(total * tokens / TOKENS_OF_RUN)
    return (step - 1) % every == 0 or step == total


def add_tokens(
    samples: list[Row],
    tokenizer: transformers.PreTrainedTokenizerBase,
    rollout: Any,
    figures: Any,
) -> None:
    """Give the samples of a step their tokens, up to TOKENS_OF_STEP; see samples_of_step.

    Only the main process does it, for that one writes them.
    """
    if not is_main_process():
        return
    count = 0
    for place, sample in enumerate(samples):
        response = rollout.responses[place]
        count += len(response)
        if count > TOKENS_OF_STEP:
            return
        sample["tokens"] = {
            "text": token_texts(tokenizer, rollout.queries[place], response),
            "score": rounded(figures.scores[place]),
            "kl": rounded(figures.kl[place]),
            "value": rounded(figures.values[place]),
            "advantage": rounded(figures.advantages[place]),
            "logprob": rounded(figures.logprobs[place]),
            "ref_logprob": rounded(figures.ref_logprobs[place]),
        }


def token_texts(
    tokenizer: transformers.PreTrainedTokenizerBase,
    query: torch.Tensor,
    response: torch.Tensor,
) -> list[str]:
    """Return the text of each token of a response; together they are the response's.

    A letter of several tokens belongs to the last of them. The others have an empty
    text, as have special tokens.
    """
    if len(response) == 0:
        return []
    beginnings = [response[:end] for end in range(1, len(response) + 1)]
    texts = texts_of(tokenizer, query, beginnings)
    whole = texts[-1]
    ends = [0]
    for text in texts:
        # Where a beginning ends within a letter, a sign stands there that says so.
        ends.append(max(common_length(text, whole), ends[-1]))
    ends[-1] = len(whole)
    return [whole[first:last] for first, last in pairwise(ends)]


def common_length(one: str, other: str) -> int:
    """Return how many letters two texts have in common, from the beginning on."""
    if other.startswith(one):
        return len(one)
    for place, (letter, other_letter) in enumerate(zip(one, other)):
        if letter != other_letter:
            return place
    return len(other)


def rounded(numbers: torch.Tensor) -> list[float | None]:
    """Return numbers with four digits that count; what is not finite is None, JSON's null."""
    return [short(number) for number in numbers.tolist()]
