"""A PPO step: its numbers against values worked out apart from it; bad ones are skipped."""

import itertools
import math
from contextlib import ExitStack, contextmanager, nullcontext
from types import SimpleNamespace

import numpy
import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from helpers import read_metrics
from safetensors.torch import load_file

import train_rlhf
from finetune import evaluation, measurement
from finetune.checkpoint import Checkpoint, read_checkpoint
from finetune.errors import RunError
from finetune.output import claim_output
from finetune.tokens import encode
from train_rlhf import approx_kl_growth

PROMPTS = ["I feel so", "Life is", "I am really happy because", "Today I am"]
NEAR = {"abs": 1e-4, "rel": 1e-4}


@pytest.fixture
def drifted(build, roll_out, make_settings):
    """Build a trainer whose policy is no longer the base model, and sample a batch from it."""

    def make(*flags):
        built = build(make_settings(*map(str, flags)))
        torch.manual_seed(1)
        for name, parameter in built.policy.named_parameters():
            if "lora_B" in name or "v_head" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        rows = [{"prompt": prompt} for prompt in PROMPTS]
        queries = encode(built.tokenizer, rows, chat_template=False)
        responses, _ = roll_out(built, queries)
        responses[1] = responses[1][:3]  # so that lengths differ
        token_scores = [torch.linspace(-1, 1, len(response)) for response in responses]
        built.batch = queries, responses, token_scores
        return built

    return make


def gradients_of(policy):
    """Return copies of the gradients of all that is trained, {name: gradient}."""
    named = policy.named_parameters()
    return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}


# ------------------------------------------------------- by another way
def evaluate(built, row, base=False):
    """Return all logprobs (response length, vocabulary) and values of a response as float64.

    Unpadded and on its own, by the plain model, so that no position and no mask can go wrong.
    """
    query, response, scores = (column[row] for column in built.batch)
    model = built.policy.pretrained_model
    with torch.no_grad(), model.disable_adapter() if base else nullcontext():
        output = model(torch.cat([query, response])[None], output_hidden_states=True)
        of_hidden = built.policy.v_head(output.hidden_states[-1])[0]
    before = slice(len(query) - 1, -1)
    logits = output.logits[0, before].double() / built.settings.temperature
    # Before a token only those before it have earned anything.
    earned = torch.tensor([scores[:t].sum() for t in range(len(scores))])
    constant, slope = of_hidden[before].double().unbind(-1)
    values = constant + slope * earned
    return torch.log_softmax(logits, dim=-1).numpy(), values.numpy()


def divergence(logprobs, others):
    """Return KL(p || q) at each position."""
    return (numpy.exp(logprobs) * (logprobs - others)).sum(-1)


def before_the_updates(built, row):
    """Return what a step has to know of a response before its first update."""
    settings, (_, responses, token_scores) = built.settings, built.batch
    all_logprobs, values = evaluate(built, row)
    all_ref_logprobs, _ = evaluate(built, row, base=True)
    kl = divergence(all_logprobs, all_ref_logprobs)
    rewards = token_scores[row].numpy() - settings.kl_coef * kl
    next_values = numpy.append(values[1:], 0)
    deltas = rewards + settings.gamma * next_values - values
    weight, length = settings.gamma * settings.lam, len(deltas)
    advantages = numpy.zeros(length)
    for t in range(length):
        discounts = weight ** numpy.arange(length - t)
        advantages[t] = (discounts * deltas[t:]).sum()
    places = range(length), responses[row].tolist()
    return SimpleNamespace(
        places=places,  # of the tokens that were sampled, in all_logprobs
        logprobs=all_logprobs[places],
        all_ref_logprobs=all_ref_logprobs,
        values=values,
        kl=kl,
        rewards=rewards,
        advantages=advantages,
        returns=advantages + values,
    )


