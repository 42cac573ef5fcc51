"""The figures of the report: each is worked out once more, by hand, and chance is no learning."""

import math
from contextlib import contextmanager
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

import train_rlhf
from train_rlhf import kl_minimum

METRICS = [{"samples": 60, "seconds": 3.0}]  # of a run, as far as the report needs them
UNSCALED = {"mean": 0.0, "deviation": 1.0, "graded": False, "threshold": None}
PLAIN = UNSCALED | {"threshold": 0.0}


def tensor(numbers):
    return torch.tensor(numbers, dtype=torch.float64)


def plus_minus_one(rate, samples):
    """Return as many scores of +1 and -1, in no order, of which that share are successes."""
    scores = -torch.ones(samples, dtype=torch.float64)
    scores[: round(rate * samples)] = 1.0
    return scores[torch.randperm(samples, generator=torch.Generator().manual_seed(0))]


# -------------------------------------------------------------------------------- the least KL
def of_success_rates(rate, base_rate):
    """Return p ln(p / p0) + (1 - p) ln((1 - p) / (1 - p0))."""
    pairs = (rate, base_rate), (1 - rate, 1 - base_rate)
    return sum(share * math.log(share / base) for share, base in pairs)


@pytest.mark.parametrize("base_rate", [1 / 240, 0.25, 0.95])
@pytest.mark.parametrize("rate", [0.01, 0.25, 0.6, 0.99])
def test_the_least_kl_of_a_rule_with_two_scores_is_that_of_its_success_rates(rate, base_rate):
    expected = of_success_rates(rate, base_rate)
    base_scores = plus_minus_one(base_rate, 240)
    least = kl_minimum(2 * rate - 1, base_scores)
    assert least == pytest.approx(expected, rel=1e-3, abs=1e-6)
    # Whatever the two scores are.
    assert kl_minimum(rate, (base_scores + 1) / 2) == pytest.approx(least)
    assert kl_minimum(5e8 + 1e8 * rate, 5e8 + 1e8 * (base_scores + 1) / 2) == pytest.approx(least)


def test_the_least_kl_by_hand():
    """From 20 % to 95 % success."""
    least = kl_minimum(0.9, plus_minus_one(0.2, 200))
    assert least == pytest.approx(
        0.95 * math.log(0.95 / 0.2) + 0.05 * math.log(0.05 / 0.8), abs=1e-3
    )
    assert least == pytest.approx(1.34, abs=0.01)


def tilt_to(score, weights, scores):
    """Return the weights times e^(tilt * score), with the tilt that gives this mean score."""
    unit = (scores - scores.mean()) / scores.std()
    low, high = -1e4, 1e4
    for _ in range(80):
        tilted = torch.softmax(weights.log() + (low + high) / 2 * unit, dim=0)
        low, high = ((low + high) / 2, high) if tilted @ scores < score else (low, (low + high) / 2)
    assert (tilted @ scores).item() == pytest.approx(score, rel=1e-6, abs=1e-6)
    return tilted


def kl(policy, base):
    policy, base = policy[policy > 0], base[policy > 0]
    return (policy * (policy / base).log()).sum().item()


GRADED = {
    "even": torch.linspace(0, 1, 60),
    "normal": 44 + 10 * torch.randn(60, generator=torch.Generator().manual_seed(0)),
    "lengths": -torch.arange(60).remainder(7),
    "rare": torch.cat([torch.zeros(56), torch.tensor([0.2, 0.5, 0.9, 1.0])]),
    "a punishment": torch.cat([torch.linspace(-1, 1, 59), torch.tensor([-100.0])]),
}


