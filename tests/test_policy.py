import copy
import json
import re

import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BloomConfig,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
)
from transformers.modeling_layers import GradientCheckpointingLayer

import train_rlhf

ONE_UPDATE = ["--ppo-epochs", "1", "--target-approx-kl", "0"]


def trained_parameters(policy):
    return {name: value for name, value in policy.named_parameters() if value.requires_grad}


def frozen_parameters(policy):
    named = policy.named_parameters()
    return {name: value.clone() for name, value in named if not value.requires_grad}


def ask(tokenizer, *prompts):
    return [tokenizer(prompt, return_tensors="pt")["input_ids"][0] for prompt in prompts]


def evaluate(built, queries, responses):
    """Return all logprobs and values of padded responses, each token of which has earned 1."""
    device = built.trainer.accelerator.device
    inputs, mask = train_rlhf.pad_batch(built.tokenizer, queries, responses, device)
    inputs["earned"] = (mask.cumsum(1) - mask).float()
    with torch.no_grad():
        all_logprobs, values = built.policy(**inputs)
    rows = zip(all_logprobs, values, mask.bool())
    return [(logprobs[where], value[where]) for logprobs, value, where in rows]


def greedy(model, tokenizer, prompts):
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        options = {"do_sample": False, "pad_token_id": tokenizer.pad_token_id}
        with torch.no_grad():
            ids = model.generate(**inputs, max_new_tokens=20, **options)
        texts.append(tokenizer.decode(ids[0]))
    return texts


@pytest.fixture(scope="session")
def bloom(demo_model, save_random_model, tmp_path_factory):
    """Return the folder of a random BLOOM, which takes no positions, with demo_model's tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = BloomConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        pad_token_id=tokenizer.pad_token_id,
        **ids,
    )
    return save_random_model(config, tokenizer, tmp_path_factory.mktemp("bloom"))


# ---------------------------------------------------------------------------- adapter, value head
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_is_trained_and_how_it_starts(build, make_settings, dtype):
    built = build(make_settings("--dtype", dtype))
    trained = trained_parameters(built.policy)
    assert all("lora_" in name or name.startswith("v_head.") for name in trained)
    assert any("lora_A" in name for name in trained)
    assert all(value.dtype == torch.float32 for value in trained.values())
    held = [value for group in built.trainer.optimizer.param_groups for value in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, trained.values()))
    head = [value for name, value in trained.items() if name.startswith("v_head.")]
    assert head and not any(value.any() for value in head)
    assert next(iter(frozen_parameters(built.policy).values())).dtype == getattr(torch, dtype)


def test_every_linear_layer_but_the_output_head_is_adapted(build, settings):
    policy = build(settings).policy
    layers = policy.pretrained_model.config.num_hidden_layers
    adapted = [name for name in trained_parameters(policy) if "lora_A" in name]
    assert len(adapted) == 7 * layers  # q, k, v, o, gate, up, down
    assert not [name for name in adapted if "lm_head" in name]


def test_rank_and_targets_of_the_adapter_are_those_of_the_settings(build, make_settings):
    flags = ["--lora-rank", "3", "--lora-alpha", "12", "--lora-targets", "q_proj", "v_proj"]
    policy = build(make_settings(*flags)).policy
    trained = trained_parameters(policy)
    adapted = {name: value for name, value in trained.items() if "lora_A" in name}
    assert {value.shape[0] for value in adapted.values()} == {3}
    assert {name.split(".")[-4] for name in adapted} == {"q_proj", "v_proj"}
    layer = policy.pretrained_model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 4.0


def test_targets_that_the_model_lacks(build, make_settings):
    with pytest.raises(train_rlhf.SettingsError) as error:
        build(make_settings("--lora-targets", "no_such_layer"))
    (problem,) = error.value.args
    assert problem.startswith("LORA_TARGETS is ['no_such_layer']: ")
    assert problem.endswith(": name linear layers of this model, or all-linear")


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_tied_embeddings_are_not_adapted(call_main, demo_model, tmp_path, capsys, layer):
    flags = ["--device", "cpu", "--lora-targets", layer]
    assert call_main("--model-name", demo_model, *flags) == 2
    assert f"- LORA_TARGETS is ['{layer}']: " in capsys.readouterr().err
    assert not (tmp_path / "trained_model").exists()


def test_nothing_is_dropped_out(build, step, gpt2, make_settings):
    """GPT-2 comes with dropout, which would change the ratio of a policy to itself."""
    built = build(make_settings("--model-name", str(gpt2), *ONE_UPDATE))
    torch.manual_seed(0)
    assert step(built)["approx_kl"] == pytest.approx(0, abs=1e-9)
    built.policy.train()
    own = [*built.policy.v_head.named_modules()]
    own += [(name, m) for name, m in built.policy.named_modules() if "lora_dropout" in name]
    assert not any(m.p for _, m in own if isinstance(m, torch.nn.Dropout))


# -------------------------------------------------------------------------------------- tokenizer
def test_the_pad_token_is_no_end_token(shared_model):
    """That tokenizer's pad token is its end token."""
    tokenizer = train_rlhf.load_tokenizer(shared_model("tinyllama-shape"))
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_a_tokenizer_without_a_pad_token_gets_one(copy_of_demo_model):
    path = copy_of_demo_model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    assert train_rlhf.load_tokenizer(copy_of_demo_model).pad_token is not None


