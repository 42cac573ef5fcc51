"""The numbers of a PPO step, against values worked out apart from it."""

import math
from contextlib import nullcontext
from types import SimpleNamespace

import numpy
import pytest
import torch

import train_rlhf

PROMPTS = ["I feel so", "Life is", "I am really happy because", "Today I am"]


@pytest.fixture
def drifted(build, roll_out, make_settings):
    """Build a trainer whose policy is no longer the base model, and sample a batch from it."""

    def make(*flags):
        built = build(make_settings(*flags))
        torch.manual_seed(1)
        for name, parameter in built.policy.named_parameters():
            if "lora_B" in name or "v_head" in name:
                torch.nn.init.normal_(parameter, std=0.1)
        rows = [{"prompt": prompt} for prompt in PROMPTS]
        queries = train_rlhf.encode(built.tokenizer, rows, chat_template=False)
        responses, _ = roll_out(built, queries)
        responses[1] = responses[1][:3]  # so that lengths differ
        token_scores = [torch.linspace(-1, 1, len(response)) for response in responses]
        built.batch = queries, responses, token_scores
        return built

    return make


def spy(monkeypatch, owner, name, calls):
    """Let a method append its arguments and its result to calls."""
    method = getattr(owner, name)

    def spied(*args, **kwargs):
        result = method(*args, **kwargs)
        calls.append(SimpleNamespace(args=args, kwargs=kwargs, result=result))
        return result

    monkeypatch.setattr(owner, name, spied)


# -------------------------------------------------------------------------------- by another way
def evaluate(built, row, base=False):
    """Return all logprobs (response length, vocabulary) and values of a response as float64.

    Unpadded and on its own, by the plain model, so that no position and no mask can go wrong.
    """
    query, response, scores = (part[row] for part in built.batch)
    model = built.policy.pretrained_model
    with torch.no_grad(), model.disable_adapter() if base else nullcontext():
        output = model(torch.cat([query, response])[None], output_hidden_states=True)
        of_hidden = built.policy.v_head(output.hidden_states[-1])[0].double().numpy()
    before = slice(len(query) - 1, -1)
    logits = output.logits[0, before].double() / built.settings.temperature
    # Before a token only those before it have earned anything.
    earned = numpy.array([sum(scores.tolist()[:t]) for t in range(len(scores))])
    values = of_hidden[before, 0] + of_hidden[before, 1] * earned
    return torch.log_softmax(logits, dim=-1).numpy(), values


def divergence(logprobs, others):
    """Return KL(p || q) at each position."""
    return (numpy.exp(logprobs) * (logprobs - others)).sum(-1)


def before_the_updates(built, row):
    """Return what a step has to know of a response before its first update."""
    settings, (_, responses, token_scores) = built.settings, built.batch
    all_logprobs, values = evaluate(built, row)
    all_ref_logprobs, _ = evaluate(built, row, base=True)
    kl = divergence(all_logprobs, all_ref_logprobs)
    rewards = token_scores[row].double().numpy() - settings.kl_coef * kl
    deltas = rewards + settings.gamma * numpy.append(values[1:], 0) - values
    weight, end = settings.gamma * settings.lam, len(deltas)
    advantages = [
        sum(weight ** (later - t) * deltas[later] for later in range(t, end)) for t in range(end)
    ]
    return SimpleNamespace(
        all_logprobs=all_logprobs,
        all_ref_logprobs=all_ref_logprobs,
        tokens=responses[row].tolist(),
        values=values,
        kl=kl,
        rewards=rewards,
        advantages=numpy.array(advantages),
        returns=numpy.array(advantages) + values,
    )


