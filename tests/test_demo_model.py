"""What the card of the demo model tells of it, held against the model and the script that made it."""

import math
import re
import runpy
from pathlib import Path

import pytest
from huggingface_hub import ModelCard
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def card(demo_model):
    return ModelCard.load(demo_model / "README.md")


def test_the_card_has_what_the_hub_asks_for(card):
    data = card.data
    assert data.license == "apache-2.0"
    assert data.language == "en"
    assert data.library_name == "transformers"
    assert data.pipeline_tag == "text-generation"
    assert {"llama", "ppo", "rlhf"} <= set(data.tags)


def test_the_card_tells_the_shape_that_the_model_has(card, demo_model):
    config = AutoConfig.from_pretrained(demo_model)
    with safe_open(demo_model / "model.safetensors", "pt") as file:
        tensors = [file.get_slice(name) for name in file.keys()]  # noqa: SIM118, it is no dict
        parameters = sum(math.prod(tensor.get_shape()) for tensor in tensors)
        assert {tensor.get_dtype() for tensor in tensors} == {"F16"}
    assert AutoModelForCausalLM.from_config(config).num_parameters() == parameters
    assert config.tie_word_embeddings
    heads, shared_heads = config.num_attention_heads, config.num_key_value_heads
    special = len(AutoTokenizer.from_pretrained(demo_model).all_special_ids)
    for told in (
        f"Llama: {config.num_hidden_layers} layers of width {config.hidden_size}, {heads} heads",
        f"({shared_heads} for keys and values), tied embeddings",
        f"| parameters | {parameters:,}, saved as float16 |",
        f"| vocabulary | {config.vocab_size:,} tokens: {special} special ones",
        f"| context | {config.max_position_embeddings} tokens |",
    ):
        assert told in card.text, told


def test_the_card_tells_how_the_model_was_made(card, demo_model):
    maker = runpy.run_path(str(demo_model / "make_demo_model.py"))
    steps, size = maker["STEPS"], maker["BATCH_SIZE"]
    text = " ".join(card.text.split())
    for told in (
        f"trained on {maker['TOKENIZER_TEXTS']:,} of them",
        f"from scratch on {steps * size:,} more ({steps:,} updates of {size}, by AdamW)",
        f"the seed is {maker['SEED']}",
    ):
        assert told in text, told


def test_the_card_tells_what_the_readme_measured_before_training(card):
    told = re.findall(r"\d+\.\d %", card.text)
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    assert len(told) == 2
    assert f"Of its responses {told[0]} had a positive word before" in readme
    assert f"not trained on {told[1]} before" in readme