def figures_of(built, before, rows):
    """Return the losses and other figures of an update with the policy as it is now."""
    settings, figures = built.settings, []
    for row in rows:
        old = before[row]
        all_logprobs, values = evaluate(built, row)
        log_ratio = all_logprobs[old.places] - old.logprobs
        ratio = numpy.exp(log_ratio)
        low, high = 1 - settings.clip_range, 1 + settings.clip_range
        gain, clipped_gain = old.advantages * ratio, old.advantages * ratio.clip(low, high)
        farthest = settings.value_clip_range
        clipped_values = old.values + (values - old.values).clip(-farthest, farthest)
        error, clipped_error = (values - old.returns) ** 2, (clipped_values - old.returns) ** 2
        figures.append(
            {
                "policy_loss": -numpy.minimum(gain, clipped_gain),
                "value_loss": numpy.maximum(error, clipped_error) / 2,
                "kl_loss": divergence(all_logprobs, old.all_ref_logprobs),
                "approx_kl": 0.5 * log_ratio**2,
                "clip_fraction": clipped_gain < gain,
                "entropy": -(numpy.exp(all_logprobs) * all_logprobs).sum(-1),
                "value_clip_fraction": clipped_error > error,
            }
        )
    # Means over the tokens of all these rows.
    return {name: numpy.concatenate([row[name] for row in figures]).mean() for name in figures[0]}


@pytest.fixture
def watch(monkeypatch):
    """List the updates of a trainer from now on, each with what look returned right before it.

    look: gets the rows of the batch that the update is about; the policy has not moved on then.
    """

    def start(built, look):
        updates, trainer = [], built.trainer
        update, backward = trainer.update, trainer.accelerator.backward
        whole = [torch.cat(pair).tolist() for pair in zip(*built.batch[:2])]

        def see_update(batch, experience, policy_pass, weight):
            pairs = zip(batch.inputs["input_ids"], batch.inputs["attention_mask"])
            rows = [whole.index(ids[mask.bool()].tolist()) for ids, mask in pairs]
            masks = batch.mask.bool()
            seen = SimpleNamespace(rows=rows, masks=masks, experience=experience, wanted=look(rows))
            seen.ref_states = policy_pass.ref_states
            updates.append(seen)
            return update(batch, experience, policy_pass, weight)

        def see_loss(loss):
            updates[-1].loss = loss.item()
            backward(loss)

        monkeypatch.setattr(trainer, "update", see_update)
        monkeypatch.setattr(trainer.accelerator, "backward", see_loss)
        return updates

    return start


@pytest.mark.parametrize(
    ("name", "mini_batch_size", "kl_coef", "is_split"),
    [
        ("demo_model", 1, 0.3, True),
        ("demo_model", 2, 0.3, False),
        ("demo_model", 4, 0.0, True),
        ("gpt2", 2, 0.3, True),
    ],
)
def test_every_number_of_a_step(
    drifted, watch, request, monkeypatch, name, mini_batch_size, kl_coef, is_split
):
    """GPT-2 has absolute positions, which padding would shift.

    Where all four rows are one minibatch, the pass before the updates is also that of the first.
    Where the head is left to the model, states are logits, which are made for each minibatch.
    """
    if not is_split:
        monkeypatch.setattr(train_rlhf.models, "head_is_whole", lambda *arguments: False)
    flags = ["--gamma", 0.9, "--lam", 0.8, "--temperature", 0.7, "--value-clip-range", 0.05]
    flags += ["--ppo-epochs", 3, "--learning-rate", 0.003, "--vf-coef", 0.5, "--kl-coef", kl_coef]
    flags += ["--model-name", request.getfixturevalue(name), "--mini-batch-size", mini_batch_size]
    built = drifted(*flags)
    lengths = [len(response) for response in built.batch[1]]
    assert len({*lengths}) > 1 and len({*map(len, built.batch[0])}) > 1
    before = [before_the_updates(built, row) for row in range(4)]
    assert (built.policy.head.layer is None) == (not is_split)

    given, compute = [], train_rlhf.compute_advantages

    def see_rewards(values, rewards, mask, gamma, lam):
        given.append((values, rewards, mask))
        return compute(values, rewards, mask, gamma, lam)

    monkeypatch.setattr(train_rlhf, "compute_advantages", see_rewards)
    updates = watch(built, lambda rows: figures_of(built, before, rows))
    torch.manual_seed(0)
    stats, token_figures = built.trainer.step(*built.batch)

    # Before the updates.
    ((values, rewards, mask),) = given
    assert mask.sum(1).tolist() == lengths
    for row, old in enumerate(before):
        assert values[row, : lengths[row]].numpy() == pytest.approx(old.values, **NEAR)
        assert rewards[row, : lengths[row]].numpy() == pytest.approx(old.rewards, **NEAR)

    assert len(updates) == 3 * 4 / mini_batch_size
    for update in updates:
        check_experience(built, update, before)

    # Each epoch takes every row once, in an order of its own where there are several minibatches.
    orders = numpy.concatenate([update.rows for update in updates]).reshape(3, 4).tolist()
    assert all(sorted(order) == [0, 1, 2, 3] for order in orders)
    assert len({*map(tuple, orders)}) == (1 if mini_batch_size == 4 else 3)

    # The losses and the figures.
    for update in updates:
        parts = update.wanted
        loss = parts["policy_loss"] + kl_coef * parts["kl_loss"] + 0.5 * parts["value_loss"]
        assert update.loss == pytest.approx(loss, **NEAR)
    assert stats["kl"] == pytest.approx(numpy.mean([old.kl.sum() for old in before]), **NEAR)
    check_token_figures(built, token_figures, before)
    for name in ("policy_loss", "value_loss", "clip_fraction", "entropy"):
        mean = numpy.mean([update.wanted[name] for update in updates])
        assert stats[name] == pytest.approx(mean, **NEAR), name
    approx_kls = [update.wanted["approx_kl"] for update in updates]
    assert stats["approx_kl"] == pytest.approx(after_the_last(approx_kls), **NEAR)
    assert (stats["kl_coef"], stats["learning_rate"]) == (kl_coef, 0.003)
    assert stats["skipped_updates"] == 0

    # There has been something to see.
    assert stats["kl"] > 0.1 and stats["clip_fraction"] > 0
    assert any(update.wanted["value_clip_fraction"] > 0 for update in updates)


