"""The fields of a row, which of them are used, and what is told of those that are not."""

import ast
import json
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from finetune.errors import shorten

# What a mark may be that says yes or no, in lower case; a csv has it as a text.
SWITCHES = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}

LIMIT = 20  # of what is told in a line

# The fields that hold lists, beside those of messages.
LISTS = ("history", "tools", "ranking", "instances")


class LeftOut(Exception):
    """Raised where a row can't be used, but the others can; its argument is the reason."""


@dataclass
class Tally:
    """What is told of rows: how many are left out or changed, and what of them is not used."""

    left_out: Counter[str] = field(default_factory=Counter)  # rows, by the reason
    changed: Counter[str] = field(default_factory=Counter)  # rows, by what is not as it was
    unused: Counter[str] = field(default_factory=Counter)  # rows with a field, by its name

    def add(self, other: "Tally") -> None:
        """Count what another tally counted."""
        self.left_out.update(other.left_out)
        self.changed.update(other.changed)
        self.unused.update(other.unused)

    def reasons(self) -> str:
        """Return why rows were left out, and how many for each reason, in words."""
        return ", ".join(in_words(self.left_out))

    def unused_fields(self) -> str:
        """Return the fields that are not used, and how many rows have each, in words."""
        words = []
        for name, count in self.unused.items():
            words.append(f"{shown_name(name)} ({count:,})")
        if len(words) > LIMIT:
            words[LIMIT:] = [f"{len(words) - LIMIT} more"]
        return ", ".join(words)

    def in_words(self, with_fields: bool = True) -> str:
        """Return all that is told, behind a comma or a semicolon; with_fields: of unused ones too."""
        text = "".join(f", {words}" for words in in_words(self.changed))
        if self.reasons():
            text += f"; left out: {self.reasons()}"
        if self.unused and with_fields:
            text += f"; fields not used: {self.unused_fields()}"
        return text


def shown_name(name: str) -> str:
    """Return the name of a field as it is shown: in a line, and without signs that are none."""
    shown = "".join(sign if sign.isprintable() else "?" for sign in shorten(name, 40))
    return shown if name else "a nameless one"


def in_words(counts: Counter[str]) -> list[str]:
    """Return each number that is not 0 with what it counts, many of them in one."""
    counted = [(count, reason) for reason, count in counts.items() if count]
    words = [f"{count:,} {reason}" for count, reason in counted[:LIMIT]]
    if len(counted) > LIMIT:
        rest = sum(count for count, _ in counted[LIMIT:])
        words.append(f"{rest:,} for other reasons")
    return words


# --------------------------------------------------------------------------- the fields
class Fields:
    """The fields of a row that are not empty, and which of them are not used yet."""

    def __init__(self, row: Any) -> None:
        if isinstance(row, str):
            row = {"text": row}
        if not isinstance(row, dict):
            raise ValueError(f"it is {shorten(row)}: no text, and nothing with fields")
        self.row = row
        self.unused = [name for name in row if self.is_filled(name)]

    def is_filled(self, name: str) -> bool:
        """Return whether there is something in a field."""
        value = self.row.get(name)
        # In a csv an empty list is a text.
        if name in LISTS and isinstance(value, str):
            value = parsed(value)
        return not is_empty(value)

    def first(self, names: Iterable[str]) -> str | None:
        """Return the first of these fields that is filled, None where none is."""
        return next((name for name in names if self.is_filled(name)), None)

    def has_any(self, names: Iterable[str]) -> bool:
        """Return whether the row has one of these fields, though it may be empty."""
        return any(name in self.row for name in names)

    def names(self) -> str:
        """Return the names of all fields, in words."""
        return shorten(", ".join(self.row)) if self.row else "none"

    def take(self, name: str) -> Any:
        """Return what is in a field, which is used from now on.

        Raises ValueError where there is no such field, LeftOut where it is empty.
        """
        if name not in self.row:
            raise ValueError(f"it has no {name}: its fields are {self.names()}")
        if not self.is_filled(name):
            raise LeftOut(f"with an empty {name}")
        if name in self.unused:
            self.unused.remove(name)
        return self.row[name]

    def take_text(self, name: str) -> str:
        """Return the text in a field."""
        return checked_text(self.take(name), name)

    def take_list(self, name: str) -> list[Any]:
        """Return the list in a field, in which it may be written as a text."""
        return as_list(self.take(name), name)


def is_empty(value: Any) -> bool:
    """Return whether nothing is in a field: None, a blank text, or an empty list."""
    if isinstance(value, str):
        return not value.strip()
    return value is None or value == [] or value == {}


def checked_text(value: Any, name: str) -> str:
    """Return what is in a field of that name, or raise ValueError where it is no text."""
    if isinstance(value, bool | int | float):
        raise ValueError(f"its {name} is {value}, no text: put it in quotes")
    if not isinstance(value, str):
        raise ValueError(f"its {name} is {shorten(value)}, no text")
    # An error for half a character, as "\ud800", which can't be written.
    if "\0" in value or value != value.encode(errors="replace").decode():
        raise ValueError(f"its {name} is {shorten(ascii(value))}, no text")
    return value


def as_list(value: Any, name: str) -> list[Any]:
    """Return a list, or one that is written as a text, in JSON or in Python, as in a csv."""
    if isinstance(value, dict):
        return [value]
    entries = parsed(value) if isinstance(value, str) else value
    if not isinstance(entries, list):
        raise ValueError(f"its {name} is {shorten(value)}, no list")
    return entries


def as_switch(value: Any, name: str) -> bool:
    """Return a mark of that name, True or False, 1 or 0, or one of these as a text."""
    switch = switch_in(value)
    if switch is None:
        raise ValueError(f"its {name} is {shorten(value)}: give 0 or 1, false or true")
    return switch


def switch_in(value: Any) -> bool | None:
    """Return whether a mark says yes or no, None where it says neither."""
    return SWITCHES.get(str(value).strip().lower())


def parsed(text: str) -> Any:
    """Return what a text says in JSON, or in Python as pandas writes a list; else the text."""
    with suppress(ValueError, RecursionError):
        return json.loads(text)
    with suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return text


def without_none(value: Any) -> Any:
    """Return what is nested in lists and fields without None, which a table has for nothing."""
    if isinstance(value, dict):
        return {name: without_none(part) for name, part in value.items() if part is not None}
    if isinstance(value, list):
        return [without_none(part) for part in value]
    return value
