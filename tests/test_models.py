"""The families of models that people will name: random small ones, each through a whole run.

Their weights are large, so that probabilities are far from uniform and a slip in masks, positions or
weights shows.
"""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from test_policy import evaluate
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedTokenizerFast,
)

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
PROMPTS = ["Life", "I'm feeling as if I could do it all", "My", "Today I am very happy and"]
ANSWERS = ["is good", "and so", "day was long and I am so very tired of it all", "so are you"]


def make_model(kind, tokenizer, sizes):
    """Return a random model of that kind whose weights are large."""
    ids = {
        f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")
    }
    sizes = {name: size for name, size in sizes.items() if name != "kind"}
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


def save_random_model(family, tokenizer, folder):
    """Save a random model of a family, and a tokenizer, into a folder."""
    sizes = {**FAMILIES, **REFUSED}[family]
    make_model(sizes.get("kind", family), tokenizer, sizes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def train(settings, *flags):
    """Do a whole run in this process, but for its picture; return the metrics of its steps."""
    places = ["--model-name", settings.model_name, "--output-dir", settings.output_dir]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_rlhf, "draw", lambda *measured: measured[-1].touch())
        assert train_rlhf.main([*places, *RUN, *flags]) == 0
    lines = Path(settings.output_dir, "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module", params=FAMILIES)
def trained(request, demo_tokenizer, build, read_settings, tmp_path_factory):
    """Return what a run of two steps leaves of a model of each family, and its policy."""
    place = tmp_path_factory.mktemp(request.param)
    folder = save_random_model(request.param, demo_tokenizer, place / "model")
    settings = make_settings(read_settings, folder)
    metrics, built = train(settings), take_up(build, settings)
    return SimpleNamespace(folder=folder, output=place / "trained", metrics=metrics, built=built)


def encode(tokenizer, texts):
    return [tokenizer(text, return_tensors="pt")["input_ids"][0] for text in texts]


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
    first, second = trained.metrics
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


# ------------------------------------------------------------------------------- some of them in other ways
def chances(model, tokenizer):
    """Return the probabilities of the token after each prompt."""
    return torch.softmax(greedy(model, tokenizer, PROMPTS)[1].float(), dim=-1)


@pytest.fixture
def random_model(demo_tokenizer, tmp_path):
    """Save a random model of a family and return its folder."""
    return lambda family: save_random_model(family, demo_tokenizer, tmp_path / "model")


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_a_run_with_weights_in_16_bits(random_model, build, read_settings, family):
    flags = ["--dtype", "bfloat16"]
    settings = make_settings(read_settings, random_model(family), *flags)
    first, second = train(settings, *flags)
    assert first["kl"] == 0 < second["kl"]
    built = take_up(build, settings)
    model = AutoModelForCausalLM.from_pretrained(settings.output_dir)
    assert model.dtype == torch.bfloat16
    distance = chances(model, built.tokenizer) - chances(
        built.policy.pretrained_model, built.tokenizer
    )
    assert distance.abs().sum(-1).max() / 2 < 0.02


@pytest.mark.parametrize("family", ["qwen2", "gpt_neox"])
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


@pytest.mark.parametrize("family", ["gemma2", "gpt2"])
def test_a_run_that_goes_on_is_the_undisturbed_run(random_model, read_settings, family):
    settings = make_settings(read_settings, random_model(family))
    steady = ["--ppo-epochs", "1", "--target-approx-kl", "0"]  # whatever the number of steps
    found = []
    for flags in ([], ["--training-epochs", "0.6"], ["--resume"]):
        found.append(train(settings, *steady, *flags))
        for step in found[-1]:
            del step["seconds"]
    undisturbed, first_step, resumed = found
    assert resumed == undisturbed and first_step == undisturbed[:1]
    assert len(undisturbed) == 2 and undisturbed[1]["kl"] > 0


