"""Between texts and tokens."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import transformers

from finetune.files import Row
from finetune.hub import base_of
from finetune.prompts import is_turn


# ------------------------------------------------------------------------ the tokenizer
def load_tokenizer(path: str) -> transformers.PreTrainedTokenizerBase:
    """Return the tokenizer; its pad token is no end token where it has one to spare.

    path: of a model, or of an adapter, which may leave its tokenizer to its base. Raises
    ValueError for a tokenizer without an end token.
    """
    has_tokenizer = Path(path, "tokenizer_config.json").exists()
    folder = path if has_tokenizer else base_of(path)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, trust_remote_code=False)

    if tokenizer.eos_token is None:
        raise ValueError("its tokenizer has no end token")
    if tokenizer.pad_token in (None, tokenizer.eos_token):
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token

    tokenizer.padding_side = "left"  # as generation needs it
    return tokenizer


def end_tokens(
    own_ids: int | list[int] | None,
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> list[int]:
    """Return the ids that end a response: the model's own and the chat template's.

    own_ids: of the model's generation config; None stands for the tokenizer's end token.
    """
    if isinstance(own_ids, list):
        ids = list(own_ids)
    elif own_ids is None:
        ids = [tokenizer.eos_token_id]
    else:
        ids = [own_ids]

    # Where there is no template, or one for other conversations, nothing is added.
    with suppress(Exception):
        ids.append(end_of_turn(tokenizer))

    # Each once, in this order.
    return list(dict.fromkeys(ids))


def end_of_turn(tokenizer: transformers.PreTrainedTokenizerBase) -> int:
    """Return the id with which the chat template ends an answer, or raise anything."""
    question = {"role": "user", "content": "Hi"}
    answer = {"role": "assistant", "content": "Hello"}
    text = str(tokenizer.apply_chat_template([question, answer], tokenize=False))
    after_answer = text.rpartition("Hello")[2]

    tokens = tokenizer(after_answer, add_special_tokens=False)["input_ids"]
    added_tokens = tokenizer.added_tokens_decoder
    return next(token for token in tokens if token in added_tokens)


# ---------------------------------------------------------------------- there, and back
def encode(
    tokenizer: transformers.PreTrainedTokenizerBase,
    rows: list[Row],
    chat_template: bool,
) -> list[torch.Tensor]:
    """Return the queries, a 1-D tensor of token ids for the prompt of each row."""
    # Behind an end token a decoder would be done; its queries are padded on the left.
    drops_end = tokenizer.padding_side == "left" and appends_end(tokenizer)
    queries = []
    for row in rows:
        prompt = row["prompt"]
        if not is_turn(prompt, chat_template):
            ids = prompt_ids(tokenizer, prompt, drops_end)
        else:
            # The template has a start token, where one is wanted.
            is_text = isinstance(prompt, str)
            inputs: Any = tokenizer.apply_chat_template(
                [{"role": "user", "content": prompt}] if is_text else prompt,
                tools=None if is_text else row.get("tools"),
                add_generation_prompt=True,
            )
            ids = inputs["input_ids"]
        queries.append(torch.tensor(ids))
    return queries


def prompt_ids(
    tokenizer: transformers.PreTrainedTokenizerBase,
    text: str,
    drops_end: bool,
) -> list[int]:
    """Return the token ids of a text that is to be continued.

    drops_end: whether the last token is the tokenizer's own end token, see appends_end.
    """
    ids = without_second_start(tokenizer, tokenizer(text)["input_ids"])
    return ids[:-1] if drops_end else ids


def appends_end(tokenizer: transformers.PreTrainedTokenizerBase) -> bool:
    """Return whether a tokenizer puts an end token behind every text."""
    return tokenizer("a")["input_ids"][-1:] == [tokenizer.eos_token_id]


def without_second_start(
    tokenizer: transformers.PreTrainedTokenizerBase,
    ids: list[int],
) -> list[int]:
    """Return the ids of a text, with one start token where it has its own and the tokenizer's."""
    start = tokenizer.bos_token_id
    return ids[1:] if start is not None and ids[:2] == [start, start] else ids


