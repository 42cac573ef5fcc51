import json
import math

import numpy
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_rlhf
from train_rlhf import random_numbers, texts_of

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


def ask(tokenizer, *prompts):
    return [tokenizer(prompt, return_tensors="pt")["input_ids"][0] for prompt in prompts]


def rollout(built, queries, numbers=None, size=None):
    """Return the responses alone, all of them generated at once where no size is given."""
    if numbers is None:
        numbers = random_numbers((0, 0, 0), queries, built.settings.max_new_tokens)
    size = size or len(queries)
    return train_rlhf.rollout(built.policy, built.tokenizer, queries, numbers, size)[0]


def change_generation_config(folder, changes):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def plain(demo_model):
    """Return demo_model in plain transformers."""
    return AutoModelForCausalLM.from_pretrained(demo_model).float()


# ------------------------------------------------------------------------------------- the prompts
def test_every_epoch_has_each_row_once_in_an_order_of_its_own():
    """The batches don't divide an epoch, and a step needs none of those before it."""

    def order(seed):
        batches = [train_rlhf.rows_of_step(step, rows, 4, seed) for step in range(15, 0, -1)]
        assert {*map(len, batches)} == {4}
        names = [row["prompt"] for batch in reversed(batches) for row in batch]
        return [names[start : start + 12] for start in range(0, 60, 12)]

    rows = [{"prompt": letter} for letter in "abcdefghijkl"]
    epochs = order(seed=0)
    assert all(sorted(epoch) == [*"abcdefghijkl"] for epoch in epochs)
    assert len({*map(tuple, epochs)}) == 5
    torch.manual_seed(123)  # whatever happened in between
    numpy.random.seed(123)
    assert order(seed=0) == epochs != order(seed=1)


def test_a_batch_larger_than_an_epoch_has_every_row_as_often_as_it_goes():
    rows = [{"prompt": letter} for letter in "abc"]
    names = [row["prompt"] for row in train_rlhf.rows_of_step(1, rows, 7, seed=0)]
    assert sorted(names[:3]) == sorted(names[3:6]) == [*"abc"] and names[6] in "abc"


# ----------------------------------------------------------------------------------- the responses
def test_a_rollout_gives_responses_and_their_texts(build, settings, roll_out):
    built = build(settings)
    queries = train_rlhf.encode(built.tokenizer, built.rows, chat_template=False)
    assert [query.tolist() for query in queries] == [
        built.tokenizer(prompt)["input_ids"] for prompt in settings.prompts
    ]
    responses, texts = roll_out(built, queries)
    assert len(texts) == len(responses) == len(queries)
    for query, response, text in zip(queries, responses, texts):
        assert response.dim() == 1
        assert 1 <= len(response) <= settings.max_new_tokens
        assert response[: len(query)].tolist() != query.tolist()
        assert [text] == texts_of(built.tokenizer, query, [response])


def test_a_response_ends_with_its_first_end_token(build, make_settings):
    built = build(make_settings("--max-new-tokens", "60"))
    (query,) = ask(built.tokenizer, "Life is")
    responses = rollout(built, [query] * 60)
    assert len({len(response) for response in responses}) > 1
    for response in responses:
        assert built.tokenizer.eos_token_id not in response[:-1]
        assert len(response) == 60 or response[-1] == built.tokenizer.eos_token_id


@pytest.mark.parametrize(
    ("own", "known", "expected"),
    [
        ([1, 2], [1, 2], [[5, 6, 1], [5, 2], [5, 6, 7, 8, 9], [1], [5, 1]]),
        (None, [2], [[5, 6, 1, 0, 0], [5, 2], [5, 6, 7, 8, 9], [1, 0, 0, 0, 0], [5, 1, 7, 2]]),
    ],
)
def test_each_end_token_of_the_model_or_else_the_tokenizers_ends_a_response(
    build, make_settings, copy_of_demo_model, monkeypatch, own, known, expected
):
    change_generation_config(copy_of_demo_model, {"eos_token_id": own})
    built = build(make_settings("--model-name", str(copy_of_demo_model)))
    model = built.policy.pretrained_model
    assert built.tokenizer.eos_token_id == 2
    assert model.generation_config.eos_token_id == known

    rows = [[5, 6, 1, 0, 0], [5, 2, 0, 0, 0], [5, 6, 7, 8, 9], [1, 0, 0, 0, 0], [5, 1, 7, 2, 8]]
    monkeypatch.setattr(
        model,
        "generate",
        lambda input_ids, **others: torch.cat([input_ids, torch.tensor(rows)], dim=1),
    )
    responses = rollout(built, ask(built.tokenizer, *["Once upon a time"] * 5))
    assert [response.tolist() for response in responses] == expected