# ---------------------------------------------------------------------------------- the context
LONG = "very " * 100 + "good"


@pytest.mark.parametrize("text", [LONG, [{"role": "user", "content": LONG}]], ids=["text", "chat"])
def test_prompt_and_response_have_to_fit_into_the_context(demo_model, make_settings, text):
    """What does not fit is left out; only where nothing fits there is something to be told."""
    tokenizer = train_rlhf.load_tokenizer(demo_model)
    tokenizer.chat_template = "{{ bos_token }}{{ messages[0]['content'] }}"
    context = json.loads((demo_model / "config.json").read_text())["max_position_embeddings"]
    assert train_rlhf.context_of(demo_model) == context
    length = len(tokenizer(LONG)["input_ids"])
    short, long = {"prompt": "My cat"}, {"prompt": text}

    def fitting(new_tokens, *rows):
        settings = make_settings("--max-new-tokens", str(new_tokens))
        return train_rlhf.prompts_that_fit(context, tokenizer, list(rows), settings)

    assert fitting(context - length, short, long) == [short, long]
    assert fitting(context - length + 1, long, short) == [short]
    assert fitting(context + 1) == []  # of none that were asked for none are missed
    with pytest.raises(train_rlhf.SettingsError) as error:
        fitting(context - length + 1, long, long)
    (problem,) = error.value.args
    assert problem.startswith(
        f"MAX_NEW_TOKENS is {context - length + 1}, too many for every prompt, such as 'very very"
    )
    remedy = f"give less, or shorter prompts; the model's context is {context}"
    assert problem.endswith(f"', {length} tokens: {remedy}")
    assert len(problem) < 300


@pytest.mark.parametrize("flag", ["--prompts", "--eval-prompts"])
def test_prompts_of_both_kinds_are_held_against_the_context(
    call_main, demo_model, tmp_path, capsys, flag
):
    flags = ["--device", "cpu", flag, LONG, "--max-new-tokens", "200"]
    assert call_main("--model-name", demo_model, *flags) == 2
    problem = "- MAX_NEW_TOKENS is 200, too many for every prompt, such as 'very very"
    assert problem in capsys.readouterr().err
    assert not (tmp_path / "trained_model").exists()


# ------------------------------------------------------------------------ before the first update
def test_before_the_first_update_policy_and_base_model_are_one(build, roll_out, settings):
    built = build(settings)
    queries = ask(built.tokenizer, *settings.prompts)
    responses, _ = roll_out(built, queries)
    policy = evaluate(built, queries, responses)
    with built.trainer.optional_peft_ctx():
        base = evaluate(built, queries, responses)
    for (logprobs, values), (ref_logprobs, _) in zip(policy, base):
        torch.testing.assert_close(logprobs, ref_logprobs, atol=1e-6, rtol=0)
        assert not values.any()
    pair = built.trainer, built.policy
    kls, _ = train_rlhf.compare_with_base(*pair, queries, responses, base=False)
    assert kls == pytest.approx([0] * len(queries), abs=1e-6)


