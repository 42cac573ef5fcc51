"""Responses sampled from a model: each by its own random numbers, from the model's distribution."""

import json
import math
import os

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM

from finetune.models import load_base_model
from finetune.processes import random_numbers
from finetune.sampling import TokenSampler, sample_responses
from finetune.tokens import texts_of

FULL = bool(os.environ.get("CI_FULL"))
NAN, INF = math.nan, math.inf
ODD_SAMPLING = {
    "do_sample": True,
    "temperature": 0.1,
    "top_k": 1,
    "top_p": 0.5,
    "min_p": 0.5,
    "typical_p": 0.5,
    "repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "min_length": 200,
    "min_new_tokens": 8,
    "max_length": 300,
    "suppress_tokens": [40, 41],
    "bad_words_ids": [[42]],
}
PROMPTS = [
    "Life",
    "Life is what I always wanted it to be, and",
    "I'm feeling",
    "My day was",
    "Life",
    "Today I am so",
    "It makes me",
]


def ask(tokenizer, *prompts):
    return [tokenizer(prompt, return_tensors="pt")["input_ids"][0] for prompt in prompts]


def sample(built, queries, numbers=None, size=100):
    """Return the responses as lists of ids, at most so many of them generated at once."""
    if numbers is None:
        numbers = random_numbers((0, 0, 0), len(queries), built.settings.max_new_tokens)
    model = built.policy.pretrained_model
    responses, _ = sample_responses(model, built.tokenizer, queries, numbers, batch_size=size)
    return [response.tolist() for response in responses]


@pytest.fixture
def build_with(build, make_settings, copy_of_demo_model):
    """Build a copy of demo_model whose generation config has these changes."""

    def make(changes, *flags):
        path = copy_of_demo_model / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))
        return build(make_settings("--model-name", str(copy_of_demo_model), *flags))

    return make


# -------------------------------------------------------- the responses
def test_responses_come_without_their_queries_and_with_their_texts(build, settings, roll_out):
    built = build(settings)
    queries = ask(built.tokenizer, *PROMPTS)
    responses, texts = roll_out(built, queries)
    assert len(texts) == len(responses) == len(queries)
    for query, response, text in zip(queries, responses, texts):
        assert response.dim() == 1
        assert 1 <= len(response) <= settings.max_new_tokens
        assert response[: len(query)].tolist() != query.tolist()
        assert [text] == texts_of(built.tokenizer, query, [response])


def test_a_response_ends_with_its_first_end_token(build, make_settings):
    built = build(make_settings("--max-new-tokens", "60"))
    responses = sample(built, ask(built.tokenizer, "Life is") * 60)
    assert len({len(response) for response in responses}) > 1
    for response in responses:
        assert built.tokenizer.eos_token_id not in response[:-1]
        assert len(response) == 60 or response[-1] == built.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("own", "known", "lengths"), [([1, 2], [1, 2], [3, 2, 5, 1, 2]), (None, [2], [5, 2, 5, 5, 4])]
)
def test_each_end_token_of_the_model_or_else_the_tokenizers_ends_a_response(
    build_with, monkeypatch, own, known, lengths
):
    built = build_with({"eos_token_id": own})
    model = built.policy.pretrained_model
    assert built.tokenizer.eos_token_id == 2
    assert model.generation_config.eos_token_id == known

    rows = [
        [5, 6, 1, 0, 0],
        [5, 2, 0, 0, 0],
        [5, 6, 7, 8, 9],
        [1, 0, 0, 0, 0],
        [5, 1, 7, 2, 8],
    ]

    def generate(input_ids, **others):
        return torch.cat([input_ids, torch.tensor(rows)], dim=1)

    monkeypatch.setattr(model, "generate", generate)
    responses = sample(built, ask(built.tokenizer, "Once upon a time") * 5)
    assert responses == [row[:length] for row, length in zip(rows, lengths)]


