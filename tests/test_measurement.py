"""The figures of the report: each is worked out once more, by hand, and chance is no learning."""

import math
from collections import Counter
from dataclasses import asdict, replace
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from matplotlib.figure import Figure

from finetune import measurement
from finetune.fields import Tally
from finetune.measurement import Measured, kl_minimum
from finetune.prompts import Prompts
from finetune.scale import Scale

METRICS = [{"samples": 60, "seconds": 3.0}]  # of a run, as far as the report needs them


def plus_minus_one(rate, samples):
    """Return as many scores of +1 and -1, in no order, of which that share are successes."""
    successes = round(rate * samples)
    scores = [1.0] * successes + [-1.0] * (samples - successes)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(samples, generator=generator)
    return [scores[place] for place in order]


# ------------------------------------------------------------------------- the least KL
def of_success_rates(rate, base_rate):
    """Return p ln(p / p0) + (1 - p) ln((1 - p) / (1 - p0))."""
    failures = (1 - rate) * math.log((1 - rate) / (1 - base_rate))
    return rate * math.log(rate / base_rate) + failures


@pytest.mark.parametrize("base_rate", [1 / 240, 0.25, 0.95])
@pytest.mark.parametrize("rate", [0.01, 0.25, 0.6, 0.99])
def test_the_least_kl_of_a_rule_with_two_scores_is_that_of_its_success_rates(rate, base_rate):
    expected = of_success_rates(rate, base_rate)
    base_scores = plus_minus_one(base_rate, 240)
    least = kl_minimum(2 * rate - 1, base_scores)
    assert least == pytest.approx(expected, rel=1e-3, abs=1e-6)
    # Whatever the two scores are.
    for low, width in ((0, 1), (5e8, 1e8)):
        scores = [low + width * (score + 1) / 2 for score in base_scores]
        assert kl_minimum(low + width * rate, scores) == pytest.approx(least)


def tilt_to(score, weights, scores):
    """Return the weights times e^(tilt * score), with the tilt that gives this mean score."""
    unit = (scores - scores.mean()) / scores.std()
    low, high = -1e4, 1e4
    for _ in range(80):
        tilt = (low + high) / 2
        tilted = torch.softmax(weights.log() + tilt * unit, dim=0)
        if tilted @ scores < score:
            low = tilt
        else:
            high = tilt
    assert (tilted @ scores).item() == pytest.approx(score, rel=1e-6, abs=1e-6)
    return tilted


def kl(policy, base):
    policy, base = policy[policy > 0], base[policy > 0]
    return (policy * (policy / base).log()).sum().item()


GRADED = {
    "even": torch.linspace(0, 1, 60).double(),
    "normal": 44 + 10 * torch.randn(60, generator=torch.Generator().manual_seed(0)).double(),
    "lengths": -torch.arange(60).remainder(7).double(),
    "rare": torch.cat([torch.zeros(56), torch.tensor([0.2, 0.5, 0.9, 1.0])]).double(),
    "a punishment": torch.cat([torch.linspace(-1, 1, 59), torch.tensor([-100.0])]).double(),
    "a rule": torch.tensor([1.0] * 24 + [-1.0] * 36).double(),
}


@pytest.mark.parametrize("share", [-0.6, 0.02, 0.5, 0.97])
@pytest.mark.parametrize("name", GRADED)
def test_no_reweighting_of_the_samples_with_that_mean_has_a_smaller_kl(name, share):
    """Of what lies between the mean and the best, or the worst where it is below 0."""
    scores = GRADED[name]
    end = scores.max() if share > 0 else scores.min()
    mean = scores.mean()
    score = (mean + abs(share) * (end - mean)).item()
    least = kl_minimum(score, scores.tolist())
    base = torch.full_like(scores, 1 / len(scores))
    assert least == pytest.approx(kl(tilt_to(score, base, scores), base), rel=1e-2)
    generator = torch.Generator().manual_seed(1)
    for spread in [0.01, 0.1, 1.0] * 10:
        noise = torch.randn(len(scores), generator=generator, dtype=torch.float64)
        policy = tilt_to(score, torch.softmax(spread * noise, dim=0), scores)
        assert kl(policy, base) > least * (1 - 1e-9)


@pytest.mark.parametrize("name", GRADED)
def test_the_least_kl_at_the_edges_is_that_of_half_a_sample_less(name):
    """Samples can't tell how rare their best is, and what they lack has no KL of its own."""
    scores = GRADED[name].tolist()
    mean, half = sum(scores) / len(scores), 0.5 / len(scores)
    assert kl_minimum(mean, scores) == pytest.approx(0, abs=1e-9)
    for edge, step in ((max(scores), 5), (min(scores), -5)):
        near = edge - half * (edge - mean)
        least = kl_minimum(edge, scores)
        assert 0 < least < math.log(len(scores))
        assert kl_minimum(near, scores) == pytest.approx(least)
        assert kl_minimum(edge + step, scores) == least


@pytest.mark.parametrize("score", [-1.0, 0.0, 3.0])
def test_there_is_no_least_kl_where_all_scores_are_one(score):
    assert kl_minimum(score, [0.0] * 240) is None
    assert kl_minimum(score, [3.0]) is None


