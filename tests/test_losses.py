"""GAE and the clipped losses as they stand in the script, against TRL's own, which are the oracle."""

from types import SimpleNamespace

import pytest
import torch
from trl import PPOTrainer

from train_rlhf import compute_advantages, entropy_of, policy_loss, value_loss

SHAPES = [(1, 1), (1, 7), (5, 1), (6, 10), (10, 40)]


def random_mask(batch, length, generator):
    """Return the mask of responses of random lengths, none of them empty."""
    lengths = torch.randint(1, length + 1, (batch,), generator=generator)
    return (torch.arange(length) < lengths[:, None]).long()


def random_batch(shape, seed, drift):
    """Return tensors by the names that TRL's loss has for them; drift: how far the policy moved."""
    generator = torch.Generator().manual_seed(seed)
    batch, length = shape

    def normal(*sizes, scale=1.0):
        return torch.randn(*sizes, generator=generator) * scale

    old_logprobs = -normal(batch, length).abs() - 0.1
    values = normal(batch, length)
    return {
        "old_logprobs": old_logprobs,
        "logprobs": (old_logprobs + normal(batch, length, scale=drift)).requires_grad_(),
        "values": values,
        "vpreds": (values + normal(batch, length, scale=drift)).requires_grad_(),
        "logits": normal(batch, length, 11),
        "advantages": normal(batch, length),
        "returns": normal(batch, length),
        "mask": random_mask(batch, length, generator),
    }


def trl_with(**config):
    """Return what TRL's methods need of a trainer: its config alone."""
    return SimpleNamespace(config=SimpleNamespace(whiten_rewards=False, **config))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("gamma, lam", [(1.0, 0.95), (1.0, 1.0), (0.9, 0.5), (0.0, 0.0)])
@pytest.mark.parametrize("seed", range(3))
def test_advantages_and_returns_are_those_of_trl(shape, gamma, lam, seed):
    generator = torch.Generator().manual_seed(seed)
    mask = random_mask(*shape, generator)
    values, rewards = torch.randn(2, *shape, generator=generator)
    advantages, returns = compute_advantages(values, rewards, mask, gamma, lam)

    trainer = trl_with(gamma=gamma, lam=lam)
    if mask.sum() == 1:  # which TRL can't whiten
        mask = torch.cat([mask, mask])
        values, rewards = torch.cat([values, values]), torch.cat([rewards, rewards])
    trl_values, whitened, trl_returns = PPOTrainer.compute_advantages(
        trainer, values, rewards, mask
    )
    assert torch.equal(returns, trl_returns[: len(returns)])
    assert torch.equal(advantages, ((trl_returns - trl_values) * mask)[: len(returns)])

    # TRL whitens what it returns: that is ours, but for mean and deviation.
    ours = advantages[mask[: len(advantages)] == 1]
    if len(ours) > 2 and ours.std() > 0:
        trls = whitened[mask == 1]
        standard = (ours - ours.mean()) / ours.std()
        torch.testing.assert_close(standard, trls, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape != (1, 1)])
@pytest.mark.parametrize("drift", [0.0, 0.01, 0.3, 2.0], ids=lambda drift: f"drift {drift}")
@pytest.mark.parametrize("clip_range", [0.2, 1e-6])
@pytest.mark.parametrize("seed", range(3))
def test_losses_and_their_gradients_are_those_of_trl(shape, drift, clip_range, seed):
    """Clipped and unclipped, with masks; vf_coef 0.1 weighs the value loss in TRL's way."""
    batch = random_batch(shape, seed, drift)
    if batch["mask"].sum() == 1:  # of which TRL wants a variance
        batch["mask"] = torch.ones_like(batch["mask"])
    trainer = trl_with(
        cliprange=clip_range, cliprange_value=clip_range, vf_coef=0.1, ratio_threshold=float("inf")
    )
    trl_policy_loss, trl_value_loss, stats = PPOTrainer.loss(trainer, **batch)
    inputs = [batch["logprobs"], batch["vpreds"]]
    gradients = torch.autograd.grad(trl_policy_loss + trl_value_loss, inputs)

    mask = batch["mask"]
    loss, clip_fraction = policy_loss(
        batch["logprobs"], batch["old_logprobs"], batch["advantages"], mask, clip_range
    )
    squared_error = value_loss(batch["vpreds"], batch["values"], batch["returns"], mask, clip_range)
    assert torch.equal(loss, trl_policy_loss)
    assert torch.equal(0.1 * squared_error, trl_value_loss)
    assert torch.equal(clip_fraction, stats["policy/clipfrac"])
    entropy = (entropy_of(batch["logits"]) * mask).sum() / mask.sum()
    assert torch.equal(entropy, stats["policy/entropy"])
    for own, trl_gradient in zip(
        torch.autograd.grad(loss + 0.1 * squared_error, inputs), gradients, strict=True
    ):
        assert torch.equal(own, trl_gradient)


def test_the_batches_have_clipped_and_unclipped_tokens():
    """So that the tests above see both sides of each maximum."""
    batch = random_batch((10, 40), seed=0, drift=0.3)
    _, fraction = policy_loss(
        batch["logprobs"], batch["old_logprobs"], batch["advantages"], batch["mask"], 0.2
    )
    assert 0.1 < fraction < 0.9
    change = (batch["vpreds"] - batch["values"]).abs()
    assert 0.1 < (change > 0.2).float().mean() < 0.9


def test_minibatches_weighed_by_their_tokens_are_the_whole_batch():
    """As processes share a minibatch: each has a mean over its own tokens, weighed by their number."""
    batch = random_batch((6, 10), seed=1, drift=0.3)
    batch = {name: tensor.detach().double() for name, tensor in batch.items()}
    names = ("logprobs", "old_logprobs", "advantages", "mask")
    whole, _ = policy_loss(*(batch[name] for name in names), 0.2)
    total = 0.0
    for rows in torch.arange(6).split(2):
        weight = batch["mask"][rows].sum() / batch["mask"].sum()
        total += weight * policy_loss(*(batch[name][rows] for name in names), 0.2)[0]
    torch.testing.assert_close(total, whole)
