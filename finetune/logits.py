"""From hidden states to logits: the output head of a model, and what stands behind it."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class OutputHead:
    """What makes logits of hidden states, and divides them by TEMPERATURE.

    layer: of the model; None where the states are logits already. scale, cap: what a
    family does to the logits then, cap * tanh(logits / cap) where it has one.
    """

    layer: Any
    temperature: float
    scale: float = 1.0
    cap: float | None = None

    def __call__(self, states: torch.Tensor) -> torch.Tensor:
        """Return logits of at least float32, (…, vocabulary), of states (…, width)."""
        logits = states
        if self.layer is not None:
            # In its own dtype, as the model does it.
            logits = self.layer(states)
            if self.scale != 1:
                logits = logits * self.scale
            if self.cap is not None:
                logits = self.cap * torch.tanh(logits / self.cap)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        return logits if self.temperature == 1 else logits / self.temperature


def find_head(model: Any, temperature: float) -> OutputHead:
    """Return the head of an adapted model, as far as its config tells; see OutputHead.

    A head that is trained itself has a gradient of its own, so it is left to the model.
    """
    base = model.get_base_model()
    layer = base.get_output_embeddings()
    if layer is None or any(weight.requires_grad for weight in layer.parameters()):
        return OutputHead(None, temperature)

    # Gemma 2 has a cap; Cohere multiplies, Granite divides.
    config = base.config
    scale = getattr(config, "logit_scale", None) or 1.0
    scale /= getattr(config, "logits_scaling", None) or 1.0
    cap = getattr(config, "final_logit_softcapping", None)
    return OutputHead(layer, temperature, scale, cap)


@contextmanager
def inputs_of(layer: Any) -> Iterator[list[torch.Tensor]]:
    """Keep what a layer gets in this block; the layer itself gets the first place of each row."""
    kept: list[torch.Tensor] = []

    def keep(module: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        kept.append(arguments[0])
        return (arguments[0][:, :1],)

    handle = layer.register_forward_pre_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()