def check_token_figures(built, token_figures, before):
    """Check what is told of each token: that is how it was before the updates, without padding."""
    for row, old in enumerate(before):
        wanted = {
            "scores": built.batch[2][row].numpy(),
            "kl": old.kl,
            "values": old.values,
            "advantages": old.advantages,
            "logprobs": old.logprobs,
            "ref_logprobs": old.all_ref_logprobs[old.places],
        }
        assert wanted.keys() == token_figures._asdict().keys()
        for name, numbers in wanted.items():
            told = getattr(token_figures, name)
            assert len(told) == len(before)
            assert told[row].numpy() == pytest.approx(numbers, **NEAR), name


def check_experience(built, update, before):
    """Check what an update is given: each row its own numbers, and nothing of the padding."""
    for place, row in enumerate(update.rows):
        where = update.masks[place]
        assert where.sum() == len(before[row].values)
        given = update.experience._asdict()
        given["all_ref_logprobs"] = built.policy.head(update.ref_states).log_softmax(-1)
        for name, numbers in given.items():
            wanted = getattr(before[row], name)
            assert numbers[place][where].numpy() == pytest.approx(wanted, **NEAR)
        assert not update.experience.advantages[place][~where].any()


# --------------------------------------------- how far a step has moved
def after_the_last(approx_kls):
    """Return the KL after the last update, from those before each.

    It grows with the square of the number of updates that were made: by what factor is told by all
    those before an update, taken together.
    """
    count = len(approx_kls)
    grown = sum(number**2 for number in range(count))
    return sum(approx_kls) * count**2 / grown if grown else 0.0


@pytest.mark.parametrize("count", [2, 3, 4, 16])
def test_approx_kl_is_that_after_the_last_update(count):
    """Of a way that grows evenly: 0, 1, 4, 9 … are measured before the updates, count² is left."""
    approx_kls = [number**2 for number in range(count)]
    mean = sum(approx_kls) / count
    assert mean * approx_kl_growth(count) == pytest.approx(count**2)
    assert after_the_last(approx_kls) == pytest.approx(count**2)


def test_a_single_update_is_not_measured(build, step, make_settings):
    flags = ["--ppo-epochs", "1", "--target-approx-kl", "0"]
    stats = step(build(make_settings(*flags)))
    assert [stats[name] for name in ("kl", "approx_kl", "clip_fraction")] == [0, 0, 0]
    assert approx_kl_growth(1) == 1


