"""Numbers that are not finite, or have run away: what a run does about them, and what it says."""

import json
import math
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from safetensors.torch import load_file, save_file

import train_rlhf

STEPS = 5
SMALL = ["--device", "cpu", "--batch-size", "6", "--training-epochs", str(STEPS)]
SMALL += ["--max-new-tokens", "4", "--ppo-epochs", "2", "--eval-samples", "6", "--save-every", "1"]
TOLD = "updates skipped, since their numbers were not finite: 2"
REMEDY = "lower TARGET_APPROX_KL, or start anew with a lower LEARNING_RATE or DTYPE float32"


def trained(trainer):
    return {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}


def state_of(trainer):
    """Return copies of all that an update may move: what is trained, and Adam's moments of it."""
    moments = trainer.optimizer.state_dict()["state"].values()
    moments = [value for moment in moments for value in moment.values()]
    return [tensor.detach().clone() for tensor in [*trained(trainer).values(), *moments]]


def is_same(before, after):
    """Return whether two states are equal bit for bit; a NaN is equal to a NaN."""
    pairs = zip(before, after)
    same = (torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in pairs)
    return len(before) == len(after) and all(same)


# ---------------------------------------------------------------------------- ways to spoil a step
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
        gradient.view(-1)[-1] = value
        return gradient

    handle = trained(trainer)["v_head.summary.bias"].register_hook(spoil)
    yield
    handle.remove()


@contextmanager
def bad_loss(trainer, value):
    """Spoil the loss by a constant; the gradient stays finite."""
    with replaced(trainer, "loss", lambda method, **kwargs: add(value, *method(**kwargs))):
        yield


def add(value, policy_loss, *others):
    return policy_loss + value, *others


@contextmanager
def bad_reward(trainer, value):
    """Spoil the reward of the first response's last token."""

    def spoiled(method, values, rewards, mask):
        rewards[0, mask[0].nonzero()[-1]] = value
        return method(values, rewards, mask)

    with replaced(trainer, "compute_advantages", spoiled):
        yield


@contextmanager
def bad_return(trainer, value):
    """Spoil the return, and so the advantage, of the first response's last token."""

    def spoiled(method, values, rewards, mask):
        results = method(values, rewards, mask)
        results[2][0, mask[0].nonzero()[-1]] = value
        return results

    with replaced(trainer, "compute_advantages", spoiled):
        yield


@contextmanager
def replaced(trainer, name, function):
    """Let the function, which gets the method first, stand for a method of the trainer."""
    method = getattr(trainer, name)
    setattr(trainer, name, lambda *args, **kwargs: function(method, *args, **kwargs))
    yield
    delattr(trainer, name)


@contextmanager
def bad_weight(trainer, value):
    """Spoil one element of one weight of the adapter, for good."""
    name = next(name for name in trained(trainer) if "lora_B" in name)
    trained(trainer)[name].data.view(-1)[0] = value
    yield


@pytest.fixture
def spoil(monkeypatch):
    """Spoil some steps; return {step: whether nothing moved in it, bit for bit}."""

    def start(way, value, *steps):
        trainers, untouched, now = [], {}, {}
        names = ("make_trainer", "rows_of_step", "make_record")
        make_trainer, rows_of_step, make_record = (getattr(train_rlhf, name) for name in names)

        def make(*args):
            trainers.append(make_trainer(*args))
            return trainers[-1]

        def begin(step, *args):
            now["way"] = way(trainers[-1], value) if step in steps else nullcontext()
            now["way"].__enter__()
            now["before"] = state_of(trainers[-1])
            return rows_of_step(step, *args)

        def end(step, *args):
            untouched[step] = is_same(now["before"], state_of(trainers[-1]))
            now["way"].__exit__(None, None, None)
            return make_record(step, *args)

        for name, function in zip(names, (make, begin, end)):
            monkeypatch.setattr(train_rlhf, name, function)
        return untouched

    return start


@pytest.fixture
def train(build, make_settings):
    """Train without measuring; return the metrics."""

    def start(*flags):
        settings = make_settings(*SMALL, *flags)
        with train_rlhf.claim_output(settings.output_dir, resume=False):
            built, metrics = build(settings), []
            trainer, rows = built.trainer, built.rows
            reward, scale = train_rlhf.load_reward(settings, rows, trainer.accelerator.device)
            learner = trainer.model, trainer.optimizer, trainer.accelerator.scaler
            save = partial(train_rlhf.save_checkpoint, *learner, settings, metrics, scale=scale)
            parts = reward, scale, rows, settings, metrics, save
            train_rlhf.train(trainer, built.policy, *parts)
        return metrics

    return start


def read_metrics(folder):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


