"""A measurement: whom it asks, how it samples, and how far that is from the base model."""

import json
import math
import os
from dataclasses import asdict
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import AutoModelForCausalLM

import train_rlhf
from finetune import evaluation, tokens
from finetune.processes import random_numbers
from finetune.scale import Scale

FULL = bool(os.environ.get("CI_FULL"))
TEMPERATURES = [2.0, 1.0] if FULL else [2.0]
METRICS = [{"samples": 60, "seconds": 3.0}]  # of a run, as far as the report needs them


def graded(rows, texts):
    """Return -1, 0 or 1 for each text: a reward that knows more than good and bad."""
    return [float(len(text) % 3 - 1) for text in texts]


@pytest.fixture(scope="module", params=TEMPERATURES, ids="temperature {}".format)
def trained(request, build, read_settings, step, demo_model, tmp_path_factory):
    """Return what build returns, after a few steps away from the base model."""
    output = tmp_path_factory.mktemp("measured")
    settings = read_settings(
        *("--model-name", str(demo_model), "--output-dir", str(output)),
        *("--device", "cpu", "--temperature", str(request.param), "--learning-rate", "0.003"),
        *("--batch-size", "6", "--max-new-tokens", "20"),
        *("--eval-samples", "18", "--eval-batch-size", "7"),
    )
    built = build(settings)
    for _ in range(4):
        step(built)
    return built


@pytest.fixture(scope="module")
def by_hand(trained, demo_model):
    """Return KL and base logprob of one response, without padding and without TRL."""
    base = AutoModelForCausalLM.from_pretrained(demo_model).float()

    @torch.no_grad()
    def logprobs(model, query, response):
        logits = model(torch.cat([query, response])[None]).logits[0, len(query) - 1 : -1]
        return torch.log_softmax(logits.double() / trained.settings.temperature, dim=-1)

    def compute(query, response):
        of_policy = logprobs(trained.policy.pretrained_model, query, response)
        of_base = logprobs(base, query, response)
        kl = (of_policy.exp() * (of_policy - of_base)).sum().item()
        return kl, sum(ref[token].item() for ref, token in zip(of_base, response))

    return compute


@pytest.fixture
def sampled(monkeypatch):
    """Return queries, numbers, responses and texts of each call that samples from now on.

    The responses are cut, so that no two lengths are alike.
    """
    calls, sample_responses = [], evaluation.sample_responses

    def see(model, tokenizer, queries, numbers, batch_size):
        responses, texts = sample_responses(model, tokenizer, queries, numbers, batch_size)
        lengths = [len(response) - i % 7 for i, response in enumerate(responses)]
        responses = [response[:length] for response, length in zip(responses, lengths)]
        calls.append((queries, numbers, responses, texts))
        return responses, texts

    monkeypatch.setattr(evaluation, "sample_responses", see)
    return calls


@pytest.fixture
def passes(trained, monkeypatch):
    """Return the passes from now on: (rows, whether to sample, whether of the base model)."""
    seen, samples = [], []
    model = trained.policy.pretrained_model
    generate = model.generate
    adapted = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    assert len(adapted) > 1

    def sample(**inputs):
        samples.append(True)
        sequences = generate(**inputs)
        samples.pop()
        return sequences

    def see(module, args, options):
        (is_base,) = {layer.disable_adapters for layer in adapted}
        seen.append((len(options["input_ids"]), bool(samples), is_base))

    monkeypatch.setattr(model, "generate", sample)
    handle = model.get_base_model().register_forward_pre_hook(see, with_kwargs=True)
    yield seen
    handle.remove()


@pytest.fixture
def measure(trained, make_learner):
    """Measure on 18 samples, with the numbers of the prompts of the training."""

    def call(rows, scorer=graded, base=False):
        learner = make_learner(trained, scorer)
        return evaluation.measure(learner, rows, samples=18, number=1, base=base)

    return call


@pytest.fixture
def make_report(make_learner, monkeypatch):
    """Measure before and after, on all prompts, without saving the model; return the report."""

    def make(built, scorer=graded):
        for name in ("save_model", "draw"):
            monkeypatch.setattr(evaluation, name, lambda *arguments: None)
        folder = Path(built.settings.output_dir)
        (folder / "checkpoint" / "new").mkdir(parents=True, exist_ok=True)
        learner = make_learner(built, scorer, Scale(threshold=0.0))
        evaluation.measure_and_save(learner, built.rows, built.eval_rows, METRICS)
        return json.loads((folder / "report.json").read_text(encoding="utf-8"))

    return make