# ------------------------------------------------------------------------- padding and positions
@pytest.mark.parametrize("model", ["demo_model", "gpt2", "bloom"])
def test_padding_changes_no_log_probability_and_no_value(
    build, step, make_settings, request, model
):
    folder = str(request.getfixturevalue(model))
    built = build(make_settings("--model-name", folder, "--mini-batch-size", "2"))
    torch.manual_seed(0)
    step(built)  # so that neither adapter nor value head is zero
    queries = ask(built.tokenizer, "Life", "I'm feeling as if I could do it all", "My")
    answers = ["is good", "and so", "day was long and I am so very tired of it all"]
    responses = ask(built.tokenizer, *answers)

    for row, (logprobs, values) in enumerate(evaluate(built, queries, responses)):
        assert len(logprobs) == len(responses[row])
        ((logprobs_alone, values_alone),) = evaluate(built, [queries[row]], [responses[row]])
        torch.testing.assert_close(logprobs, logprobs_alone, atol=2e-5, rtol=0)
        torch.testing.assert_close(values, values_alone, atol=2e-5, rtol=0)
        assert values.any()


@pytest.mark.parametrize(("model", "takes_positions"), [("gpt2", True), ("bloom", False)])
def test_positions_go_only_to_models_that_take_them(
    build, make_settings, request, model, takes_positions
):
    built = build(make_settings("--model-name", str(request.getfixturevalue(model))))
    given = []
    built.policy.pretrained_model.get_base_model().register_forward_pre_hook(
        lambda module, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    queries, responses = [[5, 6, 7], [8]], [[9], [10, 11]]
    evaluate(built, *([torch.tensor(ids) for ids in part] for part in (queries, responses)))
    (arguments,) = given
    if takes_positions:  # the last of the first row is padding
        assert arguments["position_ids"].tolist() == [[0, 1, 2, 3, 3], [0, 0, 0, 1, 2]]
    else:
        assert "position_ids" not in arguments


# ----------------------------------------------------------------------------------------- update
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_change_adapter_and_value_head_and_not_a_bit_of_the_base_model(
    build, step, make_settings, demo_model, dtype
):
    built = build(make_settings("--dtype", dtype, *ONE_UPDATE))
    frozen = frozen_parameters(built.policy)
    trained = {name: value.clone() for name, value in trained_parameters(built.policy).items()}
    torch.manual_seed(0)
    for _ in range(2):
        step(built)
    now = dict(built.policy.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert [name for name, value in trained.items() if torch.equal(now[name], value)] == []
    base = copy.deepcopy(built.policy.pretrained_model).unload().state_dict()
    for name, value in load_file(demo_model / "model.safetensors").items():
        assert torch.equal(base[name], value.to(getattr(torch, dtype)))


# ------------------------------------------------------------------------- gradient checkpointing
@pytest.fixture(scope="session")
def forgetting_models(demo_model, save_random_model, tmp_path_factory):
    """Return the folders of demo_model and of random models whose configs have dropout.

    GPT-2 drops out in modules of its own; OPT's layers do it themselves, by their training flag.
    """
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    ids |= {"pad_token_id": tokenizer.pad_token_id, "vocab_size": len(tokenizer)}
    gpt2 = {"n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2, "initializer_range": 0.3}
    gpt2 |= {"attn_pdrop": 0.5, "resid_pdrop": 0.5, "embd_pdrop": 0.5}
    opt = {"max_position_embeddings": 64, "hidden_size": 32, "word_embed_proj_dim": 32}
    opt |= {"ffn_dim": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "init_std": 0.3}
    configs = {
        "gpt2": GPT2Config(**gpt2, **ids),
        "opt": OPTConfig(**opt, **ids, dropout=0.5, attention_dropout=0.5),
        "opt without layers": OPTConfig(**opt, **ids, dropout=0.0, layerdrop=0.9),
    }
    folders = {"demo_model": demo_model}
    for name, config in configs.items():
        folders[name] = save_random_model(config, tokenizer, tmp_path_factory.mktemp("forgetting"))
    return folders


@pytest.fixture
def checkpointed(build, make_settings, forgetting_models):
    """Build one of those models, with or without checkpointing; its adapter is no longer zero."""

    def make(name, *flags):
        built = build(make_settings("--model-name", str(forgetting_models[name]), *flags))
        torch.manual_seed(1)
        for weight_name, weight in trained_parameters(built.policy).items():
            if "lora_B" in weight_name or "v_head" in weight_name:
                torch.nn.init.normal_(weight, std=0.1)
        queries = ask(built.tokenizer, "Life is", "I'm feeling as if I could do it all")
        responses = ask(built.tokenizer, "is good and so am I", "and so")
        device = built.trainer.accelerator.device
        built.inputs, mask = train_rlhf.pad_batch(built.tokenizer, queries, responses, device)
        built.inputs["earned"] = (mask.cumsum(1) - mask).float()
        modules = built.policy.modules()
        layer = next(each for each in modules if isinstance(each, GradientCheckpointingLayer))
        parts = layer.named_children()  # a hook of the layer itself would see the first call only
        norm = next(part for name, part in parts if re.search("norm|ln_", name))
        built.lengths = []  # of the sequences in each pass through the first layer
        norm.register_forward_pre_hook(lambda _, given: built.lengths.append(given[0].shape[1]))
        return built

    return make


@pytest.mark.parametrize("name", ["demo_model", "gpt2", "opt", "opt without layers"])
def test_what_is_forgotten_and_computed_again_changes_no_number(checkpointed, name):
    found = {}
    for flag in "--no-gradient-checkpointing", "--gradient-checkpointing":
        built = checkpointed(name, flag)
        torch.manual_seed(2)
        all_logprobs, values = built.policy(**built.inputs)
        with torch.no_grad():
            again, _ = built.policy(**built.inputs)
        torch.testing.assert_close(all_logprobs, again, rtol=0, atol=1e-5)
        torch.manual_seed(3)  # backward computes the same again, whatever was drawn meanwhile
        (all_logprobs.exp().square().sum() + values.sum()).backward()
        named = trained_parameters(built.policy).items()
        found[flag] = all_logprobs, values, {name: weight.grad for name, weight in named}
    (*outputs, plain), (*others, checkpointed) = found.values()
    for output, other in zip(outputs, others):
        torch.testing.assert_close(other, output, rtol=0, atol=1e-5)
    for weight_name, gradient in plain.items():
        torch.testing.assert_close(checkpointed[weight_name], gradient, rtol=1e-4, atol=1e-6)
    assert all(gradient.any() for gradient in plain.values())


@pytest.mark.parametrize(("flag", "passes"), [("--gradient-checkpointing", 2), ("--seed=0", 1)])
@pytest.mark.parametrize("name", ["demo_model", "gpt2"])
def test_only_what_was_forgotten_is_computed_again(checkpointed, name, flag, passes):
    built = checkpointed(name, flag)
    all_logprobs, values = built.policy(**built.inputs)
    width = built.inputs["input_ids"].shape[1]
    assert built.lengths == [width]
    (all_logprobs.exp().square().sum() + values.sum()).backward()
    assert built.lengths == [width] * passes
    with torch.no_grad():  # nothing goes backward here, and nothing is said of it
        built.policy(**built.inputs)
    assert built.lengths == [width] * (passes + 1)


@pytest.mark.parametrize("name", ["demo_model", "gpt2"])
def test_gradient_checkpointing_leaves_generation_its_cache(checkpointed, roll_out, name):
    """A model in training has none: each token would take a pass over all before it."""
    flags = ["--max-new-tokens", "6", "--gradient-checkpointing"]
    built, plain = checkpointed(name, *flags), checkpointed(name, *flags[:2])
    queries = ask(built.tokenizer, "Life is")
    built.policy(**built.inputs)  # as in a step
    built.lengths.clear()
    responses, texts = roll_out(built, queries)
    count = len(responses[0])
    assert built.lengths == [len(queries[0])] + [1] * (count - 1) and count > 2
    assert roll_out(plain, queries)[1] == texts


def test_gradient_checkpointing_is_refused_where_it_would_do_nothing(
    build, make_settings, monkeypatch
):
    name = "transformers.modeling_layers.GradientCheckpointingLayer"
    monkeypatch.setattr(name, torch.nn.Conv3d)  # of which the model has none
    with pytest.raises(train_rlhf.SettingsError, match="GRADIENT_CHECKPOINTING is True: give F"):
        build(make_settings("--gradient-checkpointing"))


@pytest.mark.parametrize("mini_batch_size", ["0", "2"])
def test_a_step_with_gradient_checkpointing_is_the_same_step(
    build, step, make_settings, mini_batch_size
):
    found = []
    for flag in "--no-gradient-checkpointing", "--gradient-checkpointing":
        built = build(make_settings("--mini-batch-size", mini_batch_size, flag))
        torch.manual_seed(0)
        found.append([step(built), step(built)])
    for plain, checkpointed in zip(*found):
        assert checkpointed == pytest.approx(plain, rel=1e-2, abs=1e-5)
    assert found[0][1]["kl"] > 1e-5


# ----------------------------------------------------------------------------------------- saving
@pytest.mark.parametrize("steps", [0, 5])
def test_a_saved_policy_says_the_same_in_plain_transformers(
    build, step, make_settings, demo_model, tmp_path, monkeypatch, steps
):
    settings = make_settings("--learning-rate", "0.003", "--no-save-adapter")
    built = build(settings)
    torch.manual_seed(0)
    for _ in range(steps):
        step(built)
    prompts = settings.prompts + settings.eval_prompts
    before = greedy(built.policy.pretrained_model, built.tokenizer, prompts)
    (tmp_path / "saved").mkdir()
    train_rlhf.save_model(
        built.policy.pretrained_model, built.tokenizer, built.settings, tmp_path / "saved"
    )

    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    tokenizer = AutoTokenizer.from_pretrained("../saved")
    model = AutoModelForCausalLM.from_pretrained("../saved")
    assert greedy(model, tokenizer, prompts) == before
    base = AutoModelForCausalLM.from_pretrained(demo_model).float()
    assert (greedy(base, tokenizer, prompts) == before) == (steps == 0)
    assert not list((tmp_path / "saved").glob("adapter*"))


def test_the_saved_model_samples_at_the_temperature_it_was_trained_for(
    build, make_settings, tmp_path
):
    built = build(make_settings("--temperature", "0.7", "--max-new-tokens", "9"))
    train_rlhf.save_model(
        built.policy.pretrained_model, built.tokenizer, built.settings, tmp_path / "saved"
    )
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config
    names = ("do_sample", "temperature", "top_k", "max_new_tokens")
    assert [getattr(config, name) for name in names] == [True, 0.7, 0, 9]


@pytest.mark.parametrize(
    ("bits", "width"),
    [
        ("8bit", 344),
        ("4bit", 384),
        ("4bit", 344),
    ],  # some processors want multiples of 64 for 4 bits
)
def test_a_quantized_model_learns_and_is_saved_whole(
    build, step, make_settings, demo_model, save_random_model, tmp_path, bits, width
):
    config = LlamaConfig.from_pretrained(demo_model, intermediate_size=width, initializer_range=0.1)
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    folder = save_random_model(config, tokenizer, tmp_path / "random")
    flags = ["--model-name", str(folder), "--quantization", bits, "--learning-rate", "0.003"]
    built = build(make_settings(*flags, *ONE_UPDATE))
    inputs = built.tokenizer("I feel so", return_tensors="pt")

    def chances(model):
        with torch.no_grad():
            return torch.softmax(model(**inputs).logits[0, -1].float(), dim=-1)

    untrained = chances(built.policy.pretrained_model)
    torch.manual_seed(0)
    for _ in range(3):
        step(built)
    trained = chances(built.policy.pretrained_model)
    train_rlhf.save_model(
        built.policy.pretrained_model, built.tokenizer, built.settings, tmp_path / "saved"
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not getattr(model.config, "quantization_config", None)
    saved = chances(model)
    assert (trained - saved).abs().sum() < 0.1
    # The update is larger than what the rounding may have cost: without it there were a difference.
    assert (trained - untrained).abs().sum() > 2 * (trained - saved).abs().sum()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_step_on_a_gpu(build, step, roll_out, make_settings, dtype):
    built = build(make_settings("--device", "cuda", "--dtype", dtype))
    queries = ask(built.tokenizer, "Life is", "I")
    responses, _ = roll_out(built, queries)
    device = built.trainer.accelerator.device
    inputs, mask = train_rlhf.pad_batch(built.tokenizer, queries, responses, device)
    assert {part.device.type for part in (*inputs.values(), mask)} == {"cuda"}
    first, second = step(built), step(built)
    assert first["skipped_updates"] == second["skipped_updates"] == 0
    assert second["kl"] > 0