# ------------------------------------------------------------------------------- a single bad step
@pytest.mark.parametrize(
    ("way", "value"),
    [
        (bad_logits, math.nan),
        (bad_logits, math.inf),
        (bad_gradient, math.nan),
        (bad_gradient, math.inf),
        (bad_loss, math.inf),
        (bad_reward, math.nan),
        (bad_return, -math.inf),
    ],
)
def test_a_bad_step_moves_nothing_is_counted_and_told_and_the_run_goes_on(
    train, spoil, tmp_path, capsys, way, value
):
    untouched = spoil(way, value, 3)
    metrics = train()
    assert untouched == {step: step == 3 for step in range(1, STEPS + 1)}
    assert [record["skipped_updates"] for record in metrics] == [0, 0, 2, 0, 0]
    assert read_metrics(tmp_path / "trained_model") == metrics
    assert capsys.readouterr().out.count(TOLD) == 1
    weights = train_rlhf.read_checkpoint(tmp_path / "trained_model")["weights"]
    assert all(weight.isfinite().all() for weight in weights.values())


def test_what_is_not_finite_is_null_in_the_metrics_and_nothing_else_is(train, spoil, tmp_path):
    spoil(bad_logits, math.nan, 3)
    train()
    metrics = read_metrics(tmp_path / "trained_model")
    nulls = [{name for name, value in record.items() if value is None} for record in metrics]
    assert nulls[2] >= {"kl", "reward", "approx_kl", "policy_loss", "value_loss", "entropy"}
    known = {"step", "samples", "epoch", "success_rate", "score", "kl_coef", "learning_rate"}
    assert not nulls[2] & {*known, "skipped_updates", "distinct", "seconds"}
    assert not any(nulls[:2] + nulls[3:])
    assert metrics[3]["learning_rate"] == pytest.approx(metrics[2]["learning_rate"] / 1.5)


def test_bad_steps_with_good_ones_in_between_stop_no_run_but_are_not_saved_before_the_end(
    train, spoil, monkeypatch
):
    saved, save = [], train_rlhf.save_checkpoint

    def see_save(*args, **more):
        saved.append(len(args[-1]))
        save(*args, **more)

    monkeypatch.setattr(train_rlhf, "save_checkpoint", see_save)
    spoil(bad_logits, math.nan, 1, 2, 4, 5)
    assert [record["skipped_updates"] for record in train()] == [2, 2, 0, 2, 2]
    assert saved == [3, STEPS]


def test_a_run_with_a_bad_step_is_measured_and_saved(
    call_main, spoil, demo_model, tmp_path, capsys
):
    spoil(bad_logits, math.nan, STEPS)
    assert call_main("--model-name", demo_model, *SMALL) == 0
    assert f"step {STEPS}: {TOLD}" in capsys.readouterr().out
    folder = tmp_path / "trained_model"
    weights = load_file(folder / "model.safetensors")
    assert all(weight.isfinite().all() for weight in weights.values())
    report = (folder / "report.json").read_text(encoding="utf-8")
    assert "NaN" not in report and "Infinity" not in report


# -------------------------------------------------------------------------- the scaler of float16
@pytest.fixture
def learn(build, step, make_settings, monkeypatch):
    """Take a step of one update whose gradients pass through float16.

    With a scale, what accelerate sets up for float16 on a GPU scales the loss, here on a CPU.
    Returns what has come of it.
    """

    def start(scale=None, spoiled=nullcontext):
        built = build(make_settings("--ppo-epochs", "1", "--target-approx-kl", "0"))
        trainer, seen = built.trainer, {"steps": 0, "norms": []}
        accelerator, scaler = trainer.accelerator, None
        if scale:
            scaler = torch.amp.GradScaler("cpu", init_scale=scale)
            trainer.optimizer = AcceleratedOptimizer(trainer.optimizer.optimizer, scaler=scaler)
            accelerator.scaler, accelerator.native_amp = scaler, True
            accelerator._optimizers = [trainer.optimizer]
            monkeypatch.setattr(Accelerator, "mixed_precision", "fp16")
        for weight in trained(trainer).values():
            weight.register_hook(lambda gradient: gradient.half().float())

        def see_clip(*args, clip=accelerator.clip_grad_norm_):
            seen["norms"].append(clip(*args).item())
            return torch.tensor(seen["norms"][-1])

        def see_step(update=trainer.optimizer.step):
            seen["steps"] += 1
            update()

        monkeypatch.setattr(accelerator, "clip_grad_norm_", see_clip)
        monkeypatch.setattr(trainer.optimizer, "step", see_step)
        torch.manual_seed(0)
        before = state_of(trainer)
        with spoiled(trainer):
            seen |= step(built)
        after = state_of(trainer)
        moments = trainer.optimizer.state_dict()["state"].values()
        seen |= {"same": is_same(before, after), "scale": scaler and scaler.get_scale()}
        return seen | {"moments": [moment["exp_avg"].flatten() for moment in moments]}

    return start


