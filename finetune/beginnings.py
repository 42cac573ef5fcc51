"""Beginnings of texts, which a causal model reads in one pass."""

from typing import Any, NamedTuple

import torch
import transformers

from finetune.tokens import pad

# So many tokens at its end a beginning may have otherwise, as where it ends within a word.
LAST_TOKENS = 4


class Pass(NamedTuple):
    """A sequence to read, and the texts that end somewhere in it."""

    ids: list[int]  # of its tokens
    places: list[int]  # of the texts, among all texts
    ends: list[int]  # the place of the last token of each


def passes_for(sequences: list[list[int]]) -> list[Pass]:
    """Return few passes for all sequences: each is one, or the beginning of one.

    sequences: of token ids. The beginnings of a response stand before it, shorter first.
    """
    passes: list[Pass] = []
    chain = Pass([], [], [])
    for place in range(len(sequences) - 1, -1, -1):
        ids = sequences[place]
        if chain.ids[: len(ids)] == ids:
            chain.places.append(place)
            chain.ends.append(len(ids) - 1)
            continue

        alone = Pass(ids, [place], [len(ids) - 1])
        passes.append(alone)
        # A beginning that ends within a word may stand alone among others that are in line.
        most = max(len(ids) - LAST_TOKENS, 1)
        if chain.ids[:most] != ids[:most]:
            chain = alone
    return passes[::-1]


def logits_at_ends(
    model: Any,
    tokenizer: transformers.PreTrainedTokenizerBase,
    passes: list[Pass],
) -> torch.Tensor:
    """Return the logits of a causal classifier where each text of the passes ends.

    Returns float32 (texts, labels), in the order of the passes and of the places in them.
    """
    inputs = pad(tokenizer, [one.ids for one in passes]).to(model.device)
    with torch.no_grad():
        hidden = model.base_model(**inputs).last_hidden_state
        all_logits = model.score(hidden)
    logits = [all_logits[row, one.ends] for row, one in enumerate(passes)]
    return torch.cat(logits).float()


def reads_beginnings(model: Any, tokenizer: transformers.PreTrainedTokenizerBase) -> bool:
    """Return whether a classifier's head on each place gives what it says up to there.

    So it is in a causal model, whose head is called score as in transformers.
    """
    ids = tokenizer("I am so very glad today")["input_ids"]
    half = ids[: len(ids) // 2]
    whole = Pass(ids, [0], [len(half) - 1])
    if not isinstance(getattr(model, "score", None), torch.nn.Module) or not half:
        return False
    try:
        at_end = logits_at_ends(model, tokenizer, [whole])
        with torch.no_grad():
            alone = model(**pad(tokenizer, [half]).to(model.device)).logits
    # What it lacks another class of model may have in another way.
    except (AttributeError, RuntimeError, TypeError, ValueError, IndexError):
        return False
    return torch.allclose(at_end, alone.float(), rtol=1e-3, atol=1e-4)