@pytest.mark.parametrize("epochs", [2, 4])
def test_approx_kl_foretells_how_far_a_step_moves(
    build, make_settings, make_learner, roll_out, epochs
):
    """The same target would else mean another size of step for another number of epochs."""
    built = build(make_settings("--batch-size", "10", "--ppo-epochs", str(epochs)))
    trainer, rows = built.trainer, (built.rows * 2)[:10]
    queries = encode(built.tokenizer, rows, chat_template=False)
    scorer, scale = train_rlhf.load_reward(built.settings, rows, trainer.accelerator.device)

    def logprobs_of(batch):
        """Return the logprobs of all tokens of the responses, one after the other."""
        with torch.no_grad():
            policy_pass = trainer.policy_pass(batch, trainer.ref_pass(batch.inputs))
        return policy_pass.logprobs[batch.mask.bool()]

    told, moved = [], []
    for number in range(8):
        responses, _ = roll_out(built, queries, key=(0, number, 0))
        _, token_scores = train_rlhf.score_responses(
            scorer, scale, built.tokenizer, rows, queries, responses, True, [*range(99)]
        )
        batch = trainer.make_batch(queries, responses, token_scores)
        before = logprobs_of(batch)
        stats, _ = trainer.step(queries, responses, token_scores)
        told.append(stats["approx_kl"])
        moved.append(0.5 * (logprobs_of(batch) - before).square().mean().item())
    assert min(moved) > 0
    ratios = numpy.log(told) - numpy.log(moved)
    assert math.exp(abs(ratios.mean())) < 1.5
    assert math.exp(abs(math.log(sum(told) / sum(moved)))) < 1.5


# ------------------------------------------------------- how it is done
@pytest.mark.parametrize(
    ("epochs", "mini_batch_size", "counts"),
    [
        (1, 0, {"base": 1, "update": 1}),
        (4, 0, {"base": 1, "update": 4}),
        (2, 1, {"score": 4, "update": 8, "base": 4}),
    ],
)
def test_a_step_makes_no_more_passes_than_it_needs(drifted, epochs, mini_batch_size, counts):
    """A pass of a large model takes most of the time, and its logits most of the memory."""
    flags = ["--ppo-epochs", epochs, "--mini-batch-size", mini_batch_size]
    built = drifted(*flags, "--target-approx-kl", 0)
    adapted = [module for module in built.policy.modules() if hasattr(module, "disable_adapters")]
    passes = []

    def see(module, args, kwargs):
        assert len(kwargs["input_ids"]) == (mini_batch_size or 4)
        kind = "update" if torch.is_grad_enabled() else "score"
        passes.append("base" if all(module.disable_adapters for module in adapted) else kind)

    backbone = built.policy.pretrained_model.get_base_model()
    backbone.register_forward_pre_hook(see, with_kwargs=True)
    built.trainer.step(*built.batch)
    assert {kind: passes.count(kind) for kind in passes} == counts


@pytest.mark.parametrize("mini_batch_size", [0, 2])
def test_the_gradient_of_a_first_update(drifted, watch, monkeypatch, mini_batch_size):
    """It comes from the pass that also tells what the policy was, which must not be moved along."""
    flags = ["--ppo-epochs", 1, "--target-approx-kl", 0, "--max-grad-norm", 0, "--kl-coef", 0.3]
    built = drifted(*flags, "--mini-batch-size", mini_batch_size)
    before = [before_the_updates(built, row) for row in range(4)]
    updates, found = watch(built, lambda rows: None), []

    def take_no_step():  # so that each update is a first
        found.append(gradients_of(built.policy))

    monkeypatch.setattr(built.trainer.optimizer, "step", take_no_step)
    built.trainer.step(*built.batch)
    assert len(found) == len(updates) == (2 if mini_batch_size else 1)

    for update, gradients in zip(updates, found):
        total = sum(loss_to_differentiate(built, before[row], row) for row in update.rows)
        (total / sum(len(before[row].values) for row in update.rows)).backward()
        expected = gradients_of(built.policy)
        built.policy.zero_grad()
        assert gradients.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(gradients[name], gradient, rtol=1e-3, atol=1e-5)
        assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())