def test_queries_are_padded_on_the_left_and_responses_on_the_right(build, settings):
    """By their lengths: a pad token in the middle is an ordinary one."""
    tokenizer = build(settings).tokenizer
    pad = tokenizer.pad_token_id
    queries = [torch.tensor(ids) for ids in ([5, pad, 7], [8])]
    responses = [torch.tensor(ids) for ids in ([9, pad], [10, 11, 12])]
    inputs, mask = train_rlhf.pad_batch(tokenizer, queries, responses, torch.device("cpu"))
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].tolist() == [[5, pad, 7, 9, pad, pad], [pad, pad, 8, 10, 11, 12]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]


# ------------------------------------------------------------------------------ the random numbers
PROMPTS = [
    "Life",
    "Life is what I always wanted it to be, and",
    "I'm feeling",
    "My day was",
    "Life",
    "Today I am so",
    "It makes me",
]


@pytest.fixture(params=["demo_model", "gpt2"])
def either(request, build, make_settings):
    """Return what build returns, of a model with relative positions, and of one with absolute."""
    folder = request.getfixturevalue(request.param)
    return build(make_settings("--model-name", str(folder), "--max-new-tokens", "40"))


@pytest.fixture
def pieces(monkeypatch):
    """Return a function that lists from now on how many responses are generated at once."""

    def list_of(built):
        sizes, model = [], built.policy.pretrained_model
        generate = model.generate

        def see(input_ids, **others):
            sizes.append(len(input_ids))
            return generate(input_ids=input_ids, **others)

        monkeypatch.setattr(model, "generate", see)
        return sizes

    return list_of


def test_responses_do_not_depend_on_the_size_of_the_pieces(either, pieces):
    """Neither on padding, which differs from piece to piece, nor on responses that end earlier."""
    queries, sizes = ask(either.tokenizer, *PROMPTS), pieces(either)
    whole = [response.tolist() for response in rollout(either, queries)]
    assert len({*map(tuple, whole)}) == 7  # also where two prompts are the same
    for size in (1, 3):
        responses = rollout(either, queries, size=size)
        assert [response.tolist() for response in responses] == whole
    assert sizes == [7] + [1] * 7 + [3, 3, 1]


def test_responses_do_not_depend_on_the_other_rows(either):
    """A prompt with its numbers alone is continued as in a batch, and so it is in another order."""
    queries = ask(either.tokenizer, *PROMPTS)
    numbers = random_numbers((0, 0, 0), queries, 40)
    batch = [response.tolist() for response in rollout(either, queries, numbers)]
    for place, wanted in enumerate(batch):
        (alone,) = rollout(either, [queries[place]], numbers[place : place + 1])
        assert alone.tolist() == wanted
    backwards = rollout(either, queries[::-1], numbers.flip(0))
    assert [response.tolist() for response in backwards] == batch[::-1]


def test_responses_of_pieces_are_of_different_lengths(build, make_settings):
    """Or the tests above would not tell of responses that end earlier than others."""
    built = build(make_settings("--max-new-tokens", "40"))
    assert len({len(response) for response in rollout(built, ask(built.tokenizer, *PROMPTS))}) > 1


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
        assert not {*roll_out(built, queries, key)[1]} & {*texts}


def test_random_numbers_depend_on_key_and_place_alone():
    """So a run can go on anywhere, with batches of any size and any number of processes."""
    numbers = random_numbers((5, 3, 1), range(20), 6)
    assert numbers.shape == (20, 6) and numbers.dtype == torch.float32
    assert len(numbers.unique()) == 120
    numpy.random.seed(123)  # whatever happened in between
    torch.manual_seed(123)
    assert torch.equal(random_numbers((5, 3, 1), [{"prompt": "A"}] * 7, 6), numbers[:7])
    for key in ((6, 3, 1), (5, 4, 1), (5, 3, 2), (3, 5, 1), (5, 1, 3)):
        assert not torch.isin(random_numbers(key, range(20), 6), numbers).any()


