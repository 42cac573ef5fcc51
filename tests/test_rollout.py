import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import train_rlhf

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


def rollout(built, queries):
    """Return the responses alone."""
    return train_rlhf.rollout(built.policy, built.tokenizer, queries)[0]


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
    assert order(seed=0) == epochs != order(seed=1)


def test_a_batch_larger_than_an_epoch_has_every_row_as_often_as_it_goes():
    rows = [{"prompt": letter} for letter in "abc"]
    names = [row["prompt"] for row in train_rlhf.rows_of_step(1, rows, 7, seed=0)]
    assert sorted(names[:3]) == sorted(names[3:6]) == [*"abc"] and names[6] in "abc"


# ----------------------------------------------------------------------------------- the responses
def test_a_rollout_gives_queries_responses_and_their_texts(build, settings):
    built = build(settings)
    queries = train_rlhf.encode(built.tokenizer, built.rows, chat_template=False)
    assert [query.tolist() for query in queries] == [
        built.tokenizer(prompt)["input_ids"] for prompt in settings.prompts
    ]
    torch.manual_seed(0)
    responses, texts = train_rlhf.rollout(built.policy, built.tokenizer, queries)
    assert len(texts) == len(responses) == len(queries)
    for query, response, text in zip(queries, responses, texts):
        assert response.dim() == 1
        assert 1 <= len(response) <= settings.max_new_tokens
        assert response[: len(query)].tolist() != query.tolist()
        assert text == train_rlhf.response_text(built.tokenizer, query, response)


def test_a_response_ends_with_its_first_end_token(build, make_settings):
    built = build(make_settings("--max-new-tokens", "60"))
    (query,) = ask(built.tokenizer, "Life is")
    torch.manual_seed(0)
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


def test_padding_does_not_change_what_a_prompt_is_continued_with(build, make_settings):
    built = build(make_settings("--max-new-tokens", "12"))
    built.policy.pretrained_model.generation_config.do_sample = False
    prompts = ["Life", "Life is what I always wanted it to be, and today I am", "I'm feeling"]
    queries = ask(built.tokenizer, *prompts)
    for query, response in zip(queries, rollout(built, queries)):
        (alone,) = rollout(built, [query])
        assert response.tolist() == alone.tolist()


def test_queries_are_padded_on_the_left_and_responses_on_the_right(build, settings):
    """By their lengths: a pad token in the middle is an ordinary one."""
    tokenizer = build(settings).tokenizer
    pad = tokenizer.pad_token_id
    queries = [torch.tensor(ids) for ids in ([5, pad, 7], [8])]
    responses = [torch.tensor(ids) for ids in ([9, pad], [10, 11, 12])]
    inputs, mask = train_rlhf.pad_batch(tokenizer, queries, responses)
    assert inputs.keys() == {"input_ids", "attention_mask"}
    assert inputs["input_ids"].tolist() == [[5, pad, 7, 9, pad, pad], [pad, pad, 8, 10, 11, 12]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]]
    assert mask.tolist() == [[1, 1, 0], [1, 1, 1]]


# -------------------------------------------------------------------------------- the distribution
@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_tokens_are_sampled_as_the_model_gives_them(
    build, make_settings, copy_of_demo_model, plain, temperature
):
    change_generation_config(copy_of_demo_model, ODD_SAMPLING)
    flags = ["--max-new-tokens", "1", "--temperature", str(temperature)]
    built = build(make_settings("--model-name", str(copy_of_demo_model), *flags))
    n, (query,) = 4000, ask(built.tokenizer, "I feel so")
    torch.manual_seed(0)
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
    build, make_settings, copy_of_demo_model
):
    texts = []
    for changes in ({}, ODD_SAMPLING):
        change_generation_config(copy_of_demo_model, changes)
        built = build(make_settings("--model-name", str(copy_of_demo_model)))
        torch.manual_seed(0)
        queries = ask(built.tokenizer, *["Life is"] * 20)
        texts.append(train_rlhf.rollout(built.policy, built.tokenizer, queries)[1])
    assert texts[0] == texts[1]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_rollout_and_loss_speak_of_one_distribution(build, make_settings, plain, temperature):
    built = build(make_settings("--temperature", str(temperature)))
    queries = ask(built.tokenizer, "Life is", "I'm feeling so")
    torch.manual_seed(0)
    responses = rollout(built, queries)
    assert built.policy.pretrained_model.generation_config.temperature == temperature

    inputs, mask = train_rlhf.pad_batch(built.tokenizer, queries, responses)
    inputs["earned"] = mask.float()
    all_logprobs, _ = built.trainer.forward_pass(inputs)
    for query, response, logprobs in zip(queries, responses, all_logprobs):
        with torch.no_grad():
            logits = plain(torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]
        wanted = torch.log_softmax(logits / temperature, dim=-1)
        torch.testing.assert_close(logprobs[: len(response)], wanted, atol=1e-4, rtol=1e-5)


# --------------------------------------------------------------------------------------- the texts
def test_the_text_of_a_response_keeps_the_space_before_it(demo_model):
    tokenizer = train_rlhf.load_tokenizer(demo_model)
    query, spaced = ask(tokenizer, "Life is", "Life is good today")
    assert spaced[: len(query)].tolist() == query.tolist()
    assert train_rlhf.response_text(tokenizer, query, spaced[len(query) :]) == " good today"
    ended = torch.tensor([*spaced[len(query) :].tolist(), tokenizer.eos_token_id])
    assert train_rlhf.response_text(tokenizer, query, ended) == " good today"
    end = torch.tensor([tokenizer.eos_token_id])
    assert train_rlhf.response_text(tokenizer, query, end) == ""


def test_the_text_of_a_response_keeps_the_space_of_a_sentencepiece_tokenizer(shared_model):
    tokenizer = AutoTokenizer.from_pretrained(shared_model("tinyllama-shape"))
    query, both = ask(tokenizer, "I am really", "I am really happy, glad")
    assert train_rlhf.response_text(tokenizer, query, both[len(query) :]) == " happy, glad"