@pytest.mark.parametrize("share", [-0.6, 0.02, 0.5, 0.97])
@pytest.mark.parametrize("name", GRADED)
def test_no_reweighting_of_the_samples_with_that_mean_has_a_smaller_kl(name, share):
    """Of what lies between the mean and the best, or the worst where it is below 0."""
    scores = GRADED[name].double()
    mean, end = scores.mean(), scores.max() if share > 0 else scores.min()
    score = (mean + abs(share) * (end - mean)).item()
    least = kl_minimum(score, scores)
    base = torch.full_like(scores, 1 / len(scores))
    assert least == pytest.approx(kl(tilt_to(score, base, scores), base), rel=1e-2)
    generator = torch.Generator().manual_seed(1)
    for spread in (0.01, 0.1, 1.0):
        for _ in range(10):
            noise = torch.randn(len(scores), generator=generator, dtype=torch.float64)
            policy = tilt_to(score, torch.softmax(spread * noise, dim=0), scores)
            assert kl(policy, base) > least * (1 - 1e-9)


@pytest.mark.parametrize("name", GRADED)
def test_the_least_kl_at_the_edges_is_that_of_half_a_sample_less(name):
    """Samples can't tell how rare their best is, and what they lack has no KL of its own."""
    scores = GRADED[name].double()
    low, high = scores.min().item(), scores.max().item()
    mean, half = scores.mean().item(), 0.5 / len(scores)
    assert kl_minimum(mean, scores) == pytest.approx(0, abs=1e-9)
    for edge, beyond in ((high, high + 5), (low, low - 5)):
        near = edge - half * (edge - mean)
        least = kl_minimum(edge, scores)
        assert 0 < least < math.log(len(scores))
        assert kl_minimum(near, scores) == pytest.approx(least)
        assert kl_minimum(beyond, scores) == least


@pytest.mark.parametrize("rate", [1 / 200, 0.4, 199 / 200])
def test_success_rates_at_the_edges_are_kept_half_a_sample_off_them(rate):
    scores, half = plus_minus_one(rate, 200), 0.5 / 200
    for edge, near in ((1.0, 1 - half * (1 - rate)), (-1.0, half * rate)):
        expected = of_success_rates(near, rate)
        assert kl_minimum(edge, scores) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("score", [-1.0, 0.0, 3.0])
def test_there_is_no_least_kl_where_all_scores_are_one(score):
    assert kl_minimum(score, torch.zeros(240, dtype=torch.float64)) is None
    assert kl_minimum(score, tensor([3.0])) is None


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
def rolled_out(monkeypatch):
    """Return the rollouts from now on, queries, responses and texts; no two lengths are alike."""
    rollouts, rollout = [], train_rlhf.rollout

    def uneven(policy, tokenizer, queries, numbers, size):
        responses, texts = rollout(policy, tokenizer, queries, numbers, size)
        responses = [response[: len(response) - i % 7] for i, response in enumerate(responses)]
        rollouts.append((queries, responses, texts))
        return responses, texts

    monkeypatch.setattr(train_rlhf, "rollout", uneven)
    return rollouts


@pytest.fixture
def passes(trained, monkeypatch):
    """Return the passes from now on: how many rows, in which phase, whether of the base model."""
    seen, phases = [], []
    policy, model = trained.policy, trained.policy.pretrained_model
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert len(adapted) > 1

    def phase(function, name):
        def call(*args, **options):
            phases.append(name)
            result = function(*args, **options)
            phases.pop()
            return result

        return call

    def see(module, args, options):
        (is_base,) = {each.disable_adapters for each in adapted}
        seen.append((len(options["input_ids"]), phases[-1], is_base))

    monkeypatch.setattr(model, "generate", phase(model.generate, "rollout"))
    monkeypatch.setattr(policy, "forward", phase(policy.forward, "comparison"))
    handle = model.get_base_model().register_forward_pre_hook(see, with_kwargs=True)
    yield seen
    handle.remove()


def graded(rows, texts):
    """Return -1, 0 or 1 for each text: a reward with scores that are neither good nor bad."""
    return [float(len(text) % 3 - 1) for text in texts]