def byte_level():
    """Return a tokenizer as GPT-2's: of bytes, a space before a word in its token, no start token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=300, special_tokens=["<|endoftext|>"], initial_alphabet=alphabet
    )
    tokenizer.train_from_iterator([*PROMPTS, *ANSWERS], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>"
    )


def sentence_piece():
    """Return a tokenizer as SentencePiece's: unigrams, with a mark before each word and a start token."""
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.UnigramTrainer(vocab_size=60, special_tokens=special, unk_token="<unk>")
    tokenizer.train_from_iterator([*PROMPTS, *ANSWERS] * 3, trainer)
    tokenizer.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    names = dict(zip(("unk_token", "bos_token", "eos_token"), special))
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@pytest.mark.parametrize("make", [byte_level, sentence_piece])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_a_run_with_another_kind_of_tokenizer(build, read_settings, tmp_path, make, family):
    tokenizer = make()
    folder = save_random_model(family, tokenizer, tmp_path / "model")
    settings = make_settings(read_settings, folder)
    first, second = train(settings)
    assert first["kl"] == 0 < second["kl"]
    built = take_up(build, settings)
    saved = AutoTokenizer.from_pretrained(settings.output_dir)
    model = AutoModelForCausalLM.from_pretrained(settings.output_dir)
    for text in PROMPTS:
        assert saved(text)["input_ids"] == tokenizer(text)["input_ids"]
    policy = built.policy.pretrained_model
    assert greedy(model, saved, PROMPTS)[0] == greedy(policy, built.tokenizer, PROMPTS)[0]


def test_the_context_of_a_model_whose_text_has_a_config_of_its_own(tmp_path):
    """Qwen 3.5 is loaded without its eyes."""
    text = {"max_position_embeddings": 64}
    AutoConfig.for_model("qwen3_5", text_config=text).save_pretrained(tmp_path)
    assert train_rlhf.context_of(tmp_path) == 64


# ------------------------------------------------------------------------------ those that are refused
@pytest.fixture
def refused(call_main, tmp_path, capfd):
    """Return what a run of a model is refused for, after a look at whether nothing was written."""

    def call(*flags):
        capfd.readouterr()  # what was said where the model was made
        assert call_main("--model-name", "model", *RUN, *flags) == 2
        first, line = capfd.readouterr().err.splitlines()
        assert first == "Nothing was started or changed:"
        assert [path.name for path in tmp_path.iterdir()] == ["model"]
        return line.removeprefix("- ")

    return call


NO_HEAD = "The model does not have a language model head, please use a model that has one"
LEAKS = "padding, or what follows, changes its probabilities"


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("gemma3", "it takes pictures or sound too"),
        ("bert", NO_HEAD),
        ("rwkv", NO_HEAD),
        ("roberta", LEAKS),  # each token sees those after it
        ("recurrent_gemma", LEAKS),  # what it remembers has the padding in it
        ("minimax", LEAKS),  # what it remembers where it goes on
    ],
)
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


def without_positions(policy):
    policy.takes_positions = False


def without_mask(policy):
    forward = policy.forward
    policy.forward = lambda input_ids, attention_mask, earned: forward(
        input_ids, torch.ones_like(attention_mask), earned
    )


def without_mask_in_generation(policy):
    generate = policy.pretrained_model.generate
    policy.pretrained_model.generate = lambda input_ids, attention_mask, **options: generate(
        input_ids=input_ids, attention_mask=torch.ones_like(attention_mask), **options
    )


@pytest.mark.parametrize(
    "flags",
    [["--dtype", "float32"], ["--dtype", "bfloat16"], ["--temperature", "100"]],
    ids=lambda flags: flags[-1],
)
@pytest.mark.parametrize("spoil", [without_positions, without_mask, without_mask_in_generation])
def test_a_slip_in_positions_or_masks_is_seen_before_anything_is_trained(
    random_model, build, read_settings, spoil, flags
):
    built = build(make_settings(read_settings, random_model("gpt2"), *flags))
    train_rlhf.try_policy(built.policy, built.tokenizer)
    spoil(built.policy)
    with pytest.raises(ValueError, match="padding, or what follows"):
        train_rlhf.try_policy(built.policy, built.tokenizer)
