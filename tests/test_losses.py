"""GAE and the clipped losses as the script writes them out, against TRL's own as the oracle."""

import os
from types import SimpleNamespace

import pytest
import torch
from trl import PPOTrainer

from finetune.logits import OutputHead
from train_rlhf import compute_advantages, policy_loss, token_statistics, value_loss

FULL = bool(os.environ.get("CI_FULL"))
SHAPES = [(1, 1), (1, 7), (5, 1), (6, 10), (10, 40)]
EACH_SEED = pytest.mark.parametrize("seed", range(3 if FULL else 1))


def random_mask(batch, length, generator):
    """Return the mask of responses of random lengths, none of them empty."""
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    return (torch.arange(length) < lengths[:, None]).long()


def random_batch(shape, seed, drift):
    """Return tensors by the names that TRL's loss has for them; drift: how far the policy moved."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*sizes):
        return torch.randn(*sizes, generator=generator)

    old_logprobs = -normal(*shape).abs() - 0.1
    values = normal(*shape)
    return {
        "old_logprobs": old_logprobs,
        "logprobs": (old_logprobs + drift * normal(*shape)).requires_grad_(),
        "values": values,
        "vpreds": (values + drift * normal(*shape)).requires_grad_(),
        "logits": normal(*shape, 11),
        "advantages": normal(*shape),
        "returns": normal(*shape),
        "mask": random_mask(*shape, generator),
    }


def policy_loss_of(batch, clip_range):
    """Return the policy loss of such a batch, and the share of tokens where clipping counts."""
    names = ["logprobs", "old_logprobs", "advantages", "mask"]
    return policy_loss(*[batch[name] for name in names], clip_range)


def trl_with(**config):
    """Return what TRL's methods need of a trainer: its config alone."""
    return SimpleNamespace(config=SimpleNamespace(whiten_rewards=False, **config))


# ---------------------------------------------------------- against TRL
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 1.0), (0.9, 0.5), (0.0, 0.0)])
@EACH_SEED
def test_advantages_and_returns_are_those_of_trl(shape, gamma, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask(*shape, generator)
    values, rewards = torch.randn(2, *shape, generator=generator)
    advantages, returns = compute_advantages(values, rewards, mask, gamma, lam)

    if mask.sum() == 1:  # which TRL can't whiten
        mask = mask.repeat(2, 1)
        values, rewards = values.repeat(2, 1), rewards.repeat(2, 1)
    trainer = trl_with(gamma=gamma, lam=lam)
    trl_values, whitened, trl_returns = PPOTrainer.compute_advantages(
        trainer, values, rewards, mask
    )
    trl_advantages = (trl_returns - trl_values) * mask
    assert torch.equal(returns, trl_returns[: len(returns)])
    assert torch.equal(advantages, trl_advantages[: len(returns)])

    # TRL whitens what it returns: that is ours, but for mean and deviation.
    ours = advantages[mask[: len(advantages)] == 1]
    if len(ours) > 2:
        standard = (ours - ours.mean()) / ours.std()
        torch.testing.assert_close(standard, whitened[mask == 1], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", SHAPES[1:])  # of a single token TRL wants a variance
@pytest.mark.parametrize("drift", [0.0, 0.01, 0.3, 2.0])
@pytest.mark.parametrize("clip_range", [0.2, 1e-6])
@EACH_SEED
def test_losses_and_their_gradients_are_those_of_trl(shape, drift, clip_range, seed):
    """Clipped and unclipped, with masks; vf_coef 0.1 weighs the value loss in TRL's way."""
    batch = random_batch(shape, seed, drift)
    if batch["mask"].sum() == 1:
        batch["mask"] = torch.ones_like(batch["mask"])
    trainer = trl_with(
        cliprange=clip_range,
        cliprange_value=clip_range,
        vf_coef=0.1,
        ratio_threshold=float("inf"),
    )
    trl_policy_loss, trl_value_loss, stats = PPOTrainer.loss(trainer, **batch)

    mask = batch["mask"]
    loss, clip_fraction = policy_loss_of(batch, clip_range)
    squared_error = value_loss(batch["vpreds"], batch["values"], batch["returns"], mask, clip_range)
    # The logits are what the head gets, so it is left out.
    logits, tokens = batch["logits"], torch.zeros(shape, dtype=torch.long)
    entropy = token_statistics(logits, logits, tokens, OutputHead(None, 1.0)).entropy
    entropy = (entropy * mask).sum() / mask.sum()
    assert torch.equal(loss, trl_policy_loss)
    assert torch.equal(0.1 * squared_error, trl_value_loss)
    assert torch.equal(clip_fraction, stats["policy/clipfrac"])
    # Ours is the sum by its definition, TRL's has the logits in place of logprobs.
    torch.testing.assert_close(entropy, stats["policy/entropy"], atol=1e-6, rtol=1e-6)

    inputs = [batch["logprobs"], batch["vpreds"]]
    total, trl_total = loss + 0.1 * squared_error, trl_policy_loss + trl_value_loss
    gradients = torch.autograd.grad(total, inputs)
    trl_gradients = torch.autograd.grad(trl_total, inputs)
    for gradient, trl_gradient in zip(gradients, trl_gradients, strict=True):
        assert torch.equal(gradient, trl_gradient)


def test_the_batches_have_clipped_and_unclipped_tokens():
    """So that the test above sees both sides of each maximum."""
    batch = random_batch((10, 40), seed=0, drift=0.3)
    _, clip_fraction = policy_loss_of(batch, 0.2)
    assert 0.1 < clip_fraction < 0.9
    change = (batch["vpreds"] - batch["values"]).abs()
    assert 0.1 < (change > 0.2).float().mean() < 0.9


# -------------------------------------------------------------- by hand
def test_the_losses_by_hand():
    """Of two tokens: every number below fits on a sheet of paper."""
    mask = torch.ones(1, 2)
    logprobs, old_logprobs = torch.tensor([[[0.5, 0.3]], [[0.4, 0.4]]]).log()
    advantages = torch.tensor([[2.0, -1.0]])
    loss, clip_fraction = policy_loss(logprobs, old_logprobs, advantages, mask, clip_range=0.2)
    # The ratios are 1.25 and 0.75. A gain is clipped at 1.2; a loss of -1 times 0.75 is worse off
    # than at 0.8, so 0.8 counts.
    assert loss.item() == pytest.approx((-2.0 * 1.2 + 1.0 * 0.8) / 2)
    assert clip_fraction == 1

    values, old_values = torch.tensor([[[0.5, 1.05]], [[0.0, 1.0]]])
    returns = torch.tensor([[2.0, 0.0]])
    squared_error = value_loss(values, old_values, returns, mask, clip_range=0.1)
    # The first value may move to 0.1 only: (0.1 - 2)² is worse than (0.5 - 2)². The second moved
    # by less than 0.1.
    assert squared_error.item() == pytest.approx(0.5 * (1.9**2 + 1.05**2) / 2)


def test_minibatches_weighed_by_their_tokens_are_the_whole_batch():
    """As processes share one: each has a mean over its own tokens, weighed by their number."""
    batch = random_batch((6, 10), seed=1, drift=0.3)
    whole, _ = policy_loss_of(batch, 0.2)
    total = 0.0
    for rows in torch.arange(6).split(2):
        part = {name: tensor[rows] for name, tensor in batch.items()}
        weight = part["mask"].sum() / batch["mask"].sum()
        total += weight * policy_loss_of(part, 0.2)[0]
    torch.testing.assert_close(total, whole)
