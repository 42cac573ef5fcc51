"""finetune/rates.py: one learning rate for models of every width."""

from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from transformers import GPT2Config, LlamaConfig, LlavaConfig, Qwen2Config

from finetune.fields import Tally
from finetune.rates import rate_of
from finetune.supervised import announce


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


@pytest.mark.parametrize(
    ("learning_rate", "told"),
    [("auto", "learning rate 0.00099, auto for a width of 832"), (2e-4, "learning rate 0.0002")],
)
def test_the_rate_is_told_before_training_begins(capsys, learning_rate, told):
    settings = SimpleNamespace(
        learning_rate=learning_rate,
        model_name="m",
        data="d",
        output_dir="o",
        batch_size=4,
        seed=0,
    )
    model = SimpleNamespace(
        config=LlamaConfig(hidden_size=832),
        device=torch.device("cpu"),
        num_parameters=lambda only_trainable=False: 3,
    )
    rate = rate_of(learning_rate, model.config)
    stage = SimpleNamespace(model=model, settings=settings, steps=6, learning_rate=rate)
    announce(stage, "float32", "40 examples", Tally(Counter(), Counter(), Counter()))
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "Training" in line]
    assert line == f"Training  6 steps of 4, seed 0, {told}"