# -------------------------------------------------------------------------- the figures
@pytest.mark.parametrize(
    ("threshold", "successes"),
    [(0.0, 3), (-0.5, 4), (1.0, 1), (2.5, 0), (None, None)],  # at the threshold is no success
)
def test_the_figures_of_a_measurement(threshold, successes):
    measured = Measured(
        prompts=["Life is", "Life is", "Life is", "I feel so", "I feel so", "I feel so"],
        texts=[" good", " bad", " good", " so", " glad", " good"],
        scores=[1.0, -1.0, 1.0, 0.0, 2.5, -2.0],
        kls=[0.5, 1.0, 1.5, 2.0, 2.5, 3.0],
        ref_logprobs=[-3.0, -6.0, -4.0, -2.0, -5.0, -4.0],
        lengths=[1, 2, 3, 4, 1, 1],
    )
    assert measurement.figures_of(measured, threshold) == {
        "samples": 6,
        "score": 0.25,
        "standard_error": pytest.approx(math.sqrt((2 * 0.75**2 + 1.625 + 10.125) / 6 / 6)),
        "success_rate": None if threshold is None else successes / 6,
        "kl": 1.75,
        "distinct": 4 / 6,
        "perplexity_under_base": pytest.approx(math.exp(24 / 12)),
        "first_sample": {"Life is": " good", "I feel so": " so"},
    }


def test_a_perplexity_that_is_too_large_to_tell_is_still_a_number():
    measured = Measured(["Life is"], [" x"], [1.0], [0.0], [-1e6], [1])
    assert measurement.figures_of(measured, None)["perplexity_under_base"] == math.exp(700)


# ------------------------------------------------------------------------- did it learn
@pytest.fixture
def report_of(make_settings):
    """Return the report of a run whose samples had these scores, before and after.

    held_out: the same for the prompts held out; None = there are none.
    """

    model = SimpleNamespace(
        device=torch.device("cpu"),
        config=SimpleNamespace(is_encoder_decoder=False),
        get_input_embeddings=lambda: torch.nn.Embedding(1, 1),
    )

    def measured(scores, kl):
        count = len(scores)
        return Measured(
            prompts=["Life is"] * count,
            texts=[" so"] * count,
            scores=scores,
            kls=[kl] * count,
            ref_logprobs=[0.0] * count,
            lengths=[1] * count,
        )

    def make(before, after, held_out=None, kl=1.0, threshold=0.0):
        base = {"train_prompts": measured(before, 0.0)}
        trained = {"train_prompts": measured(after, kl)}
        if held_out is not None:
            base["eval_prompts"] = measured(held_out[0], 0.0)
            trained["eval_prompts"] = measured(held_out[1], kl)
        return measurement.make_report(
            base,
            trained,
            scale=Scale(threshold=threshold),
            is_chat=False,
            model=model,
            settings=make_settings("--max-new-tokens", "8"),
            metrics=METRICS,
        )

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
        for rise in (0.0, 0.5, -0.5):
            report = report_of(before.tolist(), (after + rise * spread).tolist())
            assert report["learned"] is (rise > 0)


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
    assert {figures["win_rate"] for figures in report["base"].values()} == {0.5}
    assert report_of([3.0, 2.0], [1.0, 1.0])["trained"]["train_prompts"]["win_rate"] == 0


@pytest.mark.parametrize("threshold", [0.0, None])
def test_each_part_of_a_report_has_the_least_kl_from_its_own_base_scores(report_of, threshold):
    before, after = GRADED["normal"].tolist(), (GRADED["normal"] + 7).tolist()
    held_out = plus_minus_one(0.25, 60), plus_minus_one(0.6, 60)
    report = report_of(before, after, held_out=held_out, threshold=threshold)
    assert report["scale"] == asdict(Scale(threshold=threshold))
    trained = report["trained"]["train_prompts"]
    least = kl_minimum(sum(after) / 60, before)
    assert trained["kl_minimum"] == pytest.approx(least)
    assert trained["success_rate"] == (None if threshold is None else 1.0)
    trained = report["trained"]["eval_prompts"]
    least = of_success_rates(0.6, 0.25)
    assert trained["kl_minimum"] == pytest.approx(least, rel=1e-3)
    assert trained["success_rate"] == (None if threshold is None else 0.6)
    assert {figures["kl_minimum"] for figures in report["base"].values()} == {0}


# ------------------------------------------------------------------------- during a run
def record(rate=0.5, kl=0.0, score=0.0):
    return {"success_rate": rate, "kl": kl, "score": score}


def progress_of(*records):
    """Return what is said of the last of these steps of 50 samples each."""
    return measurement.progress_text(
        [record | {"samples": 50 * step} for step, record in enumerate(records, start=1)]
    )


def test_the_progress_is_told_by_the_last_100_samples():
    steps = [record(0.25 * n, kl=0.25 * n, score=0.5 * n - 1) for n in (1, 2, 3, 4)]
    assert progress_of(*steps) == "success  88%, score +0.75, KL 0.88"  # of 75 and 100 %
    assert progress_of(*steps[:2]) == "success  38%, score -0.25, KL 0.38"


