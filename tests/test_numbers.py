"""Numbers that are not finite, or have run away: what a run does about them, and what it says."""

import json
import math
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import train_rlhf

STEPS = 5
SMALL = [
    *(
        "--device",
        "cpu",
        "--batch-size",
        "6",
        "--training-epochs",
        str(STEPS),
        "--max-new-tokens",
        "4",
    ),
    *("--ppo-epochs", "2", "--eval-samples", "6", "--save-every", "1"),
]
BAD = [math.nan, math.inf]
TOLD = "updates skipped, since their numbers were not finite: 2"
REMEDY = "lower TARGET_APPROX_KL, or start anew with a lower LEARNING_RATE or with DTYPE float32"


@contextmanager
def bad_logits(trainer, value):
    """Spoil all logits, those of sampling too."""
    head = trainer.model.pretrained_model.get_output_embeddings()
    handle = head.register_forward_hook(lambda module, inputs, output: output * value)
    yield
    handle.remove()


@contextmanager
def bad_gradient(trainer, value):
    """Spoil one element of the gradient of one weight."""

    def spoil(gradient):
        gradient = gradient.clone()
        gradient.view(-1)[-1] = value
        return gradient

    handle = trained(trainer)["v_head.summary.bias"].register_hook(spoil)
    yield
    handle.remove()


def spoiled_result(name, index):
    """Return a way to spoil the first response's last token in a result of the trainer's method."""

    @contextmanager
    def bad_result(trainer, value):
        method = getattr(trainer, name)

        def spoiled(*args, **kwargs):
            results = method(*args, **kwargs)
            mask = args[-1] if args else kwargs["mask"]
            results[index][0, mask[0].nonzero()[-1]] = value
            return results

        setattr(trainer, name, spoiled)
        yield
        delattr(trainer, name)

    return bad_result


@contextmanager
def bad_weight(trainer, value):
    """Spoil one element of one weight of the adapter, for good."""
    name = next(name for name in trained(trainer) if "lora_B" in name)
    trained(trainer)[name].data.view(-1)[0] = value
    yield


WAYS = {
    "logits": bad_logits,
    "gradient": bad_gradient,
    "reward": spoiled_result("compute_rewards", 0),
    "advantage": spoiled_result("compute_advantages", 1),
}


def trained(trainer):
    return {name: value for name, value in trainer.model.named_parameters() if value.requires_grad}


@pytest.fixture
def spoil(monkeypatch):
    """Spoil some steps; return {step: whether it left the trained weights and their moments bit for bit equal}."""

    def start(way, value, *steps):
        take_step, untouched = train_rlhf.take_step, {}

        def state(trainer):
            moments = trainer.optimizer.state_dict()["state"].values()
            tensors = [
                *trained(trainer).values(),
                *(value for moment in moments for value in moment.values()),
            ]
            return [tensor.clone() for tensor in tensors]

        def take(trainer, tokenizer, reward, settings, step):
            with way(trainer, value) if step in steps else nullcontext():
                before = state(trainer)
                result = take_step(trainer, tokenizer, reward, settings, step)
                after = state(trainer)
            same = (
                torch.equal(torch.nan_to_num(a), torch.nan_to_num(b)) for a, b in zip(before, after)
            )
            untouched[step] = len(before) == len(after) and all(same)
            return result

        monkeypatch.setattr(train_rlhf, "take_step", take)
        return untouched

    return start


@pytest.fixture
def train(build, make_settings, monkeypatch):
    """Train without measuring; return the metrics."""
    monkeypatch.setattr(train_rlhf, "is_terminal", lambda: False)

    def start(*flags):
        settings = make_settings(*SMALL, *flags)
        with train_rlhf.prepare_output(settings):
            built, metrics = build(settings), []
            stop = train_rlhf.SimpleNamespace(signal=None)
            reward = train_rlhf.load_reward(settings)
            train_rlhf.train(built.trainer, built.tokenizer, reward, settings, metrics, stop)
        return metrics

    return start


def read_metrics(folder):
    def refuse(name):
        raise AssertionError(f"{name} is no JSON")

    lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line, parse_constant=refuse) for line in lines]


def read_checkpoint(folder):
    return train_rlhf.read_checkpoint(folder / "checkpoint" / "state.safetensors")


