"""The families of models that people will name: random small ones, each through a whole run.

Their weights are large, so that probabilities are far from uniform and a slip in masks, positions or
weights shows. All families have their turn where CI_FULL is set, else a few that differ most.
"""

import json
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import evaluate, greedy, make_batch, read_metrics, refusals
from safetensors.torch import load_file
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

import train_rlhf
from finetune import evaluation
from finetune.checkpoint import read_checkpoint, trained_weights
from finetune.models import check_padding
from finetune.processes import random_numbers
from finetune.sampling import sample_responses

FULL = bool(os.environ.get("CI_FULL"))
PART = slice(None) if FULL else slice(1)  # of families that go through the same
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
FAMILIES = {  # the kind of model, unless it is the name itself, and its sizes beside those above
    "llama": {},
    "smollm": {"kind": "llama", "head_dim": 16, "tie_word_embeddings": True},
    "smollm3": {},
    "qwen2": {},
    "qwen3": {"head_dim": 16},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16, **EXPERTS},
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
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "olmo2": {},
    "stablelm": {},
    "falcon": {},
    "gpt2": {},
    "gpt_neox": {},
    "gptj": {"rotary_dim": 4},
    "opt": {"word_embed_proj_dim": 32, "ffn_dim": 64},
    "bloom": {},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4},
    # Its config has a start token for decoders, though it has no encoder.
    "xglm": {"d_model": 32, "ffn_dim": 64, "num_layers": 2, "attention_heads": 4},
}
FEW = ["qwen3", "gemma2", "mixtral", "lfm2", "gpt2"]
REFUSED = {
    "gemma3": {  # with eyes
        "text_config": {"vocab_size": 2000, "head_dim": 8, **SIZES},
        "vision_config": {"image_size": 8, "patch_size": 4, **SIZES},
        "mm_tokens_per_image": 4,
    },
    "bert": {},
    "roberta": {},
    "rwkv": {"attention_hidden_size": 32, "context_length": 64},
    "mamba": {"state_size": 4},
    "recurrent_gemma": {"num_hidden_layers": 3, "lru_width": 32, "attention_window_size": 6},
    "minimax": {
        "head_dim": 8,
        "num_local_experts": 2,
        "layer_types": ["linear_attention", "full_attention"],
    },
}
RUN = ["--device", "cpu", "--batch-size", "4", "--max-new-tokens", "8", "--eval-samples", "4"]
RUN += ["--lora-rank", "4", "--learning-rate", "0.003", "--training-epochs", "1.3"]  # two steps
# Every response earns something: where none does, nothing moves.
REWARDS = Path(__file__).resolve().parent.parent / "examples" / "rewards.py"
RUN += ["--reward", f"{REWARDS}:few_words", "--scale-samples", "0"]
PROMPTS = ["Life", "I'm feeling as if I could do it all", "My", "Today I am very happy and"]
ANSWERS = ["is good", "and so", "day was long and I am so very tired of it all", "so are you"]


def save_model_of(family, tokenizer, folder):
    """Save a random model of a family, whose weights are large, and a tokenizer into a folder."""
    sizes = SIZES | {**FAMILIES, **REFUSED}[family]
    kind = sizes.pop("kind", family)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        sizes[name] = getattr(tokenizer, name)
    config = AutoConfig.for_model(kind, vocab_size=len(tokenizer), **sizes)
    model = AutoModelForCausalLM.from_config(config)
    torch.manual_seed(0)
    for weight in model.parameters():
        noise = torch.randn_like(weight)
        weight.data = noise * 0.3 if weight.dim() > 1 else weight.data + noise * 0.1
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_settings(read_settings, folder, *flags):
    """Return the settings of that run of the model in a folder, its output beside it."""
    places = ["--model-name", str(folder), "--output-dir", str(folder.parent / "trained")]
    return read_settings(*places, *RUN, *flags)


def train(settings, *flags):
    """Do a whole run in this process, but for its picture; return the metrics of its steps."""
    places = ["--model-name", settings.model_name, "--output-dir", settings.output_dir]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(evaluation, "draw", lambda *measured: measured[-1].touch())
        assert train_rlhf.main([*places, *RUN, *flags]) == 0
    return read_metrics(Path(settings.output_dir))


