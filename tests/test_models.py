"""The families of models that people will name: random small ones, each through a whole run.

Their weights are large, so that probabilities are far from uniform and a slip in masks, positions or
weights shows.
"""

import json
from types import SimpleNamespace

import pytest
import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import train_rlhf

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
WINDOW = {"sliding_window": 6}  # shorter than the sequences
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
FOUR = {"num_experts": 4, **EXPERTS}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
MAMBA = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 4, "mamba_n_groups": 1}
FAMILIES = {  # the kind of model, unless it is the name itself, and its sizes beside those above
    "llama": {},
    "smollm": {"kind": "llama", "head_dim": 16, "tie_word_embeddings": True},
    "smollm3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen2_moe": {**FOUR, "shared_expert_intermediate_size": 16},
    "qwen3_moe": {**FOUR, "head_dim": 8},
    "qwen3_next": {**FOUR, "shared_expert_intermediate_size": 16, **LINEAR_ATTENTION},
    "gemma": {"head_dim": 8},
    "gemma2": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "final_logit_softcapping": 3.0,
        "attn_logit_softcapping": 2.0,
        **WINDOW,
    },
    "gemma3_text": {
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "layer_types": ["sliding_attention", "full_attention"],
        **WINDOW,
    },
    "mistral": WINDOW,
    "mixtral": {"num_local_experts": 4, **EXPERTS},
    "phi": {"num_key_value_heads": 4},
    "phi3": WINDOW,
    "gpt_oss": {"head_dim": 8, "num_local_experts": 4, **EXPERTS, **WINDOW},
    "granite": {},
    "granitemoehybrid": {  # Granite 4
        "layer_types": ["mamba", "attention"],
        "num_local_experts": 0,
        "shared_intermediate_size": 64,
        **MAMBA,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "olmo": {},
    "olmo2": {},
    "stablelm": {},
    "falcon": {},
    "starcoder2": WINDOW,
    "gpt2": {},
    "gpt_neox": {},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 6},
    "gptj": {"rotary_dim": 4},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "bloom": {},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
}
RUN = ["--device", "cpu", "--batch-size", "4", "--max-new-tokens", "8", "--eval-samples", "4"]
RUN += ["--lora-rank", "4", "--learning-rate", "0.003", "--training-epochs", "1.3"]  # two steps
PROMPTS = ["Life", "I'm feeling as if I could do it all", "My", "Today I am very happy and"]
ANSWERS = ["is good", "and so", "day was long and I am so very tired of it all", "so are you"]


def make_model(kind, tokenizer, sizes):
    """Return a random model of that kind whose weights are large."""
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **{**SIZES, **ids, **sizes})
    model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    for weight in model.parameters():
        noise = torch.randn_like(weight)
        weight.data = noise * 0.3 if weight.dim() > 1 else weight.data + noise * 0.1
    return model


def make_settings(read_settings, folder, *flags):
    """Return the settings of that run of the model in a folder, its output beside it."""
    places = ["--model-name", str(folder), "--output-dir", str(folder.parent / "trained")]
    return read_settings(*places, *RUN, *flags)


def take_up(build, settings):
    """Build the policy of a run, and put it to the checkpoint that the run left."""
    built = build(settings)
    state = train_rlhf.read_checkpoint(settings.output_dir)
    for name, weight in train_rlhf.trained_weights(built.policy).items():
        weight.copy_(state["weights"][name])
    return built


@pytest.fixture(scope="session")
def demo_tokenizer(demo_model):
    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, demo_tokenizer, build, read_settings, tmp_path_factory):
    """Return what a run of two steps leaves of a model of each family, and its policy."""
    sizes = dict(FAMILIES[request.param])
    place = tmp_path_factory.mktemp(request.param)
    model = make_model(sizes.pop("kind", request.param), demo_tokenizer, sizes)
    model.save_pretrained(place / "model")
    demo_tokenizer.save_pretrained(place / "model")
    settings = make_settings(read_settings, place / "model")
    flags = ["--model-name", settings.model_name, "--output-dir", settings.output_dir]
    assert train_rlhf.main([*flags, *RUN]) == 0
    built = take_up(build, settings)
    return SimpleNamespace(folder=place / "model", output=place / "trained", built=built)


def encode(tokenizer, texts):
    return [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts]


def evaluate(built, queries, responses):
    """Return the logprobs and values of each response, each token of which has earned 1."""
    inputs, mask = train_rlhf.pad_batch(built.tokenizer, queries, responses, torch.device("cpu"))
    inputs["earned"] = (mask.cumsum(1) - mask).float()
    with torch.no_grad():
        all_logprobs, values = built.policy(**inputs)
    rows = zip(all_logprobs, values, mask.bool())
    return [(logprobs[where], value[where]) for logprobs, value, where in rows]


def greedy(model, tokenizer, prompts):
    """Return the likeliest continuations and the logits at their first tokens."""
    texts, logits = [], []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt", return_token_type_ids=False)
        options = {"do_sample": False, "max_new_tokens": 8, "pad_token_id": tokenizer.pad_token_id}
        with torch.no_grad():
            ids = model.generate(**inputs, **options)
            logits.append(model(**inputs).logits[0, -1])
        texts.append(tokenizer.decode(ids[0]))
    return texts, torch.stack(logits)


