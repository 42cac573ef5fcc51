"""A row of anybody's data, as what was said in it: the one reader of all four scripts."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from finetune.errors import blame, shorten
from finetune.fields import Fields, LeftOut, Tally, as_list, checked_text, is_no
from finetune.files import Row, read_table
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
    value = fields.take(question)
    messages = messages_in(value)
    if question in CONVERSATIONS:
        messages = as_list(value, question)
    if messages is not None:
        form = "messages"
        turns = read_turns(messages, question, tally)
    else:
        form = "text" if question == "text" else "instruction"
        turns = [{"role": "user", "content": checked_text(value, question)}]

    # A text that is only to be continued asks nothing, so nothing goes with it.
    tools = None
    if form == "instruction" and question in QUESTIONS:
        add_input(turns[0], fields, tally)
        turns = read_history(fields) + turns
    if form == "messages" and fields.is_filled("tools"):
        tools = fields.take_list("tools")
    if form != "text":
        turns = with_system(turns, fields)

    for name in (*INPUTS, *SYSTEMS, "history", "tools"):
        # A field that PROMPT_FIELD names stands alone.
        if question in QUESTIONS and name in fields.unused:
            raise LeftOut(f"with {name}, which does not go with {question}")
    return Dialogue(turns, form, tools)


def read_answered(row: Any, tally: Tally) -> Dialogue:
    """Return what a row asks and answers, the answer last; counts what it does not use.

    Of a text there is no other answer than itself.
    """
    fields = Fields(row)
    dialogue = answered(fields, tally)
    # Of a text, a label may say anything.
    label = fields.first(LABELS) if dialogue.form != "text" else None
    if label and is_no(fields.take(label)):
        raise LeftOut(f"whose {label} says that the answer is a bad one")
    tally.unused.update(fields.unused)
    return dialogue


def answered(fields: Fields, tally: Tally) -> Dialogue:
    """Return what is asked and answered in the fields of a row, the answer last."""
    answer = fields.first(ANSWERS)
    asked = fields.present(QUESTIONS)
    for question in asked:
        holds_answers = question in CONVERSATIONS
        if question == "text":
            return read_asked(fields, question, tally)
        if answer is None and not holds_answers:
            continue

        dialogue = read_asked(fields, question, tally)
        ends_with_answer = dialogue.turns[-1]["role"] == "assistant"
        if answer is None or (holds_answers and ends_with_answer):
            return dialogue
        return with_answer(dialogue, fields.take(answer), answer, tally)

    # An empty field may be there as None.
    if asked or "text" in fields.row:
        is_there = any(name in fields.row for name in (*ANSWERS, "text"))
        reason = "without an answer"
    else:
        is_there = any(name in fields.row for name in QUESTIONS)
        reason = "without a question"
    if is_there:
        raise LeftOut(reason)
    lacking = "that asks"
    if asked:
        lacking = f"that answers its {asked[0]}"
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

    What was asked already is not asked again.
    """
    if answer[0]["role"] == "assistant":
        return before + answer
    systems = []
    asked = []
    for turn in before:
        if turn["role"] == "system":
            systems.append(turn)
        else:
            asked.append(prompt_text(turn).strip())

    said = [turn["content"].strip() for turn in answer[:-1]]
    if set(said).issuperset(asked):
        has_system = answer[0]["role"] == "system"
        return answer if has_system else systems + answer

    # The end of the one may be the beginning of the other.
    for count in range(min(len(asked), len(said)), 0, -1):
        if asked[-count:] == said[:count]:
            return before[:-count] + answer
    return before + answer


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


# ------------------------------------------------------------------- the examples of DATA
class Data(NamedTuple):
    """What DATA holds."""

    rows: list[Any]  # to train on
    eval_rows: list[Any]  # held out
    tally: Tally


class Reader(NamedTuple):
    """What makes an example of a row.

    read: is called as read(row, tally), and returns the example. It may raise LeftOut, or
    ValueError for what is no such row. remedy: which rows are such.
    """

    read: Callable[[Any, Tally], Any]
    remedy: str


def read_data(data: str, eval_share: float, seed: int, reader: Reader) -> Data:
    """Return the examples in DATA, each once, and those held out.

    Raises SettingsError where the file, or one of its rows, can't be read, or where fewer than two
    examples are left.
    """
    unique: dict[str, Any] = {}
    tally = Tally()
    with blame("DATA", data, reader.remedy, length=600):
        table = read_table(data, by_name=True)
        for number, row in enumerate(table, start=1):
            try:
                example = reader.read(row, tally)
            except LeftOut as reason:
                tally.left_out[str(reason)] += 1
                continue
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise ValueError(f"row {number}: {error}") from error

            tally.left_out["given twice"] += str(example) in unique
            unique.setdefault(str(example), example)

        if len(unique) < 2:
            usable = f"{len(unique)} of {len(table)} rows can be used, where 2 are the least"
            reasons = tally.reasons() or "there are no more"
            raise ValueError(f"{usable}: {reasons}{found_in(table)}")

    rows, eval_rows = hold_out(list(unique.values()), eval_share, seed)
    return Data(rows, eval_rows, tally)


def found_in(table: list[Any]) -> str:
    """Return which fields the first row has, behind a semicolon, where it has any."""
    if not table or not isinstance(table[0], dict):
        return ""
    return f"; the first row has {Fields(table[0]).names()}"


def hold_out(rows: list[Any], eval_share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Return the rows to train on and a share that is held out, in an order by seed.

    The share is rounded up, but at least one row stays to train on.
    """
    import numpy

    order = numpy.random.default_rng(seed).permutation(len(rows))
    shuffled = [rows[place] for place in order]
    count = min(math.ceil(eval_share * len(rows)), len(rows) - 1)
    return shuffled[count:], shuffled[:count]