# --------------------------------------------------- the random numbers
@pytest.mark.parametrize("name", ["demo_model", "gpt2"])
def test_a_response_depends_on_its_own_query_and_numbers_alone(
    build, make_settings, monkeypatch, request, name
):
    """Neither on the other rows, nor on padding, nor on responses that end earlier.

    One model has relative positions, the other absolute ones.
    """
    folder = str(request.getfixturevalue(name))
    built = build(make_settings("--model-name", folder, "--max-new-tokens", "40"))
    model, sizes = built.policy.pretrained_model, []
    generate = model.generate

    def see(input_ids, **others):
        sizes.append(len(input_ids))
        return generate(input_ids=input_ids, **others)

    monkeypatch.setattr(model, "generate", see)
    queries = ask(built.tokenizer, *PROMPTS)
    numbers = random_numbers((0, 0, 0), len(queries), 40)
    whole = sample(built, queries, numbers)
    assert len({*map(tuple, whole)}) == 7  # also where two prompts are the same
    assert sample(built, queries, numbers, size=1) == whole
    assert sample(built, queries[::-1], numbers.flip(0), size=3) == whole[::-1]
    assert sizes == [7] + [1] * 7 + [3, 3, 1]
    assert name == "gpt2" or len({*map(len, whole)}) > 1


def test_responses_depend_on_the_key_and_on_no_global_random_state(build, settings, roll_out):
    built = build(settings)
    queries = ask(built.tokenizer, *PROMPTS)
    _, texts = roll_out(built, queries)
    torch.manual_seed(123)  # whatever happened in between
    numpy.random.seed(123)
    state = torch.get_rng_state()
    assert roll_out(built, queries)[1] == texts
    assert torch.equal(torch.get_rng_state(), state)  # nor does it take from anyone's numbers
    for key in ((1, 0, 0), (0, 1, 0), (0, 0, 1)):
        _, others = roll_out(built, queries, key)
        assert not {*others} & {*texts}


def test_random_numbers_depend_on_key_and_place_alone():
    """So a run can go on anywhere, with batches of any size and any number of processes."""
    numbers = random_numbers((5, 3, 1), 20, 6)
    assert numbers.shape == (20, 6) and numbers.dtype == torch.float32
    assert len(numbers.unique()) == 120
    numpy.random.seed(123)  # whatever happened in between
    torch.manual_seed(123)
    again = random_numbers((5, 3, 1), 7, 6)
    assert torch.equal(again, numbers[:7])
    for key in ((6, 3, 1), (5, 4, 1), (5, 3, 2), (3, 5, 1), (5, 1, 3)):
        assert not torch.isin(random_numbers(key, 20, 6), numbers).any()


def test_random_numbers_are_uniform():
    numbers = random_numbers((0, 0, 0), 1000, 20)
    counts = torch.histc(numbers, bins=10, min=0, max=1)
    assert counts.tolist() == pytest.approx([2000] * 10, abs=4 * 2000**0.5)


@pytest.mark.parametrize("drawn", [0.0, 2**-53, 2**-30, 0.5, 1 - 2**-30, 1 - 2**-53])
def test_random_numbers_are_above_0_and_1_at_most_after_they_are_rounded(monkeypatch, drawn):
    """A number of 0 would draw the first token, even one of probability 0."""

    class Generator:
        def random(self, length):
            return numpy.full(length, drawn)

    monkeypatch.setattr(numpy.random, "default_rng", lambda key: Generator())
    numbers = random_numbers((0, 0, 0), 2, 3)
    assert ((numbers > 0) & (numbers <= 1)).all()
    assert numbers.flatten().tolist() == pytest.approx([1 - drawn] * 6, rel=1e-6)


# ----------------------------------------------------- the distribution
def draw(logits, numbers, temperature=1.0):
    """Return the token that each of the numbers draws from these logits."""
    logits = torch.tensor(logits).expand(len(numbers), -1)
    sequences = torch.zeros(len(numbers), 3, dtype=torch.long)
    sampler = TokenSampler(torch.tensor(numbers)[:, None], width=3, temperature=temperature)
    left = sampler(sequences, logits)
    assert left.shape == logits.shape
    # One token is left.
    assert ((left == 0).sum(1) == 1).all()
    assert ((left == -INF).sum(1) == logits.shape[1] - 1).all()
    return left.argmax(1)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.0, 50.0])
def test_evenly_spaced_numbers_draw_each_token_as_often_as_it_is_likely(temperature):
    logits = 3 * torch.randn(60, generator=torch.Generator().manual_seed(0))
    n = 20_000
    numbers = [(place + 1) / n for place in range(n)]
    tokens = draw(logits.tolist(), numbers, temperature)
    counts = torch.bincount(tokens, minlength=60).double()
    wanted = torch.softmax(logits.double() / temperature, dim=-1)
    torch.testing.assert_close(counts / n, wanted, atol=1 / n + 1e-6, rtol=0)