def measure(built, rows, reward=graded, scale=PLAIN, base=False):
    """Return the figures and the scores of a measurement as make_report takes it."""
    parts = built.trainer, built.policy, reward, scale, rows, built.settings
    return train_rlhf.measure(*parts, built.settings.eval_samples, 1, base=base)


def make_report(built, reward=graded):
    rows = built.rows, built.eval_rows
    parts = built.trainer, built.policy, reward, PLAIN
    return train_rlhf.make_report(*parts, *rows, built.settings, METRICS)[0]


@pytest.mark.parametrize("base", [False, True])
def test_kl_and_log_probability_are_sums_over_the_response(trained, by_hand, base):
    """Of a batch that is more than a minibatch."""

    def ids(text):
        return trained.tokenizer(text, return_tensors="pt")["input_ids"][0]

    queries = [ids("Life"), ids("I'm feeling as if I could do it"), ids("My")] * 3
    responses = [ids("is good"), ids("and so"), ids("day was long and I am so very tired")] * 3
    parts = trained.trainer, trained.policy, queries, responses
    kls, ref_logprobs = train_rlhf.compare_with_base(*parts, base)
    assert len(kls) == len(ref_logprobs) == 9 > trained.trainer.config.mini_batch_size
    assert base or min(kls) > 0.001
    for query, response, kl, ref_logprob in zip(queries, responses, kls, ref_logprobs):
        wanted_kl, wanted_logprob = by_hand(query, response)
        assert kl == (0 if base else pytest.approx(wanted_kl, rel=1e-3))
        assert ref_logprob == pytest.approx(wanted_logprob, rel=1e-4)


@pytest.mark.parametrize("threshold", [0.0, -0.5, 1.0, None])
def test_the_figures_of_a_measurement(trained, by_hand, rolled_out, threshold):
    calls = []

    def reward(rows, texts):
        calls.append((rows, texts, graded(rows, texts)))
        return calls[-1][2]

    rows, scale = trained.eval_rows, PLAIN | {"threshold": threshold}
    measured, all_scores = measure(trained, rows, reward, scale)
    ((queries, responses, texts),) = rolled_out
    ((asked, judged, scores),) = calls  # a single one for all samples
    assert judged == texts
    assert asked == [row for row in rows for _ in range(3)]
    decoded = [trained.tokenizer.decode(query, skip_special_tokens=True) for query in queries]
    assert decoded == [row["prompt"] for row in asked]

    assert len(set(scores)) == 3  # or the next ones would tell little
    assert all_scores.tolist() == scores
    mean = sum(scores) / 18
    variance = sum((score - mean) ** 2 for score in scores) / 18
    assert measured["samples"] == 18
    assert measured["score"] == pytest.approx(mean)
    assert measured["standard_error"] == pytest.approx((variance / 18) ** 0.5)
    higher = {0.0: [1.0], -0.5: [0.0, 1.0], 1.0: []}  # a score at the threshold is no success
    successes = threshold is not None and sum(score in higher[threshold] for score in scores)
    assert measured["success_rate"] == (None if threshold is None else successes / 18)
    assert measured["distinct"] == len(set(texts)) / 18
    assert measured["first_sample"] == dict(zip(trained.settings.eval_prompts, texts[::3]))
    if threshold == 0.0:  # the models have nothing to do with it
        kls, logprobs = zip(*(by_hand(*pair) for pair in zip(queries, responses)))
        perplexity = math.exp(-sum(logprobs) / sum(map(len, responses)))
        assert measured["kl"] == pytest.approx(sum(kls) / 18, rel=1e-3)
        assert measured["perplexity_under_base"] == pytest.approx(perplexity, rel=1e-4)


def test_responses_that_are_alike_are_counted_once_as_distinct(trained, monkeypatch):
    rollout = train_rlhf.rollout

    def alike(*arguments):
        responses, texts = rollout(*arguments)
        return responses, [" the same"] * len(texts)

    monkeypatch.setattr(train_rlhf, "rollout", alike)
    assert measure(trained, trained.rows[:1])[0]["distinct"] == 1 / 18


