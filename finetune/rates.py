"""The learning rate for an adapter, from the shape of the model."""

from typing import Any

# What they found best for LoRA at a width of 2000, and how it falls with the width in the two
# families that they tried: Schulman et al., LoRA Without Regret (2025).
AT_2000 = 5e-4
EXPONENTS = {"llama": 0.781, "qwen": 0.0775}


def rate_for(config: Any) -> float:
    """Return the learning rate for a model with this config: 5e-4 at a width of 2000.

    Of two models of a family the narrower one takes the higher rate. A family without an
    exponent of its own is taken for a Llama.
    """
    exponent = EXPONENTS["llama"]
    for family, own_exponent in EXPONENTS.items():
        if config.model_type.startswith(family):
            exponent = own_exponent
    return AT_2000 * (2000 / config.hidden_size) ** exponent