def test_each_of_very_many_tokens_has_its_own_numbers():
    count, places = 100_000, range(0, 100_000, 1000)
    numbers = [(place + 0.5) / count for place in places]
    assert draw([0.0] * count, numbers).tolist() == [*places]


def test_each_token_of_a_response_has_its_own_number():
    """The number of a place is that after as many tokens, whatever the width of the queries."""
    numbers = torch.tensor([[0.1, 0.5, 0.9], [0.9, 0.1, 0.5]])
    for width in (1, 4):
        sampler = TokenSampler(numbers, width, temperature=1.0)
        for place, wanted in enumerate([[0, 2], [1, 0], [2, 1]]):
            sequences = torch.zeros(2, width + place, dtype=torch.long)
            left = sampler(sequences, torch.zeros(2, 3))
            assert left.argmax(1).tolist() == wanted


EXTREME_NUMBERS = [1.0, 1 - 2**-24, 0.5, 0.1, 1e-7, 2**-24, 2**-53, 1e-38]


@pytest.mark.parametrize(
    ("logits", "allowed"),
    [
        ([-INF, -INF, 0.0, -INF, 1.0, -INF, -INF], {2, 4}),
        ([-2e4, 0.0, -2e4, 1.0, -2e4], {1, 3}),  # so small that its probability is 0 as well
        ([-2e38, 0.0, 1.0, -3e38], {1, 2}),
        ([3e38, 0.0, 1.0], {0}),
        ([0.0, INF, 5.0, -INF], {1}),
        ([-INF, INF, 0.0, INF, -INF], {1, 3}),
        ([-INF, NAN, 5.0, -INF], {1, 2}),
        ([-INF, NAN, INF, -INF], {2}),
        ([NAN, NAN, NAN], {0, 1, 2}),
        ([-INF, -INF, -INF], {0, 1, 2}),
    ],
    ids=str,
)
def test_no_number_draws_a_token_of_probability_0(logits, allowed):
    """Nor does a logit that is not finite end a run here: its update will be skipped."""
    for temperature in (0.01, 0.5, 1.0, 2.0, 100.0):
        assert {*draw(logits, EXTREME_NUMBERS, temperature).tolist()} <= allowed


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5] if FULL else [0.5])
def test_tokens_are_sampled_as_the_model_gives_them(build_with, demo_model, temperature):
    """Whatever way of sampling comes with the model."""
    flags = ["--max-new-tokens", "1", "--temperature", str(temperature)]
    built = build_with(ODD_SAMPLING, *flags)
    n, (query,) = 4000 if FULL else 2000, ask(built.tokenizer, "I feel so")
    tokens = torch.tensor(sample(built, [query] * n, size=n)).flatten()
    counts = torch.bincount(tokens, minlength=len(built.tokenizer)).double()
    plain = AutoModelForCausalLM.from_pretrained(demo_model).float()
    with torch.no_grad():
        logits = plain(query[None]).logits[0, -1].double()
    expected = n * torch.softmax(logits / temperature, dim=-1)

    # The rare tokens, all in one class, are what top-k would cut.
    order = expected.argsort(descending=True)
    freedom = int((expected >= 5).sum())
    often, rare = order[:freedom], order[freedom:]
    observed = torch.cat([counts[often], counts[rare].sum()[None]])
    wanted = torch.cat([expected[often], expected[rare].sum()[None]])
    chi_square = ((observed - wanted) ** 2 / wanted).sum().item()
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_a_model_with_its_own_way_of_sampling_is_sampled_like_any_other(build_with):
    """Also where some of that acts after the first token alone, as a penalty for repetitions."""
    responses = []
    for changes in ({}, ODD_SAMPLING):
        built = build_with(changes)
        responses.append(sample(built, ask(built.tokenizer, "Life is") * 20))
    assert responses[0] == responses[1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_head_gets_its_states_in_one_piece_in_16_bits(demo_model, dtype):
    """Of a slice a CPU would copy the head's weights for each row: twice the time in all."""
    model = load_base_model(str(demo_model), "cpu", dtype, "none")
    seen = []
    head = model.get_output_embeddings()
    head.register_forward_pre_hook(lambda layer, arguments: seen.append(arguments[0]))
    ids = torch.full((3, 4), 5)
    model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=3, do_sample=False)
    assert {states.shape for states in seen} == {(3, 1, model.config.hidden_size)}
    assert all(states.is_contiguous() for states in seen) == (dtype == "bfloat16")
