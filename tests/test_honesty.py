"""A learner that is broken on purpose must not look like one that works: the report has to say so."""

import json
import random

import pytest
import torch

import train_rlhf

RUN = ["--device", "cpu", "--training-epochs", "60", "--save-every", "0", "--eval-samples", "120"]


@pytest.fixture
def outcome(call_main, demo_model, tmp_path, capsys):
    """Train demo_model on 360 samples; return its report and what stood on the screen."""

    def run(*flags):
        assert call_main("--model-name", demo_model, *RUN, *flags) == 0
        report = json.loads((tmp_path / "trained_model" / "report.json").read_text())
        return report, capsys.readouterr().out

    return run


def test_the_whole_learner_learns_and_stays_close(outcome):
    report, screen = outcome()
    assert report["learned"] is True and report["close_to_base"] is True
    assert "did not learn" not in screen and "Little is left" not in screen


def test_a_rate_of_0_has_not_learned(outcome):
    report, screen = outcome("--learning-rate", "1e-12", "--target-approx-kl", "0")
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


def test_a_kl_that_is_paid_for_is_not_called_close(outcome, monkeypatch):
    build = train_rlhf.build_trainer

    def flipped(policy, tokenizer, settings, *others):
        trainer = build(policy, tokenizer, settings, *others)
        trainer.kl_ctl.value = -settings.kl_coef
        return trainer

    monkeypatch.setattr(train_rlhf, "build_trainer", flipped)
    report, screen = outcome()
    assert report["close_to_base"] is False
    assert (
        report["trained"]["train_prompts"]["kl"]
        > 4 * report["trained"]["train_prompts"]["kl_minimum"]
    )
    assert "the KL has run away to" in screen and "Little is left of the base model" in screen
