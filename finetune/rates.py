"""The learning rate for an adapter, from the shape of the model."""

import math
from typing import Any, Literal

# What was found best for LoRA at a width of 2000, and how it falls with the width of Llamas:
# Schulman et al., LoRA Without Regret (2025). What they found for Qwen gives too little of
# it to narrow models (benchmarks/rates.md).
AT_2000 = 5e-4
EXPONENT = 0.781


def rate_of(
    learning_rate: float | Literal["auto"],
    config: Any,
    highest: float = math.inf,
) -> float:
    """Return LEARNING_RATE; where it is auto, that of the model's width.

    config: of the model. The narrower one takes the higher rate, but none above highest.
    """
    if learning_rate != "auto":
        return learning_rate
    width = config.get_text_config().hidden_size
    return min(AT_2000 * (2000 / width) ** EXPONENT, highest)