def losses(built, responses, rows):
    """Return the losses and figures of an update with the policy as it is now."""
    settings, terms = built.settings, []
    for row in rows:
        old = responses[row]
        all_logprobs, values = evaluate(built, row)
        taken = range(len(old.tokens)), old.tokens
        ratio = numpy.exp(all_logprobs[taken] - old.all_logprobs[taken])
        clipped = ratio.clip(1 - settings.clip_range, 1 + settings.clip_range)
        near = (values - old.values).clip(-settings.value_clip_range, settings.value_clip_range)
        errors = (values - old.returns) ** 2, (old.values + near - old.returns) ** 2
        term = {
            "policy_loss": numpy.maximum(-old.advantages * ratio, -old.advantages * clipped),
            "value_loss": numpy.maximum(*errors) / 2,
            "kl_loss": divergence(all_logprobs, old.all_ref_logprobs),
            "approx_kl": 0.5 * (all_logprobs[taken] - old.all_logprobs[taken]) ** 2,
            "clip_fraction": -old.advantages * clipped > -old.advantages * ratio,
            "entropy": -(numpy.exp(all_logprobs) * all_logprobs).sum(-1),
            "value_clip_fraction": errors[1] > errors[0],
        }
        terms.append(term)
    return {name: numpy.concatenate([t[name] for t in terms]).mean() for name in terms[0]}


def after_the_last(approx_kls):
    """Return the KL after the last update, from those before each.

    It grows with the square of the number of updates that were made: by what factor is told by all
    those before an update, taken together.
    """
    count = len(approx_kls)
    grown = sum(number**2 for number in range(count))
    return sum(approx_kls) * count**2 / grown if grown else 0.0


