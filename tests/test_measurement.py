"""The figures of the report: each is worked out once more, by hand, and chance is no learning."""

import math
from contextlib import contextmanager
from itertools import chain

import pytest
import torch
from transformers import AutoModelForCausalLM

import train_rlhf
from train_rlhf import kl_minimum

METRICS = [{"samples": 60, "seconds": 3.0}]  # of a run, as far as the report needs them


def kl(policy, base):
    return (policy * (policy / base).log()).sum().item()


def with_success_rate(base, successes, rate):
    """Return the base distribution with the odds of success changed and nothing else."""
    share = base[successes].sum()
    return torch.where(successes, base * rate / share, base * (1 - rate) / (1 - share))


def random_distribution(generator):
    return torch.softmax(torch.randn(20, generator=generator, dtype=torch.float64), dim=0)


@pytest.fixture(scope="module")
def toy():
    """Return a base distribution over 20 outcomes, and which of them are successes."""
    successes = torch.zeros(20, dtype=torch.bool)
    successes[[0, 3, 4, 11, 19]] = True
    return random_distribution(torch.Generator().manual_seed(0)), successes


# -------------------------------------------------------------------------------- the least KL
@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5, 0.8, 0.99])
def test_the_base_model_with_other_odds_has_the_least_kl(toy, rate):
    base, successes = toy
    least = kl_minimum(rate, base[successes].sum().item())
    tilted = with_success_rate(base, successes, rate)
    assert tilted[successes].sum().item() == pytest.approx(rate)
    assert kl(tilted, base) == pytest.approx(least, rel=1e-9)
    generator = torch.Generator().manual_seed(1)
    for _ in range(100):
        policy = with_success_rate(random_distribution(generator), successes, rate)
        assert kl(policy, base) > least


def test_the_least_kl_by_hand():
    by_hand = 0.95 * math.log(0.95 / 0.2) + 0.05 * math.log(0.05 / 0.8)
    assert kl_minimum(0.95, 0.2) == pytest.approx(by_hand)
    assert kl_minimum(0.95, 0.2) == pytest.approx(1.34, abs=0.01)


@pytest.mark.parametrize(
    ("rate", "base_rate", "least"),
    [(0.3, 0.3, 0), (0, 0.25, math.log(4 / 3)), (1, 0.25, math.log(4)), (0, 0, 0), (1, 1, 0)],
)
def test_the_least_kl_at_the_edges(rate, base_rate, least):
    assert kl_minimum(rate, base_rate) == pytest.approx(least)


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_rates_of_so_many_samples_are_kept_half_a_sample_off_the_edges(edge):
    near = abs(edge - 0.5 / 200)
    assert kl_minimum(0.6, edge, 200) == pytest.approx(kl_minimum(0.6, near))
    assert kl_minimum(edge, 0.6, 200) == pytest.approx(kl_minimum(near, 0.6))
    assert kl_minimum(edge, edge, 200) == 0
    assert kl_minimum(0.6, 0.3, 200) == kl_minimum(0.6, 0.3)


# --------------------------------------------------------------------------------- the figures
@pytest.fixture(scope="module", params=[1.0, 2.0], ids="temperature {}".format)
def trained(request, build, read_settings, step, demo_model, tmp_path_factory):
    """Return what build returns, after a few steps away from the base model."""
    output = tmp_path_factory.mktemp("measured")
    settings = read_settings(
        *("--model-name", str(demo_model), "--output-dir", str(output), "--device", "cpu"),
        *("--batch-size", "6", "--max-new-tokens", "20", "--learning-rate", "0.003"),
        *("--eval-samples", "18", "--eval-batch-size", "7", "--temperature", str(request.param)),
    )
    built = build(settings)
    torch.manual_seed(0)
    for _ in range(4):
        step(built)
    return built


@pytest.fixture(scope="module")
def by_hand(trained, demo_model):
    """Return KL and base logprob of one response, without padding and without TRL."""
    base = AutoModelForCausalLM.from_pretrained(demo_model).float()

    @torch.no_grad()
    def logprobs(model, query, response):
        logits = model(torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]
        return torch.log_softmax(logits.double() / trained.settings.temperature, dim=-1)

    def compute(query, response):
        of_policy = logprobs(trained.policy.pretrained_model, query, response)
        of_base = logprobs(base, query, response)
        total = sum((p.exp() * (p - ref)).sum().item() for p, ref in zip(of_policy, of_base))
        return total, sum(ref[token].item() for ref, token in zip(of_base, response))

    return compute


@pytest.fixture
def batches(monkeypatch):
    """Return the batches that are rolled out from now on; their responses differ in length."""
    rolled_out, rollout = [], train_rlhf.rollout

    def uneven(policy, tokenizer, prompts):
        queries, responses, texts = rollout(policy, tokenizer, prompts)
        responses = [response[: len(response) - i] for i, response in enumerate(responses)]
        rolled_out.append((prompts, queries, responses, texts))
        return queries, responses, texts

    monkeypatch.setattr(train_rlhf, "rollout", uneven)
    return rolled_out


def graded(text):
    """Return -1, 0 or 1: a reward with scores that are neither good nor bad."""
    return len(text) % 3 - 1


def measure(built, prompts, reward=graded):
    return train_rlhf.measure(built.trainer, built.tokenizer, prompts, reward, built.settings)