def take_up(build, settings):
    """Build the policy of a run, and put it to the checkpoint that the run left."""
    built = build(settings)
    state = read_checkpoint(settings.output_dir)
    for name, weight in trained_weights(built.policy).items():
        weight.copy_(state["weights"][name])
    return built


@pytest.fixture(scope="session")
def demo_tokenizer(demo_model):
    return AutoTokenizer.from_pretrained(demo_model)


@pytest.fixture(scope="module", params=FAMILIES if FULL else FEW)
def trained(request, demo_tokenizer, build, read_settings, tmp_path_factory):
    """Return what a run of two steps leaves of a model of each family, and its policy."""
    place = tmp_path_factory.mktemp(request.param)
    folder = save_model_of(request.param, demo_tokenizer, place / "model")
    settings = make_settings(read_settings, folder)
    metrics, built = train(settings), take_up(build, settings)
    return SimpleNamespace(folder=folder, output=place / "trained", metrics=metrics, built=built)


def encode(tokenizer, texts):
    return [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts]


def next_logits(model, tokenizer):
    """Return the logits of the token after each prompt, (prompts, vocabulary)."""
    with torch.no_grad():
        logits = [model(query[None]).logits[0, -1] for query in encode(tokenizer, PROMPTS)]
    return torch.stack(logits)


# ------------------------------------------------------------------------------ each of the families
def test_two_steps_start_at_the_base_model_and_train_every_part_of_the_adapter(trained):
    first, second = trained.metrics
    # Exactly 0: the adapter's second matrix is 0, and both passes are the same arithmetic.
    assert first["kl"] == 0
    assert second["kl"] > 1e-3
    assert trained.built.policy.head.layer is not None
    assert first["skipped_updates"] == second["skipped_updates"] == 0
    assert first["entropy"] < 7.3  # of 7.4, the logarithm of the vocabulary: far from uniform
    report = json.loads((trained.output / "report.json").read_text())
    assert report["base"]["train_prompts"]["kl"] == 0 < report["trained"]["train_prompts"]["kl"]
    weights = trained_weights(trained.built.policy)
    assert [name for name, weight in weights.items() if not weight.any()] == []
    assert sum("lora_B" in name for name in weights) >= 4


def test_the_saved_model_says_the_same_in_plain_transformers(trained):
    policy, tokenizer = trained.built.policy.pretrained_model, trained.built.tokenizer
    saved_tokenizer = AutoTokenizer.from_pretrained(trained.output)
    saved = AutoModelForCausalLM.from_pretrained(trained.output)
    assert greedy(saved, saved_tokenizer, PROMPTS) == greedy(policy, tokenizer, PROMPTS)
    logits = next_logits(policy, tokenizer)
    torch.testing.assert_close(next_logits(saved, saved_tokenizer), logits, atol=1e-4, rtol=0)
    base = AutoModelForCausalLM.from_pretrained(trained.folder)
    assert (next_logits(base, tokenizer) - logits).abs().max() > 1e-2


def test_the_saved_weights_are_those_of_the_base_model_by_name_shape_and_ties(trained):
    options = {"output_loading_info": True}
    model, loading = AutoModelForCausalLM.from_pretrained(trained.output, **options)
    assert not any(loading.values())
    base = load_file(trained.folder / "model.safetensors")
    saved = load_file(trained.output / "model.safetensors")
    shapes, wanted = ({name: each[name].shape for name in each} for each in (saved, base))
    assert shapes == wanted
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


