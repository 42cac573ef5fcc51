"""Rewards, advantages, returns and losses as they come out of the trainer, against values worked out apart from it."""

import math
from contextlib import nullcontext

import numpy as np
import pytest
import torch

import train_rlhf

PROMPTS = ["I feel so", "Life is", "I am really happy because", "Today I am"]


@pytest.fixture
def parts(build, make_settings):
    """A trainer whose policy has moved away from the base model, and a batch of its responses."""
    settings = make_settings("--gamma", "0.9", "--lam", "0.8", "--kl-coef", "0.3")
    built = build(settings)
    policy, tokenizer, trainer = built.policy, built.tokenizer, built.trainer
    torch.manual_seed(1)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name or "v_head" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    queries = [tokenizer(prompt, return_tensors="pt")["input_ids"][0] for prompt in PROMPTS]
    responses = train_rlhf.generate(policy, tokenizer, queries)
    responses[1] = responses[1][:3]  # so that lengths differ
    token_scores = [torch.linspace(-1, 1, len(response)) for response in responses]
    return settings, policy, tokenizer, trainer, queries, responses, token_scores


def spy(monkeypatch, trainer, name, calls):
    """Let the trainer's method append its arguments and its result to calls."""
    method = getattr(trainer, name)

    def spied(*args, **kwargs):
        result = method(*args, **kwargs)
        calls.append((args, result))
        return result

    monkeypatch.setattr(trainer, name, spied)


def distributions(policy, query, response, base, scores=None):
    """Return the logprobs (response length, vocabulary) and values of one unpadded sample, in float64."""
    ids = torch.cat([query, response])[None]
    with torch.no_grad(), policy.pretrained_model.disable_adapter() if base else nullcontext():
        output = policy.pretrained_model(ids, output_hidden_states=True)
        at_start, for_earned = policy.v_head(output.hidden_states[-1])[0].unbind(-1)
    where = slice(len(query) - 1, -1)
    logprobs, values = (
        torch.log_softmax(output.logits[0, where].double(), -1).numpy(),
        at_start[where].double().numpy(),
    )
    if scores is not None:  # before a token, only those before it have earned anything
        earned = np.array([sum(scores.tolist()[:position]) for position in range(len(scores))])
        values = values + for_earned[where].double().numpy() * earned
    return logprobs, values


def test_rewards_advantages_and_returns_of_a_step(parts, monkeypatch):
    settings, policy, _, trainer, queries, responses, token_scores = parts
    expected = []
    for query, response, scores in zip(queries, responses, token_scores):
        logprobs, values = distributions(policy, query, response, base=False, scores=scores)
        ref_logprobs, _ = distributions(policy, query, response, base=True)
        kl = (np.exp(logprobs) * (logprobs - ref_logprobs)).sum(-1)
        rewards = scores.double().numpy() - settings.kl_coef * kl
        next_values = np.append(values[1:], 0)
        deltas = rewards + settings.gamma * next_values - values
        weight = settings.gamma * settings.lam
        advantages = [
            sum(weight ** (later - t) * deltas[later] for later in range(t, len(deltas)))
            for t in range(len(deltas))
        ]
        expected.append((rewards, np.array(advantages), np.array(advantages) + values, kl))
    calls = {name: [] for name in ("compute_rewards", "compute_advantages")}
    for name, made in calls.items():
        spy(monkeypatch, trainer, name, made)
    stats = trainer.step(queries, responses, token_scores)

    (_, (rewards, _, _)), (args, (_, advantages, returns)) = (
        calls["compute_rewards"][0],
        calls["compute_advantages"][0],
    )
    mask = args[2].bool()
    for row, (wanted_rewards, wanted_advantages, wanted_returns, _) in enumerate(expected):
        assert rewards[row][mask[row]].numpy() == pytest.approx(wanted_rewards, abs=1e-4)
        assert advantages[row][mask[row]].numpy() == pytest.approx(wanted_advantages, abs=1e-4)
        assert returns[row][mask[row]].numpy() == pytest.approx(wanted_returns, abs=1e-4)
        assert (advantages[row][~mask[row]] == 0).all()
    assert stats["objective/kl"] == pytest.approx(
        np.mean([kl.sum() for *_, kl in expected]), abs=1e-4
    )
    assert stats["objective/kl"] > 0.01  # the policy was moved, so there is something to see