def loss_to_differentiate(built, before, row):
    """Return the sum of a response's losses over its tokens, unpadded and alone.

    Its ratio has a value of 1, and nothing is clipped.
    """
    settings, policy = built.settings, built.policy
    query, response, token_scores = (column[row] for column in built.batch)
    inputs = torch.cat([query, response])[None]
    output = policy.pretrained_model(inputs, output_hidden_states=True)
    places = slice(len(query) - 1, -1)
    all_logprobs = torch.log_softmax(output.logits[0, places] / settings.temperature, dim=-1)
    constant, slope = policy.v_head(output.hidden_states[-1])[0, places].unbind(-1)
    values = constant + slope * (token_scores.cumsum(0) - token_scores)
    logprobs = all_logprobs[before.places]

    advantages = torch.tensor(before.advantages).float()
    returns = torch.tensor(before.returns).float()
    all_ref_logprobs = torch.tensor(before.all_ref_logprobs).float()
    gain = (advantages * (logprobs - logprobs.detach()).exp()).sum()
    kl = (all_logprobs.exp() * (all_logprobs - all_ref_logprobs)).sum()
    squared_error = 0.5 * (values - returns).square().sum()
    return settings.kl_coef * kl + settings.vf_coef * squared_error - gain


def test_the_loss_alone_pulls_a_drifted_policy_back(drifted, monkeypatch):
    """With advantages of 0 there is no reward that could do it."""
    built = drifted("--kl-coef", 0.3, "--learning-rate", 0.001)

    def without_rewards(values, rewards, mask, gamma, lam):
        return torch.zeros_like(values), values

    monkeypatch.setattr(train_rlhf, "compute_advantages", without_rewards)
    kls = [built.trainer.step(*built.batch)[0]["kl"] for _ in range(8)]
    assert kls[-1] < 0.3 * kls[0]


@pytest.mark.parametrize("mini_batch_size", ["0", "1"])
def test_a_step_in_which_nothing_was_earned_moves_nothing(
    build, make_settings, roll_out, mini_batch_size
):
    """Where policy and base model are one, the gradient of the KL is exactly 0.

    Of anything else, a rounding error too, Adam would make a step of full size.
    """
    built = build(make_settings("--ppo-epochs", "2", "--mini-batch-size", mini_batch_size))
    queries = encode(built.tokenizer, built.rows[:3], chat_template=False)
    responses, _ = roll_out(built, queries)
    before = [weight.clone() for weight in trained(built.trainer).values()]
    token_scores = [torch.zeros(len(response)) for response in responses]
    stats, _ = built.trainer.step(queries, responses, token_scores)
    assert (stats["kl"], stats["approx_kl"], stats["skipped_updates"]) == (0, 0, 0)
    assert is_same(before, [*trained(built.trainer).values()])
    assert not any(gradient.any() for gradient in gradients_of(built.policy).values())


@pytest.mark.parametrize("longest", [1e-3, 1e3, 0])
def test_every_gradient_is_clipped(drifted, monkeypatch, longest):
    built = drifted("--max-grad-norm", longest, "--ppo-epochs", 3)
    accelerator, optimizer = built.trainer.accelerator, built.trainer.optimizer
    clip, take_step = accelerator.clip_grad_norm_, optimizer.step
    before, after = [], []

    def gradient():
        return torch.cat([each.flatten() for each in gradients_of(built.policy).values()])

    def see_clip(*args):
        before.append(gradient())
        return clip(*args)

    def see_step():
        after.append(gradient())
        take_step()

    monkeypatch.setattr(accelerator, "clip_grad_norm_", see_clip)
    monkeypatch.setattr(optimizer, "step", see_step)
    built.trainer.step(*built.batch)
    assert len(before) == len(after) == 3
    for raw, used in zip(before, after):
        assert 1e-3 < raw.norm() < 1e3
        if longest == 1e-3:
            torch.testing.assert_close(used, raw * (longest / raw.norm()), rtol=1e-2, atol=1e-9)
        else:
            assert torch.equal(used, raw)


# ------------------------------------------------- ways to spoil a step
def trained(trainer):
    """Return {name: weight} of what is trained."""
    named = trainer.model.named_parameters()
    return {name: weight for name, weight in named if weight.requires_grad}


def state_of(trainer):
    """Return copies of all that an update may move: what is trained, and Adam's moments of it."""
    tensors = [*trained(trainer).values()]
    for moments in trainer.optimizer.state_dict()["state"].values():
        tensors += moments.values()
    return [tensor.detach().clone() for tensor in tensors]


