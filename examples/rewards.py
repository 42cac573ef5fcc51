"""Rewards to copy: each gets lists of prompts and completions, and returns a list of numbers.

    python train_rlhf.py --model-name demo_model --reward examples/rewards.py:few_words

The other fields of a prompt's row come by name, as lists too. TRL's GRPOTrainer calls its reward
functions in the same way, so a file of them serves both. The function is also asked about every
beginning of a response, the empty one included.
"""

import re


def few_words(prompts, completions, **kwargs):
    """Prefer short responses: each word costs a point."""
    return [-len(completion.split()) for completion in completions]


def right_answer(prompts, completions, answer, **kwargs):
    """Score 1 where the answer of the prompt's row is in the response as a whole word, else 0.

    It needs prompts from a file with a field `answer`.
    """
    scores = []
    for completion, right in zip(completions, answer):
        right = str(right).removesuffix(".0")  # which a .csv with gaps makes of whole numbers
        found = re.search(rf"\b{re.escape(right)}\b", completion, re.IGNORECASE)
        scores.append(1.0 if found else 0.0)
    return scores


def cheerful_and_varied(prompts, completions, **kwargs):
    """Weigh two wishes: a cheerful word, and half as much that no word is said twice."""
    scores = []
    for completion in completions:
        words = re.findall(r"\w+", completion.lower())
        cheerful = any(word in ("happy", "glad", "smile", "love") for word in words)
        variety = len(set(words)) / len(words) if words else 0.0
        scores.append(cheerful + 0.5 * variety)
    return scores
