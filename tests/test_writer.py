"""A language model that goes on with prompts: where it stops, and what fits into its context."""

from types import SimpleNamespace

import pytest
import torch

from finetune.errors import SettingsError
from finetune.self_instruct import list_prompt
from finetune.writer import Writer


@pytest.fixture
def load(demo_model):
    """Return a writer with demo_model."""
    settings = SimpleNamespace(
        model_name=str(demo_model),
        quantization="none",
        max_new_tokens=300,
        batch_size=3,
    )
    return lambda prompt="": Writer(settings, torch.device("cpu"), "float32", prompt)


def test_it_stops_where_it_should_whatever_stands_beside(load):
    writer = load()
    assert (writer.context, writer.new_tokens) == (256, 128)
    prompts = ["I feel so", "This morning it was cold, and", "My aunt"]
    together = writer.write(prompts, "no such text", new_tokens=6)
    writer.batch_size = 1
    assert writer.write(prompts, "no such text", new_tokens=6) == together
    assert not any(ended for _, ended in together)
    whole = writer.write(prompts, "no such text")
    assert all(ended for _, ended in whole)  # by the model's end token
    stop = whole[0].text[4:7]
    ((text, ended),) = writer.write(prompts[:1], stop)
    assert ended and text == whole[0].text.partition(stop)[0] != whole[0].text


def test_as_many_examples_are_shown_as_fit(load):
    writer = load()
    examples = ["five words are in here"] * 100
    prompt, count = writer.fill(list_prompt, examples)
    assert 3 < count < 30 and prompt == list_prompt(examples[:count])
    assert writer.fits(prompt)
    assert not writer.fits(list_prompt(examples[: count + 1]))
    writer.context = 0
    assert writer.fill(list_prompt, examples) == (list_prompt([]), 0)


def test_a_context_without_room_for_the_shortest_prompt_is_refused(load):
    with pytest.raises(SettingsError, match=r"\(its context of 256 tokens is too small\)"):
        load("so " * 129)