def texts_of(
    tokenizer: transformers.PreTrainedTokenizerBase,
    query: torch.Tensor,
    responses: list[torch.Tensor],
) -> list[str]:
    """Return the texts that responses add to the query's, with the space before, if any.

    query, responses: 1-D tensors of token ids.
    """
    # The query of an encoder has an end token: the response to it is a text of its own.
    if query[-1] == tokenizer.eos_token_id:
        texts = decode(tokenizer, responses)
        return [f" {text.lstrip()}" if text else "" for text in texts]

    # A token may be another text at the beginning, so all are decoded behind the query.
    sequences = [torch.cat([query, response]) for response in responses]
    before, *texts = decode(tokenizer, [query, *sequences])
    return [text[len(before) :] for text in texts]


def decode(
    tokenizer: transformers.PreTrainedTokenizerBase,
    sequences: Any,
) -> list[str]:
    """Return the texts of token ids, with every space, without special tokens."""
    return tokenizer.batch_decode(
        sequences,
        skip_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )


# ---------------------------------------------------------------------------- the batch
def pad_batch(
    tokenizer: transformers.PreTrainedTokenizerBase,
    queries: list[torch.Tensor],
    responses: list[torch.Tensor],
    device: torch.device | str,
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Put queries, padded on the tokenizer's side, before responses, padded on the right.

    Returns input_ids and attention_mask by name, both (batch, query length + response
    length), and the mask of the response tokens (batch, response length).
    """
    left = pad(tokenizer, queries).to(device)
    right = pad(tokenizer, responses, padding_side="right").to(device)

    inputs = {name: torch.cat([left[name], right[name]], dim=1) for name in left}
    return inputs, right["attention_mask"]


def pad(
    tokenizer: transformers.PreTrainedTokenizerBase,
    sequences: Any,
    padding_side: str | None = None,
) -> transformers.BatchEncoding:
    """Return input_ids and attention_mask of 1-D tensors, (batch, greatest length).

    padding_side: the tokenizer's where it is None.
    """
    return tokenizer.pad(
        {"input_ids": sequences},
        padding_side=padding_side,
        return_tensors="pt",
    )


def for_decoder(
    inputs: dict[str, torch.Tensor],
    length: int,
    start_id: int,
) -> tuple[dict[str, Any], torch.Tensor]:
    """Return inputs for an encoder-decoder, and where it samples the last tokens of them.

    inputs: input_ids and attention_mask as from pad_batch; others stay as they are.
    length: of the responses. start_id: the token that a decoder begins with. The places,
    (length,), are the decoder's.
    """
    # The encoder gets the queries; the decoder gets the responses, moved on by a token.
    ids = inputs["input_ids"]
    mask = inputs["attention_mask"]
    start = torch.full_like(ids[:, :1], start_id)
    decoder_inputs = {
        **inputs,
        "input_ids": ids[:, :-length],
        "attention_mask": mask[:, :-length],
        "decoder_input_ids": torch.cat([start, ids[:, -length:-1]], dim=1),
    }
    return decoder_inputs, torch.arange(length, device=ids.device)


def check_ids(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
    sequences: Any,
) -> None:
    """Refuse token ids that a model has no embedding for.

    sequences: of the data's token ids. Raises ValueError with both numbers.
    """
    embeddings: Any = model.get_input_embeddings()
    rows = embeddings.num_embeddings
    special = (tokenizer.pad_token_id, tokenizer.eos_token_id)
    largest = max(token for token in (*special, 0) if token is not None)
    for sequence in sequences:
        largest = max(largest, int(torch.as_tensor(sequence).max()))
    if largest >= rows:
        token = tokenizer.convert_ids_to_tokens(largest)
        problem = f"its tokenizer has the token {token!r} with the id {largest}"
        raise ValueError(f"{problem}, but its embedding has {rows} rows")