def test_with_good_numbers_a_scaled_loss_moves_the_weights_as_an_unscaled_one(learn):
    plain, scaled = learn(), learn(scale=256.0)
    assert (scaled["steps"], scaled["skipped_updates"]) == (1, 0)
    assert scaled["scale"] == 256.0 and not scaled["same"]
    # It is the gradient itself that is clipped, not what is 256 times as long.
    assert scaled["norms"] == pytest.approx(plain["norms"], rel=1e-2)
    moments, expected = torch.cat(scaled["moments"]), torch.cat(plain["moments"])
    assert (moments - expected).norm() < 0.01 * expected.norm()


def test_a_scale_that_is_too_large_is_lowered_and_nothing_is_counted(learn):
    """The scaler looks for its scale so, which is no fault of the numbers."""
    seen = learn(scale=2.0**30)
    assert math.isfinite(seen["policy_loss"] + seen["value_loss"])
    assert not math.isfinite(seen["norms"][0])
    assert seen["same"] and seen["scale"] == 2.0**29
    assert (seen["steps"], seen["skipped_updates"]) == (1, 0)


def test_a_loss_that_is_not_finite_is_counted_with_a_scaler_too(learn):
    seen = learn(scale=256.0, spoiled=lambda trainer: bad_return(trainer, math.nan))
    assert seen["same"] and seen["scale"] == 128.0
    assert (seen["steps"], seen["skipped_updates"]) == (1, 1)


# ---------------------------------------------------------------------------------- three in a row
@pytest.mark.parametrize("way", [bad_logits, bad_weight])
def test_three_bad_steps_in_a_row_end_the_run_and_it_can_go_on_from_before(
    call_main, spoil, demo_model, tmp_path, monkeypatch, capsys, way
):
    folder, flags = tmp_path / "trained_model", ["--model-name", demo_model, *SMALL]
    with monkeypatch.context():
        spoil(way, math.nan, *((3, 4, 5) if way is bad_logits else (3,)))
        assert call_main(*flags) == 1
    out, err = capsys.readouterr()
    assert out.count(TOLD) == 3
    assert err == (
        f"\nStopped: three steps in a row had updates that are not finite: {REMEDY}; "
        "what was learned up to step 2 is saved. To go on, run the same line with --resume\n"
    )
    assert [record["skipped_updates"] for record in read_metrics(folder)] == [0, 0, 2, 2, 2]
    state = train_rlhf.read_checkpoint(folder)
    assert len(state["metrics"]) == 2
    assert all(weight.isfinite().all() for weight in state["weights"].values())
    assert not (folder / "model.safetensors").exists() and not (folder / "report.json").exists()

    monkeypatch.undo()
    monkeypatch.chdir(tmp_path)
    assert call_main(*flags, "--target-approx-kl", "0.001", "--resume") == 0
    assert [record["skipped_updates"] for record in read_metrics(folder)] == [0] * STEPS
    assert (folder / "model.safetensors").exists()


def test_a_model_with_weights_that_are_not_finite_is_not_saved(
    call_main, spoil, demo_model, tmp_path, capsys
):
    spoil(bad_weight, math.nan, STEPS)
    assert call_main("--model-name", demo_model, *SMALL) == 1
    remedy = "set DTYPE float32 or lower TARGET_APPROX_KL"
    saved = f"what was learned up to step {STEPS - 1} is saved."
    message = f"\nStopped: the measurement is not finite: {remedy}; {saved}"
    assert capsys.readouterr().err.startswith(message)
    assert not list((tmp_path / "trained_model").rglob("model.safetensors"))


# ------------------------------------------------------------------------------------ a base model
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_base_model_with_weights_that_are_not_finite_is_told_before_anything_starts(
    call_main, copy_of_demo_model, tmp_path, capsys, value
):
    path = copy_of_demo_model / "model.safetensors"
    weights = load_file(path)
    name = next(name for name in weights if "layers.1.mlp.up_proj" in name)
    weights[name].view(-1)[5] = value
    save_file(weights, path, {"format": "pt"})
    assert call_main("--model-name", copy_of_demo_model, *SMALL) == 2
    err = capsys.readouterr().err
    assert err.startswith("Nothing was started or changed:\n- MODEL_NAME is ")
    assert f"it has weights that are not finite, such as {name}" in err
    assert not (tmp_path / "trained_model").exists()


