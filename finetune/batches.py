"""How examples become a batch: padded, packed one after another, or as comparisons."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from finetune.errors import blame
from finetune.files import Row


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