# ------------------------------------------------------------------------ a measurement
@pytest.mark.parametrize("is_base", [False, True])
def test_kl_and_log_probability_are_sums_over_the_response(trained, by_hand, is_base):
    """Of a batch that is more than a minibatch."""

    def ids(text):
        return trained.tokenizer(text, return_tensors="pt")["input_ids"][0]

    queries = [ids("Life"), ids("I'm feeling as if I could do it"), ids("My")] * 3
    responses = [ids("is good"), ids("and so"), ids("day was long and I am very tired")] * 3
    kls, ref_logprobs = trained.trainer.compare_with_base(queries, responses, is_base=is_base)
    assert len(kls) == len(ref_logprobs) == 9 > trained.trainer.config.mini_batch_size
    assert is_base or min(kls) > 0.001
    for query, response, kl, ref_logprob in zip(queries, responses, kls, ref_logprobs):
        wanted_kl, wanted_logprob = by_hand(query, response)
        assert kl == (0 if is_base else pytest.approx(wanted_kl, rel=1e-3))
        assert ref_logprob == pytest.approx(wanted_logprob, rel=1e-4)


def test_what_is_measured_is_what_was_sampled_and_scored(trained, measure, by_hand, sampled):
    calls = []

    def scorer(rows, texts):
        calls.append((rows, texts))
        return graded(rows, texts)

    rows = trained.eval_rows
    measured = measure(rows, scorer)
    ((queries, _, responses, texts),) = sampled
    ((asked, judged),) = calls  # a single one for all samples
    assert asked == [row for row in rows for _ in range(3)]
    prompts = [row["prompt"] for row in asked]
    decode = trained.tokenizer.decode
    assert [decode(query, skip_special_tokens=True) for query in queries] == prompts
    assert measured.prompts == prompts
    assert measured.texts == judged == texts
    assert measured.scores == graded(rows, texts)
    assert measured.lengths == [len(response) for response in responses]
    kls, logprobs = zip(*map(by_hand, queries, responses))
    assert measured.kls == pytest.approx(kls, rel=1e-3)
    assert measured.ref_logprobs == pytest.approx(logprobs, rel=1e-4)


@pytest.mark.parametrize(
    ("count", "places"),
    [(5, [0, 1, 2, 3, 4]), (18, range(18)), (40, range(0, 40, 3))],  # of many, some
)
def test_rows_share_the_samples_evenly(count, places):
    rows = [{"prompt": f"Day {number} is"} for number in range(count)]
    times = math.ceil(18 / len(places))
    asked = evaluation.spread(rows, 18)
    assert asked == [rows[place] for place in places for _ in range(times)]
    assert len(asked) >= 18 or count == 40


def test_the_base_model_is_measured_without_a_pass_of_the_policy(trained, measure, passes):
    """It needs one pass for its log probabilities, where the policy's KL needs another."""
    assert measure(trained.rows, base=True).kls == [0] * 18
    assert {is_base for _, _, is_base in passes} == {True}
    # The minibatch is 6.
    assert [size for size, samples, _ in passes if not samples] == [6] * 3

    passes.clear()
    assert sum(measure(trained.rows).kls) > 18 * 0.01
    assert {is_base for _, samples, is_base in passes if samples} == {False}
    compared = [(size, is_base) for size, samples, is_base in passes if not samples]
    assert sorted(compared) == [(6, False)] * 3 + [(6, True)] * 3

    # With EVAL_BATCH_SIZE 7 and MAX_NEW_TOKENS 20.
    sizes = [size for size, samples, _ in passes if samples]
    assert [size for size, after in pairwise([*sizes, None]) if size != after] == [7, 4]
    assert sizes.count(4) <= 20 and sizes.count(7) <= 2 * 20


