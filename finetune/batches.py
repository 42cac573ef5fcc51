"""How examples become batches: in which order, padded, packed, or as comparisons."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers.trainer_pt_utils import get_length_grouped_indices

from finetune.errors import blame
from finetune.files import Row
from finetune.settings import StageSettings


def order_of(examples: list[Row], total: int, settings: StageSettings) -> list[int]:
    """Return the places of the run's examples; every epoch has each once, in an order of its own.

    total: the steps of the whole run. A longer run begins like a shorter one.
    """
    # Examples that are all as long are simply shuffled.
    lengths = [0] * len(examples)
    if settings.group_by_length:
        lengths = [len(example["input_ids"]) for example in examples]

    count = total * settings.batch_size
    order: list[int] = []
    for epoch in range(math.ceil(count / len(examples))):
        generator = torch.Generator().manual_seed(settings.seed * 10**6 + epoch)
        order += get_length_grouped_indices(lengths, settings.batch_size, generator=generator)
    return order[:count]


def make_collator(
    model: Any,
    tokenizer: transformers.PreTrainedTokenizerBase,
    packing: bool,
) -> Any:
    """Return what makes a batch of examples: padded on the right, or one after another.

    Raises SettingsError for a model that does not know where a packed example begins.
    """
    if not packing:
        return transformers.DataCollatorForSeq2Seq(tokenizer)

    collate = transformers.DataCollatorWithFlattening()
    first = {"input_ids": list(range(9)), "labels": list(range(9))}
    second = {"input_ids": [9, 8, 7], "labels": [9, 8, 7]}
    with blame("PACKING", packing, "give False"):
        alone = last_logits(model, collate([second]))
        behind = last_logits(model, collate([first, second]))
        if (alone - behind).std() > 0.1 * alone.std():
            raise ValueError("in this model an example sees the one before it")
    return collate


def last_logits(model: Any, batch: Row) -> torch.Tensor:
    """Return the logits of the token after a packed batch, (vocabulary,)."""
    inputs = {name: tensor.to(model.device) for name, tensor in batch.items()}
    with torch.no_grad():
        return model(**inputs, use_cache=False).logits[0, -1].float()


@dataclass(frozen=True)
class ComparisonCollator:
    """Makes a batch of comparisons."""

    tokenizer: transformers.PreTrainedTokenizerBase

    def __call__(self, examples: list[Row]) -> transformers.BatchEncoding:
        """Return all texts of the comparisons, the sign of each, and whose it is.

        input_ids, attention_mask: (texts, length). signs: (texts,), 1.0 of a better text, else -1.0.
        owners: (texts,), the place of its comparison in the batch.
        """
        sequences: list[list[int]] = []
        signs: list[float] = []
        owners: list[int] = []
        for place, example in enumerate(examples):
            sequences += example["sequences"]
            signs += example["signs"]
            owners += [place] * len(example["signs"])

        batch = self.tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
        batch["signs"] = torch.tensor(signs)
        batch["owners"] = torch.tensor(owners)
        return batch
