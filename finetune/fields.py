"""The fields of a row, which of them are used, and what is told of those that are not."""

import ast
import json
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from finetune.errors import shorten

# What a mark may be that says yes or no, in lower case; a csv has it as a text.
SWITCHES = {"0": False, "0.0": False, "false": False, "1": True, "1.0": True, "true": True}

# The fields that hold lists, beside those of messages.
LISTS = ("history", "tools")


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

    def in_words(self, with_fields: bool = True) -> str:
        """Return all that is told, behind a comma or a semicolon; with_fields: of unused ones too."""
        text = "".join(f", {words}" for words in in_words(self.changed))
        if self.reasons():
            text += f"; left out: {self.reasons()}"
        if self.unused and with_fields:
            counts = [f"{name or 'a nameless one'} ({self.unused[name]:,})" for name in self.unused]
            text += f"; fields not used: {', '.join(counts)}"
        return text


def in_words(counts: Counter[str]) -> list[str]:
    """Return each number that is not 0 with what it counts."""
    return [f"{count:,} {reason}" for reason, count in counts.items() if count]


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

    def has(self, name: str) -> bool:
        """Return whether the row has a field, though it may be empty; None is nothing."""
        return self.row.get(name) is not None

    def is_filled(self, name: str) -> bool:
        """Return whether there is something in a field."""
        value = self.row.get(name)
        # In a csv an empty list is a text.
        if name in LISTS and isinstance(value, str):
            value = parsed(value)
        return not is_empty(value)

    def present(self, names: tuple[str, ...]) -> list[str]:
        """Return those of these fields that the row has, the empty ones last."""
        there = [name for name in names if self.has(name)]
        filled = [name for name in there if self.is_filled(name)]
        return filled + [name for name in there if name not in filled]

    def first(self, names: tuple[str, ...]) -> str | None:
        """Return the first of these fields that is filled, or else there; None where none is."""
        return next(iter(self.present(names)), None)

    def names(self) -> str:
        """Return the names of all fields, in words."""
        return shorten(", ".join(self.row)) if self.row else "none"

    def take(self, name: str) -> Any:
        """Return what is in a field, which is used from now on; an error where there is none."""
        if not self.has(name):
            raise ValueError(f"it has no {name}: its fields are {self.names()}")
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
    text = str(value).strip().lower()
    if text not in SWITCHES:
        raise ValueError(f"its {name} is {shorten(value)}: give 0 or 1, false or true")
    return SWITCHES[text]


def is_no(value: Any) -> bool:
    """Return whether a mark says no: False, 0, or one of these as a text."""
    return SWITCHES.get(str(value).strip().lower()) is False


def parsed(text: str) -> Any:
    """Return what a text says in JSON, or in Python as pandas writes a list; else the text."""
    with suppress(ValueError):
        return json.loads(text)
    with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
        return ast.literal_eval(text)
    return text