def test_loss_by_hand(build, make_settings):
    """Two positions of one response and three words: every number below fits on a sheet of paper."""
    flags = [
        "--kl-coef",
        "0.5",
        "--clip-range",
        "0.2",
        "--value-clip-range",
        "0.1",
        "--vf-coef",
        "2",
    ]
    trainer = build(make_settings(*flags)).trainer
    p, p_old, p_ref = [0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.25, 0.25, 0.5]
    trainer.old_logprobs = torch.tensor([[p_old, p_old]]).log()
    trainer.ref_logprobs = torch.tensor([[p_ref, p_ref]]).log()
    trainer.model.rows = torch.tensor([0])
    logits = torch.tensor([[p, p]]).log() + 7.0  # logits are free of a constant
    taken = torch.tensor([[0.5, 0.3]]).log()  # the first word, then the second
    old = torch.tensor([[0.4, 0.4]]).log()
    policy_loss, value_loss, stats = trainer.loss(
        old,
        values=torch.tensor([[0.0, 1.0]]),
        logits=logits,
        vpreds=torch.tensor([[0.5, 1.05]]),
        logprobs=taken,
        mask=torch.tensor([[1, 1]]),
        advantages=torch.tensor([[2.0, -1.0]]),
        returns=torch.tensor([[1.0, 2.0]]),
    )
    # Ratios 1.25 and 0.75. A gain is clipped at 1.2; a loss of -1 times 0.75 is worse off than at 0.8, so 0.8 counts.
    surrogate = (-2.0 * 1.2 + 1.0 * 0.8) / 2
    kl = 0.5 * math.log(0.5 / 0.25) + 0.3 * math.log(0.3 / 0.25) + 0.2 * math.log(0.2 / 0.5)
    assert policy_loss.item() == pytest.approx(surrogate + 0.5 * kl, abs=1e-6)
    # The first value may move to 0.1 only: (0.1 - 1)^2 is worse than (0.5 - 1)^2. The second moved by less than 0.1.
    assert value_loss.item() == pytest.approx(2 * 0.5 * (0.9**2 + 0.95**2) / 2, abs=1e-6)
    step_kl = 0.4 * math.log(0.4 / 0.5) + 0.4 * math.log(0.4 / 0.3)
    assert stats["policy/approxkl"].item() == pytest.approx(step_kl, abs=1e-6)


def test_loss_is_trls_own_where_the_kl_costs_nothing(parts, monkeypatch):
    *_, trainer, queries, responses, token_scores = parts
    trainer.kl_ctl.value = 0.0
    calls = []
    spy(monkeypatch, trainer, "loss", calls)
    trainer.step(queries, responses, token_scores)
    args, (policy_loss, value_loss, _) = calls[-1]
    trl_policy_loss, trl_value_loss, _ = super(train_rlhf.ExactKLTrainer, trainer).loss(*args)
    assert (
        policy_loss.item() == trl_policy_loss.item() and value_loss.item() == trl_value_loss.item()
    )


def test_before_the_first_update_the_ratio_is_1_and_the_kl_0(build, make_settings):
    built = build(make_settings("--ppo-epochs", "1", "--target-approx-kl", "0"))
    policy, tokenizer, trainer = built.policy, built.tokenizer, built.trainer
    queries = [tokenizer(prompt, return_tensors="pt")["input_ids"][0] for prompt in PROMPTS]
    responses = train_rlhf.generate(policy, tokenizer, queries)
    stats = trainer.step(queries, responses, [torch.ones(len(response)) for response in responses])
    assert stats["objective/kl"] == pytest.approx(0, abs=1e-6)
    assert stats["ppo/policy/approxkl"] == pytest.approx(0, abs=1e-6)
    assert stats["ppo/policy/ratio"] == pytest.approx(1, abs=1e-5)
    assert stats["ppo/policy/clipfrac"] == 0