@pytest.mark.parametrize(
    ("count", "asked"),
    [(5, [0, 1, 2, 3, 4]), (18, range(18)), (40, range(0, 40, 3))],  # of many, some
)
def test_rows_share_the_samples_evenly(trained, monkeypatch, count, asked):
    seen = []

    def reward(rows, texts):
        seen.append(rows)
        return graded(rows, texts)

    rows = [{"prompt": f"Day {number} is"} for number in range(count)]
    monkeypatch.setattr(trained, "rows", rows)
    monkeypatch.setattr(trained, "eval_rows", [])
    report = make_report(trained, reward)
    each = math.ceil(18 / len(asked))
    before, after = seen
    assert before == after == [rows[index] for index in asked for _ in range(each)]
    for model in ("base", "trained"):
        assert 18 <= report[model]["train_prompts"]["samples"] == len(before)


def test_the_base_model_is_at_no_kl_of_itself(trained):
    assert measure(trained, trained.rows, base=True)[0]["kl"] == 0
    assert measure(trained, trained.rows)[0]["kl"] > 0.01


def test_the_base_model_is_measured_without_a_pass_of_the_policy(trained, passes):
    """It needs a single pass for its log probabilities, where the policy's KL needs another."""
    measure(trained, trained.rows, base=True)
    assert {is_base for _, _, is_base in passes} == {True}
    assert [size for size, phase, _ in passes if phase == "comparison"] == [6] * 3  # the minibatch
    passes.clear()
    measure(trained, trained.rows)
    assert {is_base for _, phase, is_base in passes if phase == "rollout"} == {False}
    compared = [(size, is_base) for size, phase, is_base in passes if phase == "comparison"]
    assert sorted(compared) == [(6, False)] * 3 + [(6, True)] * 3


def test_a_measurement_generates_as_many_responses_at_once_as_it_may(trained, passes):
    measure(trained, trained.rows)  # with EVAL_BATCH_SIZE 7
    sizes = [size for size, phase, _ in passes if phase == "rollout"]
    assert [size for size, after in pairwise([*sizes, None]) if size != after] == [7, 4]
    assert sizes.count(4) <= 20 and sizes.count(7) <= 2 * 20  # MAX_NEW_TOKENS is 20


@pytest.mark.parametrize("base", [False, True])
def test_the_eval_batch_size_changes_no_response_of_a_measurement(
    trained, rolled_out, monkeypatch, base
):
    whole, all_scores = measure(trained, trained.rows, base=base)
    for size in (1, 5, 18):
        monkeypatch.setattr(trained.settings, "eval_batch_size", size)
        measured, scores = measure(trained, trained.rows, base=base)
        assert (measured, scores.tolist()) == (whole, all_scores.tolist())
    first, *others = [[each.tolist() for each in responses] for _, responses, _ in rolled_out]
    assert others == [first] * 3
    assert len({*map(tuple, first)}) == 18 and len({*map(len, first)}) > 3


def test_base_model_and_policy_are_measured_with_the_same_random_numbers(trained, monkeypatch):
    """But those for the prompts held out are others."""
    given, rollout = [], train_rlhf.rollout

    def see(policy, tokenizer, queries, numbers, size):
        given.append(numbers)
        return rollout(policy, tokenizer, queries, numbers, size)

    monkeypatch.setattr(train_rlhf, "rollout", see)
    make_report(trained)
    base, policy, base_held_out, policy_held_out = given
    assert torch.equal(base, policy) and torch.equal(base_held_out, policy_held_out)
    assert not torch.isin(base, base_held_out).any()
    for number, numbers in ((1, base), (2, base_held_out)):
        key = trained.settings.seed, 0, number
        assert torch.equal(numbers, train_rlhf.random_numbers(key, range(18), 20))


