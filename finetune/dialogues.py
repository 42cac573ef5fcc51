"""A row of anybody's data as what was said in it: the one reader of rows for all scripts."""

import re
from typing import Any, NamedTuple

from finetune.errors import shorten
from finetune.fields import (
    Fields,
    LeftOut,
    Tally,
    as_list,
    checked_text,
    switch_in,
    without_none,
)
from finetune.files import Row
from finetune.messages import messages_in, prompt_text, read_turns

# The fields in which a row asks something, the first that is there; text is only to be continued.
CONVERSATIONS = ("messages", "conversations", "conversation")
QUESTIONS = ("prompt", *CONVERSATIONS, "instruction", "question", "query", "text")

# The fields in which a row answers, and those that change what it asks.
ANSWERS = ("completion", "output", "response", "answer")
INPUTS = ("input", "context")
SYSTEMS = ("system", "system_prompt")

# The fields in which a row says whether its answer is a good one: TRL's and LLaMA-Factory's.
LABELS = ("label", "kto_tag")


class Dialogue(NamedTuple):
    """What a row says, the same to all scripts.

    turns: messages {"role", "content"}; the user's may have an "input" beside it, and one that is
    not to be learned has "weight" 0. form: "messages", an "instruction", or a mere "text", whose
    only turn has a role that means nothing. tools: that an assistant may call.
    """

    turns: list[Row]
    form: str
    tools: list[Row] | None = None


# -------------------------------------------------------------------------- the reading
def read_asked(fields: Fields, question: str, tally: Tally) -> Dialogue:
    """Return what is asked in a field of a row, with all that changes what is asked.

    An answer may stand at the end where the field has a conversation. Raises LeftOut where the row
    has something that changes what is asked and does not go with the field, ValueError with the
    field where something of it is wrong.
    """
    # An instruction may stand in its input alone.
    value = fields.take(question) if fields.is_filled(question) else ""
    messages = as_list(value, question) if question in CONVERSATIONS else messages_in(value)
    if messages is not None:
        form = "messages"
        turns = read_turns(messages, question, tally)
    else:
        form = "text" if question == "text" else "instruction"
        turns = [{"role": "user", "content": checked_text(value, question)}]

    tools = None
    # What else there is belongs to the usual fields, and not to one that PROMPT_FIELD names.
    if form == "instruction" and question in QUESTIONS:
        add_input(turns[0], fields, tally)
        turns = read_history(fields) + turns
    if form == "messages" and fields.is_filled("tools"):
        tools = without_none(fields.take_list("tools"))
    # A text that is only to be continued asks nothing, so nothing is said before it.
    if form != "text" and question not in SYSTEMS:
        turns = with_system(turns, fields)

    for name in (*INPUTS, *SYSTEMS, "history", "tools"):
        if name in fields.unused and question in QUESTIONS:
            raise LeftOut(f"with {name}, which does not go with {question}")
    return Dialogue(turns, form, tools)


def question_in(fields: Fields, names: tuple[str, ...]) -> str | None:
    """Return the field of these in which a row asks something, None where there is none.

    It may be an empty one whose input is filled.
    """
    question = fields.first(names)
    if question is None and fields.first(INPUTS):
        question = next((name for name in names if name in fields.row), None)
    return question


def read_answered(row: Any, tally: Tally) -> Dialogue:
    """Return what a row asks and answers, the answer last; counts what it does not use.

    Of a text there is no other answer than itself.
    """
    fields = Fields(row)
    dialogue = answered(fields, tally)
    # Of a text, a label may say anything.
    label = fields.first(LABELS) if dialogue.form != "text" else None
    is_good = switch_in(fields.row[label]) if label else None
    if is_good is False:
        raise LeftOut(f"whose {label} says that the answer is a bad one")
    if label and is_good:
        fields.take(label)
    tally.unused.update(fields.unused)
    return dialogue


def answered(fields: Fields, tally: Tally) -> Dialogue:
    """Return what is asked and answered in the fields of a row, the answer last."""
    answer = fields.first(ANSWERS)
    holding_answers = (*CONVERSATIONS, "text")
    question = question_in(fields, QUESTIONS if answer else holding_answers)
    if question:
        dialogue = read_asked(fields, question, tally)
        is_answered = question == "text" or dialogue.turns[-1]["role"] == "assistant"
        if is_answered or answer is None:
            return dialogue
        return with_answer(dialogue, fields.take(answer), answer, tally)

    asked = question_in(fields, QUESTIONS)
    if fields.has_any((*ANSWERS, "text")) and (asked or "text" in fields.row):
        raise LeftOut("without an answer")
    if asked:
        lacking = f"that answers its {asked}"
    elif fields.has_any(QUESTIONS):
        raise LeftOut("without a question")
    else:
        lacking = "that asks"
    known = {*QUESTIONS, *ANSWERS}
    if known.intersection(name.lower() for name in fields.row if name not in known):
        lacking += ", which wants small letters"
    raise ValueError(f"it has nothing {lacking}: its fields are {fields.names()}")