def test_shuffled_minibatches_find_their_own_base_model(parts, monkeypatch):
    *_, trainer, queries, responses, token_scores = parts
    trainer.config.mini_batch_size = trainer.config.backward_batch_size = 1
    trainer.config.ppo_epochs = 1
    for group in trainer.optimizer.param_groups:
        group["lr"] = 0.0
    calls = []
    spy(monkeypatch, trainer, "loss", calls)
    stats = trainer.step(queries, responses, token_scores)
    assert len(calls) == 4
    for _, (
        _,
        _,
        loss_stats,
    ) in calls:  # at rate 0 nothing moves, unless a row is compared with another one
        assert loss_stats["policy/approxkl"].item() == pytest.approx(0, abs=1e-5)
    added = []
    for args, (policy_loss, _, _) in calls:
        trl_policy_loss, _, _ = super(train_rlhf.ExactKLTrainer, trainer).loss(*args)
        added.append(
            (policy_loss - trl_policy_loss).item() / trainer.kl_ctl.value * args[5].sum().item()
        )
    assert sum(added) / 4 == pytest.approx(stats["objective/kl"], rel=1e-3)


def test_the_loss_alone_pulls_a_drifted_policy_back(parts, monkeypatch):
    *_, trainer, queries, responses, token_scores = parts
    for group in trainer.optimizer.param_groups:
        group["lr"] = 1e-3
    monkeypatch.setattr(
        trainer, "compute_advantages", lambda values, *_: (values, 0 * values, values)
    )
    kls = [trainer.step(queries, responses, token_scores)["objective/kl"] for _ in range(8)]
    assert kls[-1] < 0.3 * kls[0]


def test_every_gradient_is_clipped(parts, monkeypatch):
    _, policy, _, trainer, queries, responses, token_scores = parts
    norms = []
    monkeypatch.setattr(trainer.config, "max_grad_norm", 1e-3)
    zero_grad = trainer.optimizer.zero_grad

    def spied():
        norms.append(
            math.sqrt(
                sum(p.grad.square().sum().item() for p in policy.parameters() if p.grad is not None)
            )
        )
        zero_grad()

    monkeypatch.setattr(trainer.optimizer, "zero_grad", spied)
    for _ in range(2):
        trainer.step(queries, responses, token_scores)
    assert len(norms) == 2 * trainer.config.ppo_epochs
    assert max(norms) <= 1e-3 * 1.01


def test_score_tokens_finds_the_word_that_made_the_difference():
    class Letters:
        """A tokenizer of characters."""

        def decode(self, ids, **_):
            return "".join(chr(int(i)) for i in ids)

    def encode(text):
        return torch.tensor([ord(letter) for letter in text])

    reward = train_rlhf.positive_word_reward
    scores = train_rlhf.score_tokens(
        reward, Letters(), "I am", encode("I am"), encode(" glad ly"), 1.0
    )
    assert scores.tolist() == [0, 0, 0, 0, 2, 0, 0, 0]
    taken_back = train_rlhf.score_tokens(
        reward, Letters(), "I am", encode("I am"), encode(" gladly"), -1.0
    )
    assert taken_back.tolist() == [0, 0, 0, 0, 2, -2, 0]


@pytest.mark.parametrize(
    ("approx_kl", "factor"), [(0.01, 1), (0.0, 1.5), (1.0, 1 / 1.5), (0.01 / 1.44, 1.2)]
)
def test_learning_rate_follows_the_root_of_the_kl(approx_kl, factor):
    assert train_rlhf.adapt_learning_rate(1e-4, approx_kl, target=0.01) == pytest.approx(
        1e-4 * factor
    )