def test_random_numbers_are_uniform():
    numbers = random_numbers((0, 0, 0), range(1000), 20)
    counts = torch.histc(numbers, bins=10, min=0, max=1)
    assert counts.tolist() == pytest.approx([2000] * 10, abs=4 * 2000**0.5)


@pytest.mark.parametrize("drawn", [0.0, 2**-53, 2**-30, 0.5, 1 - 2**-30, 1 - 2**-53])
def test_random_numbers_are_above_0_and_1_at_most_after_they_are_rounded(monkeypatch, drawn):
    """A number of 0 would draw the first token, even one of probability 0."""

    class Generator:
        def random(self, length):
            return numpy.full(length, drawn)

    monkeypatch.setattr(numpy.random, "default_rng", lambda key: Generator())
    numbers = random_numbers((0, 0, 0), range(2), 3)
    assert ((numbers > 0) & (numbers <= 1)).all()
    assert numbers.flatten().tolist() == pytest.approx([1 - drawn] * 6, rel=1e-6)


# -------------------------------------------------------------------------------- the distribution
def draw(logits, numbers, temperature):
    """Return the token that each of the numbers draws from these logits."""
    logits = torch.tensor(logits).expand(len(numbers), -1)
    sequences = torch.zeros(len(numbers), 3, dtype=torch.long)
    left = train_rlhf.draw_tokens(torch.tensor(numbers)[:, None], 3, temperature, sequences, logits)
    assert left.shape == logits.shape
    assert ((left == 0).sum(1) == 1).all()  # one token is left
    assert ((left == -math.inf).sum(1) == logits.shape[1] - 1).all()
    return left.argmax(1)


@pytest.mark.parametrize("temperature", [0.1, 0.7, 1.0, 2.0, 50.0])
def test_evenly_spaced_numbers_draw_each_token_as_often_as_it_is_likely(temperature):
    logits = 3 * torch.randn(60, generator=torch.Generator().manual_seed(0))
    n = 20_000
    numbers = [(place + 1) / n for place in range(n)]
    counts = torch.bincount(draw(logits.tolist(), numbers, temperature), minlength=60).double()
    wanted = torch.softmax(logits.double() / temperature, dim=-1)
    torch.testing.assert_close(counts / n, wanted, atol=1 / n + 1e-6, rtol=0)


def test_each_of_very_many_tokens_has_its_own_numbers():
    count, places = 100_000, range(0, 100_000, 1000)
    numbers = [(place + 0.5) / count for place in places]
    assert draw([0.0] * count, numbers, 1.0).tolist() == [*places]


def test_each_token_of_a_response_has_its_own_number():
    """The number of a place is that after as many tokens, whatever the width of the queries."""
    numbers = torch.tensor([[0.1, 0.5, 0.9], [0.9, 0.1, 0.5]])
    for width in (1, 4):
        for place, wanted in enumerate([[0, 2], [1, 0], [2, 1]]):
            sequences = torch.zeros(2, width + place, dtype=torch.long)
            left = train_rlhf.draw_tokens(numbers, width, 1.0, sequences, torch.zeros(2, 3))
            assert left.argmax(1).tolist() == wanted


EXTREME_NUMBERS = [1.0, 1 - 2**-24, 0.5, 0.1, 1e-7, 2**-24, 2**-53, 1e-38]
NAN, INF = math.nan, math.inf


