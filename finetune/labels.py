"""Which tokens of an example are learned: those of its answers, and the end token."""

from typing import NamedTuple

import transformers

from finetune.chat import check_known, checked_rendering, rendering
from finetune.data import Data
from finetune.errors import SettingsError
from finetune.examples import in_template, learned_places, shown_of
from finetune.fields import LeftOut, Tally
from finetune.files import Row
from finetune.messages import plain_turns, prompt_text
from finetune.tokens import without_second_start

Tokenizer = transformers.PreTrainedTokenizerBase

TOO_LONG = "too long for an answer"


class Piece(NamedTuple):
    """A text to learn from.

    spans: where what is learned begins and ends in the text. place: of the first turn of it.
    """

    text: str
    spans: list[tuple[int, int]]
    place: int


class Learned(NamedTuple):
    """What is learned: examples, input_ids and labels (-100 = not learned), and the row of each."""

    examples: list[Row]
    rows: list[Row]


def tokenize(
    tokenizer: Tokenizer,
    rows: list[Row],
    template: str,
    length: int,
    tally: Tally,
) -> Learned:
    """Return the examples in rows, one each, or one for each of its answers.

    rows: as of read_example; what of them can't be used is counted in tally. length: of an example
    in tokens, at most. Raises SettingsError where all are too long, ValueError where none can be
    used.
    """
    if not tokenizer.is_fast:
        raise ValueError("the model's tokenizer does not tell where its tokens are")
    if not tokenizer.chat_template and any(row["form"] == "messages" for row in rows):
        raise ValueError("it has conversations, and the model has no chat template")
    told = Tally()
    learned = learn(tokenizer, rows, template, length, told)
    tally.add(told)
    if not learned.examples and told.left_out[TOO_LONG]:
        remedy = "give more or shorter examples, since of none an answer is left"
        raise SettingsError(f"MAX_LENGTH is {length} here: {remedy}")
    if not learned.examples:
        raise ValueError(f"none of its rows can be used: {told.reasons()}")
    return learned


def tokenize_data(
    tokenizer: Tokenizer,
    data: Data,
    template: str,
    length: int,
) -> tuple[Learned, Learned]:
    """Return what there is to train on, and what is held out; see tokenize."""
    learned = tokenize(tokenizer, data.rows, template, length, data.tally)
    held_out = learn(tokenizer, data.eval_rows, template, length, data.tally)

    # Where no row is left that was held out, the last of the others is, with all its examples.
    if not held_out.examples:
        last = learned.rows[-1]["turns"]
        while learned.rows and learned.rows[-1]["turns"] is last:
            held_out.examples.append(learned.examples.pop())
            held_out.rows.append(learned.rows.pop())
    if not learned.examples:
        raise ValueError(f"a single row of it can be used: {data.tally.reasons()}")
    return learned, held_out


def learn(
    tokenizer: Tokenizer,
    rows: list[Row],
    template: str,
    length: int,
    tally: Tally,
) -> Learned:
    """Return what there is to learn in rows, perhaps nothing; the arguments are tokenize's."""
    learned = Learned([], [])
    for row in rows:
        try:
            add_row(learned, tokenizer, row, template, length, tally)
        except LeftOut as reason:
            tally.left_out[str(reason)] += 1
    return learned


def add_row(
    learned: Learned,
    tokenizer: Tokenizer,
    row: Row,
    template: str,
    length: int,
    tally: Tally,
) -> None:
    """Add what there is to learn in a row; the arguments are those of tokenize."""
    if row["form"] != "text" and has_special_token(tokenizer, row["turns"]):
        tally.changed["with a special token in what is said"] += 1
    for piece in pieces_of(tokenizer, row, template):
        ids, labels = label(tokenizer, piece, is_chat=row["form"] == "messages")
        # The first token is never learned, since nothing stands before it.
        if set(labels[1:length]) <= {-100}:
            tally.left_out[TOO_LONG] += 1
            continue
        tally.changed["cut"] += len(ids) > length
        example = {"input_ids": ids[:length], "labels": labels[:length]}
        learned.examples.append(example)
        learned.rows.append(row | {"shown": shown_of(row["turns"], piece.place)})


def has_special_token(tokenizer: Tokenizer, turns: list[Row]) -> bool:
    """Return whether a turn has the text of a special token in it, which becomes that token."""
    said = "\n".join(prompt_text(turn) for turn in turns)
    return any(token in said for token in tokenizer.all_special_tokens)