def with_answer(dialogue: Dialogue, value: Any, name: str, tally: Tally) -> Dialogue:
    """Return a dialogue with an answer behind it, which has the field of that name."""
    turns = read_answer(value, name, tally)
    if messages_in(value) is not None:
        dialogue = dialogue._replace(form="messages")
    return dialogue._replace(turns=put_together(dialogue.turns, turns))


def read_answer(value: Any, name: str, tally: Tally) -> list[Row]:
    """Return the turns of an answer, which is a text, a message, or a list of them."""
    messages = messages_in(value)
    if messages is None:
        text = checked_text(value, name)
        return [{"role": "assistant", "content": text}]
    turns = read_turns(messages, name, tally)
    if turns[-1]["role"] != "assistant":
        raise LeftOut(f"whose {name} does not end with an answer")
    return turns


def put_together(before: list[Row], answer: list[Row]) -> list[Row]:
    """Return the turns before an answer and its own, which may be the whole conversation.

    What was asked already is not asked again. Raises LeftOut where they do not go together.
    """
    if answer[0]["role"] == "assistant":
        if before and before[-1]["role"] == "assistant":
            raise LeftOut("whose prompt ends with an answer")
        return before + answer

    systems, asked = parted(before)
    own_systems, said = parted(answer)
    if systems and own_systems and systems != own_systems:
        raise LeftOut("with two different system texts")

    # What was asked stands somewhere in it, or its end is what this begins with.
    asked_keys, said_keys = keys_of(asked), keys_of(said)
    count = len(asked)
    starts = range(len(said) - count + 1)
    is_within = any(said_keys[start : start + count] == asked_keys for start in starts)
    while not is_within and asked_keys[len(asked) - count :] != said_keys[:count]:
        count -= 1
    return (systems or own_systems) + asked[: len(asked) - count] + said


def parted(turns: list[Row]) -> tuple[list[Row], list[Row]]:
    """Return the system's turns at the beginning, and the others."""
    count = 0
    while count < len(turns) and turns[count]["role"] == "system":
        count += 1
    return turns[:count], turns[count:]


def keys_of(turns: list[Row]) -> list[tuple[str, str]]:
    """Return who says what in each turn."""
    return [(turn["role"], prompt_text(turn).strip()) for turn in turns]


# ------------------------------------------------------------ what changes what is asked
def add_input(turn: Row, fields: Fields, tally: Tally) -> None:
    """Add the input of an instruction to its turn, where it has one."""
    names = [name for name in INPUTS if fields.is_filled(name)]
    if len(names) == 2:
        raise LeftOut("with both input and context")
    for name in names:
        text = fields.take_text(name).strip()
        # Alpaca's data set and its likes say so where an instruction needs no input.
        if re.sub(r"\W", "", text).lower() == "noinput":
            tally.changed['inputs that say "noinput"'] += 1
        elif turn["content"].strip():
            turn["input"] = text
        else:
            turn["content"] = text


def read_history(fields: Fields) -> list[Row]:
    """Return what was said before, of pairs of what was asked and answered."""
    turns = []
    if fields.is_filled("history"):
        for pair in fields.take_list("history"):
            if not isinstance(pair, list) or len(pair) != 2:
                raise ValueError(f"its history has {shorten(pair)}, no pair of texts")
            for role, text in zip(("user", "assistant"), pair):
                turns.append({"role": role, "content": checked_text(text, "history")})
    return turns


def read_systems(fields: Fields) -> list[str]:
    """Return what is said to the assistant in a field of its own, where there is one."""
    return [fields.take_text(name) for name in SYSTEMS if fields.is_filled(name)]


def with_system(turns: list[Row], fields: Fields) -> list[Row]:
    """Return the turns, before them what is said to the assistant in a field of its own."""
    for text in read_systems(fields):
        turn = {"role": "system", "content": text}
        if turns[0]["role"] != "system":
            turns = [turn, *turns]
        elif turns[0] != turn:
            raise LeftOut("with two different system texts")
    return turns