# ------------------------------------------------------------------------------------------ the KL
def warnings(*kls, batch_size=100):
    """Return what is told at each step, {step: lines}; a response is of 8 tokens at most."""
    metrics = [{"kl": kl, "skipped_updates": 0} for kl in kls]
    for number, record in enumerate(metrics, start=1):
        record |= {"samples": number * batch_size, "score": float(number)}
    steps = range(1, len(kls) + 1)
    told = {step: train_rlhf.warnings_of(metrics[:step], max_new_tokens=8) for step in steps}
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
    told = warnings(*kls)
    assert list(told) == steps
    remedy = "lower TARGET_APPROX_KL, raise KL_COEF"
    for step, lines in told.items():
        assert lines == [f"the KL has run away to {kls[step - 1]:.1f} nats: {remedy}"]


def test_one_step_of_a_few_samples_is_no_runaway():
    assert warnings(1.0, 1.0, 1.0, 20.0, 1.0, 1.0, batch_size=10) == {}


def test_a_skipped_update_is_told_at_its_step_only():
    metrics = [{"kl": 0.0, "samples": 10, "score": 0.5}] * 3
    metrics = [record | {"skipped_updates": n} for record, n in zip(metrics, (0, 3, 0))]
    told = [train_rlhf.warnings_of(metrics[:step], 8) for step in (1, 2, 3)]
    assert told == [[], ["updates skipped, since their numbers were not finite: 3"], []]


def test_a_run_says_that_its_kl_has_run_away(train, capsys):
    train("--kl-coef", "0", "--learning-rate", "0.05", "--target-approx-kl", "0")
    assert capsys.readouterr().out.count("the KL has run away to ") == 1


# --------------------------------------------------------------------------- a reward of the user
REWARD_FORM = "let f(prompts, completions, **kwargs) return a finite number for each completion"


@pytest.fixture
def write_reward(tmp_path):
    """Write a reward whose body begins at line 5, and return the flags for it."""
    lines = ["import math, numpy, torch", "texts = []"]
    lines += ["def kindness(prompts, completions, **kwargs):", "    texts.extend(completions)"]

    def write(code):
        (tmp_path / "mine.py").write_text("\n".join([*lines, f"    {code}"]), encoding="utf-8")
        return ["--reward", "mine.py:kindness", "--scale-samples", "6"]

    return write


@pytest.mark.parametrize(
    ("code", "problem", "line"),
    [
        ("raise ValueError('no idea')", "ValueError('no idea')", 5),
        ("raise SystemExit(3)", "SystemExit(3)", 5),
        ("return missing", "NameError(", 5),
        ("return [1.0]", "ValueError('it returned [1.0] for 2 texts')", 3),
        ("return numpy.array(['1'] * len(completions))", "ValueError(", 3),
        ("return torch.zeros(len(completions), 2)", "", 3),
        ("return [math.nan for text in completions]", "ValueError('[nan] has what is not", 3),
    ],
)
def test_a_reward_that_gives_no_number_is_told_before_anything_is_moved(
    call_main, write_reward, demo_model, tmp_path, capsys, code, problem, line
):
    earlier = tmp_path / "trained_model" / "metrics.jsonl"
    earlier.parent.mkdir()
    earlier.write_text("{}\n", encoding="utf-8")
    assert call_main("--model-name", demo_model, *SMALL, *write_reward(code)) == 2
    err = capsys.readouterr().err
    assert err.startswith(f"Nothing was started or changed:\n- REWARD is kindness: {problem}")
    assert err.endswith(f" for '' in mine.py, line {line}: {REWARD_FORM}\n")
    assert {path.name for path in tmp_path.iterdir()} == {"mine.py", "trained_model"}
    assert [path.name for path in earlier.parent.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize(("good", "steps"), [(2, None), (8, 0), (70, 2)])
def test_a_reward_that_gives_no_number_later_costs_no_finished_step(
    call_main, write_reward, demo_model, tmp_path, capsys, good, steps
):
    """It is asked about 2 texts to try it, 6 for the scale, 30 a step.

    Those 30 are 6 responses and what each begins with, token by token.
    """
    code = f"return [1.0 if len(texts) <= {good} else math.nan for text in completions]"
    flags = [*write_reward(code), "--save-every", "0"]
    assert call_main("--model-name", demo_model, *SMALL, *flags) == 1
    err = capsys.readouterr().err
    assert err.startswith("\nStopped: REWARD is kindness: ValueError('[nan] has what is not finite")
    saved = f"what was learned up to step {steps} is saved. To go on, run the same line with"
    saved = f"{saved} --resume" if steps else "there was nothing to save yet"
    assert err.endswith(f" in mine.py, line 3: {REWARD_FORM}; {saved}\n")
    folder = tmp_path / "trained_model"
    assert (folder / "metrics.jsonl").exists() == (steps is not None)
    assert steps is None or len(read_metrics(folder)) == steps
    state = train_rlhf.read_checkpoint(folder)
    assert len(state["metrics"]) == steps if steps else state is None