def test_a_report_can_be_repeated_differs_by_seed_and_trains_nothing(trained, monkeypatch):
    before = {name: value.clone() for name, value in trained.policy.state_dict().items()}
    monkeypatch.setattr(trained.settings, "eval_samples", 6)  # one to each prompt is enough here
    first = make_report(trained)
    torch.manual_seed(123)  # whatever happened in between
    second = make_report(trained)
    monkeypatch.setattr(trained.settings, "seed", 1)
    other = make_report(trained)
    names = "train_prompts", "eval_prompts"
    for model in ("base", "trained"):
        assert second[model] == first[model]
        in_training, held_out = (first[model][name]["first_sample"] for name in names)
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
    assert list(report["base"]) == ["train_prompts", "eval_prompts"]  # in the order of the card
    for measured in report["base"].values():
        assert measured["kl"] == 0 and measured["win_rate"] == 0.5
        assert measured["kl_minimum"] == pytest.approx(0, abs=1e-12)
    assert (report["samples"], report["seconds"], report["samples_per_second"]) == (60, 3.0, 20.0)
    assert report["scale"] == PLAIN and report["chat"] is False
    assert "Measuring before and after, 12 samples each time" in capsys.readouterr().out


class Trainer:
    """What a report asks of a trainer besides its numbers."""

    tokenizer = None
    is_base = False

    @contextmanager
    def optional_peft_ctx(self):
        self.is_base = True
        yield
        self.is_base = False


def encode(tokenizer, rows, chat_template):
    """Return the prompts in the place of queries."""
    return [row["prompt"] for row in rows]


@pytest.fixture
def report_of(make_settings, monkeypatch):
    """Return the report of a run whose samples had these scores, before and after.

    held_out: the same for the prompts held out; None = there are none.
    """

    def make(before, after, held_out=None, kl=1.0, threshold=0.0):
        trainer = Trainer()
        parts = {"get_input_embeddings": lambda: torch.nn.Embedding(1, 1)}
        config = SimpleNamespace(is_encoder_decoder=False)
        backbone = SimpleNamespace(device=torch.device("cpu"), config=config, **parts)
        policy = SimpleNamespace(pretrained_model=backbone)
        scores_of = {"in training": (before, after), "held out": held_out}

        def rollout(policy, tokenizer, queries, numbers, size):
            assert len(queries) == len(numbers)
            scores = scores_of[queries[0]][not trainer.is_base]
            return [torch.tensor([1])] * len(queries), [str(float(score)) for score in scores]

        def compare_with_base(trainer, policy, queries, responses, base):
            return [0.0 if base else kl] * len(queries), [0.0] * len(queries)

        for function in (encode, rollout, compare_with_base):
            monkeypatch.setattr(train_rlhf, function.__name__, function)
        rows, eval_rows = [{"prompt": "in training"}], [{"prompt": "held out"}]
        samples = ["--eval-samples", str(len(before))]
        settings = make_settings("--max-new-tokens", "8", *samples)
        scale = PLAIN | {"threshold": threshold}
        parts = trainer, policy, lambda rows, texts: [*map(float, texts)], scale
        sets = rows, eval_rows if held_out else []
        report, base_scores = train_rlhf.make_report(*parts, *sets, settings, METRICS)
        assert base_scores.tolist() == [*map(float, before)]  # of the training, for the picture
        return report

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
    report = report_of(plus_minus_one(0.25, samples), plus_minus_one(rate, samples))
    assert report["learned"] is learned


@pytest.mark.parametrize("spread", [0.05, 1.0, 30.0])
def test_a_graded_rise_is_learned_and_noise_is_not(report_of, spread):
    """Whatever the zero of the scores: a reward may be negative throughout."""
    generator = torch.Generator().manual_seed(0)
    draws = spread * (torch.randn(10, 240, generator=generator, dtype=torch.float64) - 44)
    for before, after in pairwise(draws):
        assert report_of(before, after)["learned"] is False
        assert report_of(before, after + 0.5 * spread)["learned"] is True
        assert report_of(before, after - 0.5 * spread)["learned"] is False


