"""Files of prompts and examples, as rows."""

# Bad settings are told within a second, and files are read for that. numpy and
# datasets take longer to load: so a function imports the one that it needs.
import glob
import json
import logging
import math
import os
import re
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

from finetune.errors import SettingsError, blame, shorten

Row = dict[str, Any]  # the fields of a row by name
Prompt = str | list[dict[str, Any]]  # a text, or the messages of a conversation

# What a file holds, by the ending of its name.
FORMATS = {".txt": "text", ".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}

# The fields in which a prompt is looked for, in this order, where PROMPT_FIELD is auto.
USUAL_FIELDS = ("prompt", "messages", "text", "instruction", "question")


# ---------------------------------------------------------------------------- the files
def is_file(entry: str) -> bool:
    """Return whether an entry means a file: it is one, or has a name like one."""
    if Path(entry).suffix.lower() in FORMATS:
        return True
    return os.path.isfile(entry) or bool(re.fullmatch(r"\S+(\.\w{1,8}|/)", entry))


def read_table(path: str, other: str | None = None) -> list[Any]:
    """Return the rows of a file, dictionaries or texts.

    other: the form of a file of unknown ending; None = it is refused. Raises
    ValueError, OSError, or whatever the library raises that reads the file.
    """
    form = FORMATS.get(Path(path).suffix.lower(), other)
    if form in ("csv", "parquet"):
        return read_columns(path, form)
    if not form:
        raise ValueError("it is a file of another kind")

    text = Path(path).read_text(encoding="utf-8-sig").strip()
    # A line ends at a line feed alone: a text may well have other signs that end a line.
    lines = [line.strip() for line in text.split("\n") if line.strip()]
    if form != "json":
        return lines

    # datasets would name no line where one is wrong, and take texts like dates for dates.
    is_list = text.startswith("[")
    return json.loads(text if is_list else "[" + ",\n".join(lines) + "]")


def read_columns(path: str, form: str) -> list[Row]:
    """Return the rows of a file in the form csv or parquet."""
    import datasets

    # The library would use the network to count downloads, and log what blame tells.
    datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False
    datasets.logging.set_verbosity(logging.CRITICAL)

    # Without streaming a copy of the file would stay in the cache.
    options: dict[str, Any] = {"split": "train", "streaming": True}
    if form == "csv":
        options |= {"encoding": "utf-8-sig", "keep_default_na": False}
    rows = list(datasets.load_dataset(form, data_files=glob.escape(path), **options))

    # That is the field which pandas makes of commas without quotes.
    if any("__index_level_0__" in row for row in rows):
        raise ValueError("its rows have more fields than its first line")
    return rows


def text_in(row: Row, name: str) -> str:
    """Return the text in a field of a row.

    Raises KeyError where the row lacks it, ValueError where it is no text.
    """
    if not isinstance(row[name], str):
        raise ValueError(f"its {name} is {shorten(row[name])}, no text")
    return row[name]


# -------------------------------------------------------------------------- the prompts
class Prompts(NamedTuple):
    """What PROMPTS and EVAL_PROMPTS stand for."""

    rows: list[Row]  # to train on
    eval_rows: list[Row]  # held out
    count: int  # type: ignore[assignment]  # of all rows, those left out too
    eval_source: str  # EVAL_PROMPTS or EVAL_SHARE: where the eval_rows come from


def read_prompts(
    prompts: list[str],
    eval_prompts: list[str],
    eval_share: float,
    prompt_field: str,
    seed: int,
) -> Prompts:
    """Return the rows to train on, the rows held out, and how many were read.

    Where PROMPTS names a file, EVAL_SHARE of all its rows is held out; else, or where
    that is 0, EVAL_PROMPTS are, and nothing where these are []. Prompts that are empty, or
    came before, are left out. Raises SettingsError also where both ways are wished for.
    """
    eval_source = "EVAL_PROMPTS"
    has_file = any(is_file(entry) for entry in prompts)
    if has_file and eval_prompts and eval_share > 0:
        check_eval_prompts(eval_prompts, eval_share)
        eval_source = "EVAL_SHARE"

    rows_read = read_rows("PROMPTS", prompts, prompt_field)
    texts = {str(row["prompt"]) for row in rows_read}
    train_count = len(texts - {""})
    if eval_source == "EVAL_PROMPTS":
        rows_read += read_rows("EVAL_PROMPTS", eval_prompts, prompt_field)

    rows = unique_rows(rows_read)
    if eval_source == "EVAL_PROMPTS":
        rows, eval_rows = rows[:train_count], rows[train_count:]
    else:
        rows, eval_rows = hold_out(rows, eval_share, seed)
    return Prompts(rows, eval_rows, len(rows_read), eval_source)


def check_eval_prompts(eval_prompts: list[str], eval_share: float) -> None:
    """Refuse a file in EVAL_PROMPTS where a share of PROMPTS is held out in its place."""
    for entry in eval_prompts:
        if is_file(entry):
            share = f"EVAL_SHARE {eval_share:g} of PROMPTS is held out in its place"
            remedy = "give EVAL_SHARE 0 to measure EVAL_PROMPTS"
            name = shorten(entry)
            raise SettingsError(f"EVAL_PROMPTS is {name}, but {share}: {remedy}")


def read_rows(setting: str, entries: list[str], prompt_field: str) -> list[Row]:
    """Return the rows of a setting's entries: those of a file, one for a text."""
    rows: list[Row] = []
    remedy = f"give a {', '.join(FORMATS)} file with a prompt a row, in UTF-8"
    for entry in entries:
        with blame(setting, entry, remedy):
            table = read_table(entry) if is_file(entry) else [entry]
            numbered = enumerate(table, start=1)
            entry_rows = [with_prompt(row, prompt_field, number) for number, row in numbered]
            if not any(row["prompt"] for row in entry_rows):
                raise ValueError("it has no prompts")
            rows += entry_rows
    return rows


def unique_rows(rows: list[Row]) -> list[Row]:
    """Return the first row of each prompt that is not empty; fields it lacks are None."""
    # All get the same fields, since a function that scores texts wants each one of all rows.
    fields: Row = {}
    for row in rows:
        fields.update(dict.fromkeys(row))

    unique: dict[str, Row] = {}
    for row in rows:
        unique.setdefault(str(row["prompt"]), fields | row)
    unique.pop("", None)
    return list(unique.values())


def with_prompt(row: Row | str, prompt_field: str, number: int) -> Row:
    """Return a row with its prompt: a text, which may be empty, or a list of messages.

    number: of the row in its file. Raises ValueError where it has no prompt.
    """
    if isinstance(row, str):
        return with_prompt({"prompt": row}, "prompt", number)

    field = field_of_prompt(row, prompt_field, number)
    prompt = row[field]
    if isinstance(prompt, str) and not prompt.strip():
        return row | {"prompt": ""}
    if field == "instruction" and row.get("input"):
        prompt = f"{prompt}\n{row['input']}"

    # A field may hold anything. Whatever goes wrong with it here, it is no prompt.
    with suppress(Exception):
        prompt = before_the_answer(prompt)
        check_text(last_said(prompt))
        return row | {"prompt": prompt}
    raise ValueError(f"row {number}: its {field} is {shorten(row[field])}, no text")


def field_of_prompt(row: Row, prompt_field: str, number: int) -> str:
    """Return the field of a row's prompt: PROMPT_FIELD, or the first usual one."""
    names = USUAL_FIELDS if prompt_field == "auto" else (prompt_field,)
    for name in names:
        if name in row:
            return name
    fields = f"PROMPT_FIELD is {prompt_field}, and its fields are {', '.join(row)}"
    raise ValueError(f"row {number}: {fields}")


def before_the_answer(prompt: Prompt) -> Prompt:
    """Return a prompt without the answers at its end, which are for the model to say."""
    while isinstance(prompt, list) and prompt[-1]["role"] == "assistant":
        prompt = prompt[:-1]
    return prompt


def check_text(text: Any) -> None:
    """Raise ValueError where this is no text, or one that can't be written."""
    if not isinstance(text, str) or not text.strip() or "\0" in text:
        raise ValueError("it is no text")
    text.encode()  # an error for half a character, as "\ud800"


def last_said(prompt: Prompt) -> str:
    """Return a prompt, or the last message of one that is a conversation."""
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


def is_turn(prompt: Prompt, chat_template: bool) -> bool:
    """Return whether a prompt goes through the template, as conversations always do."""
    return chat_template or not isinstance(prompt, str)


# ------------------------------------------------------------------- shares and batches
def hold_out(rows: list[Any], eval_share: float, seed: int) -> tuple[list[Any], list[Any]]:
    """Return the rows to train on and a share that is held out, in an order by seed.

    The share is rounded up, but at least one row stays to train on.
    """
    import numpy

    order = numpy.random.default_rng(seed).permutation(len(rows))
    shuffled = [rows[place] for place in order]
    count = min(math.ceil(eval_share * len(rows)), len(rows) - 1)
    return shuffled[count:], shuffled[:count]


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


def read_data(
    data: str,
    eval_share: float,
    seed: int,
    read: Callable[..., Any],
    remedy: str,
    **arguments: Any,
) -> tuple[list[Any], list[Any], Counter[str]]:
    """Return the examples in DATA, those held out, and a count of the rows left out.

    read: is called as read(row, left_out, **arguments). It returns the example in a row,
    None where there is no answer, and may count in left_out what it does not use. Raises
    SettingsError, with the remedy, where the file or one of its rows can't be read.
    """
    unique: dict[str, Any] = {}
    left_out: Counter[str] = Counter()
    with blame("DATA", data, remedy):
        for number, row in enumerate(read_table(data, "text"), start=1):
            if isinstance(row, str):
                row = {"text": row}
            try:
                example = read(row, left_out, **arguments)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                reason = f"it has no {error}" if isinstance(error, KeyError) else error
                raise ValueError(f"row {number}: {reason}") from error

            if example is None:
                left_out["without an answer"] += 1
            elif str(example) in unique:
                left_out["given twice"] += 1
            else:
                unique[str(example)] = example

        if len(unique) < 2:
            raise ValueError(f"{len(unique)} rows of it can be used, where 2 are the least")

    examples, eval_examples = hold_out(list(unique.values()), eval_share, seed)
    return examples, eval_examples, left_out
