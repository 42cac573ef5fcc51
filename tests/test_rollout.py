"""What is said in a step, and how that scores."""

import pytest
import torch
from transformers import AutoModelForCausalLM

import train_rlhf
from finetune.processes import random_numbers
from finetune.scale import Scale
from finetune.tokens import encode

PROMPTS = ["Life is", "I'm feeling so", "My day was", "Today I am"]


@pytest.fixture
def respond(build, make_settings, make_learner):
    """Return what was built, rows, and what sample_and_score makes of them."""

    def lengths(rows, texts):
        return [float(len(text)) for text in texts]

    def start(*flags, scale=None):
        built = build(make_settings(*flags))
        learner = make_learner(built, lengths, scale)
        rows = [{"prompt": prompt} for prompt in PROMPTS]
        numbers = random_numbers((0, 1, 0), len(rows), built.settings.max_new_tokens)
        return built, rows, train_rlhf.sample_and_score(rows, numbers, learner)

    return start


@pytest.mark.parametrize(
    ("mini_batch_size", "eval_batch_size", "flag"),
    [("0", "3", "--score-prefixes"), ("2", "3", "--no-score-prefixes")],
)
def test_a_rollout_is_what_the_policy_says_and_how_that_scores(
    respond, roll_out, monkeypatch, mini_batch_size, eval_batch_size, flag
):
    sizes, sample = [], train_rlhf.sample_responses

    def see(*args, batch_size):
        sizes.append(batch_size)
        return sample(*args, batch_size=batch_size)

    monkeypatch.setattr(train_rlhf, "sample_responses", see)
    scale = Scale(mean=10.0, deviation=4.0)
    sizes_at_once = ["--mini-batch-size", mini_batch_size, "--eval-batch-size", eval_batch_size]
    built, rows, rollout = respond(*sizes_at_once, flag, scale=scale)
    assert sizes == [max(int(mini_batch_size) or 4, 3)]

    queries = encode(built.tokenizer, rows, chat_template=False)
    responses, texts = roll_out(built, queries, key=(0, 1, 0))
    assert {len(column) for column in rollout} == {4}
    for own, query in zip(rollout.queries, queries):
        assert torch.equal(own, query)
    for own, response in zip(rollout.responses, responses):
        assert torch.equal(own, response)
    assert rollout.texts == texts
    assert rollout.scores == [len(text) for text in texts]
    for response, score, earned in zip(responses, rollout.scores, rollout.token_scores):
        assert len(earned) == len(response)
        before = 0.0 if flag == "--score-prefixes" else 10.0  # of the empty text, or the mean
        assert earned.sum().item() == pytest.approx((score - before) / 4)
        assert (earned[:-1] == 0).all() == (flag == "--no-score-prefixes")


def test_a_conversation_with_tools_is_asked_and_scored_with_them(
    build, make_settings, make_learner
):
    """The template has a start token, and the tokenizer adds no second one."""
    built = build(make_settings("--no-score-prefixes"))
    built.tokenizer.chat_template = (
        "{{ bos_token }}{% if tools %}{{ tools[0]['name'] + '! ' }}{% endif %}"
        "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    )
    turns, seen = [{"role": "user", "content": "Hi"}], []
    rows = [{"prompt": turns, "tools": [{"name": "Time"}]}, {"prompt": turns, "tools": None}]
    rows += [{"prompt": "<s>Hi", "tools": None}]

    def lengths(rows, texts):
        seen.append(rows)
        return [float(len(text)) for text in texts]

    numbers = random_numbers((0, 1, 0), len(rows), built.settings.max_new_tokens)
    rollout = train_rlhf.sample_and_score(rows, numbers, make_learner(built, lengths))
    wanted = [built.tokenizer(text)["input_ids"] for text in ("Time! Hi", "Hi", "Hi")]
    assert [query.tolist() for query in rollout.queries] == wanted
    assert all(query.count(built.tokenizer.bos_token_id) == 1 for query in wanted)
    assert seen == [rows]
    assert rollout.scores == [len(text) for text in rollout.texts]


@pytest.mark.parametrize("temperature", ["1.0", "0.7", "2.0"])
def test_rollout_and_loss_speak_of_one_distribution(respond, demo_model, temperature):
    """That of the plain model, as long as nothing is learned."""
    built, _, rollout = respond("--temperature", temperature)
    config = built.policy.pretrained_model.generation_config
    assert config.temperature == float(temperature)

    batch = built.trainer.make_batch(rollout.queries, rollout.responses, rollout.token_scores)
    with torch.no_grad():
        states, _ = built.policy(**batch.inputs)
        ref_states = built.trainer.ref_pass(batch.inputs)
        of_policy = built.policy.head(states).log_softmax(-1)
        of_base = built.policy.head(ref_states).log_softmax(-1)
    plain = AutoModelForCausalLM.from_pretrained(demo_model).float()
    rows = zip(rollout.queries, rollout.responses, of_policy, of_base)
    for query, response, *both in rows:
        places = slice(len(query) - 1, -1)
        with torch.no_grad():
            logits = plain(torch.cat([query, response])[None]).logits[0, places]
        wanted = torch.log_softmax(logits / config.temperature, dim=-1)
        for logprobs in both:
            torch.testing.assert_close(logprobs[: len(response)], wanted, atol=1e-4, rtol=1e-5)
