"""Comparisons to learn from: rows of a file, as pairs of a better and a worse text."""

# Settings are checked with this file before the heavy libraries are loaded, so it needs none; a
# tokenizer is handed to it where it takes one.
from collections import Counter
from collections.abc import Iterable
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune.data import Row, read_data, text_in
from finetune.errors import SettingsError, shorten

if TYPE_CHECKING:
    import transformers

Pair = tuple[str | None, str | None]

REMEDY = "give rows with chosen and rejected, completion_0 … and ranking, or text and label"
LABELS = {"0": False, "False": False, "1": True, "True": True}


# ------------------------------------------------------------------------------ reading
def read_comparisons(
    data: str,
    eval_share: float,
    seed: int,
) -> tuple[list[list[Pair]], list[list[Pair]], Counter[str]]:
    """Return the rows to train on, those held out, and a count of what was left out, by reason.

    A row is a list of comparisons, each of a better and a worse text; one of a label has None for
    what it is compared with, a text whose score is 0.
    """
    return read_data(
        data=data,
        eval_share=eval_share,
        seed=seed,
        read=read_comparison,
        remedy=REMEDY,
    )


def read_comparison(row: Row, left_out: Counter[str]) -> list[Pair] | None:
    """Return a row's comparisons, None where nothing is preferred.

    Raises KeyError or ValueError for what is no such row.
    """
    if "chosen" in row:
        before = said_before(row)
        answers = [(0, row["chosen"]), (1, row["rejected"])]
        # Without a prompt each answer may be a whole conversation.
        if not before and isinstance(row["chosen"], list):
            before = said_before({"prompt": row["chosen"][:-1]})
    elif "ranking" in row:
        before = said_before(row)
        answers = ranked_answers(row)
    else:
        return read_label(row)

    texts = []
    for rank, answer in answers:
        text = joined_text(before, answer_in(answer))
        texts.append((rank, text))

    pairs: list[Pair] = []
    for (rank, text), (other_rank, other_text) in combinations(texts, 2):
        if rank == other_rank or text == other_text:
            continue
        if rank < other_rank:
            pairs.append((text, other_text))
        else:
            pairs.append((other_text, text))
    return pairs or None


def ranked_answers(row: Row) -> list[tuple[Any, Any]]:
    """Return the rank of each completion, the best one's the lowest, and the completion."""
    ranks = row["ranking"]
    if not isinstance(ranks, list) or f"completion_{len(ranks)}" in row:
        raise ValueError(f"its ranking is {shorten(ranks)}: give a rank for each completion")

    answers = []
    for number, rank in enumerate(ranks):
        answers.append((rank, row[f"completion_{number}"]))
    return answers


def read_label(row: Row) -> list[Pair] | None:
    """Return a text as better or worse than one of score 0, None where it is empty."""
    # A line of a file of another kind is "1 a text".
    if list(row) == ["text"]:
        label, _, text = row["text"].partition(" ")
        row = {"text": text, "label": label}
    label = str(row["label"])
    if label not in LABELS:
        raise ValueError(f"its label is {shorten(label)}: give 0 or 1")

    text = text_in(row, "text")
    if not text.strip():
        return None
    return [(text, None)] if LABELS[label] else [(None, text)]


def said_before(row: Row) -> str:
    """Return what stands before the answers: a prompt, or a line for each turn before them."""
    prompt = row.get("prompt") or row.get("conversations") or row.get("messages") or ""
    if isinstance(prompt, str):
        return prompt
    lines = [answer_in(turn) + "\n" for turn in prompt]
    return "".join(lines)


def answer_in(answer: Any) -> str:
    """Return the text of an answer: a text, a message, or the last of several."""
    if isinstance(answer, list) and answer:
        return answer_in(answer[-1])
    if isinstance(answer, dict):
        return text_in(answer, "content" if "content" in answer else "value")
    return text_in({"answer": answer}, "answer")


def joined_text(before: str, answer: str) -> str:
    """Return a prompt and its answer as one text, with a space where there is none between them."""
    if not before or before[-1].isspace() or answer[:1].isspace():
        return before + answer
    return f"{before} {answer}"


# --------------------------------------------------------------------------- the checks
def check_data(
    score: list[str],
    output_dir: str,
    data: str,
    eval_share: float,
    seed: int,
) -> None:
    """Refuse data that can't be used, or, to score with, a folder without a model."""
    if not score:
        read_comparisons(data, eval_share, seed)
    elif not Path(output_dir, "config.json").exists():
        problem = "there is no model in it: train one first"
        raise SettingsError(f"OUTPUT_DIR is {output_dir}: {problem}")


def check_head(quantization: str, lora_rank: int) -> None:
    """Refuse to train a head alone on a quantized body, which Trainer won't do."""
    if quantization != "none" and lora_rank == 0:
        remedy = "give none, or LORA_RANK 1 or more"
        raise SettingsError(f"QUANTIZATION is {quantization}: {remedy}")


# --------------------------------------------------------------------------- the tokens
def pairs_of(rows: list[list[Pair]]) -> list[tuple[int, str | None, str | None]]:
    """Return (row's number, better text, worse text) for each comparison of the rows."""
    pairs = []
    for number, row in enumerate(rows):
        for better, worse in row:
            pairs.append((number, better, worse))
    return pairs


def tokenize(
    tokenizer: "transformers.PreTrainedTokenizerBase",
    pairs: Iterable[tuple[int, str | None, str | None]],
) -> list[Row]:
    """Return an example for each comparison: its row's number, its texts, their signs and tokens.

    sign: 1.0 of a better text, -1.0 of a worse one. sequences: the token ids of each text. The
    longest of them is input_ids, by which comparisons of like length are put together.
    """
    examples = []
    for number, better, worse in pairs:
        signed = [(better, 1.0), (worse, -1.0)]
        texts = tuple(text for text, _ in signed if text is not None)
        signs = tuple(sign for text, sign in signed if text is not None)
        sequences = [tokenizer(text, truncation=True)["input_ids"] for text in texts]
        example = {
            "row": number,
            "texts": texts,
            "signs": signs,
            "sequences": sequences,
            "input_ids": max(sequences, key=len),
        }
        examples.append(example)
    return examples
