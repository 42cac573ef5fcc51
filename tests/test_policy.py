import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

import train_rlhf


def trained_parameters(policy):
    return {name: value for name, value in policy.named_parameters() if value.requires_grad}


def frozen_parameters(policy):
    return {
        name: value.clone() for name, value in policy.named_parameters() if not value.requires_grad
    }


def ask(tokenizer, *prompts):
    return [tokenizer(prompt, return_tensors="pt")["input_ids"][0] for prompt in prompts]


def greedy(model, tokenizer, prompts):
    texts = []
    for prompt in prompts:
        inputs = tokenizer(prompt, return_tensors="pt")
        with torch.no_grad():
            ids = model.generate(
                **inputs, do_sample=False, max_new_tokens=20, pad_token_id=tokenizer.pad_token_id
            )
        texts.append(tokenizer.decode(ids[0]))
    return texts


# ---------------------------------------------------------------------------------------------- adapter, value head
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_value_head_starts_at_zero_in_float32(build, make_settings, dtype):
    policy = build(make_settings("--dtype", dtype)).policy
    head = {name: value for name, value in policy.named_parameters() if name.startswith("v_head")}
    assert head
    for value in head.values():
        assert value.dtype == torch.float32
        assert not value.any()
    assert next(iter(frozen_parameters(policy).values())).dtype == getattr(torch, dtype)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_adapter_and_value_head_are_all_that_is_trained(build, make_settings, dtype):
    built = build(make_settings("--dtype", dtype))
    trained = trained_parameters(built.policy)
    assert all("lora_" in name or name.startswith("v_head.") for name in trained)
    assert any("lora_A" in name for name in trained) and any("v_head" in name for name in trained)
    assert all(value.dtype == torch.float32 for value in trained.values())
    held = [value for group in built.trainer.optimizer.param_groups for value in group["params"]]
    assert sorted(map(id, held)) == sorted(map(id, trained.values()))


def test_every_linear_layer_but_the_output_head_is_adapted(build, settings):
    policy = build(settings).policy
    layers = policy.pretrained_model.config.num_hidden_layers
    adapted = [name for name in trained_parameters(policy) if "lora_A" in name]
    assert len(adapted) == 7 * layers  # q, k, v, o, gate, up, down
    assert not [name for name in adapted if "lm_head" in name]


def test_rank_and_targets_of_the_adapter_are_those_of_the_settings(build, make_settings):
    policy = build(
        make_settings(
            "--lora-rank", "3", "--lora-alpha", "12", "--lora-targets", "q_proj", "v_proj"
        )
    ).policy
    adapted = {
        name: value for name, value in trained_parameters(policy).items() if "lora_A" in name
    }
    assert {value.shape[0] for value in adapted.values()} == {3}
    assert {name.split(".")[-4] for name in adapted} == {"q_proj", "v_proj"}
    layer = policy.pretrained_model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 4.0


def test_targets_that_the_model_lacks(build, make_settings):
    with pytest.raises(train_rlhf.SettingsError, match="LORA_TARGETS is \\['no_such_layer'\\]"):
        build(make_settings("--lora-targets", "no_such_layer"))


def test_nothing_is_dropped_out(build, gpt2, make_settings):
    policy = build(make_settings("--model-name", str(gpt2))).policy  # GPT-2 comes with dropout
    policy.train()
    built_in = [
        module.p for module in policy.v_head.modules() if isinstance(module, torch.nn.Dropout)
    ]
    adapters = [
        m.p
        for name, m in policy.named_modules()
        if "lora_dropout" in name and isinstance(m, torch.nn.Dropout)
    ]
    assert not any(built_in + adapters)


def test_a_step_trains_without_dropout(build, step, gpt2, make_settings):
    built = build(
        make_settings("--model-name", str(gpt2), "--ppo-epochs", "1", "--target-approx-kl", "0")
    )
    torch.manual_seed(0)
    assert step(built)["ppo/policy/approxkl"] == pytest.approx(
        0, abs=1e-9
    )  # dropout would change the ratio