def is_same(before, after):
    """Return whether two states are equal bit for bit."""
    return len(before) == len(after) and all(map(torch.equal, before, after))


@contextmanager
def bad_logits(trainer, value):
    """Spoil all logits, those of sampling too."""
    head = trainer.model.pretrained_model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: output * value)
    yield
    handle.remove()


@contextmanager
def bad_gradient(trainer, value):
    """Spoil one element of the gradient of one weight; the loss stays finite."""

    def spoil(gradient):
        gradient = gradient.clone()
        gradient[-1] = value
        return gradient

    handle = trained(trainer)["v_head.summary.bias"].register_hook(spoil)
    yield
    handle.remove()


@contextmanager
def replaced(name, function):
    """Let the function, which gets that of the script first, stand for it."""
    original = getattr(train_rlhf, name)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rlhf, name, lambda *args, **more: function(original, *args, **more))
        yield


def bad_loss(trainer, value):
    """Spoil the loss by a constant; the gradient stays finite."""

    def spoiled(policy_loss, *args):
        loss, clip_fraction = policy_loss(*args)
        return loss + value, clip_fraction

    return replaced("policy_loss", spoiled)


def bad_reward(trainer, value):
    """Spoil the reward of the first response's last token."""

    def spoiled(compute_advantages, values, rewards, mask, **options):
        rewards[0, mask[0].nonzero()[-1]] = value
        return compute_advantages(values, rewards, mask, **options)

    return replaced("compute_advantages", spoiled)


@contextmanager
def bad_weight(trainer, value):
    """Spoil one element of one weight of the adapter, for good."""
    name = next(name for name in trained(trainer) if "lora_B" in name)
    trained(trainer)[name].data.view(-1)[0] = value
    yield


@pytest.mark.parametrize(
    ("way", "value"),
    [
        (bad_logits, math.nan),
        (bad_logits, math.inf),
        (bad_gradient, math.nan),
        (bad_gradient, math.inf),
        (bad_loss, math.inf),
        (bad_reward, math.nan),
        (bad_reward, -math.inf),
    ],
)
def test_a_bad_step_moves_nothing_and_is_counted_and_the_next_one_is_good(drifted, way, value):
    built = drifted("--ppo-epochs", 2)
    trainer = built.trainer
    stats, _ = trainer.step(*built.batch)
    assert stats["skipped_updates"] == 0
    before = state_of(trainer)
    with way(trainer, value):
        stats, _ = trainer.step(*built.batch)
    assert stats["skipped_updates"] == 2
    assert is_same(before, state_of(trainer))

    stats, _ = trainer.step(*built.batch)
    assert stats["skipped_updates"] == 0
    assert all(map(math.isfinite, stats.values()))
    assert not is_same(before, state_of(trainer))


# ------------------------------------------------ the scaler of float16
@pytest.fixture
def learn(build, step, make_settings, monkeypatch):
    """Take a step of one update whose gradients pass through float16.

    With a scale, what accelerate sets up for float16 on a GPU scales the loss, here on a CPU.
    Returns what has come of it.
    """

    def start(scale=None, spoiled=nullcontext):
        built = build(make_settings("--ppo-epochs", "1", "--target-approx-kl", "0"))
        trainer, scaler = built.trainer, None
        accelerator = trainer.accelerator
        if scale:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
            accelerator.scaler, accelerator.native_amp = scaler, True
            accelerator._optimizers = [trainer.optimizer]
            monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
        for weight in trained(trainer).values():
            weight.register_hook(lambda gradient: gradient.half().float())

        clip, take_step = accelerator.clip_grad_norm_, trainer.optimizer.step
        norms, steps = [], []

        def see_clip(*args):
            norms.append(clip(*args))
            return norms[-1]

        def see_step():
            steps.append(1)
            take_step()

        monkeypatch.setattr(accelerator, "clip_grad_norm_", see_clip)
        monkeypatch.setattr(trainer.optimizer, "step", see_step)
        torch.manual_seed(0)
        before = state_of(trainer)
        with spoiled(trainer):
            stats = step(built)
        moments = trainer.optimizer.state_dict()["state"].values()
        return SimpleNamespace(
            stats=stats,
            steps=len(steps),
            norm=norms[0].item(),
            same=is_same(before, state_of(trainer)),
            scale=scaler and scaler.get_scale(),
            moments=[moment["exp_avg"].flatten() for moment in moments],
        )

    return start