def test_without_a_threshold_there_is_no_success_to_show():
    assert progress_of(record(None, kl=0.25), record(None, kl=0.5)) == "score +0.00, KL 0.38"


def test_a_kl_that_rounding_takes_below_0_is_shown_as_0():
    assert progress_of(record(kl=-0.0001)).endswith("KL 0.00")


def test_what_was_not_finite_is_left_out_of_the_progress():
    assert progress_of(record(kl=1.0), record(kl=None)).endswith("KL 1.00")
    assert progress_of(record(kl=1.0), *[record(kl=None)] * 3).endswith("KL nan")


# -------------------------------------------------------------------------- the picture
@pytest.fixture
def draw(monkeypatch, tmp_path):
    """Draw a report; return the lines of the right half by their label, as lists of points."""
    figures, savefig = [], Figure.savefig

    def see(figure, *args, **options):
        figures.append(figure)
        savefig(figure, *args, **options)

    def make(report, base_scores, metrics):
        monkeypatch.setattr(Figure, "savefig", see)
        measurement.draw(report, base_scores, metrics, tmp_path / "training.png")
        assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")
        left, right = figures.pop().axes
        assert left.get_ylabel() == "mean score"
        return {line.get_label(): [*zip(*line.get_data())] for line in right.lines}

    return make


def test_the_picture_of_a_graded_reward_goes_by_its_score(report_of, draw):
    before, after = GRADED["normal"].tolist(), (GRADED["normal"] + 7).tolist()
    report = report_of(before, after, kl=1.5, threshold=None)
    base_score = sum(before) / 60
    score = sum(after) / 60
    metrics = [{"samples": 100 * n, "score": 40.0 + n, "kl": 0.1 * n} for n in (1, 2, 3)]
    lines = draw(report, before, metrics)
    assert lines["base model, measured"] == [(0, pytest.approx(base_score))]
    assert lines["trained model, measured"] == [(1.5, pytest.approx(score))]
    learning = lines["mean of the last 100 samples"]
    assert learning == [(pytest.approx(0.1 * n), 40.0 + n) for n in (1, 2, 3)]
    line = lines["least KL for a mean score"]
    assert line[0] == (pytest.approx(0, abs=1e-6), pytest.approx(base_score))
    assert line[-1][1] == pytest.approx(max(before))
    for least, reached in line[::20]:
        assert least == pytest.approx(kl_minimum(reached, before))


@pytest.mark.parametrize("samples", [10, 200])
def test_the_picture_of_scores_that_are_all_equal_has_no_line_of_the_least_kl(
    report_of, draw, samples
):
    report = report_of([-1.0] * 40, [-1.0] * 40)
    metrics = [{"samples": samples, "score": -1.0, "kl": 0.2}]
    lines = draw(report, [-1.0] * 40, metrics)
    assert "least KL for a mean score" not in lines
    assert lines["mean of the last 100 samples"] == [(0.2, -1.0)]
    assert lines["trained model, measured"] == [(1.0, -1.0)]


# ----------------------------------------------------------------- what is told at first
@pytest.mark.parametrize("is_kept", [False, True])
def test_logits_that_are_kept_whole_are_told(build, make_settings, capsys, is_kept):
    built = build(make_settings())
    if is_kept:
        built.policy.head = replace(built.policy.head, layer=None)
    prompts = Prompts(
        [{"prompt": "I am"}], [], "EVAL_PROMPTS", Tally(Counter(), Counter(), Counter())
    )
    scorer = SimpleNamespace(text_before=str, meaning=None)
    measurement.announce(built.policy, built.settings, prompts, [], scorer)
    assert ("\nLogits    kept whole, " in capsys.readouterr().out) == is_kept


@pytest.mark.parametrize(
    ("are_fields_used", "fields"), [(False, "; fields not used: id (5), source (4)"), (True, "")]
)
def test_what_is_left_out_and_not_used_is_told_with_the_prompts(
    build, make_settings, capsys, are_fields_used, fields
):
    """A reward function gets all fields of a row, so that none of them is unused."""
    built = build(make_settings())
    left_out = Counter({"given twice": 3, "empty": 1, "too long": 0})
    tally = Tally(left_out, Counter({"with a note": 2}), Counter({"id": 5, "source": 4}))
    rows = [{"prompt": f"{number}"} for number in range(6)]
    for eval_source, share in (("EVAL_PROMPTS", ""), ("EVAL_SHARE", ": EVAL_SHARE 0.1, in place")):
        prompts = Prompts(rows[:4], rows[4:], eval_source, tally)
        text_before = None if are_fields_used else str
        scorer = SimpleNamespace(text_before=text_before, meaning="what it means")
        measurement.announce(built.policy, built.settings, prompts, [], scorer)
        lines = capsys.readouterr().out.splitlines()
        (line,) = [line for line in lines if line.startswith("Prompts ")]
        assert line.startswith(f"Prompts   4 to train on, 2 held out{share}")
        assert f"Reward    {built.settings.reward}: what it means" in lines
        assert line.endswith(f", 2 with a note; left out: 3 given twice, 1 empty{fields}")