# ----------------------------------------------------------------------------------------------------- tokenizer
def test_the_pad_token_is_no_end_token(shared_model, make_settings):
    settings = make_settings(
        "--model-name", str(shared_model("tinyllama-shape"))
    )  # whose pad token is </s>
    tokenizer = train_rlhf.load_tokenizer(settings.model_name, settings)
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_a_tokenizer_without_a_pad_token_gets_one(copy_of_demo_model, make_settings):
    path = copy_of_demo_model / "tokenizer_config.json"
    config = json.loads(path.read_text())
    del config["pad_token"]
    path.write_text(json.dumps(config))
    settings = make_settings("--model-name", str(copy_of_demo_model))
    assert train_rlhf.load_tokenizer(settings.model_name, settings).pad_token is not None


def test_a_prompt_longer_than_the_context_is_an_error(demo_model, make_settings):
    room = json.loads((demo_model / "config.json").read_text())["max_position_embeddings"] - 8
    long = "very " * 300 + "good"
    settings = make_settings("--prompts", "Life is", long, "--eval-prompts", "My day", "x" + long)
    with pytest.raises(train_rlhf.SettingsError) as error:
        train_rlhf.load_tokenizer(settings.model_name, settings)
    lines = str(error.value).splitlines()[1:]
    assert len(lines) == 2
    for line, name in zip(lines, ("PROMPTS", "EVAL_PROMPTS")):
        assert line.startswith(f"- {name} has ")
        assert f"give one of at most {room}, or lower MAX_NEW_TOKENS" in line
        assert len(line) < 300


def test_more_new_tokens_than_the_context_are_an_error_of_their_own(make_settings):
    settings = make_settings("--max-new-tokens", "256")
    with pytest.raises(
        train_rlhf.SettingsError, match="MAX_NEW_TOKENS is 256: give less than the context of 256"
    ):
        train_rlhf.load_tokenizer(settings.model_name, settings)


@pytest.mark.parametrize("layer", ["lm_head", "embed_tokens"])
def test_tied_embeddings_are_not_adapted(build, make_settings, layer):
    with pytest.raises(train_rlhf.SettingsError, match=r"LORA_TARGETS is .* tied"):
        build(make_settings("--lora-targets", layer))


# ---------------------------------------------------------------------------------------- before the first update
def test_before_the_first_update_policy_and_base_model_are_one(build, settings):
    built = build(settings)
    queries = ask(built.tokenizer, *settings.prompts)
    torch.manual_seed(0)
    responses = train_rlhf.generate(built.policy, built.tokenizer, queries)
    built.trainer.token_scores = [torch.ones(len(response)) for response in responses]
    inputs = built.trainer.prepare_model_inputs(queries, responses)
    with torch.no_grad():
        logprobs, _, values, _ = built.trainer.batched_forward_pass(
            built.policy, queries, responses, inputs
        )
        with built.trainer.optional_peft_ctx():
            ref_logprobs, *_ = built.trainer.batched_forward_pass(
                built.policy, queries, responses, inputs
            )
    torch.testing.assert_close(logprobs, ref_logprobs, atol=1e-6, rtol=0)
    assert not values.any()
    kl, _ = train_rlhf.compare_with_base(built.trainer, queries, responses)
    torch.testing.assert_close(kl, torch.zeros(len(queries)), atol=1e-6, rtol=0)


def test_the_first_step_starts_at_no_kl(build, step, settings):
    torch.manual_seed(0)
    assert step(build(settings))["objective/kl"] == pytest.approx(0, abs=1e-6)


# -------------------------------------------------------------------------------------------------------- padding
@pytest.fixture(params=["llama", "gpt2"])
def model_name(request, demo_model):
    return str(demo_model if request.param == "llama" else request.getfixturevalue("gpt2"))


def test_padding_changes_no_log_probability_and_no_value(build, step, make_settings, model_name):
    built = build(make_settings("--model-name", model_name))
    torch.manual_seed(0)
    step(built)  # so that neither adapter nor value head is zero
    queries = ask(built.tokenizer, "Life", "I'm feeling as if I could do it all", "My")
    responses = ask(
        built.tokenizer, "is good", "and so", "day was long and I am so very tired of it all"
    )

    def forward(rows):
        batch = [queries[i] for i in rows], [responses[i] for i in rows]
        built.trainer.token_scores = [torch.ones(len(response)) for response in batch[1]]
        inputs = built.trainer.prepare_model_inputs(*batch)
        with torch.no_grad():
            logprobs, _, values, masks = built.trainer.batched_forward_pass(
                built.policy, *batch, inputs
            )
        return [
            (logprobs[i][masks[i].bool()], values[i][masks[i].bool()]) for i in range(len(rows))
        ]

    for row, (logprobs, values) in enumerate(forward([0, 1, 2])):
        assert len(logprobs) == len(responses[row])
        ((logprobs_alone, values_alone),) = forward([row])
        torch.testing.assert_close(logprobs, logprobs_alone, atol=2e-5, rtol=0)
        torch.testing.assert_close(values, values_alone, atol=2e-5, rtol=0)
        assert values.any()