def test_a_response_is_the_same_in_any_batch(trained):
    """And it is the one that the policy's own probabilities give with its random numbers."""
    built = trained.built
    queries = encode(built.tokenizer, PROMPTS)
    numbers = random_numbers((0, 0, 0), len(queries), built.settings.max_new_tokens)
    model = built.policy.pretrained_model
    responses, _ = sample_responses(model, built.tokenizer, queries, numbers, batch_size=4)
    alone, _ = sample_responses(model, built.tokenizer, queries, numbers, batch_size=1)
    assert [each.tolist() for each in responses] == [each.tolist() for each in alone]
    for query, response, own in zip(queries, responses, numbers):
        ((logprobs, _),) = evaluate(built, [query], [response])
        chances, tokens = logprobs.double().exp(), response[:, None]
        ends = chances.cumsum(-1).gather(-1, tokens)[:, 0]
        starts = ends - chances.gather(-1, tokens)[:, 0]
        own = own[: len(response)]
        assert (starts - 1e-4 < own).all() and (own < ends + 1e-4).all()


def test_gradient_checkpointing_changes_no_gradient(trained, build, read_settings):
    forgetful = make_settings(read_settings, trained.folder, "--gradient-checkpointing")
    built = trained.built
    queries, responses = (encode(built.tokenizer, texts) for texts in (PROMPTS, ANSWERS))
    batch = make_batch(built, queries, responses)
    gradients = []
    for policy in (built.policy, take_up(build, forgetful).policy):
        states, values = policy(**batch.inputs)
        all_logprobs = policy.head(states).log_softmax(-1)
        (all_logprobs.exp().square().sum() + values.sum()).backward()
        named = policy.named_parameters()
        gradients.append({name: each.grad for name, each in named if each.requires_grad})
        policy.zero_grad()
    plain, checkpointed = gradients
    for name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[name], gradient, rtol=1e-3, atol=1e-5)


# ------------------------------------------------------------------------------- some of them in other ways
def chances(model, tokenizer):
    """Return the probabilities of the token after each prompt."""
    return torch.softmax(next_logits(model, tokenizer).float(), dim=-1)


@pytest.fixture
def random_model(demo_tokenizer, tmp_path):
    """Save a random model of a family and return its folder."""
    return lambda family: save_model_of(family, demo_tokenizer, tmp_path / "model")


@pytest.mark.parametrize("family", ["gemma2", "gpt2"][PART])
def test_a_run_with_weights_in_16_bits(random_model, build, read_settings, family):
    flags = ["--dtype", "bfloat16"]
    settings = make_settings(read_settings, random_model(family), *flags)
    first, second = train(settings, *flags)
    assert first["kl"] == 0 < second["kl"]
    built = take_up(build, settings)
    model = AutoModelForCausalLM.from_pretrained(settings.output_dir)
    assert model.dtype == torch.bfloat16
    trained = chances(built.policy.pretrained_model, built.tokenizer)
    distance = chances(model, built.tokenizer) - trained
    assert distance.abs().sum(-1).max() / 2 < 0.02


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"][PART])
def test_a_run_with_weights_in_8_bits(random_model, build, read_settings, family):
    flags = ["--quantization", "8bit", "--learning-rate", "0.02"]
    settings = make_settings(read_settings, random_model(family), *flags)
    first, second = train(settings, *flags)
    assert first["kl"] == 0 < second["kl"]
    built = take_up(build, settings)
    model = AutoModelForCausalLM.from_pretrained(settings.output_dir)
    assert not getattr(model.config, "quantization_config", None)
    saved = chances(model, built.tokenizer)
    trained = chances(built.policy.pretrained_model, built.tokenizer)
    with built.trainer.optional_peft_ctx():
        untrained = chances(built.policy.pretrained_model, built.tokenizer)
    lost, learned = (trained - saved).abs().sum(), (trained - untrained).abs().sum()
    assert learned > 4 * lost


def test_a_run_with_a_tokenizer_as_that_of_gpt2(build, read_settings, tmp_path):
    """Of bytes, a space before a word in its token, without start token, or a pad to spare."""
    bytes_alone = Tokenizer(BPE())
    bytes_alone.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=300, special_tokens=["<end>"], initial_alphabet=alphabet)
    bytes_alone.train_from_iterator([*PROMPTS, *ANSWERS], trainer)
    ends = {"bos_token": "<end>", "eos_token": "<end>"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, **ends)

    settings = make_settings(read_settings, save_model_of("gpt2", tokenizer, tmp_path / "model"))
    first, second = train(settings)
    assert first["kl"] == 0 < second["kl"]
    built = take_up(build, settings)
    saved = AutoTokenizer.from_pretrained(settings.output_dir)
    model = AutoModelForCausalLM.from_pretrained(settings.output_dir)
    for text in PROMPTS:
        assert saved(text)["input_ids"] == tokenizer(text)["input_ids"]
    policy = built.policy.pretrained_model
    assert greedy(model, saved, PROMPTS) == greedy(policy, built.tokenizer, PROMPTS)


