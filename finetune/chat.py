"""Conversations in a chat template: rendered, and nothing of them left away in silence."""

import transformers

from finetune.errors import shorten
from finetune.fields import LeftOut
from finetune.files import Row

Tokenizer = transformers.PreTrainedTokenizerBase


def checked_rendering(
    tokenizer: Tokenizer,
    turns: list[Row],
    tools: list[Row] | None,
    add_generation_prompt: bool = False,
) -> str:
    """Return a conversation in the template; raise LeftOut where it leaves something away."""
    text = rendering(tokenizer, turns, tools, add_generation_prompt)
    if not text.strip():
        raise LeftOut("of which the chat template renders nothing")
    if tools and text == rendering(tokenizer, turns, None, add_generation_prompt):
        raise LeftOut("with tools, which the chat template does not know")
    for place, turn in enumerate(turns):
        role = turn["role"]
        # What a user or an assistant says is seldom in what another one says.
        is_there = role in ("user", "assistant") and turn["content"].strip() in text
        if turn["content"].strip() and not is_there:
            other = {"content": "Something else."}
            changed = [*turns[:place], turn | other, *turns[place + 1 :]]
            if is_same(tokenizer, text, changed, tools, add_generation_prompt):
                raise LeftOut(f"with a turn of {role}, which the chat template leaves away")
        if turn.get("tool_calls"):
            check_known(tokenizer, turns[: place + 1], tools, "tool_calls")
    return text


def check_known(
    tokenizer: Tokenizer,
    turns: list[Row],
    tools: list[Row] | None,
    name: str,
) -> None:
    """Raise LeftOut where the last turn has a field of that name that the template leaves away."""
    *before, last = turns
    if last.get(name):
        others = {key: value for key, value in last.items() if key != name}
        text = rendering(tokenizer, turns, tools)
        if is_same(tokenizer, text, [*before, others], tools, False):
            raise LeftOut(f"with {name}, which the chat template does not know")


def is_same(
    tokenizer: Tokenizer,
    text: str,
    turns: list[Row],
    tools: list[Row] | None,
    add_generation_prompt: bool,
) -> bool:
    """Return whether turns, which are changed ones, are rendered as the same text."""
    try:
        return rendering(tokenizer, turns, tools, add_generation_prompt) == text
    except LeftOut:
        # The template missed what was changed.
        return False


def rendering(
    tokenizer: Tokenizer,
    turns: list[Row],
    tools: list[Row] | None,
    add_generation_prompt: bool = False,
) -> str:
    """Return turns in the tokenizer's template; raise LeftOut with its reason where it refuses."""
    try:
        text = tokenizer.apply_chat_template(
            turns,
            tools=tools,  # type: ignore[arg-type]
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
        )
    # A template is a program of somebody else's.
    except Exception as error:
        reason = f"that the chat template refuses ({shorten(error)})"
        raise LeftOut(reason) from error
    return str(text)