@pytest.mark.parametrize(
    ("name", "mini_batch_size", "kl_coef"),
    [("demo_model", 1, 0.3), ("demo_model", 4, 0.0), ("gpt2", 2, 0.3)],
)
def test_every_number_of_a_step(
    drifted, demo_model, gpt2, monkeypatch, name, mini_batch_size, kl_coef
):
    """GPT-2 has absolute positions, which padding would shift.

    Where all four rows are one minibatch, the pass before the updates is also that of the first.
    """
    built = drifted(
        *("--model-name", str(demo_model if name == "demo_model" else gpt2)),
        *("--gamma", "0.9", "--lam", "0.8", "--temperature", "0.7", "--ppo-epochs", "3"),
        *("--kl-coef", str(kl_coef), "--vf-coef", "0.5", "--value-clip-range", "0.05"),
        *("--mini-batch-size", str(mini_batch_size), "--learning-rate", "0.003"),
    )
    trainer, (queries, answers, token_scores) = built.trainer, built.batch
    assert len({*map(len, queries)}) > 1 and len({*map(len, answers)}) > 1
    whole = [torch.cat(pair).tolist() for pair in zip(queries, answers)]
    expected = [before_the_updates(built, row) for row in range(len(whole))]

    calls = {"compute_advantages": [], "loss": []}
    for method in calls:
        spy(monkeypatch, trainer, method, calls[method])
    orders, totals, wanted = [], [], []
    seen = SimpleNamespace()

    def see_inputs(module, args, kwargs):
        pairs = zip(kwargs["input_ids"], kwargs["attention_mask"])
        seen.rows = [whole.index(ids[mask.bool()].tolist()) for ids, mask in pairs]

    def see_loss(loss, backward=trainer.accelerator.backward):
        orders.append(seen.rows)
        wanted.append(losses(built, expected, seen.rows))  # the policy has not moved on yet
        totals.append(loss.item())
        backward(loss)

    trainer.model.register_forward_pre_hook(see_inputs, with_kwargs=True)
    monkeypatch.setattr(trainer.accelerator, "backward", see_loss)
    torch.manual_seed(0)
    stats, kls = trainer.step(queries, answers, token_scores)

    near = {"abs": 1e-4, "rel": 1e-4}
    # Before the updates.
    (call,) = calls["compute_advantages"]
    values, rewards, mask = call.args
    for row, wanted_row in enumerate(expected):
        where = mask[row].bool()
        assert where.tolist() == [t < len(answers[row]) for t in range(mask.shape[1])]
        assert values[row][where].numpy() == pytest.approx(wanted_row.values, **near)
        assert rewards[row][where].numpy() == pytest.approx(wanted_row.rewards, **near)
    # What each update is given: each row its own numbers, and nothing of the padding.
    assert len(calls["loss"]) == len(totals) == 3 * 4 / mini_batch_size
    for rows, call in zip(orders, calls["loss"]):
        for position, row in enumerate(rows):
            given = {key: tensor[position].detach() for key, tensor in call.kwargs.items()}
            where = given["mask"].bool()
            assert where.sum() == len(answers[row])
            for key in ("values", "advantages", "returns"):
                numbers = given[key][where].numpy()
                assert numbers == pytest.approx(getattr(expected[row], key), **near)
            old = expected[row].all_logprobs[range(len(answers[row])), answers[row].tolist()]
            assert given["old_logprobs"][where].numpy() == pytest.approx(old, **near)
            assert not given["advantages"][~where].any()
    # Each epoch takes every row once, in an order of its own where there are several minibatches.
    flat = numpy.concatenate(orders).reshape(3, 4).tolist()
    assert all(sorted(order) == [0, 1, 2, 3] for order in flat)
    assert len({*map(tuple, flat)}) == (1 if mini_batch_size == 4 else 3)
    # The losses.
    for call, total, update in zip(calls["loss"], totals, wanted):
        policy_loss, value_loss, _ = call.result
        assert policy_loss.item() == pytest.approx(update["policy_loss"], **near)
        assert value_loss.item() == pytest.approx(0.5 * update["value_loss"], **near)
        kl_loss = total - policy_loss.item() - value_loss.item()
        assert kl_loss == pytest.approx(kl_coef * update["kl_loss"], **near)
    # The figures.
    assert kls == pytest.approx([row.kl.sum() for row in expected], **near)
    assert stats["kl"] == pytest.approx(numpy.mean(kls), **near)
    for key in ("policy_loss", "value_loss", "clip_fraction", "entropy"):
        mean = numpy.mean([update[key] for update in wanted])
        assert stats[key] == pytest.approx(mean, **near), key
    approx_kl = after_the_last([update["approx_kl"] for update in wanted])
    assert stats["approx_kl"] == pytest.approx(approx_kl, **near)
    assert (stats["kl_coef"], stats["learning_rate"]) == (kl_coef, 0.003)
    assert stats["skipped_updates"] == 0
    # There has been something to see.
    assert stats["kl"] > 0.1 and stats["clip_fraction"] > 0
    assert any(update["value_clip_fraction"] > 0 for update in wanted)


