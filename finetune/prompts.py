"""Prompts: texts and files, as the rows that PPO trains on and measures."""

from functools import partial
from typing import Any, NamedTuple

from finetune.data import FILE_REMEDY, hold_out, read_each
from finetune.dialogues import QUESTIONS, Dialogue, question_in, read_asked
from finetune.errors import SettingsError, blame, shorten
from finetune.fields import Fields, LeftOut, Tally
from finetune.files import Row, is_file, read_table
from finetune.messages import before_the_answer, plain_turns, prompt_text

Prompt = str | list[Row]  # a text, or the messages of a conversation


class Prompts(NamedTuple):
    """What PROMPTS and EVAL_PROMPTS stand for."""

    rows: list[Row]  # to train on
    eval_rows: list[Row]  # held out
    eval_source: str  # EVAL_PROMPTS or EVAL_SHARE: where the eval_rows come from
    tally: Tally


# -------------------------------------------------------------------------- the reading
def read_prompts(
    prompts: list[str],
    eval_prompts: list[str],
    eval_share: float,
    prompt_field: str,
    seed: int,
) -> Prompts:
    """Return the rows to train on, the rows held out, and what is told of the others.

    Where PROMPTS names a file, EVAL_SHARE of all its rows is held out; else, or where
    that is 0, EVAL_PROMPTS are, and nothing where these are []. Prompts that are empty, or
    came before, are left out. Raises SettingsError also where both ways are wished for.
    """
    eval_source = "EVAL_PROMPTS"
    has_file = any(is_file(entry) for entry in prompts)
    if has_file and eval_prompts and eval_share > 0:
        check_eval_prompts(eval_prompts, eval_share)
        eval_source = "EVAL_SHARE"

    tally = Tally()
    rows_read = read_rows("PROMPTS", prompts, prompt_field, tally)
    train_count = len({asked_in(row) for row in rows_read})
    if eval_source == "EVAL_PROMPTS":
        rows_read += read_rows("EVAL_PROMPTS", eval_prompts, prompt_field, tally)

    rows = unique_rows(rows_read)
    tally.left_out["given twice"] += len(rows_read) - len(rows)
    if eval_source == "EVAL_PROMPTS":
        rows, eval_rows = rows[:train_count], rows[train_count:]
    else:
        rows, eval_rows = hold_out(rows, eval_share, seed)
    return Prompts(rows, eval_rows, eval_source, tally)


def check_eval_prompts(eval_prompts: list[str], eval_share: float) -> None:
    """Refuse a file in EVAL_PROMPTS where a share of PROMPTS is held out in its place."""
    for entry in eval_prompts:
        if is_file(entry):
            share = f"EVAL_SHARE {eval_share:g} of PROMPTS is held out in its place"
            remedy = "give EVAL_SHARE 0 to measure EVAL_PROMPTS"
            name = shorten(entry)
            raise SettingsError(f"EVAL_PROMPTS is {name}, but {share}: {remedy}")


def read_rows(setting: str, entries: list[str], prompt_field: str, tally: Tally) -> list[Row]:
    """Return the rows of a setting's entries: those of a file, one for a text.

    Each has its prompt, a text or a list of messages, in the field prompt.
    """
    rows: list[Row] = []
    remedy = "give rows with prompt, messages, instruction, question or text, or set PROMPT_FIELD"
    for entry in entries:
        with blame(setting, entry, FILE_REMEDY):
            table = read_table(entry) if is_file(entry) else [entry]
        with blame(setting, entry, remedy, length=600):
            told = Tally()
            read = partial(read_prompt, prompt_field=prompt_field)
            entry_rows = read_each(table, read, told)
            if not entry_rows:
                raise ValueError(f"it has no prompts: {told.reasons() or 'it is empty'}")
            rows += entry_rows
            tally.add(told)
    return rows


def read_prompt(row: Any, tally: Tally, prompt_field: str) -> Row:
    """Return a row with its prompt: a text, or a list of messages.

    Raises LeftOut where the prompt is empty, ValueError where there is none.
    """
    # A mere text has no fields.
    if isinstance(row, str):
        row, prompt_field = {"prompt": row}, "prompt"
    fields = Fields(row)
    dialogue = read_asked(fields, question_of(fields, prompt_field), tally)
    prompt = prompt_of(dialogue)
    if prompt == []:
        raise LeftOut("without a question")
    if not last_said(prompt).strip():
        raise LeftOut("empty")
    tally.unused.update(fields.unused)

    # The fields of a row are handed to a reward function, as they are.
    changed: Row = {"prompt": prompt}
    if "tools" in fields.row and dialogue.form == "messages":
        changed["tools"] = dialogue.tools
    return fields.row | changed


def question_of(fields: Fields, prompt_field: str) -> str:
    """Return the field of a row's prompt: PROMPT_FIELD, or the first usual one."""
    names = QUESTIONS if prompt_field == "auto" else (prompt_field,)
    field = question_in(fields, names)
    if field is None and fields.has_any(names):
        raise LeftOut("empty")
    if field is None:
        found = f"its fields are {fields.names()}"
        raise ValueError(f"PROMPT_FIELD is {prompt_field}, and {found}")
    return field


def prompt_of(dialogue: Dialogue) -> Prompt:
    """Return what is asked, without the answers at the end, which are for the model to say."""
    turns = before_the_answer(dialogue.turns)
    if dialogue.form != "messages" and len(turns) == 1:
        return prompt_text(turns[0])
    return plain_turns(turns)


def asked_in(row: Row) -> str:
    """Return what tells a prompt from others: its text or messages, and their tools."""
    is_text = isinstance(row["prompt"], str)
    return str(row["prompt"]) if is_text else str((row["prompt"], row.get("tools")))


def unique_rows(rows: list[Row]) -> list[Row]:
    """Return the first row of each prompt; fields that it lacks are None."""
    # All get the same fields, since a function that scores texts wants each one of all rows.
    fields: Row = {}
    for row in rows:
        fields.update(dict.fromkeys(row))

    unique: dict[str, Row] = {}
    for row in rows:
        unique.setdefault(asked_in(row), fields | row)
    return list(unique.values())


# ------------------------------------------------------------------------ what is asked
def last_said(prompt: Prompt) -> str:
    """Return a prompt, or the last message of one that is a conversation."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def is_turn(prompt: Prompt, chat_template: bool) -> bool:
    """Return whether a prompt goes through the template, as conversations always do."""
    return chat_template or not isinstance(prompt, str)


def batch_of_step(step: int, rows: list[Row], batch_size: int, seed: int) -> list[Row]:
    """Return the rows of a step; every epoch has each row once, in an order of its own.

    step: counted from 1. A batch may end in another epoch than it begins in.
    """
    import numpy

    orders: dict[int, Any] = {}
    batch = []
    for index in range((step - 1) * batch_size, step * batch_size):
        epoch, place = divmod(index, len(rows))
        if epoch not in orders:
            generator = numpy.random.default_rng([seed, epoch])
            orders[epoch] = generator.permutation(len(rows))
        batch.append(rows[orders[epoch][place]])
    return batch
