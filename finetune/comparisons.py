"""Comparisons to learn from: rows of a file, as pairs of a better and a worse text."""

# Settings are checked with this file before the heavy libraries are loaded, so it needs none.
import math
from itertools import combinations
from pathlib import Path
from typing import Any

from finetune.data import Reader, read_data
from finetune.dialogues import (
    ANSWERS,
    CONVERSATIONS,
    INPUTS,
    LABELS,
    QUESTIONS,
    Dialogue,
    answered,
    put_together,
    question_in,
    read_answer,
    read_asked,
    read_systems,
)
from finetune.errors import SettingsError, shorten
from finetune.fields import Fields, LeftOut, Tally, as_switch
from finetune.files import Row, is_file, read_table
from finetune.messages import before_the_answer, messages_in, prompt_text

Pair = tuple[Dialogue | None, Dialogue | None]  # a better one and a worse

# What is asked before answers that are compared.
BEFORE = tuple(name for name in QUESTIONS if name != "text")
NOTHING = Dialogue(turns=[], form="text")


# ------------------------------------------------------------------------------ reading
def read_comparison(row: Row | str, tally: Tally) -> list[Pair]:
    """Return a row's comparisons; one of a label has None for what it is compared with.

    Raises LeftOut where nothing is preferred, ValueError for what is no such row.
    """
    # A line of a text file is "1 a text".
    if isinstance(row, str):
        label, *text = row.split(maxsplit=1)
        row = {"label": label, "text": "".join(text)}
    fields = Fields(row)
    if fields.first(("chosen", "rejected")):
        pairs = read_choice(fields, tally)
    elif fields.is_filled("ranking"):
        pairs = read_ranking(fields, tally)
    else:
        pairs = read_label(fields, tally)
    tally.unused.update(fields.unused)
    return pairs


COMPARISONS = Reader(
    read=read_comparison,
    remedy="give rows with chosen and rejected, completion_0 … and ranking, or text and label",
)


def read_choice(fields: Fields, tally: Tally) -> list[Pair]:
    """Return the comparison of a row with chosen and rejected."""
    before = read_before(fields, tally)
    better, worse = said_with(before, fields, ["chosen", "rejected"], tally)
    if better == worse:
        raise LeftOut("where nothing is preferred")
    return [(better, worse)]


def read_ranking(fields: Fields, tally: Tally) -> list[Pair]:
    """Return each comparison of completions with different ranks, of which the lower is better."""
    before = read_before(fields, tally)
    ranks = fields.take_list("ranking")
    if fields.is_filled(f"completion_{len(ranks)}"):
        raise ValueError(f"its ranking is {shorten(ranks)}: give a rank for each completion")

    names = [f"completion_{number}" for number in range(len(ranks))]
    dialogues = said_with(before, fields, names, tally)
    ranked = [(as_number(rank), dialogue) for rank, dialogue in zip(ranks, dialogues)]
    pairs: list[Pair] = []
    for (rank, dialogue), (other_rank, other) in combinations(ranked, 2):
        if rank == other_rank or dialogue == other:
            continue
        pairs.append((dialogue, other) if rank < other_rank else (other, dialogue))
    if not pairs:
        raise LeftOut("where nothing is preferred")
    return pairs


def as_number(rank: Any) -> float:
    """Return a rank as a number, which may be written as a text."""
    try:
        number = float(rank)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise ValueError(f"its ranking has {shorten(rank)}: give a number for each completion")
    return number


def read_label(fields: Fields, tally: Tally) -> list[Pair]:
    """Return what a row says as better or worse than a text of score 0, by its label."""
    name = fields.first(LABELS)
    if name is None and fields.has_any(("chosen", "rejected", "ranking", *LABELS)):
        raise LeftOut("where nothing is preferred")
    if name is None:
        lacking = "no chosen, no ranking and no label"
        raise ValueError(f"it has {lacking}: its fields are {fields.names()}")

    is_better = as_switch(fields.take(name), name)
    dialogue = read_labelled(fields, tally)
    return [(dialogue, None) if is_better else (None, dialogue)]


def read_labelled(fields: Fields, tally: Tally) -> Dialogue:
    """Return what is said in a row with a label: a text, or an answer to what is asked."""
    # The answer to a prompt may have the name text.
    if fields.is_filled("text") and not fields.first((*ANSWERS, *CONVERSATIONS)):
        return said_with(read_before(fields, tally), fields, ["text"], tally)[0]

    dialogue = answered(fields, tally)
    last = dialogue.turns[-1]
    if dialogue.form != "text" and last["role"] != "assistant":
        raise LeftOut("whose last turn is no answer")
    check_answer(last, "last turn")
    if dialogue.form == "instruction" and len(dialogue.turns) == 2:
        asked, answer = dialogue.turns
        return as_text(joined_text(prompt_text(asked), answer["content"]))
    return dialogue if dialogue.form == "text" else dialogue._replace(form="messages")


# -------------------------------------------------------------------------- the answers
def read_before(fields: Fields, tally: Tally) -> Dialogue:
    """Return what is asked before the answers of a row, where it has such a field."""
    question = question_in(fields, BEFORE)
    if question:
        dialogue = read_asked(fields, question, tally)
        # Such a field may have one of the answers already.
        if question in CONVERSATIONS:
            dialogue = dialogue._replace(turns=before_the_answer(dialogue.turns))
        return dialogue
    for name in (*INPUTS, "history"):
        if fields.is_filled(name):
            raise LeftOut(f"with {name}, but without what it belongs to")

    # What is compared may be whole conversations, with these beside them.
    systems = [{"role": "system", "content": text} for text in read_systems(fields)]
    tools = fields.take_list("tools") if fields.is_filled("tools") else None
    if not systems and not tools:
        return NOTHING
    return Dialogue(systems, "messages", tools)


