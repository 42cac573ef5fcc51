"""finetune/rates.py: one learning rate for models of every width."""

import pytest
from transformers import GPT2Config, LlamaConfig, LlavaConfig, Qwen2Config

from finetune.rates import rate_of


@pytest.mark.parametrize(
    ("config", "rate"),
    [
        (LlamaConfig(hidden_size=2000, num_attention_heads=20), 5e-4),
        (LlamaConfig(hidden_size=4000, num_attention_heads=20), 5e-4 * 0.5**0.781),
        (LlamaConfig(hidden_size=2048), 4.908e-4),  # TinyLlama's
        (GPT2Config(n_embd=768), 1.056e-3),
        (Qwen2Config(hidden_size=896), 9.36e-4),
        # Of a model that takes pictures too it is the width for texts.
        (LlavaConfig(text_config=LlamaConfig(hidden_size=1024)), 5e-4 * (2000 / 1024) ** 0.781),
    ],
)
def test_the_narrower_model_takes_the_higher_rate(config, rate):
    assert rate_of("auto", config) == pytest.approx(rate, rel=1e-3)


def test_no_rate_is_above_the_highest():
    narrow, wide = LlamaConfig(hidden_size=64), LlamaConfig(hidden_size=1024)
    assert rate_of("auto", narrow, highest=3e-3) == 3e-3
    assert rate_of("auto", wide, highest=3e-3) == rate_of("auto", wide) < 3e-3


@pytest.mark.parametrize("highest", [1e-6, 1.0])
def test_a_rate_that_is_given_is_taken(highest):
    assert rate_of(2e-4, LlamaConfig(), highest) == 2e-4