# ------------------------------------------------------------------------------ each of the families
def test_two_steps_start_at_the_base_model_and_train_every_part_of_the_adapter(trained):
    lines = (trained.output / "metrics.jsonl").read_text().splitlines()
    first, second = map(json.loads, lines)
    # Exactly 0: the adapter's second matrix is 0, and both passes are the same arithmetic.
    assert first["kl"] == 0
    assert second["kl"] > 1e-3
    assert first["skipped_updates"] == second["skipped_updates"] == 0
    assert first["entropy"] < 7.3  # of 7.4, the logarithm of the vocabulary: far from uniform
    report = json.loads((trained.output / "report.json").read_text())
    assert report["base"]["train_prompts"]["kl"] == 0 < report["trained"]["train_prompts"]["kl"]
    weights = train_rlhf.trained_weights(trained.built.policy)
    assert [name for name, weight in weights.items() if not weight.any()] == []
    assert sum("lora_B" in name for name in weights) >= 4


def test_the_saved_model_says_the_same_in_plain_transformers(trained):
    built = trained.built
    before, logits = greedy(built.policy.pretrained_model, built.tokenizer, PROMPTS)
    tokenizer = AutoTokenizer.from_pretrained(trained.output)
    model = AutoModelForCausalLM.from_pretrained(trained.output)
    after, saved_logits = greedy(model, tokenizer, PROMPTS)
    assert after == before
    torch.testing.assert_close(saved_logits, logits, atol=1e-4, rtol=0)
    base = AutoModelForCausalLM.from_pretrained(trained.folder)
    assert (greedy(base, tokenizer, PROMPTS)[1] - logits).abs().max() > 1e-2


def test_the_saved_weights_are_those_of_the_base_model_by_name_shape_and_ties(trained):
    options = {"output_loading_info": True}
    model, loading = AutoModelForCausalLM.from_pretrained(trained.output, **options)
    assert not any(loading.values())
    base, saved = (
        load_file(folder / "model.safetensors") for folder in (trained.folder, trained.output)
    )
    assert {name: weight.shape for name, weight in saved.items()} == {
        name: weight.shape for name, weight in base.items()
    }
    tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
    assert tied == model.config.tie_word_embeddings
    changed = {name for name, weight in saved.items() if not torch.equal(weight, base[name])}
    assert changed and not [name for name in changed if "norm" in name or "embed" in name]


def test_padding_changes_no_log_probability_and_no_value(trained):
    queries, responses = (encode(trained.built.tokenizer, texts) for texts in (PROMPTS, ANSWERS))
    together = evaluate(trained.built, queries, responses)
    for query, response, (logprobs, values) in zip(queries, responses, together):
        ((logprobs_alone, values_alone),) = evaluate(trained.built, [query], [response])
        torch.testing.assert_close(logprobs, logprobs_alone, atol=5e-5, rtol=0)
        torch.testing.assert_close(values, values_alone, atol=2e-5, rtol=0)
        assert values.any()


def test_a_response_is_the_same_in_any_batch(trained, roll_out):
    """And it is the one that the policy's own probabilities give with its random numbers."""
    built = trained.built
    queries = encode(built.tokenizer, PROMPTS)
    numbers = train_rlhf.random_numbers((0, 0, 0), queries, built.settings.max_new_tokens)
    responses, alone = (
        train_rlhf.rollout(built.policy, built.tokenizer, queries, numbers, size)[0]
        for size in (len(queries), 1)
    )
    assert [each.tolist() for each in responses] == [each.tolist() for each in alone]
    for query, response, own in zip(queries, responses, numbers):
        ((logprobs, _),) = evaluate(built, [query], [response])
        ends = logprobs.double().exp().cumsum(-1).gather(-1, response[:, None])[:, 0]
        starts = ends - logprobs.double().exp().gather(-1, response[:, None])[:, 0]
        own = own[: len(response)]
        assert (starts - 1e-4 < own).all() and (own < ends + 1e-4).all()


def test_gradient_checkpointing_changes_no_gradient(trained, build, read_settings):
    forgetful = make_settings(read_settings, trained.folder, "--gradient-checkpointing")
    built = trained.built
    queries, responses = (encode(built.tokenizer, texts) for texts in (PROMPTS, ANSWERS))
    inputs, mask = train_rlhf.pad_batch(built.tokenizer, queries, responses, torch.device("cpu"))
    gradients = []
    for policy in (built.policy, take_up(build, forgetful).policy):
        all_logprobs, values = policy(**inputs, earned=mask.float())
        (all_logprobs.exp().square().sum() + values.sum()).backward()
        named = policy.named_parameters()
        gradients.append({name: each.grad for name, each in named if each.requires_grad})
        policy.zero_grad()
    plain, checkpointed = gradients
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-3, atol=1e-5)
