"""What can go wrong, said in one line with a remedy."""

import re
from collections.abc import Iterator
from contextlib import contextmanager


class SettingsError(Exception):
    """Settings or input that can't work.

    Its arguments are lines, and each names a setting, its value and a remedy.
    """


class RunError(Exception):
    """A failure in the middle of a run that the user can mend."""


class Stopped(KeyboardInterrupt):
    """Raised where Ctrl-C or SIGTERM ends the run; its argument is the signal's number."""


def shorten(value: object, length: int = 80) -> str:
    """Return the first line of the value's text, of at most so many characters."""
    first, *others = str(value).strip().splitlines() or ["empty"]
    if not others and len(first) <= length:
        return first
    return first[: length - 1].rstrip(" .:") + "…"


def end_of(text: str, length: int) -> str:
    """Return the end of a text, of at most so many characters."""
    return text if len(text) <= length else "…" + text[1 - length :].lstrip()


def telling_text(error: BaseException) -> str:
    """Return what an error says, with its second line in the first where that announces it."""
    # The text of a KeyError is a single word, which says nothing without its class.
    text = str(error).strip()
    if " " not in text:
        return repr(error)
    first, _, others = text.partition("\n")
    if first.rstrip().endswith(":"):
        return f"{first.rstrip()} {others.strip()}"
    return text


@contextmanager
def blame(name: str, value: object, remedy: str, length: int = 200) -> Iterator[None]:
    """Turn what is raised here into a SettingsError that names a setting, its value, a remedy.

    length: of the reason in characters, at most.
    """
    try:
        yield
    # A broken folder can make transformers raise anything, SystemExit included.
    except (Exception, SystemExit) as error:
        if isinstance(error, SettingsError) or lacks_memory(error):
            raise
        reason = shorten(telling_text(error), length).rstrip(".")
        problem = f"{name} is {shorten(value)}: it can't be used ({reason}): {remedy}"
        raise SettingsError(problem) from error


def lacks_memory(error: BaseException) -> bool:
    """Return whether an error comes from too little memory."""
    texts = "can't allocate memory|not enough memory|out of memory|ALLOC_FAILED"
    return isinstance(error, MemoryError) or bool(re.search(texts, str(error)))
