"""Conversations in a chat template: rendered, and nothing of them left away in silence."""

import transformers

from finetune.errors import shorten
from finetune.fields import LeftOut
from finetune.files import Row
from finetune.tokens import render

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
        if (
            turn["content"].strip()
            and not is_there
            and is_ignored(tokenizer, turns, place, "content")
        ):
            raise LeftOut(f"with a turn of {role}, which the chat template leaves away")
        # Of earlier answers a template may well leave the reasoning away.
        is_last = place == len(turns) - 1
        for name in ("tool_calls", "reasoning_content") if is_last else ("tool_calls",):
            if turn.get(name) and is_ignored(tokenizer, turns, place, name):
                raise LeftOut(f"with {name}, which the chat template does not know")
    return text


def is_ignored(tokenizer: Tokenizer, turns: list[Row], place: int, name: str) -> bool:
    """Return whether a conversation is the same text without a field of one of its turns."""
    turn = {key: value for key, value in turns[place].items() if key != name}
    turn.setdefault("content", "")
    changed = [*turns[:place], turn, *turns[place + 1 :]]
    try:
        return render(tokenizer, changed) == render(tokenizer, turns)
    except Exception:
        # The template missed it.
        return False


def rendering(
    tokenizer: Tokenizer,
    turns: list[Row],
    tools: list[Row] | None,
    add_generation_prompt: bool = False,
) -> str:
    """Return turns in the tokenizer's template; raise LeftOut with its reason where it refuses."""
    try:
        return render(tokenizer, turns, tools, add_generation_prompt)
    # A template is a program of somebody else's.
    except Exception as error:
        reason = f"that the chat template refuses ({shorten(error)})"
        raise LeftOut(reason) from error
