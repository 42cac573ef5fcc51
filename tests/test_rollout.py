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


def spoil_generation_config(folder):
    path = folder / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | ODD_SAMPLING))


@pytest.fixture(scope="module")
def next_logits(demo_model):
    """Return the logits of demo_model, in plain transformers, for the token after a prompt."""
    model, tokenizer = (
        AutoModelForCausalLM.from_pretrained(demo_model).float(),
        AutoTokenizer.from_pretrained(demo_model),
    )

    @torch.no_grad()
    def logits(prompt):
        return model(**tokenizer(prompt, return_tensors="pt")).logits[0, -1]

    return logits


def test_responses_come_without_the_query(build, settings):
    built = build(settings)
    queries = ask(built.tokenizer, *settings.prompts)
    torch.manual_seed(0)
    responses = train_rlhf.generate(built.policy, built.tokenizer, queries)
    assert len(responses) == len(queries)
    for query, response in zip(queries, responses):
        assert response.dim() == 1
        assert 1 <= len(response) <= settings.max_new_tokens
        assert response[: len(query)].tolist() != query.tolist()


def test_a_response_ends_with_its_first_end_token(build, make_settings):
    built = build(make_settings("--max-new-tokens", "60"))
    (query,) = ask(built.tokenizer, "Life is")
    torch.manual_seed(0)
    responses = train_rlhf.generate(built.policy, built.tokenizer, [query] * 60)
    assert len({len(response) for response in responses}) > 1
    for response in responses:
        assert built.tokenizer.eos_token_id not in response[:-1]
        assert len(response) == 60 or response[-1] == built.tokenizer.eos_token_id


def test_each_of_several_end_tokens_ends_a_response(build, make_settings, shared_model):
    built = build(
        make_settings("--model-name", str(shared_model("stories260K")), "--max-new-tokens", "12")
    )
    sequences = iter(
        [[5, 6, 1, 0, 0], [5, 2, 0, 0, 0], [5, 6, 7, 8, 9], [1, 0, 0, 0, 0], [5, 1, 7, 2, 8]]
    )
    queries = ask(built.tokenizer, *["Once upon a time"] * 5)
    built.policy.pretrained_model.generate = lambda input_ids, **others: torch.cat(
        [input_ids, torch.tensor([*sequences])], dim=1
    )
    assert built.policy.pretrained_model.generation_config.eos_token_id == [1, 2]
    responses = train_rlhf.generate(built.policy, built.tokenizer, queries)
    assert [response.tolist() for response in responses] == [
        [5, 6, 1],
        [5, 2],
        [5, 6, 7, 8, 9],
        [1],
        [5, 1],
    ]


@pytest.mark.parametrize("temperature", [1.0, 2.0, 0.5])
def test_tokens_are_sampled_as_the_model_gives_them(
    build, make_settings, copy_of_demo_model, next_logits, temperature
):
    spoil_generation_config(copy_of_demo_model)
    built = build(
        make_settings(
            *(
                "--model-name",
                str(copy_of_demo_model),
                "--max-new-tokens",
                "1",
                "--temperature",
                str(temperature),
            )
        )
    )
    n = 4000
    torch.manual_seed(0)
    responses = train_rlhf.generate(
        built.policy, built.tokenizer, ask(built.tokenizer, "I feel so") * n
    )
    counts = torch.bincount(torch.cat(responses), minlength=len(built.tokenizer)).double()
    expected = n * torch.softmax(next_logits("I feel so").double() / temperature, dim=-1)

    order = expected.argsort(
        descending=True
    )  # the rare tokens, all in one class, are what top-k would cut
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
    for odd in (False, True):
        if odd:
            spoil_generation_config(copy_of_demo_model)
        built = build(make_settings("--model-name", str(copy_of_demo_model)))
        torch.manual_seed(0)
        texts.append(
            train_rlhf.rollout(built.policy, built.tokenizer, ["Life is"] * 20, lambda text: 0.0)[2]
        )
    assert texts[0] == texts[1]


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.0])
def test_rollout_and_loss_speak_of_one_distribution(build, make_settings, demo_model, temperature):
    built = build(make_settings("--temperature", str(temperature)))
    queries = ask(built.tokenizer, "Life is", "I'm feeling so")
    torch.manual_seed(0)
    responses = train_rlhf.generate(built.policy, built.tokenizer, queries)
    assert built.policy.pretrained_model.generation_config.temperature == temperature

    built.trainer.token_scores = [torch.zeros(len(response)) for response in responses]
    inputs = built.trainer.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        logprobs, _, _, masks = built.trainer.batched_forward_pass(
            built.trainer.model, queries, responses, inputs
        )
    plain = AutoModelForCausalLM.from_pretrained(demo_model).float()
    for query, response, row, mask in zip(queries, responses, logprobs, masks):
        with torch.no_grad():
            logits = plain(torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]
        wanted = (
            torch.log_softmax(logits / temperature, dim=-1).gather(1, response[:, None]).flatten()
        )
        torch.testing.assert_close(row[mask.bool()], wanted, atol=1e-5, rtol=1e-5)


def test_the_text_of_a_response_keeps_the_space_before_it(build, settings):
    tokenizer = build(settings).tokenizer
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


def test_rollout_scores_the_texts_of_its_responses(build, settings):
    built = build(settings)
    torch.manual_seed(0)
    queries, responses, texts, scores = train_rlhf.rollout(
        built.policy, built.tokenizer, settings.prompts, len
    )
    assert [query.tolist() for query in queries] == [
        built.tokenizer(p)["input_ids"] for p in settings.prompts
    ]
    for prompt, query, response, text, score in zip(
        settings.prompts, queries, responses, texts, scores
    ):
        assert text == train_rlhf.response_text(built.tokenizer, query, response)
        assert score == train_rlhf.score_response(len, prompt, text)


def test_padding_does_not_change_what_a_prompt_is_continued_with(build, make_settings):
    built = build(make_settings("--max-new-tokens", "12"))
    built.policy.pretrained_model.generation_config.do_sample = False
    queries = ask(
        built.tokenizer,
        "Life",
        "Life is what I always wanted it to be, and today I am",
        "I'm feeling",
    )
    together = train_rlhf.generate(built.policy, built.tokenizer, queries)
    for query, response in zip(queries, together):
        (alone,) = train_rlhf.generate(built.policy, built.tokenizer, [query])
        assert response.tolist() == alone.tolist()
