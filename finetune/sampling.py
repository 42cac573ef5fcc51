"""Responses sampled from a language model, each by random numbers of its own."""

import math
from typing import Any

import torch
import transformers

from finetune.progress import progress
from finetune.tokens import pad, texts_of


def sample_responses(
    model: Any,
    tokenizer: transformers.PreTrainedTokenizerBase,
    queries: list[torch.Tensor],
    numbers: torch.Tensor,
    batch_size: int,
) -> tuple[list[torch.Tensor], list[str]]:
    """Sample a response to each query, up to its first end token, batch_size of them at once.

    numbers: (queries, new tokens), uniform in (0, 1], one for each token that is sampled.
    Returns the responses, 1-D tensors of token ids, and their texts.
    """
    end_ids = torch.tensor(model.generation_config.eos_token_id)
    responses = []
    for start in progress(range(0, len(queries), batch_size)):
        inputs = pad(tokenizer, queries[start : start + batch_size]).to(model.device)
        width = 1 if model.config.is_encoder_decoder else inputs["input_ids"].shape[1]
        sampler = TokenSampler(
            numbers=numbers[start : start + batch_size].to(model.device),
            width=width,
            temperature=model.generation_config.temperature,
        )
        processors = transformers.LogitsProcessorList([sampler])
        with torch.no_grad():
            sequences = model.generate(**inputs, do_sample=False, logits_processor=processors)

        # What was asked is no action: the response is what comes after it.
        for tokens in sequences[:, width:].cpu():
            ends = torch.isin(tokens, end_ids).nonzero()
            responses.append(tokens[: ends[0, 0] + 1] if len(ends) else tokens)

    texts = []
    for query, response in zip(queries, responses):
        texts += texts_of(tokenizer, query, [response])
    return responses, texts


class TokenSampler(transformers.LogitsProcessor):
    """What samples a token: the first up to which the probabilities sum to its number.

    Sampled thus a response depends on its own numbers alone, however a batch is put together.
    numbers: (batch, new tokens), uniform in (0, 1]. width: of the queries, in tokens.
    """

    def __init__(self, numbers: torch.Tensor, width: int, temperature: float) -> None:
        self.numbers = numbers
        self.width = width
        self.temperature = temperature

    def __call__(self, sequences: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        """Return logits that leave only one token of each row.

        sequences: (batch, length so far). logits: (batch, vocabulary), of the next token.
        """
        # Logits that are not finite become finite here; what they did is noticed later.
        logits = (logits.float() / self.temperature).nan_to_num()
        sums = torch.softmax(logits, dim=-1).cumsum(-1)
        column = sequences.shape[1] - self.width
        wanted = self.numbers[:, column, None] * sums[:, -1:]
        tokens = torch.searchsorted(sums, wanted)
        return torch.full_like(logits, -math.inf).scatter(1, tokens, 0.0)