def pieces_of(tokenizer: Tokenizer, row: Row, template: str) -> list[Piece]:
    """Return a row as texts to learn from: in the chat template, in TEMPLATE, or as it is."""
    if row["form"] == "messages":
        return conversation(tokenizer, row)
    if row["form"] == "instruction":
        text, spans = in_template(template, row, tokenizer.eos_token)
        return [Piece(text, spans, learned_places(row["turns"], "instruction")[0])]
    text = row["turns"][0]["content"]
    return [Piece(text, [(0, len(text))], 0)]


def label(tokenizer: Tokenizer, piece: Piece, is_chat: bool) -> tuple[list[int], list[int]]:
    """Return the tokens of a piece, and what is to be learned of them, -100 where nothing is.

    Prompt and answer are one text, since apart they might be other tokens: a token is learned where
    it ends inside an answer. The end token is learned too, or the model would never stop.
    """
    # A chat template has its own start and end.
    encoded = tokenizer(
        piece.text,
        add_special_tokens=not is_chat,
        return_offsets_mapping=True,
    )
    labels = []
    for token, (_, end) in zip(encoded["input_ids"], encoded["offset_mapping"]):
        is_answer = any(first < end <= last for first, last in piece.spans)
        labels.append(token if is_answer else -100)
    ids = without_second_start(tokenizer, encoded["input_ids"])
    labels = labels[len(labels) - len(ids) :]
    end_token = tokenizer.eos_token_id
    if ids[-2:] == [end_token, end_token]:
        ids, labels = ids[:-1], labels[:-1]

    # Some tokenizers put an end token behind every text by themselves, and some templates do.
    if not is_chat or not has_end(tokenizer, piece):
        ids = ids if ids[-1] == end_token else [*ids, end_token]
        labels = [*labels[: len(ids) - 1], end_token]
    return ids, labels


def has_end(tokenizer: Tokenizer, piece: Piece) -> bool:
    """Return whether the last answer of a piece ends with a special token."""
    first, last = piece.spans[-1]
    ids = tokenizer(piece.text[first:last], add_special_tokens=False)["input_ids"]
    added = tokenizer.added_tokens_decoder.get(ids[-1])
    return ids[-1] == tokenizer.eos_token_id or bool(added and added.special)


# ------------------------------------------------------------------------- conversations
def conversation(tokenizer: Tokenizer, row: Row) -> list[Piece]:
    """Return a conversation in the tokenizer's template, with all its answers, or once for each.

    Once for each where the template writes the last answer in another way than those before it, or
    ends none of them. Raises LeftOut where the template refuses the conversation, or leaves
    something of it away.
    """
    turns, tools = plain_turns(row["turns"]), row["tools"]
    places = learned_places(row["turns"], "messages")
    text = checked_rendering(tokenizer, turns, tools)
    pieces = [answer_at(tokenizer, turns, place, tools) for place in places]

    is_one_text = all(text.startswith(piece.text) for piece in pieces)
    if not is_one_text or not has_end(tokenizer, pieces[-1]):
        return pieces
    return [Piece(text, [piece.spans[0] for piece in pieces], places[0])]


def answer_at(
    tokenizer: Tokenizer,
    turns: list[Row],
    place: int,
    tools: list[Row] | None,
) -> Piece:
    """Return a conversation up to the answer at a place, of which that answer is learned."""
    before = rendering(tokenizer, turns[:place], tools, add_generation_prompt=True)
    text = rendering(tokenizer, turns[: place + 1], tools).rstrip()
    answer = turns[place]["content"].strip()
    if without_spaces(answer) not in without_spaces(text):
        raise LeftOut("whose answer the chat template changes")
    # Of answers before it a template may well leave the reasoning away.
    check_known(tokenizer, turns[: place + 1], tools, "reasoning_content")
    if text.startswith(before) and text != before:
        return Piece(text, [(len(before), len(text))], place)

    # Some templates begin an answer that is to be written in another way than a written one.
    asked = rendering(tokenizer, turns[:place], tools).rstrip()
    start = shared_length(before, text)
    if answer in text[len(asked) :]:
        start = min(start, text.rindex(answer))
    if start < len(asked) or start == len(text):
        raise LeftOut("where the chat template changes what came before an answer")
    return Piece(text, [(start, len(text))], place)


def without_spaces(text: str) -> str:
    """Return a text without its spaces and line ends."""
    return "".join(text.split())


def shared_length(text: str, other: str) -> int:
    """Return how many characters two texts begin with alike."""
    length = 0
    for one, another in zip(text, other):
        if one != another:
            break
        length += 1
    return length
