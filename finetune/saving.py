"""An adapted model saved as an ordinary one, and measured as what was saved."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
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
@contextmanager
def as_saved(model: Any, folder: Path | str) -> Iterator[None]:
    """Let an adapted model compute in this block as the one that save_model writes of it.

    In 16 bits the sum of a weight and of what was learned is rounded, which costs some of
    the latter. So every adapted layer is merged, and what its weight was waits in a file
    without a name, in the folder where there is one: memory never holds two models. Where
    the adapter is switched off a layer is at work with the weight of the file. Nothing
    changes in 32 bits.
    """
    adapted: list[Any] = [layer for layer in model.modules() if isinstance(layer, LoraLayer)]
    layers = [layer for layer in adapted if adapted_weight(layer).dtype != torch.float32]
    if not layers:
        yield
        return

    place = folder if Path(folder).is_dir() else None
    with tempfile.TemporaryFile(dir=place) as file, ExitStack() as undo:
        for layer in layers:
            merged = MergedLayer(layer, file)
            undo.callback(merged.take_apart)
            merged.merge()
            before = layer.register_forward_pre_hook(merged.before_work)
            after = layer.register_forward_hook(merged.after_work, always_call=True)
            undo.callback(before.remove)
            undo.callback(after.remove)
        yield


def adapted_weight(layer: Any) -> torch.nn.Parameter:
    """Return the weight that a layer adapts; that of experts has a name of its own."""
    of_experts = isinstance(layer, ParamWrapper)
    return layer.get_param() if of_experts else layer.get_base_layer().weight


class MergedLayer:
    """An adapted layer that is merged, and what its weight was, at the end of a file."""

    def __init__(self, layer: Any, file: Any) -> None:
        self.layer = layer
        self.weight = adapted_weight(layer)
        self.merged = self.weight.data
        self.adapters: list[str] = []

        self.file = file
        self.offset = file.seek(0, os.SEEK_END)
        as_bytes = self.merged.cpu().contiguous().view(torch.uint8)
        as_bytes.numpy().tofile(file)

    def merge(self) -> None:
        """Add what was learned to the weight."""
        self.layer.merge()
        self.merged = self.weight.data
        self.adapters = list(self.layer.merged_adapters)

    def unmerged(self) -> torch.Tensor:
        """Return what the weight was; it takes memory only while it is used."""
        as_bytes = np.memmap(
            self.file,
            dtype=np.uint8,
            mode="c",
            offset=self.offset,
            shape=(self.merged.nbytes,),
        )
        weight = torch.from_numpy(as_bytes).view(self.merged.dtype)
        return weight.view(self.merged.shape).to(self.merged.device)

    def before_work(self, *others: Any) -> None:
        """Take what the weight was, where the adapter is switched off."""
        if self.layer.disable_adapters:
            self.layer.merged_adapters.clear()
            self.weight.data = self.unmerged()

    def after_work(self, *others: Any) -> None:
        """Be merged again."""
        self.weight.data = self.merged
        self.layer.merged_adapters[:] = self.adapters

    def take_apart(self) -> None:
        """Be for good what it was."""
        self.merged.copy_(self.unmerged())
        self.weight.data = self.merged
        self.layer.merged_adapters.clear()
