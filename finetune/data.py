"""The rows of a file, one by one, and a share of them that is held out."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from finetune.errors import blame
from finetune.fields import Fields, LeftOut, Tally
from finetune.files import read_table

FILE_REMEDY = "give a file that is there, in UTF-8; docs/data.md tells which are read"


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
    with blame("DATA", data, FILE_REMEDY):
        table = read_table(data, by_name=True)
    with blame("DATA", data, reader.remedy, length=600):
        if not table:
            raise ValueError("it is empty")
        for example in read_each(table, reader.read, tally):
            key = str(example)
            tally.left_out["given twice"] += key in unique
            unique.setdefault(key, example)

        if len(unique) < 2:
            usable = f"{len(unique)} of {len(table)} rows can be used, where 2 are the least"
            reasons = tally.reasons() or "there are no more"
            raise ValueError(f"{usable}: {reasons}{found_in(table)}")

    rows, eval_rows = hold_out(list(unique.values()), eval_share, seed)
    return Data(rows, eval_rows, tally)


def read_each(
    table: list[Any],
    read: Callable[[Any, Tally], Any],
    tally: Tally,
) -> list[Any]:
    """Return what is read of each row; count in tally what is told of them, and those left out.

    read: as of a Reader. Raises ValueError with the number of a row that can't be read.
    """
    found = []
    for number, row in enumerate(table, start=1):
        told = Tally()
        try:
            found.append(read(row, told))
            tally.add(told)
        except LeftOut as reason:
            tally.left_out[str(reason)] += 1
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise ValueError(f"row {number}: {error}") from error
    return found


def found_in(table: list[Any]) -> str:
    """Return which fields the first row has, behind a semicolon, where it has any."""
    if not isinstance(table[0], dict):
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