@pytest.mark.parametrize("temperature", [0.01, 0.5, 1.0, 2.0, 100.0])
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
def test_no_number_draws_a_token_of_probability_0(logits, allowed, temperature):
    """Nor does a logit that is not finite end a run here: its update will be skipped."""
    assert {*draw(logits, EXTREME_NUMBERS, temperature).tolist()} <= allowed


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_tokens_are_sampled_as_the_model_gives_them(
    build, make_settings, copy_of_demo_model, plain, temperature
):
    change_generation_config(copy_of_demo_model, ODD_SAMPLING)
    flags = ["--max-new-tokens", "1", "--temperature", str(temperature)]
    built = build(make_settings("--model-name", str(copy_of_demo_model), *flags))
    n, (query,) = 4000, ask(built.tokenizer, "I feel so")
    responses = rollout(built, [query] * n)
    counts = torch.bincount(torch.cat(responses), minlength=len(built.tokenizer)).double()
    with torch.no_grad():
        logits = plain(query[None]).logits[0, -1].double()
    expected = n * torch.softmax(logits / temperature, dim=-1)

    # The rare tokens, all in one class, are what top-k would cut.
    order = expected.argsort(descending=True)
    often = order[: int((expected >= 5).sum())]
    rare = order[len(often) :]
    observed = torch.cat([counts[often], counts[rare].sum()[None]])
    wanted = torch.cat([expected[often], expected[rare].sum()[None]])
    chi_square, freedom = ((observed - wanted) ** 2 / wanted).sum().item(), len(often)
    assert chi_square < freedom + 4 * (2 * freedom) ** 0.5


def test_a_model_with_its_own_way_of_sampling_is_sampled_like_any_other(
    build, make_settings, copy_of_demo_model, roll_out
):
    texts = []
    for changes in ({}, ODD_SAMPLING):
        change_generation_config(copy_of_demo_model, changes)
        built = build(make_settings("--model-name", str(copy_of_demo_model)))
        queries = ask(built.tokenizer, *["Life is"] * 20)
        texts.append(roll_out(built, queries)[1])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_rollout_and_loss_speak_of_one_distribution(build, make_settings, plain, temperature):
    built = build(make_settings("--temperature", str(temperature)))
    queries = ask(built.tokenizer, "Life is", "I'm feeling so")
    responses = rollout(built, queries)
    assert built.policy.pretrained_model.generation_config.temperature == temperature

    inputs, mask = train_rlhf.pad_batch(built.tokenizer, queries, responses, torch.device("cpu"))
    inputs["earned"] = mask.float()
    with torch.no_grad():
        of_policy, _ = built.policy(**inputs)
    of_base = built.trainer.ref_pass(inputs)  # nothing is learned yet
    for query, response, *both in zip(queries, responses, of_policy, of_base):
        with torch.no_grad():
            logits = plain(torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]
        wanted = torch.log_softmax(logits / temperature, dim=-1)
        for logprobs in both:
            torch.testing.assert_close(logprobs[: len(response)], wanted, atol=1e-4, rtol=1e-5)


# --------------------------------------------------------------------------------------- the texts
def test_the_text_of_a_response_keeps_the_space_before_it(demo_model):
    tokenizer = train_rlhf.load_tokenizer(demo_model)
    query, spaced = ask(tokenizer, "Life is", "Life is good today")
    assert spaced[: len(query)].tolist() == query.tolist()
    assert texts_of(tokenizer, query, [spaced[len(query) :]]) == [" good today"]
    ended = torch.tensor([*spaced[len(query) :].tolist(), tokenizer.eos_token_id])
    assert texts_of(tokenizer, query, [ended]) == [" good today"]
    end = torch.tensor([tokenizer.eos_token_id])
    assert texts_of(tokenizer, query, [end]) == [""]


def test_the_text_of_a_response_keeps_the_space_of_a_sentencepiece_tokenizer(shared_model):
    tokenizer = AutoTokenizer.from_pretrained(shared_model("tinyllama-shape"))
    query, both = ask(tokenizer, "I am really", "I am really happy, glad")
    assert texts_of(tokenizer, query, [both[len(query) :]]) == [" happy, glad"]


def test_the_texts_of_several_responses_to_one_query_come_in_their_order(demo_model):
    """Such as the beginnings of one, of which the first is empty."""
    tokenizer = train_rlhf.load_tokenizer(demo_model)
    query, whole = ask(tokenizer, "Life is", "Life is good today, I feel")
    response = whole[len(query) :]
    beginnings = [response[:end] for end in range(len(response) + 1)]
    texts = texts_of(tokenizer, query, beginnings)
    assert texts == [texts_of(tokenizer, query, [each])[0] for each in beginnings]
    assert texts[0] == "" and texts[-1] == " good today, I feel"
    assert all(texts[-1].startswith(text) for text in texts) and len({*texts}) > 4
    assert texts_of(tokenizer, query, beginnings[::-1]) == texts[::-1]