def test_padding_changes_no_loss(build, step, make_settings, model_name):
    settings = make_settings("--model-name", model_name, "--batch-size", "2", "--ppo-epochs", "2")
    stats = []
    for multiple in (None, 32):
        built = build(settings)
        built.trainer.data_collator.pad_to_multiple_of = multiple
        queries = ask(built.tokenizer, "Life is", "I'm feeling as if I")
        responses = ask(built.tokenizer, "good so far", "could do")
        for _ in range(2):  # the second step has a KL
            result = step(built, queries, responses)
        stats.append(result)
        width = built.trainer.prepare_model_inputs(queries, responses)["input_ids"].shape[1]
        assert (width == 32) == (multiple == 32)
    names = [
        "objective/kl",
        "ppo/loss/policy",
        "ppo/loss/value",
        "ppo/policy/approxkl",
        "ppo/mean_non_score_reward",
    ]
    assert stats[0]["objective/kl"] > 0
    for name in names:
        assert stats[1][name] == pytest.approx(stats[0][name], rel=1e-3, abs=1e-6), name


# --------------------------------------------------------------------------------------------------------- update
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_steps_change_adapter_and_value_head_and_not_a_bit_of_the_base_model(
    build, step, make_settings, dtype
):
    built = build(make_settings("--dtype", dtype))
    frozen = frozen_parameters(built.policy)
    trained = {name: value.clone() for name, value in trained_parameters(built.policy).items()}
    torch.manual_seed(0)
    for _ in range(2):
        step(built)
    now = dict(built.policy.named_parameters())
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    assert [name for name, value in trained.items() if torch.equal(now[name], value)] == []


def test_the_base_model_is_that_of_the_file_after_steps_too(build, step, settings, demo_model):
    built = build(settings)
    torch.manual_seed(0)
    step(built)
    base = copy.deepcopy(built.policy.pretrained_model).unload()
    for name, value in load_file(demo_model / "model.safetensors").items():
        assert torch.equal(base.state_dict()[name], value.float())


# ---------------------------------------------------------------------------------------------------------- saving
@pytest.mark.parametrize("steps", [0, 5])
def test_a_saved_policy_says_the_same_in_plain_transformers(
    build, step, make_settings, demo_model, tmp_path, monkeypatch, steps
):
    settings = make_settings("--learning-rate", "0.003")
    built = build(settings)
    torch.manual_seed(0)
    for _ in range(steps):
        step(built)
    prompts = settings.prompts + settings.eval_prompts
    before = greedy(built.policy.pretrained_model, built.tokenizer, prompts)
    train_rlhf.save_model(built.policy, built.tokenizer, settings, tmp_path / "saved")

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
    settings = make_settings("--temperature", "0.7", "--max-new-tokens", "9")
    built = build(settings)
    train_rlhf.save_model(built.policy, built.tokenizer, settings, tmp_path / "saved")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").generation_config
    assert (config.do_sample, config.temperature, config.top_k, config.max_new_tokens) == (
        True,
        0.7,
        0,
        9,
    )


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
    folder = save_random_model(
        config, AutoTokenizer.from_pretrained(demo_model), tmp_path / "random"
    )
    settings = make_settings(
        "--model-name", str(folder), "--quantization", bits, "--learning-rate", "0.003"
    )
    built = build(settings)
    torch.manual_seed(0)
    for _ in range(2):
        step(built)
    inputs = built.tokenizer("I feel so", return_tensors="pt")
    with torch.no_grad():
        before = torch.softmax(
            built.policy.pretrained_model(**inputs).logits[0, -1].float(), dim=-1
        )
    train_rlhf.save_model(built.policy, built.tokenizer, settings, tmp_path / "saved")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "saved")
    assert not getattr(model.config, "quantization_config", None)
    with torch.no_grad():
        after = torch.softmax(model(**inputs).logits[0, -1].float(), dim=-1)
    assert (before - after).abs().sum() < 0.1