def make_report(built):
    settings = built.settings
    return train_rlhf.make_report(
        built.trainer, built.tokenizer, graded, settings, METRICS, "cpu", "float32"
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


def test_the_figures_of_a_measurement(trained, by_hand, batches):
    scores = []

    def reward(text):
        scores.append(graded(text))
        return scores[-1]

    prompts = trained.settings.eval_prompts
    measured = measure(trained, prompts, reward)
    assert [len(batch[0]) for batch in batches] == [7, 7, 4]  # of EVAL_BATCH_SIZE 7
    asked, queries, responses, texts = ([*chain(*lists)] for lists in zip(*batches))
    assert asked == [prompt for prompt in prompts for _ in range(3)]
    decoded = [trained.tokenizer.decode(query, skip_special_tokens=True) for query in queries]
    assert decoded == asked

    kls, logprobs = zip(*(by_hand(query, response) for query, response in zip(queries, responses)))
    perplexity = math.exp(-sum(logprobs) / sum(map(len, responses)))
    assert measured["samples"] == 18
    assert measured["kl"] == pytest.approx(sum(kls) / 18, rel=1e-3)
    assert measured["perplexity_under_base"] == pytest.approx(perplexity, rel=1e-4)
    assert len(set(scores)) == 3  # or the next two would tell little
    assert measured["success_rate"] == scores.count(1) / 18
    assert measured["score"] == pytest.approx(sum(scores) / 18)
    assert measured["distinct"] == len(set(texts)) / 18
    assert measured["first_sample"] == dict(zip(prompts, texts[::3]))


def test_responses_that_are_alike_are_counted_once_as_distinct(trained, monkeypatch):
    rollout = train_rlhf.rollout

    def alike(*arguments):
        queries, responses, texts = rollout(*arguments)
        return queries, responses, [" the same"] * len(texts)

    monkeypatch.setattr(train_rlhf, "rollout", alike)
    assert measure(trained, ["Life is"])["distinct"] == 1 / 18


def test_prompts_share_the_samples_evenly(trained, batches):
    prompts = ["Life is", "My day was", "I", "You", "We"]  # 18 samples for 5 prompts
    assert measure(trained, prompts)["samples"] == 20
    asked = [prompt for batch in batches for prompt in batch[0]]
    assert asked == [prompt for prompt in prompts for _ in range(4)]


def test_the_base_model_is_at_no_kl_of_itself(trained):
    with trained.trainer.optional_peft_ctx():
        assert measure(trained, trained.settings.prompts)["kl"] == 0
    assert measure(trained, trained.settings.prompts)["kl"] > 0.01


def test_a_report_can_be_repeated_differs_by_seed_and_trains_nothing(trained, monkeypatch):
    before = {name: value.clone() for name, value in trained.policy.state_dict().items()}
    monkeypatch.setattr(trained.settings, "eval_samples", 6)  # one to each prompt is enough here
    first = make_report(trained)
    torch.manual_seed(123)  # whatever happened in between
    second = make_report(trained)
    monkeypatch.setattr(trained.settings, "seed", 1)
    other = make_report(trained)
    for model in ("base", "trained"):
        assert second[model] == first[model]
        in_training, held_out = (first[model][name]["first_sample"] for name in first[model])
        assert list(in_training) == trained.settings.prompts
        assert list(held_out) == trained.settings.eval_prompts
        assert list(in_training.values()) != list(held_out.values())
        assert other[model]["train_prompts"]["first_sample"] != in_training
    after = trained.policy.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# -------------------------------------------------------------------------------- did it learn
def test_an_untrained_policy_has_not_learned(build, make_settings, capsys):
    built = build(make_settings())
    report = make_report(built)
    assert report["learned"] is False and report["close_to_base"] is True
    assert report["base"] == report["trained"]  # the same samples
    assert list(report["base"]) == ["train_prompts", "eval_prompts"]
    for measured in report["base"].values():
        assert measured["kl"] == measured["kl_minimum"] == 0
    assert (report["samples"], report["seconds"], report["samples_per_second"]) == (60, 3.0, 20.0)
    assert "Measuring before and after, 12 samples each time" in capsys.readouterr().out


@pytest.fixture
def report_of(make_settings, monkeypatch):
    """Return the report of a run whose measurements gave this, before and after."""

    class Trainer:
        is_base = False

        @contextmanager
        def optional_peft_ctx(self):
            self.is_base = True
            yield
            self.is_base = False

    def make(base_rate, rate, samples, kl=1.0):
        def measured(trainer, tokenizer, prompts, reward, settings):
            share = base_rate if trainer.is_base else rate
            distance = 0.0 if trainer.is_base else kl
            return {"success_rate": share, "samples": samples, "kl": distance}

        monkeypatch.setattr(train_rlhf, "measure", measured)
        settings = make_settings("--max-new-tokens", "8")
        return train_rlhf.make_report(Trainer(), None, None, settings, METRICS, "cpu", "float32")

    return make


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
def test_a_rise_within_chance_is_not_called_learning(report_of, rate, samples, learned):
    assert report_of(0.25, rate, samples)["learned"] is learned


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_a_rate_that_stays_at_the_edge_is_not_called_learning(report_of, edge):
    assert report_of(edge, edge, 240)["learned"] is False


@pytest.mark.parametrize(("kl", "close"), [(8.0, True), (8.1, False)])
def test_close_is_a_nat_per_token_at_most(report_of, kl, close):
    assert report_of(0.25, 0.9, 240, kl)["close_to_base"] is close


@pytest.mark.parametrize("base_rate", [0.0, 0.25, 1.0])
def test_the_report_has_the_least_kl_of_the_rates_that_were_measured(report_of, base_rate):
    report = report_of(base_rate, 0.6, 200)
    for prompts in ("train_prompts", "eval_prompts"):
        assert report["base"][prompts]["kl_minimum"] == 0
        least = report["trained"][prompts]["kl_minimum"]
        assert least == kl_minimum(0.6, base_rate, 200) and 0 < least < math.inf
