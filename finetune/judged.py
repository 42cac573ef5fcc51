"""How a text is written that a reward model judges, in its training and in PPO alike."""

from typing import Any

import transformers

from finetune.chat import checked_rendering
from finetune.comparisons import Pair, joined_text
from finetune.data import Data
from finetune.dialogues import Dialogue
from finetune.errors import blame
from finetune.fields import LeftOut, Tally
from finetune.files import Row
from finetune.messages import plain_turns
from finetune.tokens import without_second_start

Tokenizer = transformers.PreTrainedTokenizerBase


# ----------------------------------------------------------------------------- the form
def conversation_form(tokenizer: Tokenizer, rows: list[list[Pair]]) -> str:
    """Return how conversations are written: in the chat template, in lines, or as mere texts.

    As texts where the rows have no conversations. A reward model's config.json keeps it.
    """
    dialogues = [dialogue for row in rows for pair in row for dialogue in pair if dialogue]
    if all(dialogue.form == "text" for dialogue in dialogues):
        return "text"
    return "chat_template" if tokenizer.chat_template else "lines"


def judged_text(tokenizer: Tokenizer, dialogue: Dialogue, form: str) -> str:
    """Return what is judged: a text as it is, a conversation in its form, up to its last answer.

    Raises LeftOut where the chat template does not take it.
    """
    *before, last = plain_turns(dialogue.turns)
    if dialogue.form == "text":
        return last["content"]
    return beginning(tokenizer, before, dialogue.tools, form) + last["content"]


def beginning(
    tokenizer: Tokenizer,
    turns: list[Row],
    tools: list[Row] | None,
    form: str,
) -> str:
    """Return what stands before an answer to these turns; raise LeftOut where that can't be."""
    if form == "chat_template":
        return checked_rendering(tokenizer, turns, tools, add_generation_prompt=True)
    if tools or any(turn.get("tool_calls") for turn in turns):
        raise LeftOut("with tools, for which the model has no chat template")
    # A model that learned texts alone has a question and its answer in one line.
    if form == "text" and len(turns) == 1:
        return joined_text(turns[0]["content"], "")
    return "".join(turn["content"] + "\n" for turn in turns)


def prompt_before(tokenizer: Tokenizer, row: Row, is_chat: bool, form: str) -> str:
    """Return what stands before the response to a row's prompt in PPO, as the model learned it.

    is_chat: whether the prompt was put into a chat template; else the response continues it.
    """
    prompt = row["prompt"]
    if not is_chat:
        return prompt
    if isinstance(prompt, str):
        turns, tools = [{"role": "user", "content": prompt}], None
    else:
        turns, tools = prompt, row.get("tools")
    return beginning(tokenizer, turns, tools, form)


# --------------------------------------------------------------------------- the tokens
def tokenize_comparisons(
    tokenizer: Tokenizer,
    data: Data,
    settings: Any,
) -> tuple[str, list[Row], list[Row]]:
    """Return the form of conversations, the examples to train on, and those held out.

    settings: DATA is named where its rows can't be used.
    """
    form = conversation_form(tokenizer, data.rows + data.eval_rows)
    remedy = "name a model with a chat template that takes them"
    with blame("DATA", settings.data, remedy, length=600):
        pairs = pairs_of(tokenizer, data.rows, form, data.tally)
        eval_pairs = pairs_of(tokenizer, data.eval_rows, form, data.tally)
        examples = tokenize(tokenizer, pairs, data.tally)
        eval_examples = tokenize(tokenizer, eval_pairs, data.tally)
        if not examples:
            raise ValueError(f"none of its rows can be used: {data.tally.reasons()}")
        # Where no row is left that was held out, the last of the others is.
        if not eval_examples:
            last = examples[-1]["row"]
            eval_examples = [example for example in examples if example["row"] == last]
            examples = [example for example in examples if example["row"] != last]
        if not examples:
            raise ValueError(f"a single row of it can be used: {data.tally.reasons()}")
    return form, examples, eval_examples


def row_count(examples: list[Row]) -> int:
    """Return of how many rows the examples are."""
    return len({example["row"] for example in examples})


def sequences_of(examples: list[Row]) -> list[list[int]]:
    """Return the token ids of all texts of the examples."""
    return [sequence for example in examples for sequence in example["sequences"]]


def pairs_of(
    tokenizer: Tokenizer,
    rows: list[list[Pair]],
    form: str,
    tally: Tally,
) -> list[tuple[int, str | None, str | None]]:
    """Return (row's number, better text, worse text) for each comparison of the rows.

    tally: counts the rows that the chat template does not take.
    """
    pairs: list[tuple[int, str | None, str | None]] = []
    for number, row in enumerate(rows):
        try:
            texts = [texts_of_pair(tokenizer, pair, form) for pair in row]
            pairs += [(number, better, worse) for better, worse in texts]
        except LeftOut as reason:
            tally.left_out[str(reason)] += 1
    return pairs


def texts_of_pair(
    tokenizer: Tokenizer,
    pair: Pair,
    form: str,
) -> tuple[str | None, str | None]:
    """Return the better text and the worse one, None where there is none."""
    better, worse = pair
    better_text = better and judged_text(tokenizer, better, form)
    worse_text = worse and judged_text(tokenizer, worse, form)
    if better_text == worse_text:
        raise LeftOut("where nothing is preferred")
    return better_text, worse_text


def tokenize(
    tokenizer: Tokenizer,
    pairs: list[tuple[int, str | None, str | None]],
    tally: Tally,
) -> list[Row]:
    """Return an example for each comparison: its row's number, its texts, their signs and tokens.

    sign: 1.0 of a better text, -1.0 of a worse one. sequences: the token ids of each text. The
    longest of them is input_ids, by which comparisons of like length are put together. tally:
    counts texts that were cut, and comparisons of which nothing is left by that.
    """
    examples = []
    for number, better, worse in pairs:
        signed = [(better, 1.0), (worse, -1.0)]
        texts = tuple(text for text, _ in signed if text is not None)
        signs = tuple(sign for text, sign in signed if text is not None)
        sequences = [judged_ids(tokenizer, text) for text in texts]
        cut_count = sum(is_cut(tokenizer, text, ids) for text, ids in zip(texts, sequences))
        tally.changed["texts cut"] += cut_count
        if cut_count and len(sequences) == 2 and sequences[0] == sequences[1]:
            tally.left_out["that are the same after they were cut"] += 1
            continue
        example = {
            "row": number,
            "texts": texts,
            "signs": signs,
            "sequences": sequences,
            "input_ids": max(sequences, key=len),
        }
        examples.append(example)
    return examples


def is_cut(tokenizer: Tokenizer, text: str, ids: list[int]) -> bool:
    """Return whether a text, whose token ids these are, was too long and lost its beginning."""
    length = tokenizer.model_max_length
    # Only what fills the length may have been cut; a second start token is not among the ids.
    return len(ids) + 1 >= length and len(tokenizer(text)["input_ids"]) > length


def judged_ids(tokenizer: Tokenizer, text: str, length: int | None = None) -> list[int]:
    """Return the token ids of a text; of one that is too long, the end.

    length: in tokens, at most; None = as the tokenizer has it.
    """
    encoded: Any = tokenizer(text, truncation=True, max_length=length)
    return without_second_start(tokenizer, encoded["input_ids"])