# ------------------------------------------------------------------------------------------------- a single bad step
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("kind", WAYS)
def test_a_bad_step_changes_no_weight_is_counted_and_told_and_the_run_goes_on(
    train, spoil, tmp_path, capsys, kind, value
):
    untouched = spoil(WAYS[kind], value, 3)
    metrics = train()
    assert untouched == {step: step == 3 for step in range(1, STEPS + 1)}
    assert [record["skipped_updates"] for record in metrics] == [0, 0, 2, 0, 0]
    assert read_metrics(tmp_path / "trained_model") == metrics
    assert capsys.readouterr().out.count(TOLD) == 1
    assert all(
        tensor.isfinite().all()
        for tensor in read_checkpoint(tmp_path / "trained_model")[1].values()
    )


def test_what_is_not_finite_is_null_in_the_metrics_and_nothing_else_is(train, spoil, tmp_path):
    spoil(bad_logits, math.nan, 3)
    train()
    metrics = read_metrics(tmp_path / "trained_model")
    nulls = [{name for name, value in record.items() if value is None} for record in metrics]
    assert nulls[2] >= {"kl", "reward", "approx_kl", "policy_loss"}
    assert not nulls[2] & {
        "step",
        "samples",
        "success_rate",
        "score",
        "learning_rate",
        "skipped_updates",
    }
    assert not any(nulls[:2] + nulls[3:])
    assert metrics[3]["learning_rate"] == pytest.approx(metrics[2]["learning_rate"] / 1.5)


def test_no_checkpoint_is_taken_of_a_bad_step_but_the_last(train, spoil, monkeypatch):
    saved, save = [], train_rlhf.save_checkpoint
    monkeypatch.setattr(
        train_rlhf, "save_checkpoint", lambda *args: saved.append(len(args[2])) or save(*args)
    )
    spoil(bad_logits, math.nan, 2, STEPS - 1, STEPS)
    train()
    assert saved == [1, 3, STEPS]


def test_bad_steps_with_good_ones_in_between_stop_no_run(train, spoil):
    spoil(bad_logits, math.nan, 1, 2, 4, 5)
    assert [bool(record["skipped_updates"]) for record in train()] == [
        True,
        True,
        False,
        True,
        True,
    ]


def test_a_run_with_a_bad_step_is_measured_and_saved(
    call_main, spoil, demo_model, tmp_path, capsys
):
    spoil(bad_logits, math.nan, STEPS)
    assert call_main("--model-name", demo_model, *SMALL) == 0
    assert f"step {STEPS}: {TOLD}" in capsys.readouterr().out
    folder = tmp_path / "trained_model"
    assert all(
        weight.isfinite().all() for weight in load_file(folder / "model.safetensors").values()
    )
    assert "NaN" not in (folder / "report.json").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("loss", "skipped", "counted"), [(math.nan, True, 1), (1.0, True, 0), (1.0, False, 0)]
)
def test_what_the_scaler_of_float16_leaves_out_counts_where_the_loss_is_bad(
    build, make_settings, monkeypatch, loss, skipped, counted
):
    """The scaler also skips updates while it looks for its scale, which is no fault of the numbers."""
    trainer = build(make_settings()).trainer
    monkeypatch.setattr(
        train_rlhf.PPOTrainer, "train_minibatch", lambda *args: {"loss/total": torch.tensor(loss)}
    )
    trainer.optimizer, trainer.skipped_updates = SimpleNamespace(step_was_skipped=skipped), 0
    trainer.train_minibatch()
    assert trainer.skipped_updates == counted


# ------------------------------------------------------------------------------------------------------ three in a row
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
        f"\nStopped: three steps in a row had updates with numbers that are not finite: {REMEDY}; "
        "what was learned up to step 2 is saved. To go on, run the same line with --resume\n"
    )
    assert [record["skipped_updates"] for record in read_metrics(folder)] == [0, 0, 2, 2, 2]
    state, tensors = read_checkpoint(folder)
    assert len(state["metrics"]) == 2
    assert all(tensor.isfinite().all() for tensor in tensors.values())
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
    message = "Stopped: what was measured is not finite: set DTYPE to float32, or lower TARGET_APPROX_KL; what was"
    assert capsys.readouterr().err.startswith(
        f"\n{message} learned up to step {STEPS - 1} is saved."
    )
    assert not list((tmp_path / "trained_model").rglob("model.safetensors"))


# -------------------------------------------------------------------------------------------------------- a base model
@pytest.mark.parametrize("value", BAD)
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


# ------------------------------------------------------------------------------------------------------------- the KL
def warnings(settings, *kls):
    """Return what is told at each step of 100 samples with those KLs, {step: lines}."""
    metrics = [{"kl": kl, "skipped_updates": 0} for kl in kls]
    told = {
        step: train_rlhf.warnings_of(metrics[:step], settings) for step in range(1, len(kls) + 1)
    }
    return {step: lines for step, lines in told.items() if lines}


