"""The learning rate, which follows how far the last step has moved."""

from types import SimpleNamespace

import pytest

from finetune.scale import Scale
from train_rlhf import set_learning_rate, target_of_next_step


def rates_after(rates, approx_kls, target, total_steps):
    """Return the rates after so many steps, with a target for the first and a first rate of 1e-4."""
    optimizer = SimpleNamespace(param_groups=[{"lr": rate} for rate in rates])
    metrics = [
        {"approx_kl": approx_kl, "success_rate": None, "samples": 10 * (step + 1)}
        for step, approx_kl in enumerate(approx_kls)
    ]
    settings = SimpleNamespace(target_approx_kl=target, learning_rate=1e-4)
    set_learning_rate(optimizer, metrics, total_steps, settings, Scale())
    return [group["lr"] for group in optimizer.param_groups]


def factor_after(approx_kl, target, total_steps):
    """Return by which factor the rate changes after six steps, of which the last alone counts."""
    approx_kls = [123.0] * 5 + [approx_kl]
    first, second = rates_after([1e-4, 3e-4], approx_kls, target, total_steps)
    assert second == pytest.approx(3 * first)
    return first / 1e-4


@pytest.mark.parametrize(
    ("approx_kl", "factor"),
    [(0.01, 1), (0.01 / 1.44, 1.2), (1e-9, 1.5), (1.0, 1 / 1.5), (None, 1 / 1.5)],
)
def test_the_rate_follows_the_root_of_the_kl(approx_kl, factor):
    """Within bounds; None stands for a KL that is not finite."""
    rate = factor_after(approx_kl, target=0.08, total_steps=12)  # of which an eighth is left
    assert rate == pytest.approx(factor)


@pytest.mark.parametrize(
    ("target", "total_steps", "factor"),
    [(0.08, 12, 1), (0.04, 12, 0.5**0.5), (0.01, 6 * 10**6, 1), (0.01, 6, 1 / 1.5)],
)
def test_the_target_of_other_scores_falls_as_a_cube_to_0(target, total_steps, factor):
    """After 6 of 12 steps an eighth of it is left."""
    assert factor_after(0.01, target, total_steps) == pytest.approx(factor, rel=1e-5)


def records(success_rates, batch_size=10):
    """Return the metrics of so many steps."""
    return [
        {"success_rate": rate, "samples": batch_size * step}
        for step, rate in enumerate(success_rates, start=1)
    ]


OF_A_RULE = Scale(threshold=0.0, is_rule=True)


@pytest.mark.parametrize(
    ("success_rates", "batch_size", "share"),
    [
        ([0.5], 10, 1.02 * 89 / 90),
        ([0.0] * 45, 10, 1.01),  # a rare word: nothing is learned yet
        ([0.9] * 45, 10, 0.11),
        ([1.0] * 45, 10, 0.01),  # that none of 100 failed does not mean that none will
        ([0.0] * 35 + [0.9] * 10, 10, 0.11),  # the last 100 samples count
        ([0.0] * 44 + [0.9], 1000, 0.11),
        ([0.0, 1.0] * 45, 1, 0),  # no step is left
    ],
)
def test_the_target_falls_with_failures_and_steps_left(success_rates, batch_size, share):
    """It is the setting where half of the responses fail and no step is taken yet."""
    metrics = records(success_rates, batch_size)
    settings = SimpleNamespace(target_approx_kl=0.008)
    target = target_of_next_step(metrics, 90, settings, OF_A_RULE)
    assert target == pytest.approx(0.008 * share)


@pytest.mark.parametrize(
    "scale",
    [
        Scale(),
        Scale(graded=True),
        Scale(graded=True, threshold=0.5),  # SUCCESS_THRESHOLD does not steer
        Scale(threshold=0.0, accuracy=0.9),  # a reward model can be pleased more and more
    ],
    ids=str,
)
def test_success_is_the_end_of_a_rule_alone(scale):
    success_rate = None if scale.threshold is None else 1.0
    settings = SimpleNamespace(target_approx_kl=0.008)
    target = target_of_next_step(records([success_rate] * 45), 90, settings, scale)
    assert target == pytest.approx(0.001)


def test_the_rate_follows_the_failures():
    """Of two runs that moved alike, the one that fails goes on faster."""
    settings = SimpleNamespace(target_approx_kl=0.008, learning_rate=1e-4)
    rates = []
    for success_rate in (0.1, 0.95):
        metrics = records([success_rate] * 45)
        metrics[-1]["approx_kl"] = 0.001
        optimizer = SimpleNamespace(param_groups=[{"lr": 1e-4}])
        set_learning_rate(optimizer, metrics, 90, settings, OF_A_RULE)
        rates.append(optimizer.param_groups[0]["lr"])
    assert rates == pytest.approx([1.5e-4, 1e-4 * 0.48**0.5])


def test_a_step_that_moved_nothing_leaves_the_rate():
    """Else it would have grown a hundredfold when at last a rare word is said."""
    assert factor_after(0.0, target=0.08, total_steps=12) == 1


@pytest.mark.parametrize("approx_kl", [0.0, 0.01, None])
def test_without_a_target_the_rate_stays(approx_kl):
    assert factor_after(approx_kl, target=0, total_steps=12) == 1


def test_the_rate_has_a_bound_where_nothing_can_be_learned():
    rates = [1e-4]
    for steps in range(1, 50):
        approx_kls = [1e-9] * steps
        rates = rates_after(rates, approx_kls, target=0.01, total_steps=90)
    assert rates == [pytest.approx(1e-2)]
