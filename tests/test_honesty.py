"""A learner that is broken on purpose must not look like one that works: the report says so."""

import json
import os
import random

import pytest
import torch

import train_rlhf

# That a KL which costs something is called close at such a rate too is a matter of CI.
COSTS = [(1, True)] if os.environ.get("CI_FULL") else []

# Twelve steps that tell: the whole learner rose by 10 standard errors or more (6 seeds), and one
# that was dealt wrong scores by 2.4 at most (6 seeds); 3 are called learning.
RUN = (
    *("--device", "cpu", "--save-every", "0", "--eval-prompts"),
    *("--training-epochs", "40", "--batch-size", "20", "--max-new-tokens", "8"),
    *("--target-approx-kl", "0.04", "--ppo-epochs", "2"),
    *("--eval-samples", "120", "--eval-batch-size", "120"),
)


@pytest.fixture
def outcome(call_main, demo_model, tmp_path, capsys):
    """Train demo_model on 240 samples; return its report and what stood on the screen."""

    def run(*flags):
        assert call_main("--model-name", demo_model, *RUN, *flags) == 0
        report = json.loads((tmp_path / "trained_model" / "report.json").read_text())
        return report, capsys.readouterr().out

    return run


def test_the_whole_learner_learns_and_stays_close(outcome):
    report, screen = outcome()
    assert report["learned"] is True and report["close_to_base"] is True
    assert "did not learn" not in screen and "Little is left" not in screen
    assert "has run away" not in screen


def test_a_rate_of_0_has_not_learned(outcome):
    # A few steps do: however many there are, none moves anything.
    still = ("--learning-rate", "1e-12", "--target-approx-kl", "0", "--training-epochs", "10")
    report, screen = outcome(*still)
    assert report["learned"] is False
    assert "this run did not learn" in screen


def test_scores_dealt_to_the_wrong_responses_have_taught_nothing(outcome, monkeypatch):
    step, deck = train_rlhf.ExactKLTrainer.step, random.Random(0)

    def shuffled(self, queries, responses, token_scores):
        totals = [scores.sum() for scores in token_scores]
        deck.shuffle(totals)
        dealt = [torch.zeros(len(scores)) for scores in token_scores]
        for scores, total in zip(dealt, totals):
            scores[-1] = total
        return step(self, queries, responses, dealt)

    monkeypatch.setattr(train_rlhf.ExactKLTrainer, "step", shuffled)
    report, screen = outcome()
    assert report["learned"] is False
    assert "this run did not learn" in screen


@pytest.mark.parametrize(("sign", "close"), [(-1, False), *COSTS], ids=str)
def test_a_kl_that_is_paid_for_is_not_called_close(outcome, monkeypatch, sign, close):
    make_trainer = train_rlhf.make_trainer

    def priced(*arguments):
        trainer = make_trainer(*arguments)
        trainer.config.init_kl_coef *= sign
        return trainer

    monkeypatch.setattr(train_rlhf, "make_trainer", priced)
    # At a rate that does not fall there are 2.5 to 4.2 nats in the end where the KL costs
    # something, and 48 or more where it is paid for, with ten seeds each.
    report, screen = outcome("--learning-rate", "0.003", "--target-approx-kl", "0")
    trained = report["trained"]["train_prompts"]
    assert report["close_to_base"] is close
    assert ("the KL has run away to" in screen) is not close
    assert ("Little is left of it" in screen) is not close
    if not close:
        assert trained["kl"] > 4 * trained["kl_minimum"]
