"""What is needed of the logits, in pieces: the whole form's statistics, and its gradients."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from trl import PPOTrainer

import train_rlhf
from finetune.logits import OutputHead, find_head
from finetune.models import add_adapter
from train_rlhf import InPieces, token_statistics

BATCH, LENGTH, WIDTH, VOCABULARY = 3, 5, 8, 37


def make_head(dtype=torch.float32, bias=True, vocabulary=VOCABULARY, **options):
    torch.manual_seed(0)
    layer = torch.nn.Linear(WIDTH, vocabulary, bias=bias, dtype=dtype).requires_grad_(False)
    return OutputHead(layer, **{"temperature": 1.0, **options})


def random_states(dtype=torch.float32):
    torch.manual_seed(1)
    states = torch.randn(BATCH, LENGTH, WIDTH, dtype=dtype, requires_grad=True)
    ref_states = torch.randn(BATCH, LENGTH, WIDTH, dtype=dtype)
    return states, ref_states, torch.randint(0, VOCABULARY, (BATCH, LENGTH))


def whole_form(states, ref_states, tokens, head):
    """Return the same from tensors with the whole vocabulary, as autograd sees it."""
    all_logprobs = head(states).log_softmax(-1)
    all_ref_logprobs = head(ref_states).log_softmax(-1)
    probabilities = all_logprobs.exp()
    return [
        all_logprobs.gather(-1, tokens[..., None])[..., 0],
        all_ref_logprobs.gather(-1, tokens[..., None])[..., 0],
        (probabilities * (all_logprobs - all_ref_logprobs)).sum(-1),
        -(probabilities * all_logprobs).sum(-1),
    ]


HEADS = [{}, {"temperature": 0.7}, {"cap": 2.0}, {"scale": 0.3}, {"bias": False, "cap": 1.5}]


@pytest.mark.parametrize("options", HEADS)
@pytest.mark.parametrize("numbers", [1, 2 * VOCABULARY, 10**6])
def test_statistics_and_gradients_are_those_of_the_whole_form(monkeypatch, options, numbers):
    rows_of_a_piece = train_rlhf.rows_of_a_piece
    monkeypatch.setattr(
        train_rlhf, "rows_of_a_piece", lambda states, head: rows_of_a_piece(states, head, numbers)
    )
    head = make_head(**options)
    states, ref_states, tokens = random_states()
    weights = torch.randn(2, BATCH, LENGTH)

    results = []
    for compute in (token_statistics, whole_form):
        found = compute(states, ref_states, tokens, head)
        (weights[0] * found[0] + weights[1] * found[2]).sum().backward()
        results.append([*found, states.grad])
        states.grad = None
    for ours, wanted in zip(*results):
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("options", HEADS)
def test_the_gradients_are_right_to_numerical_differences(options):
    head = make_head(torch.float64, **options)
    states, ref_states, tokens = random_states(torch.float64)
    assert torch.autograd.gradcheck(
        lambda states: InPieces.apply(states, ref_states.flatten(0, 1), tokens.flatten(), head)[
            ::2
        ],
        [states.flatten(0, 1).detach().requires_grad_()],
    )


@pytest.mark.parametrize("options", HEADS)
def test_the_kl_and_its_gradient_are_those_of_trl(options):
    head = make_head(**options)
    states, ref_states, tokens = random_states()
    kl = token_statistics(states, ref_states, tokens, head).kl
    trainer = SimpleNamespace(config=SimpleNamespace(kl_penalty="full"))
    all_logprobs = head(states).log_softmax(-1)
    all_ref_logprobs = head(ref_states).log_softmax(-1)
    trl_kl = PPOTrainer._kl_penalty(trainer, all_logprobs, all_ref_logprobs)
    torch.testing.assert_close(kl, trl_kl, atol=1e-6, rtol=1e-5)

    weights = torch.randn(BATCH, LENGTH)
    (gradient,) = torch.autograd.grad((weights * kl).sum(), states)
    (trl_gradient,) = torch.autograd.grad((weights * trl_kl).sum(), states)
    torch.testing.assert_close(gradient, trl_gradient, atol=1e-6, rtol=1e-5)
    assert gradient.abs().max() > 1e-2


def test_in_16_bits_it_is_as_near_as_they_are():
    head = make_head(torch.bfloat16)
    states, ref_states, tokens = random_states(torch.bfloat16)
    results = []
    for compute in (token_statistics, whole_form):
        found = compute(states, ref_states, tokens, head)
        assert all(tensor.dtype == torch.float32 for tensor in found)
        (gradient,) = torch.autograd.grad((found[0] + found[2]).sum(), states)
        results.append([*found, gradient.float()])
        assert gradient.dtype == torch.bfloat16
    for ours, wanted in zip(*results):
        torch.testing.assert_close(ours, wanted, atol=1e-2, rtol=2e-2)


def test_small_gradients_are_kept_in_float16():
    """A KL near 0 has a gradient that float16 would take for 0, before the loss is scaled."""
    head = make_head(torch.float16, vocabulary=32000)
    states, _, tokens = random_states(torch.float16)
    ref_states = states.detach() + 0.002 * torch.randn_like(states)
    gradients = []
    for compute in (token_statistics, whole_form):
        kl = compute(states, ref_states, tokens, head)[2]
        (gradient,) = torch.autograd.grad((2.0**12 * kl).sum(), states)
        gradients.append(gradient.float())
    ours, wanted = gradients
    assert wanted.abs().max() > 0.1
    assert (ours - wanted).norm() < 0.01 * wanted.norm()


def test_states_of_float32_before_a_head_of_float16():
    """Accelerate makes float32 of what a model in float16 returns."""
    head = make_head(torch.float16)
    states, ref_states, tokens = random_states()
    found = token_statistics(states, ref_states, tokens, head)
    wanted = whole_form(states, ref_states, tokens, make_head())
    (gradient,) = torch.autograd.grad((found.logprobs + found.kl).sum(), states)
    (wanted_gradient,) = torch.autograd.grad((wanted[0] + wanted[2]).sum(), states)
    assert gradient.dtype == torch.float32
    for ours, theirs in zip([*found, gradient], [*wanted, wanted_gradient]):
        torch.testing.assert_close(ours, theirs, atol=1e-2, rtol=1e-2)


def test_where_nothing_was_learned_the_kl_is_exactly_0():
    states, _, tokens = random_states()
    head = make_head()
    assert token_statistics(states, states.detach(), tokens, head).kl.eq(0).all()


def test_without_a_gradient_none_is_computed():
    states, ref_states, tokens = random_states()
    with torch.no_grad():
        statistics = token_statistics(states, ref_states, tokens, make_head())
    assert not any(tensor.requires_grad for tensor in statistics)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_states_that_are_logits_are_taken_as_they_are(temperature):
    """So it is where the head itself is trained."""
    head = OutputHead(None, temperature)
    states, ref_states, tokens = random_states()
    tokens = tokens % WIDTH
    results = []
    for compute in (token_statistics, whole_form):
        found = compute(states, ref_states, tokens, head)
        (gradient,) = torch.autograd.grad((found[0] + 2 * found[2]).sum(), states)
        results.append([*found, gradient])
    for ours, wanted in zip(*results):
        torch.testing.assert_close(ours, wanted, atol=1e-6, rtol=1e-5)


# ------------------------------------------------------------------------- families of models
SIZES = {
    "vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 4, "intermediate_size": 64, "max_position_embeddings": 64,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
FAMILIES = {
    "llama": {}, "gemma2": {"final_logit_softcapping": 3.0, "head_dim": 8}, "cohere": {},
    "granite": {"logits_scaling": 4.0}, "gptj": {"rotary_dim": 8}, "phi": {}, "gpt_neox": {},
    "qwen3": {"head_dim": 8},
}  # fmt: skip
"""What the config of each says beside its sizes."""


@pytest.mark.parametrize("family", FAMILIES)
def test_the_head_makes_the_logits_of_the_family(make_settings, family):
    torch.manual_seed(0)
    config = AutoConfig.for_model(family, **SIZES, **FAMILIES[family])
    model = AutoModelForCausalLM.from_config(config)
    torch.nn.init.normal_(model.get_output_embeddings().weight, std=0.3)
    adapted = add_adapter(model, make_settings())
    policy = train_rlhf.CausalPolicy(adapted, find_head(adapted, 0.5)).eval()
    assert policy.head.layer is model.get_output_embeddings()
    ids = torch.tensor([[1, 5, 9, 13, 4, 8]])
    mask, earned = torch.ones_like(ids), torch.zeros(1, 3)
    with torch.no_grad():
        states, _ = policy(ids, mask, earned)
        wanted = model(ids).logits[:, 2:5] / 0.5
        torch.testing.assert_close(policy.head(states), wanted, atol=1e-5, rtol=1e-5)


def test_a_head_is_taken_only_where_it_makes_the_logits_of_the_model(
    build, make_settings, monkeypatch
):
    """Else the model makes them, and nothing is lost but memory."""
    settings = make_settings("--temperature", "0.5")
    policy = build(settings).policy
    assert policy.head.layer is policy.pretrained_model.get_output_embeddings()

    def find_another(model, temperature):
        return replace(find_head(model, temperature), scale=2.0)

    def find_none_of_its_own(model, temperature):
        return replace(find_head(model, temperature), layer=torch.nn.Linear(8, 8))

    def find_with_a_cap(model, temperature):
        # It changes large logits alone.
        return replace(find_head(model, temperature), cap=3000.0)

    for find in (find_another, find_none_of_its_own, find_with_a_cap):
        monkeypatch.setattr(train_rlhf, "find_head", find)
        policy = build(settings).policy
        assert policy.head.layer is None
        ids = torch.tensor([[1, 50, 90, 130]])
        with torch.no_grad():
            states, _ = policy(ids, torch.ones_like(ids), torch.zeros(1, 2))
            wanted = policy.pretrained_model(ids).logits[:, 1:3] / 0.5
        torch.testing.assert_close(policy.head(states), wanted, atol=1e-5, rtol=1e-5)


def test_the_head_of_t5_with_tied_embeddings(make_settings):
    torch.manual_seed(0)
    sizes = {"d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
    config = AutoConfig.for_model(
        "t5", vocab_size=64, pad_token_id=0, decoder_start_token_id=0, **sizes
    )
    model = AutoModelForSeq2SeqLM.from_config(config)
    adapted = add_adapter(model, make_settings())
    policy = train_rlhf.EncoderDecoderPolicy(adapted, find_head(adapted, 1.0)).eval()
    ids, response = torch.tensor([[5, 9, 13, 2]]), torch.tensor([[4, 8, 6]])
    both = torch.cat([ids, response], dim=1)
    with torch.no_grad():
        states, _ = policy(both, torch.ones_like(both), torch.zeros(1, 3))
        start = torch.tensor([[0]])
        wanted = model(
            input_ids=ids, decoder_input_ids=torch.cat([start, response], 1)[:, :3]
        ).logits
    torch.testing.assert_close(policy.head(states), wanted, atol=1e-5, rtol=1e-5)


def test_a_head_that_is_trained_is_left_to_the_model(make_settings, demo_model):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **SIZES))
    adapted = add_adapter(model, make_settings("--lora-targets", "lm_head", "q_proj"))
    assert find_head(adapted, 1.0).layer is None