def test_the_eval_batch_size_changes_no_response(trained, measure, sampled, monkeypatch):
    whole = measure(trained.rows)
    for size in (1, 18):
        monkeypatch.setattr(trained.settings, "eval_batch_size", size)
        assert measure(trained.rows) == whole
    first, *others = [list(map(torch.Tensor.tolist, call[2])) for call in sampled]
    assert others == [first] * 2
    assert len({*map(tuple, first)}) == 18 and len({*map(len, first)}) > 3


# --------------------------------------------------------------------- before and after
def test_an_untrained_policy_has_not_learned(build, make_settings, make_report, capsys):
    report = make_report(build(make_settings()))
    assert report["learned"] is False and report["close_to_base"] is True
    assert report["base"] == report["trained"]  # the same samples
    assert list(report["base"]) == ["train_prompts", "eval_prompts"]  # as in the card
    for measured in report["base"].values():
        assert measured["samples"] == 12
        assert measured["kl"] == 0 and measured["win_rate"] == 0.5
        assert measured["kl_minimum"] == pytest.approx(0, abs=1e-12)
    assert (report["samples"], report["samples_per_second"]) == (60, 20.0)
    assert report["scale"] == asdict(Scale(threshold=0.0)) and report["chat"] is False
    out = capsys.readouterr().out
    assert "Measuring before and after, 12 samples each time" in out
    assert "Beyond chance this run did not learn" in out


def test_a_report_can_be_repeated_differs_by_seed_and_trains_nothing(
    trained, make_report, monkeypatch, sampled
):
    """Base model and policy have the same random numbers, prompts held out have others."""
    before = {name: value.clone() for name, value in trained.policy.state_dict().items()}
    monkeypatch.setattr(trained.settings, "eval_samples", 6)  # one to each prompt
    first = make_report(trained)
    base, base_held_out, policy, policy_held_out = (call[1] for call in sampled)
    assert torch.equal(base, policy) and torch.equal(base_held_out, policy_held_out)
    assert not torch.isin(base, base_held_out).any()
    assert torch.equal(base, random_numbers((0, 0, 1), 6, 20))
    assert torch.equal(base_held_out, random_numbers((0, 0, 2), 6, 20))

    torch.manual_seed(123)  # whatever happened in between
    second = make_report(trained)
    monkeypatch.setattr(trained.settings, "seed", 1)
    other = make_report(trained)
    for model in ("base", "trained"):
        assert second[model] == first[model]
        names = ("train_prompts", "eval_prompts")
        in_training, held_out = (first[model][name]["first_sample"] for name in names)
        assert list(in_training) == trained.settings.prompts
        assert list(held_out) == trained.settings.eval_prompts
        kls = [first[model][name]["kl"] for name in names]
        assert min(kls) > 0.01 if model == "trained" else kls == [0, 0]
        assert list(in_training.values()) != list(held_out.values())
        assert other[model]["train_prompts"]["first_sample"] != in_training
    after = trained.policy.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


# ---------------------------------------------------------------------------- the scale
def test_the_scale_is_that_of_the_base_models_own_samples(
    build, make_settings, make_learner, roll_out
):
    """It comes from samples of its own; those of a rollout are like them."""
    flags = ("--scale-samples", "180", "--batch-size", "90", "--eval-batch-size", "90")
    built = build(make_settings(*flags))
    sizes = []

    def scorer(rows, texts):
        sizes.append(len(texts))
        return [10.0 * len(text) - 300 for text in texts]

    scales = []
    for seed in range(2):
        torch.manual_seed(seed)  # whatever happened before
        scales.append(evaluation.measure_scale(make_learner(built, scorer), built.rows))
    assert sizes == [180] * 2  # a single call for all samples
    assert scales[0] == scales[1] and scales[0].graded

    queries = tokens.encode(built.tokenizer, built.rows * 30, chat_template=False)
    _, texts = roll_out(built, queries, key=(0, 1, 0))
    scores = torch.tensor(scorer(built.rows * 30, texts), dtype=torch.float64)
    trained_on = scales[0].apply(scores)
    assert abs(trained_on.mean()) < 0.5 and 0.6 < trained_on.std() < 1.6


def test_without_samples_the_scores_stay_as_they_are(make_settings):
    settings = make_settings("--scale-samples", "0")
    learner = train_rlhf.Learner(None, None, None, None, Scale(), settings)
    assert evaluation.measure_scale(learner, [{"prompt": "Life is"}]) == Scale()