def said_with(
    before: Dialogue,
    fields: Fields,
    names: list[str],
    tally: Tally,
) -> list[Dialogue]:
    """Return what is said with each of the answers in these fields, all in one form.

    Texts where what is asked and all answers are texts, or messages that stand alone; else
    conversations.
    """
    answers = []
    for name in names:
        turns = read_answer(fields.take(name), name, tally)
        check_answer(turns[-1], name)
        answers.append(turns)

    are_texts = all(messages_in(fields.row[name]) is None for name in names)
    are_alone = before == NOTHING and all(len(turns) == 1 for turns in answers)
    if are_texts and before.form == "instruction" and begin_with(before, answers):
        tally.changed["with a prompt that its answers begin with already"] += 1
        if len(before.turns) == 1:
            return [as_text(turns[0]["content"]) for turns in answers]
        answers = [without_prompt(before, turns) for turns in answers]
    if are_alone or (are_texts and before.form != "messages" and len(before.turns) <= 1):
        beginning = "".join(prompt_text(turn) for turn in before.turns)
        return [as_text(joined_text(beginning, turns[0]["content"])) for turns in answers]

    has_question = any(turn["role"] != "system" for turn in before.turns)
    dialogues = []
    for name, turns in zip(names, answers):
        if turns[0]["role"] == "assistant" and not has_question:
            raise LeftOut(f"whose {name} answers nothing")
        turns = put_together(before.turns, turns)
        dialogues.append(Dialogue(turns, "messages", before.tools))
    return dialogues


def begin_with(before: Dialogue, answers: list[list[Row]]) -> bool:
    """Return whether all of several answers in texts begin with what was asked.

    They may begin with a single word by chance.
    """
    prompt = prompt_text(before.turns[-1]).strip()
    is_word = prompt.isascii() and prompt.isalnum()
    if len(answers) < 2 or is_word:
        return False
    for turns in answers:
        text = turns[0]["content"].lstrip()
        rest = text.removeprefix(prompt)
        border = prompt[-1:] + rest[:1]
        goes_on = border.isascii() and border.isalnum()
        if not text.startswith(prompt) or not rest.strip() or goes_on:
            return False
    return True


def without_prompt(before: Dialogue, answer: list[Row]) -> list[Row]:
    """Return an answer without what was asked, with which it begins."""
    prompt = prompt_text(before.turns[-1]).strip()
    text = answer[0]["content"].lstrip().removeprefix(prompt)
    return [{"role": "assistant", "content": text.strip()}]


def as_text(text: str) -> Dialogue:
    """Return a mere text."""
    return Dialogue([{"role": "user", "content": text}], "text")


def check_answer(turn: Row, name: str) -> None:
    """Raise LeftOut where what is to be judged is no answer in words."""
    for field in ("tool_calls", "reasoning_content"):
        if turn.get(field):
            raise LeftOut(f"whose {name} has {field}, which are not judged")
    if not turn["content"].strip():
        raise LeftOut(f"with an empty {name}")


def joined_text(before: str, answer: str) -> str:
    """Return a prompt and its answer as one text, with a space where there is none between them."""
    if not before or before[-1].isspace() or answer[:1].isspace():
        return before + answer
    return f"{before} {answer}"


# ---------------------------------------------------------------------------- the scores
def read_judged(entry: str, tally: Tally) -> list[Dialogue]:
    """Return what an entry of SCORE has to be judged: itself, or what is said in a file's rows."""
    dialogues = []
    table = read_table(entry) if is_file(entry) else [entry]
    for number, row in enumerate(table, start=1):
        fields = Fields(row)
        try:
            dialogues.append(read_said(fields, tally))
        except LeftOut as reason:
            raise ValueError(f"row {number} is one {reason}") from reason
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"row {number}: {error}") from error
        tally.unused.update(fields.unused)
    return dialogues


def read_said(fields: Fields, tally: Tally) -> Dialogue:
    """Return what is said in a row: an answer to what it asks, or what it asks alone."""
    if fields.first((*ANSWERS, *CONVERSATIONS, "text")):
        return read_labelled(fields, tally)
    question = question_in(fields, QUESTIONS)
    if question is None:
        raise ValueError(f"it has nothing that is said: its fields are {fields.names()}")
    dialogue = read_asked(fields, question, tally)
    if dialogue.form == "instruction" and len(dialogue.turns) == 1:
        return as_text(prompt_text(dialogue.turns[0]))
    raise LeftOut("whose last turn is no answer")


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
        read_data(data, eval_share, seed, COMPARISONS)
    elif not Path(output_dir, "config.json").exists():
        problem = "there is no model in it: train one first"
        raise SettingsError(f"OUTPUT_DIR is {output_dir}: {problem}")


def check_head(quantization: str, lora_rank: int) -> None:
    """Refuse to train a head alone on a quantized body, which Trainer won't do."""
    if quantization != "none" and lora_rank == 0:
        remedy = "give none, or LORA_RANK 1 or more"
        raise SettingsError(f"QUANTIZATION is {quantization}: {remedy}")
