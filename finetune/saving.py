"""An adapted model saved as an ordinary one, and measured as what was saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper


def save_model(
    model: Any,
    tokenizer: transformers.PreTrainedTokenizerBase,
    settings: Any,
    folder: Path | str,
    base_tokenizer: transformers.PreTrainedTokenizerBase | None = None,
) -> None:
    """Save an adapted model as an ordinary one, and its adapter alone; each with the tokenizer.

    base_tokenizer: that of the adapter, where it is another.
    """
    model = unquantized(model)
    if settings.save_adapter:
        config = model.peft_config["default"]
        config.base_model_name_or_path = settings.model_name
        is_encoder_decoder = model.config.is_encoder_decoder
        task_type = "SEQ_2_SEQ_LM" if is_encoder_decoder else "CAUSAL_LM"
        config.task_type = config.task_type or task_type

        adapter_folder = Path(folder, "adapter")
        model.save_pretrained(adapter_folder, save_embedding_layers=False)
        Path(adapter_folder, "README.md").unlink()  # an empty form
        (base_tokenizer or tokenizer).save_pretrained(adapter_folder)

    model.merge_and_unload().save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def unquantized(model: Any) -> Any:
    """Return an adapted model with its base in 16 or 32 bits, for what is merged into fewer is lost.

    A model that is not quantized is returned as it is; of another the base is taken apart.
    """
    is_adapted = hasattr(model, "peft_config")
    if not is_adapted or not getattr(model.get_base_model(), "is_quantized", False):
        return model
    adapter = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
    base = model.unload().dequantize()
    adapted = peft.get_peft_model(base, model.peft_config["default"])
    peft.set_peft_model_state_dict(adapted, adapter)
    return adapted.eval()


# ---------------------------------------------------------------- measured as it is saved
# So many bytes of merged weights are kept, so that they need not be merged again.
KEPT = 1_250_000_000


@contextmanager
def as_saved(model: Any) -> Iterator[None]:
    """Let an adapted model compute in this block as the one that save_model writes of it.

    In 16 bits the sum of a weight and of what was learned is rounded, which costs some of
    the latter. A layer is merged only while it is at work, and KEPT bytes of merged layers
    stay: so memory does not hold two models. Nothing changes where the adapter is switched
    off, and in 32 bits.
    """
    layers: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    handles = []
    room = KEPT
    for layer in layers:
        merging = Merging(layer)
        if merging.weight.dtype == torch.float32:
            continue
        room -= merging.weight.nbytes
        merging.is_kept = room >= 0
        handles.append(layer.register_forward_pre_hook(merging.begin))
        handles.append(layer.register_forward_hook(merging.end, always_call=True))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Merging:
    """An adapted layer, which is merged before it is at work, and is as it was after that.

    is_kept: whether its merged weight is kept for the next time.
    """

    def __init__(self, layer: Any) -> None:
        self.layer = layer
        self.is_kept = False
        self.merged: torch.Tensor | None = None
        # Of experts the adapted weights have a name of their own.
        of_experts = isinstance(layer, ParamWrapper)
        self.weight = layer.get_param() if of_experts else layer.get_base_layer().weight
        self.unmerged = self.weight.data

    def begin(self, *others: Any) -> None:
        """Merge what was learned into a copy of the weight."""
        if self.layer.disable_adapters:
            return
        if self.merged is not None:
            self.weight.data = self.merged
            self.layer.merged_adapters.extend(self.layer.active_adapters)
            return
        self.weight.data = self.unmerged.clone()
        self.layer.merge()
        if self.is_kept:
            self.merged = self.weight.data

    def end(self, *others: Any) -> None:
        """Put the weight back."""
        self.weight.data = self.unmerged
        self.layer.merged_adapters.clear()