@pytest.mark.parametrize(("samples", "learned"), [(4, False), (40, True)])
def test_a_few_samples_without_any_spread_prove_nothing(report_of, samples, learned):
    """All of one score have no standard error, be they ever so few."""
    report = report_of([-1.0] * samples, [1.0] * samples)
    assert report["learned"] is learned
    assert report["base"]["train_prompts"]["standard_error"] == 0


@pytest.mark.parametrize("score", [-1.0, 0.0, 1.0])
def test_a_score_that_stays_the_same_everywhere_is_not_called_learning(report_of, score):
    report = report_of([score] * 240, [score] * 240)
    assert report["learned"] is False
    assert report["trained"]["train_prompts"]["kl_minimum"] is None
    assert report["trained"]["train_prompts"]["win_rate"] == 0.5


def test_what_counts_is_the_score_on_the_prompts_of_the_training(report_of):
    bad, good = plus_minus_one(0.25, 240), plus_minus_one(0.9, 240)
    assert report_of(bad, good, held_out=(bad, bad))["learned"] is True
    assert report_of(bad, bad, held_out=(bad, good))["learned"] is False


@pytest.mark.parametrize(("kl", "close"), [(8.0, True), (8.1, False)])
def test_close_is_a_nat_per_token_at_most(report_of, kl, close):
    report = report_of(plus_minus_one(0.25, 240), plus_minus_one(0.9, 240), kl=kl)
    assert report["close_to_base"] is close


def test_the_win_rate_is_of_pairs_and_a_tie_counts_half(report_of):
    before, after = [0.0, 1.0, 2.0, 3.0], [3.0, 1.0, 1.0, 2.5]
    held_out = [0.0, 10.0, 0.0, 10.0], [1.0, 1.0, 1.0, 1.0]  # which a mean would tell differently
    report = report_of(before, after, held_out=held_out)
    assert report["trained"]["train_prompts"]["win_rate"] == 1.5 / 4
    assert report["trained"]["eval_prompts"]["win_rate"] == 0.5
    assert {part["win_rate"] for part in report["base"].values()} == {0.5}
    assert report_of([3.0, 2.0], [1.0, 1.0])["trained"]["train_prompts"]["win_rate"] == 0


@pytest.mark.parametrize("threshold", [0.0, None])
def test_each_part_of_a_report_has_the_least_kl_from_its_own_base_scores(report_of, threshold):
    before, after = GRADED["normal"].double(), GRADED["normal"].double() + 7
    held_out = plus_minus_one(0.25, 60), plus_minus_one(0.6, 60)
    report = report_of(before, after, held_out=held_out, threshold=threshold)
    parts = report["trained"]["train_prompts"], report["trained"]["eval_prompts"]
    wanted = kl_minimum(after.mean(), before), of_success_rates(0.6, 0.25)
    assert [part["kl_minimum"] for part in parts] == pytest.approx(wanted, rel=1e-3)
    assert [part["kl_minimum"] for part in report["base"].values()] == [0, 0]
    rates = [part["success_rate"] for part in parts]
    assert rates == ([None, None] if threshold is None else [1.0, 0.6])


@pytest.mark.parametrize(("threshold", "rate"), [(None, None), (0.0, 0.5), (-1, 0.75), (2.5, 0.0)])
def test_a_success_is_a_score_above_the_threshold(threshold, rate):
    assert train_rlhf.success_rate([-1.0, 0.0, 0.5, 2.5], -1.5) == 1.0
    assert train_rlhf.success_rate([-1.0, 0.0, 0.5, 2.5], threshold) == rate