def test_with_good_numbers_a_scaled_loss_moves_the_weights_as_an_unscaled_one(learn):
    plain, scaled = learn(), learn(scale=256.0)
    assert (scaled.steps, scaled.stats["skipped_updates"]) == (1, 0)
    assert scaled.scale == 256.0 and not scaled.same
    # It is the gradient itself that is clipped, not what is 256 times as long.
    assert scaled.norm == pytest.approx(plain.norm, rel=1e-2)
    moments, expected = torch.cat(scaled.moments), torch.cat(plain.moments)
    assert (moments - expected).norm() < 0.01 * expected.norm()


def test_a_scale_that_is_too_large_is_lowered_and_nothing_is_counted(learn):
    """The scaler looks for its scale so, which is no fault of the numbers."""
    seen = learn(scale=2.0**30)
    assert math.isfinite(seen.stats["policy_loss"] + seen.stats["value_loss"])
    assert not math.isfinite(seen.norm)
    assert seen.same and seen.scale == 2.0**29
    assert (seen.steps, seen.stats["skipped_updates"]) == (1, 0)


def test_a_loss_that_is_not_finite_is_counted_with_a_scaler_too(learn):
    seen = learn(scale=256.0, spoiled=lambda trainer: bad_reward(trainer, math.nan))
    assert seen.same and seen.scale == 128.0
    assert (seen.steps, seen.stats["skipped_updates"]) == (1, 1)


# --------------------------------------------- bad steps in a whole run
STEPS = 5
RUN = ["--device", "cpu", "--batch-size", "6", "--training-epochs", str(STEPS)]
RUN += ["--max-new-tokens", "4", "--ppo-epochs", "2", "--eval-samples", "6", "--save-every", "1"]
TOLD = "updates skipped, since their numbers were not finite: 2"


@pytest.fixture
def spoil(monkeypatch):
    """Spoil some of the steps that are taken from now on, the sampling in them included."""

    def start(way, *steps):
        sample, take_step = train_rlhf.sample_and_score, train_rlhf.ExactKLTrainer.step
        numbers, spoiled = itertools.count(1), ExitStack()

        def see_sample(rows, numbers_of_rows, learner):
            if next(numbers) in steps:
                spoiled.enter_context(way(learner.trainer, math.nan))
            return sample(rows, numbers_of_rows, learner)

        def see_step(*batch):
            with spoiled:
                return take_step(*batch)

        monkeypatch.setattr(train_rlhf, "sample_and_score", see_sample)
        monkeypatch.setattr(train_rlhf.ExactKLTrainer, "step", see_step)

    return start


