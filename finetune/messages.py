"""Messages as people have them, and as chat templates take them."""

from typing import Any

from finetune.errors import shorten
from finetune.fields import (
    Fields,
    LeftOut,
    Tally,
    as_list,
    checked_text,
    parsed,
    switch_in,
    without_none,
)
from finetune.files import Row

ROLES = {
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatbot": "assistant",
    "model": "assistant",
    "system": "system",
    "developer": "system",
    "tool": "tool",
}

# What a message may have beside its role and its content, for chat templates to render.
OF_A_MESSAGE = ("tool_calls", "tool_call_id", "reasoning_content")

# Marks of a message that is not to be learned: OpenAI's, Axolotl's, and ms-swift's.
MARKS = ("weight", "train", "training", "loss")


# --------------------------------------------------------------------------- as they come
def read_turns(messages: list[Any], name: str, tally: Tally) -> list[Row]:
    """Return messages, of OpenAI's form or ShareGPT's, with role and content each.

    name: of their field. Raises LeftOut for a role that is unknown, and where there are none.
    """
    if not messages:
        raise LeftOut("empty")
    turns = []
    unused = set()
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, dict):
            raise ValueError(f"its {name} has {shorten(message)}, no message")
        fields = Fields(message)
        turns.append(read_turn(fields, f"{name} {number}"))
        unused.update(fields.unused)
    tally.unused.update(f"{name}.{part}" for part in sorted(unused))
    return turns


def read_turn(fields: Fields, place: str) -> Row:
    """Return a message as {"role", "content"}, and what else of it a template may render.

    place: field and number, for errors.
    """
    name = fields.first(("role", "from"))
    if name is None:
        raise ValueError(f"its {place} has no role, but {fields.names()}")
    role = checked_text(fields.take(name), f"{place}, {name}").strip().lower()
    if role not in ROLES:
        raise LeftOut(f"with the unknown role {shorten(role)}")

    # Where an assistant calls a tool, its content is often None.
    name = fields.first(("content", "value"))
    if not fields.has_any(("content", "value", "tool_calls")):
        raise ValueError(f"its {place} has no content, but {fields.names()}")
    content = content_of(fields.take(name), f"{place}, {name}") if name else ""

    # OpenAI's old form of tool_calls, which templates do not know.
    if fields.is_filled("function_call"):
        raise LeftOut("with function_call, in place of tool_calls")
    turn: Row = {"role": ROLES[role], "content": content}
    for name in OF_A_MESSAGE:
        if fields.is_filled(name):
            turn[name] = without_none(fields.take(name))
    if "tool_calls" in turn:
        turn["tool_calls"] = [with_arguments(call) for call in as_list(turn["tool_calls"], place)]
    # What a tool is called some templates render.
    if turn["role"] == "tool" and fields.is_filled("name"):
        turn["name"] = fields.take("name")
    for name in MARKS:
        # What is neither yes nor no is not used, which is told.
        switch = switch_in(fields.row.get(name))
        if switch is not None:
            fields.take(name)
        if switch is False:
            turn["weight"] = 0
    return turn


def messages_in(value: Any) -> list[Any] | None:
    """Return the messages in a field that may hold a text as well; None where that is one."""
    if isinstance(value, dict):
        return [value]
    return value if isinstance(value, list) else None


def with_arguments(call: Any) -> Any:
    """Return a call of a tool, its arguments as templates take them: OpenAI has them as a text."""
    if not isinstance(call, dict):
        return call
    changed = {}
    for name, value in call.items():
        changed[name] = value
        if name == "function":
            changed[name] = with_arguments(value)
        elif name == "arguments" and isinstance(value, str):
            changed[name] = parsed(value)
    return changed


def content_of(content: Any, place: str) -> str:
    """Return the text of a message, which may be in parts of the type text."""
    if isinstance(content, list):
        texts = [text_of_part(part, place) for part in content]
        return "".join(texts)
    return checked_text(content, place)


def text_of_part(part: Any, place: str) -> str:
    """Return the text of a part of a message; raise LeftOut for a picture and the like."""
    if not isinstance(part, dict) or part.get("type", "text") != "text":
        raise LeftOut("with something else than text in a message")
    return checked_text(part.get("text"), place)


# --------------------------------------------------------------------- as templates take them
def prompt_text(turn: Row) -> str:
    """Return what a turn says, with its input where there is one."""
    if not turn.get("input"):
        return turn["content"]
    return turn["content"] + "\n" + turn["input"]


def before_the_answer(turns: list[Row]) -> list[Row]:
    """Return turns without the answers at their end."""
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return turns


def plain_turns(turns: list[Row]) -> list[Row]:
    """Return turns as chat templates take them, each with its input in its content."""
    plain = []
    for turn in turns:
        others = {name: turn[name] for name in turn if name not in ("input", "weight")}
        plain.append(others | {"content": prompt_text(turn)})
    return plain