# ---------------------------------------------------------------------------------- the scale
@pytest.fixture
def scale_of(make_settings, monkeypatch, capsys):
    """Return the scale of a base model whose samples have these scores, and what was shown."""

    def make(scores, *flags):
        asked = []

        def rollout(policy, tokenizer, queries, numbers, size):
            assert len(queries) == len(numbers) == len(scores)
            asked.append(len(queries))
            return [torch.tensor([1])] * len(queries), [str(score) for score in scores]

        def compare_with_base(trainer, policy, queries, responses, base):
            return [0.0] * len(queries), [0.0] * len(queries)

        def reward(rows, texts):
            return [*map(float, texts)]

        for function in (encode, rollout, compare_with_base):
            monkeypatch.setattr(train_rlhf, function.__name__, function)
        settings = make_settings("--scale-samples", str(len(scores)), *flags)
        rows = [{"prompt": "Life is"}]
        scale = train_rlhf.measure_scale(Trainer(), None, reward, rows, settings)
        assert asked == [settings.scale_samples] * (settings.scale_samples > 0)
        assert ("becomes 0 ± 1" in capsys.readouterr().out) == scale["graded"]
        return scale

    return make


@pytest.mark.parametrize(
    ("scores", "threshold"),
    [
        ([-1.0] * 9 + [1.0], 0.0),
        ([0.0] * 199 + [1.0], 0.5),
        ([10.0, 4.0] * 20, 7.0),
        ([-1.0] * 200, -1.0),  # and what is better is a success
    ],
)
def test_a_rule_with_two_scores_is_left_alone_and_success_is_above_their_middle(
    scale_of, scores, threshold
):
    scale = scale_of(scores)
    assert scale == UNSCALED | {"threshold": threshold}
    assert train_rlhf.on_scale(tensor(scores), scale).tolist() == scores


@pytest.mark.parametrize("name", ["even", "normal", "lengths"])
def test_graded_scores_get_mean_0_and_deviation_1(scale_of, name):
    scores = GRADED[name].double()
    scale = scale_of(scores.tolist())
    assert scale["graded"] is True and scale["threshold"] is None
    scaled = (scores - scale["mean"]) / scale["deviation"]
    assert scaled.mean().item() == pytest.approx(0, abs=1e-9)
    assert scaled.std().item() == pytest.approx(1, abs=1e-9)
    # Near the mean that is what is trained on, far away its logarithm, and the order is kept.
    near = scaled.abs() < 0.3
    trained_on = train_rlhf.on_scale(scores, scale)
    torch.testing.assert_close(trained_on[near], scaled[near], rtol=0.02, atol=0)
    far = train_rlhf.on_scale(scale["mean"] + 1000 * scale["deviation"] * tensor([1, -1]), scale)
    assert far.tolist() == pytest.approx([math.log(2000), -math.log(2000)])
    assert torch.equal(trained_on.argsort(stable=True), scores.argsort(stable=True))


@pytest.mark.parametrize("best", [1.0, 50.0])
def test_scores_of_which_all_but_a_few_are_alike_are_not_blown_up(scale_of, best):
    """Their deviation is tiny: divided by that alone, the best would be worth any KL."""
    scores = tensor([0.0] * 198 + [0.5, best])
    scale = scale_of(scores.tolist())
    assert (best - scores.mean()) / scores.std() > 12
    common, _, highest = train_rlhf.on_scale(tensor([0.0, 0.5, best]), scale).tolist()
    assert 1 < highest - common < 4


def test_without_samples_the_scores_stay_as_they_are(scale_of):
    scale = scale_of([1.0, 2.0, 44.0], "--scale-samples", "0")
    assert scale == UNSCALED


