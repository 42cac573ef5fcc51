import math

import pytest
import torch
from transformers import AutoModelForCausalLM

import train_rlhf
from train_rlhf import kl_minimum, mean_kl_minimum


def kl(policy, base):
    return (policy * (policy / base).log()).sum().item()


def with_success_rate(base, successes, rate):
    """Return the base distribution with the odds of success changed and nothing else."""
    share = base[successes].sum()
    return torch.where(successes, base * rate / share, base * (1 - rate) / (1 - share))


@pytest.fixture(scope="module")
def toy():
    """Return a base distribution over 20 outcomes, and which of them are successes."""
    generator = torch.Generator().manual_seed(0)
    successes = torch.zeros(20, dtype=torch.bool)
    successes[[0, 3, 4, 11, 19]] = True
    return torch.softmax(
        torch.randn(20, generator=generator, dtype=torch.float64), dim=0
    ), successes


# -------------------------------------------------------------------------------------------------------- KL bound
@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5, 0.8, 0.99])
def test_the_base_model_with_other_odds_has_the_least_kl(toy, rate):
    base, successes = toy
    base_rate = base[successes].sum().item()
    least = kl_minimum(rate, base_rate)
    tilted = with_success_rate(base, successes, rate)
    assert tilted[successes].sum().item() == pytest.approx(rate)
    assert kl(tilted, base) == pytest.approx(least, rel=1e-9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        noise = torch.softmax(torch.randn(20, generator=generator, dtype=torch.float64), dim=0)
        policy = with_success_rate(noise, successes, rate)
        assert kl(policy, base) > least


def test_the_bound_by_hand():
    assert kl_minimum(0.95, 0.2) == pytest.approx(
        0.95 * math.log(0.95 / 0.2) + 0.05 * math.log(0.05 / 0.8)
    )
    assert kl_minimum(0.95, 0.2) == pytest.approx(1.34, abs=0.01)


@pytest.mark.parametrize(
    ("rate", "base_rate", "least"),
    [(0.3, 0.3, 0), (0, 0.25, math.log(4 / 3)), (1, 0.25, math.log(4)), (0, 0, 0), (1, 1, 0)],
)
def test_the_bound_at_the_edges(rate, base_rate, least):
    assert kl_minimum(rate, base_rate) == pytest.approx(least)


def test_the_bound_of_several_prompts_is_the_mean_of_theirs():
    base = {"samples": 200, "success_by_prompt": {"a": 0.1, "b": 0.5}}
    trained = {"samples": 200, "success_by_prompt": {"b": 0.9, "a": 0.6}}
    assert mean_kl_minimum(base, trained) == pytest.approx(
        (kl_minimum(0.6, 0.1) + kl_minimum(0.9, 0.5)) / 2
    )


def test_the_bound_of_many_prompts_with_few_samples_each_is_that_of_the_mean_rates():
    base = {"samples": 4, "success_rate": 0.25, "success_by_prompt": {"a": 0.5, "b": 0.0}}
    trained = {"samples": 4, "success_rate": 0.75, "success_by_prompt": {"a": 1.0, "b": 0.5}}
    assert mean_kl_minimum(base, trained) == pytest.approx(kl_minimum(0.75, 0.25))


@pytest.mark.parametrize("base_rate", [0.0, 1.0])
def test_a_base_model_that_never_or_always_succeeded_leaves_the_bound_finite(base_rate):
    base = {"samples": 200, "success_by_prompt": {"a": base_rate, "b": 0.5}}
    trained = {"samples": 200, "success_by_prompt": {"a": 0.6, "b": 0.5}}
    half = 0.5 / 100  # half a response of the 100 to each prompt
    assert mean_kl_minimum(base, trained) == pytest.approx(
        kl_minimum(0.6, abs(base_rate - half)) / 2
    )


# ----------------------------------------------------------------------------------------------------- the figures
@pytest.fixture(scope="module", params=[1.0, 2.0], ids="temperature {}".format)
def trained(request, build, step, demo_model, tmp_path_factory):
    """Return policy, tokenizer and trainer after a few steps that took the policy away from the base model."""
    settings = train_rlhf.read_settings(
        [
            *(
                "--model-name",
                str(demo_model),
                "--output-dir",
                str(tmp_path_factory.mktemp("measured")),
            ),
            *(
                "--device",
                "cpu",
                "--batch-size",
                "6",
                "--max-new-tokens",
                "20",
                "--learning-rate",
                "0.003",
            ),
            *(
                "--eval-samples",
                "18",
                "--eval-batch-size",
                "7",
                "--temperature",
                str(request.param),
            ),
        ]
    )
    built = build(settings)
    built.reward = train_rlhf.load_reward(settings)
    torch.manual_seed(0)
    for _ in range(4):
        step(built)
    return built


@pytest.fixture(scope="module")
def by_hand(trained, demo_model):
    """Work out KL and log-probability under the base model of one response, without padding and without TRL."""
    base = AutoModelForCausalLM.from_pretrained(demo_model).float()

    @torch.no_grad()
    def compute(query, response):
        logprobs, ref_logprobs = (
            torch.log_softmax(
                model(torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1].double()
                / trained.settings.temperature,
                dim=-1,
            )
            for model in (trained.policy.pretrained_model, base)
        )
        kl = sum((p.exp() * (p - ref)).sum().item() for p, ref in zip(logprobs, ref_logprobs))
        return kl, sum(ref[token].item() for ref, token in zip(ref_logprobs, response))

    return compute


def measure(built, prompts, base=False):
    return train_rlhf.measure(
        built.trainer, built.tokenizer, prompts, built.reward, built.settings, base=base
    )


def test_kl_and_log_probability_are_sums_over_the_response(trained, by_hand):
    def ids(text):
        return trained.tokenizer(text, return_tensors="pt")["input_ids"][0]

    queries = [ids("Life"), ids("I'm feeling as if I could do it"), ids("My")]
    responses = [ids("is good"), ids("and so"), ids("day was long and I am so very tired")]
    kls, ref_logprobs = train_rlhf.compare_with_base(trained.trainer, queries, responses)
    assert min(kls) > 0.001
    for query, response, kl, ref_logprob in zip(queries, responses, kls, ref_logprobs):
        wanted_kl, wanted_logprob = by_hand(query, response)
        assert kl.item() == pytest.approx(wanted_kl, rel=1e-3)
        assert ref_logprob.item() == pytest.approx(wanted_logprob, rel=1e-4)


def test_the_figures_of_a_measurement(trained, by_hand, monkeypatch):
    batches, rollout = [], train_rlhf.rollout

    def uneven(*args):
        queries, responses, texts, scores = rollout(*args)
        batches.append((queries, [r[: len(r) - i] for i, r in enumerate(responses)], texts, scores))
        return batches[-1]

    monkeypatch.setattr(train_rlhf, "rollout", uneven)
    prompts = trained.settings.eval_prompts
    measured = measure(trained, prompts)
    queries, responses, texts, scores = (
        [item for batch in batches for item in batch[i]] for i in range(4)
    )
    assert [len(batch[0]) for batch in batches] == [7, 7, 4]  # of EVAL_BATCH_SIZE 7

    kls, logprobs = zip(*(by_hand(query, response) for query, response in zip(queries, responses)))
    tokens = sum(map(len, responses))
    assert measured["samples"] == 18
    assert measured["kl"] == pytest.approx(sum(kls) / 18, rel=1e-3)
    assert measured["perplexity_under_base"] == pytest.approx(
        math.exp(-sum(logprobs) / tokens), rel=1e-4
    )
    assert measured["success_rate"] == scores.count(1.0) / 18
    assert measured["score"] == pytest.approx(sum(scores) / 18)
    assert measured["distinct"] == len(set(texts)) / 18
    asked = [trained.tokenizer.decode(query, skip_special_tokens=True) for query in queries]
    assert asked == [prompt for prompt in prompts for _ in range(3)]
    for i, prompt in enumerate(prompts):
        assert measured["success_by_prompt"][prompt] == scores[3 * i : 3 * i + 3].count(1.0) / 3
        assert measured["first_sample"][prompt] == texts[3 * i]


def test_prompts_share_the_samples_evenly(trained):
    measured = measure(
        trained, ["Life is", "My day was", "I", "You", "We"]
    )  # 18 samples for 5 prompts
    assert measured["samples"] == 20
    assert all(rate * 4 == round(rate * 4) for rate in measured["success_by_prompt"].values())


def test_the_base_model_is_at_no_kl_of_itself(trained):
    measured = measure(trained, trained.settings.prompts, base=True)
    assert measured["kl"] == 0
    assert measure(trained, trained.settings.prompts)["kl"] > 0.01


def test_a_measurement_can_be_repeated(trained):
    first = measure(trained, trained.settings.prompts)
    torch.manual_seed(123)  # whatever happened in between
    assert measure(trained, trained.settings.prompts) == first
    assert measure(trained, trained.settings.eval_prompts)["first_sample"] != first["first_sample"]


def test_another_seed_gives_other_samples(trained, monkeypatch):
    first = measure(trained, trained.settings.prompts)
    monkeypatch.setattr(trained.settings, "seed", 1)
    assert measure(trained, trained.settings.prompts)["first_sample"] != first["first_sample"]


def test_a_measurement_trains_nothing(trained):
    before = {name: value.clone() for name, value in trained.policy.state_dict().items()}
    measure(trained, trained.settings.prompts)
    assert all(
        torch.equal(value, before[name]) for name, value in trained.policy.state_dict().items()
    )


# ------------------------------------------------------------------------------------------------------ did it learn
def test_an_untrained_policy_has_not_learned(build, make_settings):
    built = build(make_settings())
    reward = train_rlhf.load_reward(built.settings)
    report = train_rlhf.evaluate(built.trainer, built.tokenizer, reward, built.settings)
    assert report["learned"] is False
    for prompts in ("train_prompts", "eval_prompts"):
        base, trained = (dict(report[model][prompts]) for model in ("base", "trained"))
        assert base == trained  # the same samples
        assert base["kl"] == 0
        assert base["kl_minimum"] == pytest.approx(trained["kl_minimum"])


@pytest.mark.parametrize(
    ("rate", "samples", "learned"),
    [
        (0.9, 240, True),
        (0.4, 240, True),
        (0.3, 240, False),
        (0.25, 10_000, False),
        (0.1, 240, False),
        (0.5, 12, False),
    ],
)
def test_a_rise_within_chance_is_not_called_learning(
    make_settings, monkeypatch, rate, samples, learned
):
    def measured(*args, base):
        share = 0.25 if base else rate
        return {
            "success_rate": share,
            "samples": samples,
            "success_by_prompt": {"Life is": share},
            "kl": 1.0,
        }

    monkeypatch.setattr(train_rlhf, "measure", measured)
    assert train_rlhf.evaluate(None, None, None, make_settings())["learned"] is learned