def test_bad_steps_with_good_ones_in_between_stop_no_run_but_are_not_saved_before_the_end(
    build, make_settings, make_learner, spoil, tmp_path, monkeypatch, capsys
):
    """A model whose last steps were bad is measured and saved like any other."""
    settings, folder = make_settings(*RUN), tmp_path / "trained_model"
    built, metrics, saved = build(settings), [], []
    trainer, save = built.trainer, Checkpoint.save

    def see_save(checkpoint, metrics, **more):
        saved.append(len(metrics))
        save(checkpoint, metrics, **more)

    monkeypatch.setattr(Checkpoint, "save", see_save)
    spoil(bad_logits, 1, 2, 4, 5)
    scorer, scale = train_rlhf.load_reward(settings, built.rows, trainer.accelerator.device)
    learner = make_learner(built, scorer, scale)
    checkpoint = Checkpoint(built.policy, trainer.optimizer, None, settings, files={})
    with claim_output(settings.output_dir, resume=False):
        train_rlhf.train(learner, built.rows, metrics, checkpoint)
        weights = read_checkpoint(folder)["weights"]
        evaluation.measure_and_save(learner, built.rows, [], metrics)

    assert [record["skipped_updates"] for record in metrics] == [2, 2, 0, 2, 2]
    assert read_metrics(folder) == [record | {"seconds": 0} for record in metrics]
    assert capsys.readouterr().out.count(TOLD) == 4
    assert saved == [3, STEPS]
    weights |= load_file(folder / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    report = (folder / "report.json").read_text(encoding="utf-8")
    assert "NaN" not in report and "Infinity" not in report

    # What is not finite is null, and nothing else is.
    nulls = [{name for name, value in record.items() if value is None} for record in metrics]
    assert nulls[0] == nulls[1] == nulls[3] == nulls[4]
    assert nulls[0] >= {"kl", "reward", "approx_kl", "policy_loss", "value_loss", "entropy"}
    known = {"step", "samples", "epoch", "success_rate", "score", "kl_coef", "learning_rate"}
    assert not nulls[0] & {*known, "skipped_updates", "distinct", "seconds"}
    assert not nulls[2]
    first, second = metrics[:2]
    assert second["learning_rate"] == pytest.approx(first["learning_rate"] / 1.5)


def test_three_bad_steps_in_a_row_end_the_run_and_it_can_go_on_from_before(
    call_main, spoil, demo_model, tmp_path, monkeypatch, capsys
):
    folder, flags = tmp_path / "trained_model", ["--model-name", demo_model, *RUN]
    spoil(bad_weight, 3)
    assert call_main(*flags) == 1
    out, err = capsys.readouterr()
    assert out.count(TOLD) == 3
    assert err == (
        "\nStopped: three steps in a row had updates that are not finite: lower TARGET_APPROX_KL, "
        "or start anew with a lower LEARNING_RATE or DTYPE float32; "
        "what was learned up to step 2 is saved. To go on, run the same line with --resume\n"
    )
    assert [record["skipped_updates"] for record in read_metrics(folder)] == [0, 0, 2, 2, 2]
    state = read_checkpoint(folder)
    assert len(state["metrics"]) == 2
    assert all(weight.isfinite().all() for weight in state["weights"].values())
    assert not (folder / "model.safetensors").exists() and not (folder / "report.json").exists()

    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert call_main(*flags, "--target-approx-kl", "0.001", "--resume") == 0
    assert [record["skipped_updates"] for record in read_metrics(folder)] == [0] * STEPS
    assert (folder / "model.safetensors").exists()


def test_a_model_with_weights_that_are_not_finite_is_not_saved(
    build, make_settings, make_learner, tmp_path
):
    built = build(make_settings(*RUN))
    learner = make_learner(built, lambda rows, texts: [0.0] * len(rows))
    with bad_weight(built.trainer, math.nan):
        pass
    with (
        claim_output(built.settings.output_dir, resume=False),
        pytest.raises(RunError, match="the measurement is not finite: set DTYPE float32 or lower"),
    ):
        evaluation.measure_and_save(learner, built.rows, [], [])
    assert not list((tmp_path / "trained_model").rglob("model.safetensors"))


# --------------------------------------------------------------- the KL
def told_of(*kls, batch_size=100):
    """Return what is told at each step, {step: lines}; a response is of 8 tokens at most."""
    metrics, told = [], {}
    for step, kl in enumerate(kls, start=1):
        record = {"kl": kl, "skipped_updates": 0, "samples": step * batch_size}
        metrics.append(record | {"score": float(step)})
        told[step] = measurement.warnings_of(metrics, max_new_tokens=8)
    return {step: lines for step, lines in told.items() if lines}


@pytest.mark.parametrize(
    ("kls", "steps"),
    [
        ((0.0, 7.9, 8.1, 9.0, 20.0), [3]),  # once
        ((9.0, 1.0, 9.0, 9.0), [1, 3]),  # but each time anew
        ((1.0, None, 9.0, 9.0), [3]),  # after a step whose KL was not finite too
        ((0.0, 7.9, 8.0, None, 3.0), []),
    ],
)
def test_a_kl_that_runs_away_is_told_once(kls, steps):
    remedy = "lower TARGET_APPROX_KL, raise KL_COEF"
    assert told_of(*kls) == {
        step: [f"the KL has run away to {kls[step - 1]:.1f} nats: {remedy}"] for step in steps
    }


def test_one_step_of_a_few_samples_is_no_runaway():
    assert told_of(1.0, 1.0, 1.0, 20.0, 1.0, 1.0, batch_size=10) == {}
