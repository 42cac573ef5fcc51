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
            # In its own dtype, as the model does it; accelerate makes float32 of half a state.
            logits = self.layer(states.to(self.layer.weight.dtype))
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
    weight = getattr(layer, "weight", None)
    if weight is None or any(parameter.requires_grad for parameter in layer.parameters()):
        return OutputHead(None, temperature)

    # Cohere and Falcon-H1 multiply, Granite divides; Gemma 2 and RecurrentGemma have a cap.
    config = base.config
    scale = number_in(config, "logit_scale", 1.0)
    scale *= number_in(config, "lm_head_multiplier", 1.0)
    scale /= number_in(config, "logits_scaling", 1.0)
    cap = number_in(config, "final_logit_softcapping", 0.0)
    cap = cap or number_in(config, "logits_soft_cap", 0.0)
    return OutputHead(layer, temperature, scale, cap or None)


def number_in(config: Any, name: str, default: float) -> float:
    """Return a number other than 0 that a config has, or the default."""
    value = getattr(config, name, None)
    return value if isinstance(value, (int, float)) and value else default


@contextmanager
def inputs_of(layer: Any) -> Iterator[list[torch.Tensor]]:
    """Keep what a layer gets in this block.

    A model can't go without logits, so it makes those of one place, which nobody reads.
    """
    kept: list[torch.Tensor] = []

    def keep(module: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor]:
        kept.append(arguments[0])
        return (arguments[0][:1, :1],)

    handle = layer.register_forward_pre_hook(keep)
    try:
        yield kept
    finally:
        handle.remove()