def test_a_loss_by_hand(build, make_settings, monkeypatch):
    """Two positions, three words: every number below fits on a sheet of paper."""
    built = build(
        make_settings(
            *("--batch-size", "1", "--ppo-epochs", "2"),
            *("--kl-coef", "0.5", "--clip-range", "0.2", "--value-clip-range", "0.1"),
            *("--vf-coef", "2"),
        )
    )
    trainer = built.trainer
    p, p_old, p_ref = [0.5, 0.3, 0.2], [0.4, 0.4, 0.2], [0.25, 0.25, 0.5]
    values, new_values = torch.tensor([[0.0, 1.0]]), torch.tensor([[0.5, 1.05]])
    answers = iter([(p_ref, values), (p_old, values), (p, new_values)])

    class Model(torch.nn.Module):
        """The base model, then what sampled, then the policy that has moved on."""

        def forward(self, **inputs):
            assert inputs["input_ids"].tolist() == [[5, 0, 1]]
            probabilities, values = next(answers)
            return torch.tensor([[probabilities] * 2]).log(), values

    totals, calls, returns = [], [], torch.tensor([[2.0, 0.0]])  # advantages of 2 and -1
    monkeypatch.setattr(trainer, "model", Model())
    monkeypatch.setattr(trainer, "optional_peft_ctx", nullcontext)
    monkeypatch.setattr(trainer, "compute_advantages", lambda values, *_: (values, None, returns))
    monkeypatch.setattr(trainer.accelerator, "backward", lambda loss: totals.append(loss.item()))
    monkeypatch.setattr(
        trainer.accelerator, "clip_grad_norm_", lambda *_: torch.tensor(1.0)
    )  # there is no gradient, since nothing goes backward
    spy(monkeypatch, trainer, "loss", calls)
    stats, kls = trainer.step([torch.tensor([5])], [torch.tensor([0, 1])], [torch.zeros(2)])

    def kl_against_base(p):
        return sum(each * math.log(each / base) for each, base in zip(p, p_ref))

    # Before the first update the ratios are 1, and no value has moved.
    surrogate, value_loss = (-2.0 + 1.0) / 2, 0.5 * (2.0**2 + 1.0**2) / 2
    first = surrogate, value_loss, 0.5 * kl_against_base(p_old)

    # Before the second they are 1.25 and 0.75. A gain is clipped at 1.2; a loss of -1 times 0.75 is
    # worse off than at 0.8, so 0.8 counts.
    surrogate = (-2.0 * 1.2 + 1.0 * 0.8) / 2
    # The first value may move to 0.1 only: (0.1 - 2)^2 is worse than (0.5 - 2)^2. The second moved
    # by less than 0.1.
    value_loss = 0.5 * (1.9**2 + 1.05**2) / 2
    second = surrogate, value_loss, 0.5 * kl_against_base(p)

    both = [policy_loss + 2 * value_loss + kl for policy_loss, value_loss, kl in (first, second)]
    assert totals == pytest.approx(both, abs=1e-6)
    assert stats["policy_loss"] == pytest.approx((first[0] + second[0]) / 2, abs=1e-6)
    assert stats["value_loss"] == pytest.approx((first[1] + second[1]) / 2, abs=1e-6)
    # One update has moved the policy by this; two will have moved it twice as far, which is four
    # times the KL.
    moved = 0.5 * (math.log(1.25) ** 2 + math.log(0.75) ** 2) / 2
    assert stats["approx_kl"] == pytest.approx(4 * moved, abs=1e-6)
    old_kl = kl_against_base(p_old)
    assert stats["kl"] == pytest.approx(2 * old_kl, abs=1e-6)  # a sum over the response
    assert kls == [stats["kl"]]


def test_before_the_first_update_the_ratio_is_1_and_the_kl_0(
    build, step, make_settings, monkeypatch
):
    built, calls = build(make_settings("--ppo-epochs", "1", "--target-approx-kl", "0")), []
    spy(monkeypatch, built.trainer, "loss", calls)
    stats = step(built)
    (call,) = calls
    ratio = (call.kwargs["logprobs"] - call.kwargs["old_logprobs"]).exp()
    torch.testing.assert_close(ratio, torch.ones_like(ratio), atol=1e-5, rtol=0)
    assert stats["kl"] == pytest.approx(0, abs=1e-6)
    assert stats["approx_kl"] == pytest.approx(0, abs=1e-6)
    assert stats["clip_fraction"] == 0


# ---------------------------------------------------------------------- how far a step has moved
EACH_NUMBER_OF_UPDATES = pytest.mark.parametrize(
    ("epochs", "mini_batch_size"), [(1, 0), (2, 0), (4, 0), (1, 1), (2, 2), (4, 1)]
)