def test_what_tokens_earn_is_on_the_scale_of_the_base_models_own_samples(
    build, make_settings, roll_out
):
    """The scale comes from samples of its own; those of a rollout are like them."""
    flags = "--scale-samples", "450", "--batch-size", "90", "--eval-batch-size", "150"
    built = build(make_settings(*flags))
    sizes = []

    def reward(rows, texts):
        sizes.append(len(texts))
        return [10.0 * len(text.split()) - 300 for text in texts]

    scales = []
    for seed in range(2):
        torch.manual_seed(seed)  # whatever happened before
        parts = built.trainer, built.policy, reward, built.rows, built.settings
        scales.append(train_rlhf.measure_scale(*parts))
    assert sizes == [450] * 2  # a single call for all samples
    assert scales[0] == scales[1]

    queries = train_rlhf.encode(built.tokenizer, built.rows * 75, chat_template=False)
    responses, texts = roll_out(built, queries, key=(0, 1, 0))
    parts = reward, scales[0], built.tokenizer, built.rows * 75, queries, responses
    scores, token_scores = train_rlhf.score_responses(*parts, score_prefixes=False)
    assert len(sizes) == 3  # a single call
    assert scores == [10.0 * len(text.split()) - 300 for text in texts]
    earned = torch.stack([each.sum() for each in token_scores])
    assert abs(earned.mean()) < 0.5 and 0.6 < earned.std() < 1.6
    # With prefixes the score of the empty text, which no token earns, is missing.
    _, token_scores = train_rlhf.score_responses(*parts, score_prefixes=True)
    assert len(sizes) == 4
    missing = train_rlhf.on_scale(tensor(-300.0), scales[0]).float()
    sums = torch.stack([each.sum() for each in token_scores])
    torch.testing.assert_close(sums + missing, earned, atol=1e-4, rtol=1e-5)


# -------------------------------------------------------------------------------- the picture
@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Draw a report; return the lines of the right half by their label, as lists of points."""
    figures, savefig = [], Figure.savefig

    def see(figure, *args, **options):
        figures.append(figure)
        savefig(figure, *args, **options)

    def make(report, base_scores, metrics):
        monkeypatch.setattr(Figure, "savefig", see)
        train_rlhf.draw(report, base_scores, metrics, tmp_path / "training.png")
        assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
        left, right = figures.pop().axes
        assert left.get_ylabel() == "mean score"
        return {line.get_label(): [*zip(*line.get_data())] for line in right.lines}

    return make


def test_the_picture_of_a_graded_reward_goes_by_its_score(report_of, draw):
    before = GRADED["normal"].double()
    report = report_of(before, before + 7, kl=1.5, threshold=None)
    scores = before.mean().item(), before.mean().item() + 7
    metrics = [{"samples": 100 * n, "score": 40.0 + n, "kl": 0.1 * n} for n in (1, 2, 3)]
    lines = draw(report, before, metrics)
    assert lines["base model, measured"] == [(0, pytest.approx(scores[0]))]
    assert lines["trained model, measured"] == [(1.5, pytest.approx(scores[1]))]
    learning = lines["mean of the last 100 samples"]
    assert learning == [(pytest.approx(0.1 * n), 40.0 + n) for n in (1, 2, 3)]
    line = lines["least KL for a mean score"]
    assert line[0] == (pytest.approx(0, abs=1e-6), pytest.approx(scores[0]))
    assert line[-1][1] == pytest.approx(before.max().item())
    for least, score in line[::20]:
        assert least == pytest.approx(kl_minimum(score, before))


@pytest.mark.parametrize("samples", [10, 200])
def test_the_picture_of_scores_that_are_all_equal_has_no_line_of_the_least_kl(
    report_of, draw, samples
):
    report = report_of([-1.0] * 40, [-1.0] * 40)
    metrics = [{"samples": samples, "score": -1.0, "kl": 0.2}]
    lines = draw(report, tensor([-1.0] * 40), metrics)
    assert "least KL for a mean score" not in lines
    assert lines["mean of the last 100 samples"] == [(0.2, -1.0)]
    assert lines["trained model, measured"] == [(1.0, -1.0)]