@pytest.fixture
def hundred(make_settings):
    return make_settings("--batch-size", "100", "--max-new-tokens", "8")


def test_a_kl_that_runs_away_is_told_once(hundred):
    (step,), (lines,) = zip(*warnings(hundred, 0.0, 7.9, 8.1, 9.0, 20.0).items())
    assert step == 3
    assert lines == [
        "the KL has run away to 8.1 nats: stop, and raise KL_COEF or lower TARGET_APPROX_KL"
    ]


def test_a_kl_below_zero_is_told_once(hundred):
    (step,), (lines,) = zip(*warnings(hundred, 0.0, -0.09, -0.2, -0.3).items())
    assert step == 3
    assert lines == [
        "the KL is -0.2 nats, and none can be below 0: what is sampled is not what is trained"
    ]


def test_a_kl_that_goes_wrong_again_is_told_again(hundred):
    assert list(warnings(hundred, 9.0, 1.0, 9.0, 9.0, -1.0, 0.0, -1.0)) == [1, 3, 5, 7]


def test_an_ordinary_kl_is_no_news(hundred):
    assert warnings(hundred, 0.0, -0.09, 7.9, 8.0, None, 3.0) == {}


def test_one_step_of_a_few_samples_is_no_runaway(make_settings):
    few = make_settings("--batch-size", "10", "--max-new-tokens", "8")
    assert warnings(few, 1.0, 1.0, 1.0, 20.0, 1.0, 1.0) == {}


def test_a_skipped_update_is_told_at_its_step_only(hundred):
    metrics = [{"kl": 0.0, "skipped_updates": skipped} for skipped in (0, 3, 0)]
    told = [train_rlhf.warnings_of(metrics[:step], hundred) for step in (1, 2, 3)]
    assert told == [[], ["updates skipped, since their numbers were not finite: 3"], []]


def test_a_run_says_that_its_kl_has_run_away(train, capsys):
    train(
        "--kl-coef",
        "0",
        "--learning-rate",
        "0.05",
        "--target-approx-kl",
        "0",
        "--max-new-tokens",
        "4",
    )
    out = capsys.readouterr().out
    assert out.count("the KL has run away to ") == 1


# ------------------------------------------------------------------------------------------------- a reward of the user
REWARDS = {
    "raise ValueError('no idea')": "raised ValueError('no idea') for {text}: mend it",
    "return missing": "raised NameError(\"name 'missing' is not defined\") for {text}: mend it",
    "raise SystemExit(3)": "raised SystemExit(3) for {text}: mend it",
    "return None": "gave None for {text}: it has to return one finite number for one text",
    "return [1.0]": "gave [1.0] for {text}: it has to return one finite number for one text",
    "return float('nan')": "gave nan for {text}: it has to return one finite number for one text",
    "return float('-inf')": "gave -inf for {text}: it has to return one finite number for one text",
    "return 10**400": "gave {huge} for {text}: it has to return one finite number for one text",
    "return 'good'": "gave 'good' for {text}: it has to return one finite number for one text",
    "return 1j": "gave 1j for {text}: it has to return one finite number for one text",
}


@pytest.fixture(scope="session")
def first_text(build, demo_model, tmp_path_factory):
    """Return the first text that a run with these settings has to score."""
    output = str(tmp_path_factory.mktemp("first"))
    settings = train_rlhf.read_settings(
        ["--model-name", str(demo_model), "--output-dir", output, *SMALL]
    )
    built = build(settings)
    train_rlhf.set_seeds(settings.seed, 1)
    return train_rlhf.rollout(built.policy, built.tokenizer, settings.prompts, lambda text: 0.0)[2][
        0
    ]


@pytest.mark.parametrize("code", REWARDS)
def test_a_reward_that_gives_no_number_is_told_with_its_name_and_the_text(
    call_main, demo_model, tmp_path, capsys, first_text, code
):
    (tmp_path / "mine.py").write_text(f"def kindness(text):\n    {code}\n", encoding="utf-8")
    assert call_main("--model-name", demo_model, *SMALL, "--reward", "mine.py:kindness") == 1
    reason = REWARDS[code].format(text=repr(first_text), huge="1" + "0" * 78 + "…")
    assert (
        capsys.readouterr().err
        == f"\nStopped: REWARD, kindness, {reason}; there was nothing to save yet\n"
    )