@EACH_NUMBER_OF_UPDATES
def test_approx_kl_is_that_after_the_last_update(drifted, monkeypatch, epochs, mini_batch_size):
    flags = ["--ppo-epochs", str(epochs), "--mini-batch-size", str(mini_batch_size)]
    built = drifted(*flags, "--target-approx-kl", "0", "--learning-rate", "0.003")
    trainer, (queries, answers, token_scores) = built.trainer, built.batch
    whole = [torch.cat(pair).tolist() for pair in zip(queries, answers)]
    before = [before_the_updates(built, row) for row in range(len(whole))]
    seen, approx_kls = SimpleNamespace(), []

    def see_inputs(module, args, kwargs):
        pairs = zip(kwargs["input_ids"], kwargs["attention_mask"])
        seen.rows = [whole.index(ids[mask.bool()].tolist()) for ids, mask in pairs]

    def see_loss(loss, backward=trainer.accelerator.backward):
        approx_kls.append(losses(built, before, seen.rows)["approx_kl"])  # it has not moved on yet
        backward(loss)

    trainer.model.register_forward_pre_hook(see_inputs, with_kwargs=True)
    monkeypatch.setattr(trainer.accelerator, "backward", see_loss)
    stats, _ = trainer.step(queries, answers, token_scores)
    assert len(approx_kls) == epochs * (4 // mini_batch_size if mini_batch_size else 1)
    assert approx_kls[0] == pytest.approx(0, abs=1e-9)
    assert stats["approx_kl"] == pytest.approx(after_the_last(approx_kls), abs=1e-7, rel=1e-3)
    assert (stats["approx_kl"] > 1e-4) is (len(approx_kls) > 1)


@pytest.mark.parametrize("epochs", [2, 4])
def test_approx_kl_foretells_how_far_a_step_moves(build, roll_out, make_settings, epochs):
    """The same target would else mean another size of step for another number of epochs."""
    built = build(make_settings("--batch-size", "10", "--ppo-epochs", str(epochs)))
    rows = (built.rows * 2)[:10]
    queries = train_rlhf.encode(built.tokenizer, rows, chat_template=False)
    reward, scale = train_rlhf.load_reward(built.settings, rows, built.trainer.accelerator.device)

    def logprobs_of(responses):
        """Return the logprobs of all tokens of the responses, one after the other."""
        built.batch = queries, responses, [torch.zeros(len(each)) for each in responses]
        found = [evaluate(built, row)[0] for row in range(len(responses))]
        pairs = zip(found, responses)
        return numpy.concatenate([each[range(len(ids)), ids.tolist()] for each, ids in pairs])

    told, moved = [], []
    for number in range(8):
        responses, _ = roll_out(built, queries, key=(0, number, 0))
        given = reward, scale, built.tokenizer, rows, queries, responses
        _, token_scores = train_rlhf.score_responses(*given, score_prefixes=True)
        before = logprobs_of(responses)
        stats, _ = built.trainer.step(queries, responses, token_scores)
        told.append(stats["approx_kl"])
        moved.append(0.5 * ((logprobs_of(responses) - before) ** 2).mean())
    assert min(moved) > 0
    ratios = numpy.log(told) - numpy.log(moved)
    assert math.exp(abs(ratios.mean())) < 1.5
    assert math.exp(abs(math.log(sum(told) / sum(moved)))) < 1.5


# ------------------------------------------------------------------------------- how it is done
@EACH_NUMBER_OF_UPDATES
def test_a_step_makes_no_more_passes_than_it_needs(drifted, epochs, mini_batch_size):
    """A pass of a large model takes most of the time, and its logits most of the memory."""
    flags = ["--ppo-epochs", str(epochs), "--mini-batch-size", str(mini_batch_size)]
    built = drifted(*flags, "--target-approx-kl", "0")
    passes = []

    def see(module, args, kwargs):
        adapted = [m for m in built.policy.modules() if hasattr(m, "disable_adapters")]
        base = all(m.disable_adapters for m in adapted)
        kind = "base" if base else "update" if torch.is_grad_enabled() else "score"
        passes.append((kind, len(kwargs["input_ids"])))

    backbone = built.policy.pretrained_model.get_base_model()
    backbone.register_forward_pre_hook(see, with_kwargs=True)
    built.trainer.step(*built.batch)
    rows = mini_batch_size or 4
    minibatches = 4 // rows
    counts = {"base": 1, "update": epochs}
    if mini_batch_size:
        counts = {"score": minibatches, "update": epochs * minibatches}
        counts["base"] = counts["score"] + counts["update"]
    assert {size for _, size in passes} == {rows}
    kinds = [kind for kind, _ in passes]
    assert {kind: kinds.count(kind) for kind in kinds} == counts


@pytest.mark.parametrize("mini_batch_size", [0, 2])
def test_the_gradient_of_a_first_update(drifted, monkeypatch, mini_batch_size):
    """It comes from the pass that also tells what the policy was, which must not be moved along."""
    flags = ["--ppo-epochs", "1", "--target-approx-kl", "0", "--max-grad-norm", "0"]
    built = drifted(*flags, "--mini-batch-size", str(mini_batch_size), "--kl-coef", "0.3")
    trainer, (queries, answers, _) = built.trainer, built.batch
    before = [before_the_updates(built, row) for row in range(len(queries))]
    found, inputs_seen = [], []
    whole = [torch.cat(pair).tolist() for pair in zip(queries, answers)]

    def gradient():
        named = built.policy.named_parameters()
        return {name: weight.grad.clone() for name, weight in named if weight.grad is not None}

    def see_inputs(module, args, kwargs):
        pairs = zip(kwargs["input_ids"], kwargs["attention_mask"])
        inputs_seen.append([whole.index(ids[mask.bool()].tolist()) for ids, mask in pairs])

    def see_loss(loss, backward=trainer.accelerator.backward):
        backward(loss)
        found.append((inputs_seen[-1], gradient()))

    hook = trainer.model.register_forward_pre_hook(see_inputs, with_kwargs=True)
    monkeypatch.setattr(trainer.accelerator, "backward", see_loss)
    monkeypatch.setattr(trainer.optimizer, "step", lambda: None)  # so that each update is a first
    trainer.step(*built.batch)
    hook.remove()
    assert len(found) == (2 if mini_batch_size else 1)
    for rows, gradients in found:
        total = 0.0
        for row in rows:  # unpadded and alone
            total += loss_to_differentiate(built, before[row], row)
        built.policy.zero_grad()
        (total / sum(len(answers[row]) for row in rows)).backward()
        expected = gradient()
        built.policy.zero_grad()
        assert gradients.keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(gradients[name], value, rtol=1e-3, atol=1e-5)
        assert any(value.abs().max() > 1e-3 for value in expected.values())


def loss_to_differentiate(built, before, row):
    """Return the sum of a response's losses over its tokens, with a ratio of 1 as its value."""
    settings, (queries, answers, token_scores) = built.settings, built.batch
    inputs = torch.cat([queries[row], answers[row]])[None]
    output = built.policy.pretrained_model(inputs, output_hidden_states=True)
    places = slice(len(queries[row]) - 1, -1)
    all_logprobs = torch.log_softmax(output.logits[0, places] / settings.temperature, dim=-1)
    of_hidden = built.policy.v_head(output.hidden_states[-1])[0, places]
    earned = token_scores[row].cumsum(0) - token_scores[row]
    values = of_hidden[:, 0] + of_hidden[:, 1] * earned
    logprobs = all_logprobs[range(len(answers[row])), answers[row]]
    advantages = torch.tensor(before.advantages).float()
    returns = torch.tensor(before.returns).float()
    all_ref_logprobs = torch.tensor(before.all_ref_logprobs).float()
    kl = (all_logprobs.exp() * (all_logprobs - all_ref_logprobs)).sum()
    policy_loss = -(advantages * (logprobs - logprobs.detach()).exp()).sum()
    value_loss = 0.5 * ((values - returns) ** 2).sum()
    return policy_loss + settings.kl_coef * kl + settings.vf_coef * value_loss


def test_the_loss_alone_pulls_a_drifted_policy_back(drifted, monkeypatch):
    """With advantages of 0 there is no reward that could do it."""
    built = drifted("--kl-coef", "0.3", "--learning-rate", "0.001")
    monkeypatch.setattr(
        built.trainer, "compute_advantages", lambda values, *_: (values, None, values)
    )
    kls = [built.trainer.step(*built.batch)[0]["kl"] for _ in range(8)]
    assert kls[-1] < 0.3 * kls[0]


@pytest.mark.parametrize("longest", [1e-3, 1e3, 0])
def test_every_gradient_is_clipped(drifted, monkeypatch, longest):
    built = drifted("--max-grad-norm", str(longest))
    trainer, before, after = built.trainer, [], []

    def gradient():
        gradients = [parameter.grad for parameter in built.policy.parameters()]
        return torch.cat([each.flatten() for each in gradients if each is not None])

    def see_backward(loss, backward=trainer.accelerator.backward):
        assert all(weight.grad is None for weight in built.policy.parameters())  # none piles up
        backward(loss)
        before.append(gradient())

    def see_step(step=trainer.optimizer.step):
        after.append(gradient())
        step()

    monkeypatch.setattr(trainer.accelerator, "backward", see_backward)
    monkeypatch.setattr(trainer.optimizer, "step", see_step)
    for _ in range(2):
        trainer.step(*built.batch)
    assert len(before) == len(after) == 2 * trainer.config.ppo_epochs
    for raw, used in zip(before, after):
        assert 1e-3 < raw.norm() < 1e3
        if longest == 1e-3:
            torch.testing.assert_close(used, raw * (longest / raw.norm()), rtol=1e-2, atol=1e-9)
        else:
            assert torch.equal(used, raw)


# ---------------------------------------------------------------------------- the learning rate
def next_rate(approx_kl, target, total_steps):
    """Return by which factor the rate changes after six steps, with a target for the first."""
    optimizer = SimpleNamespace(param_groups=[{"lr": 1e-4}, {"lr": 3e-4}])
    metrics = [{"approx_kl": 123.0}] * 5 + [{"approx_kl": approx_kl}]
    settings = SimpleNamespace(target_approx_kl=target, learning_rate=1e-4)
    train_rlhf.set_learning_rate(optimizer, metrics, total_steps, settings)
    first, second = (group["lr"] for group in optimizer.param_groups)
    assert second == pytest.approx(3 * first)
    return first / 1e-4


def test_the_rate_has_a_bound_where_nothing_can_be_learned():
    optimizer = SimpleNamespace(param_groups=[{"lr": 1e-4}])
    settings = SimpleNamespace(target_approx_kl=0.01, learning_rate=1e-4)
    for steps in range(1, 50):
        metrics = [{"approx_kl": 0.0}] * steps  # as where all scores are alike
        train_rlhf.set_learning_rate(optimizer, metrics, 90, settings)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(1e-2)


@pytest.mark.parametrize(
    ("approx_kl", "factor"),
    [(0.01, 1), (0.01 / 1.44, 1.2), (0.0, 1.5), (1.0, 1 / 1.5), (None, 1 / 1.5)],
)
def test_the_learning_rate_follows_the_root_of_the_kl(approx_kl, factor):
    rate = next_rate(approx_kl, target=0.08, total_steps=12)  # of which an eighth is left
    assert rate == pytest.approx(factor)


@pytest.mark.parametrize(
    ("target", "total_steps", "factor"),
    [(0.08, 12, 1), (0.04, 12, 0.5**0.5), (0.01, 6 * 10**6, 1), (0.01, 6, 1 / 1.5)],
)
def test_the_target_falls_as_a_cube_to_0(target, total_steps, factor):
    """After 6 of 12 steps an eighth of it is left."""
    assert next_rate(0.01, target, total_steps) == pytest.approx(factor, rel=1e-5)


@pytest.mark.parametrize("approx_kl", [0.0, 0.01, None])
def test_without_a_target_the_learning_rate_stays(approx_kl):
    assert next_rate(approx_kl, target=0, total_steps=12) == 1