# ------------------------------------------------------------------------------ those that are refused
@pytest.fixture
def refused(call_main, tmp_path, capfd):
    """Return what a run of a model is refused for, after a look at whether nothing was written."""

    def call(*flags):
        capfd.readouterr()  # what was said where the model was made
        status = call_main("--model-name", "model", *RUN, *flags)
        (line,) = refusals(status, capfd.readouterr().err)
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        return line

    return call


NO_HEAD = "The model does not have a language model head, please use a model that has one"
LEAKS = "padding, or what follows, changes its probabilities"
REFUSALS = [
    ("gemma3", "it takes pictures or sound too"),
    ("rwkv", NO_HEAD),
    ("recurrent_gemma", LEAKS),  # what it remembers has the padding in it
]
MORE_REFUSALS = [
    ("bert", NO_HEAD),
    ("roberta", LEAKS),  # each token sees those after it
    ("minimax", LEAKS),  # what it remembers where it goes on
]


@pytest.mark.parametrize(("family", "reason"), REFUSALS + MORE_REFUSALS * FULL)
def test_a_family_that_ppo_can_not_train_as_it_is(random_model, refused, family, reason):
    random_model(family)
    remedy = "name a model of another family, as Llama"
    assert refused() == f"MODEL_NAME is model: it can't be used ({reason}): {remedy}"


def test_mamba_is_trained_where_its_layers_are_named(random_model, refused, read_settings):
    folder = random_model("mamba")
    assert refused().startswith("LORA_TARGETS is ['all-linear']: it can't be used (")
    flags = ["--lora-targets", "in_proj"]
    first, second = train(make_settings(read_settings, folder, *flags), *flags)
    assert first["kl"] == 0 < second["kl"]


REMEDY = "name a language model with config.json, *.safetensors and a tokenizer"


def test_a_model_whose_layers_quantization_does_not_know(random_model, refused):
    """Nothing would be smaller, and it could not be saved."""
    random_model("falcon")
    reason = "it could not be saved after QUANTIZATION, give none for that"
    line = f"MODEL_NAME is model: it can't be used ({reason}): {REMEDY}"
    assert refused("--quantization", "8bit") == line


def test_a_model_that_is_quantized_already(random_model, refused, tmp_path):
    """What was trained could not be saved."""
    bits = BitsAndBytesConfig(load_in_8bit=True)
    model = AutoModelForCausalLM.from_pretrained(random_model("llama"), quantization_config=bits)
    model.save_pretrained(tmp_path / "model")
    reason = "it is quantized already, take the model that it was made from"
    assert refused() == f"MODEL_NAME is model: it can't be used ({reason}): {REMEDY}"


def with_padding(function):
    """Let a function see the padding."""

    def see_all(input_ids, attention_mask, **others):
        mask = torch.ones_like(attention_mask)
        return function(input_ids=input_ids, attention_mask=mask, **others)

    return see_all


@pytest.mark.parametrize("flag", ["--dtype float32", "--dtype bfloat16", "--temperature 100"])
def test_a_slip_in_positions_or_masks_is_seen_before_anything_is_trained(
    random_model, build, read_settings, flag
):
    built = build(make_settings(read_settings, random_model("gpt2"), *flag.split()))
    policy, model = built.policy, built.policy.pretrained_model
    check_padding(policy, built.tokenizer)
    for part, name, slip in (
        (policy, "takes_positions", False),
        (policy, "forward", with_padding(policy.forward)),
        (model, "generate", with_padding(model.generate)),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(part, name, slip)
            with pytest.raises(ValueError, match="padding, or what follows"):
                check_padding(policy, built.tokenizer)
