"""A language model that goes on with prompts."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from transformers import GenerationConfig

from finetune.errors import blame
from finetune.hub import context_of, find_model
from finetune.models import load_base_model
from finetune.tokens import check_ids, encode, end_tokens, load_tokenizer, pad, texts_of


class Answer(NamedTuple):
    """What a model wrote after a prompt, and whether it came to an end by itself."""

    text: str
    ended: bool


class Writer:
    """A language model that goes on with prompts, and knows how much it can take."""

    def __init__(
        self,
        settings: Any,
        device: torch.device,
        dtype: str,
        shortest_prompt: str,
        texts: Sequence[str] = (),
    ) -> None:
        """Load the model, and refuse one whose context has no room for the shortest prompt.

        settings: model_name, quantization, max_new_tokens and batch_size are used. texts: of which
        prompts are made, refused where the model's embedding does not know their tokens.
        """
        remedy = "name a causal language model with config.json, *.safetensors and a tokenizer"
        with blame("MODEL_NAME", settings.model_name, remedy):
            path = find_model("MODEL_NAME", settings.model_name)
            self.tokenizer = load_tokenizer(path)
            model = load_base_model(path, device, dtype, settings.quantization)
            self.model = model.eval()
            sequences = [self.tokenizer(text)["input_ids"] for text in (shortest_prompt, *texts)]
            check_ids(model, self.tokenizer, sequences)

            # An answer takes half of the context at most: the rest is for examples.
            self.context = context_of(path)
            self.new_tokens = int(min(settings.max_new_tokens, self.context / 2))
            if not self.fits(shortest_prompt):
                raise ValueError(f"its context of {self.context} tokens is too small")

        # Whatever the model's own file says of sampling is left behind.
        self.end_ids = end_tokens(model.generation_config.eos_token_id, self.tokenizer)
        self.model.generation_config = GenerationConfig(
            eos_token_id=self.end_ids,
            pad_token_id=self.tokenizer.pad_token_id,
        )
        self.batch_size = settings.batch_size

    def fits(self, prompt: str) -> bool:
        """Return whether a prompt leaves room for an answer in the context."""
        length = len(self.tokenizer(prompt)["input_ids"])
        return length + self.new_tokens <= self.context

    def fill(
        self,
        make: Callable[..., str],
        examples: list[Any],
        **arguments: Any,
    ) -> tuple[str, int]:
        """Return the prompt made with as many of the examples as fit, and their number.

        make: returns a prompt, from its argument `examples` and the other arguments.
        """
        for count in range(len(examples), 0, -1):
            prompt = make(examples=examples[:count], **arguments)
            if self.fits(prompt):
                return prompt, count
        return make(examples=[], **arguments), 0

    def write(
        self,
        prompts: list[str],
        stop: str,
        new_tokens: int | None = None,
        **sampling: Any,
    ) -> list[Answer]:
        """Return what follows each prompt, up to the text `stop` and without it.

        new_tokens: at most; None = as many as an answer may take. sampling: options of generate,
        which is greedy without any.
        """
        rows = [{"prompt": prompt} for prompt in prompts]
        queries = encode(self.tokenizer, rows, chat_template=False)
        answers = []
        for start in range(0, len(queries), self.batch_size):
            answers += self.write_batch(
                queries[start : start + self.batch_size],
                stop=stop,
                max_new_tokens=new_tokens or self.new_tokens,
                **sampling,
            )
        return answers

    def write_batch(
        self,
        queries: list[torch.Tensor],
        stop: str,
        **options: Any,
    ) -> list[Answer]:
        """Return what follows each of the queries, which are taken at once.

        queries: 1-D tensors of token ids. options: of generate.
        """
        inputs = pad(self.tokenizer, queries, padding_side="left")
        with torch.no_grad():
            sequences = self.model.generate(
                **inputs.to(self.model.device),
                stop_strings=[stop],
                tokenizer=self.tokenizer,
                **options,
            )

        end_ids = torch.tensor(self.end_ids)
        width = inputs["input_ids"].shape[1]
        responses = sequences[:, width:].cpu()
        answers = []
        for query, response in zip(queries, responses):
            text = texts_of(self.tokenizer, query, [response])[0]
            has_end_token = bool(torch.isin(response, end_ids).any())
            ended = has_end_token or stop in text
            answers.append(Answer(text.partition(stop)[0], ended))
        return answers
