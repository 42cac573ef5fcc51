"""The policy: a language model with an adapter and a value head."""

import copy

import pytest
import torch
from helpers import evaluate, make_batch, refusals
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BloomConfig

from finetune.saving import save_model

ONE_UPDATE = ["--ppo-epochs", "1", "--target-approx-kl", "0"]
EACH_DTYPE = pytest.mark.parametrize("dtype", ["float32", "bfloat16"])


def weights_of(policy, trained):
    """Return copies of the weights that are trained, or of the frozen ones, by name."""
    weights = {}
    for name, value in policy.named_parameters():
        if value.requires_grad == trained:
            weights[name] = value.clone()
    return weights


def ask(tokenizer, *prompts):
    return [tokenizer(prompt, return_tensors="pt")["input_ids"][0] for prompt in prompts]


@pytest.fixture(scope="session")
def bloom(demo_model, save_random_model, tmp_path_factory):
    """Return the folder of a random BLOOM, which takes no positions."""
    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    config = BloomConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        n_layer=2,
        n_head=2,
        initializer_range=0.3,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return save_random_model(config, tokenizer, tmp_path_factory.mktemp("bloom"))


# -------------------------------------------------- adapter, value head
@EACH_DTYPE
def test_what_is_trained_and_how_it_starts(build, make_settings, dtype):
    built = build(make_settings("--dtype", dtype))
    trained = weights_of(built.policy, trained=True)
    assert all("lora_" in name or name.startswith("v_head.") for name in trained)
    assert all(value.dtype == torch.float32 for value in trained.values())
    (group,) = built.trainer.optimizer.param_groups
    assert all(value.requires_grad for value in group["params"])
    assert len({*map(id, group["params"])}) == len(trained)
    head = [value for name, value in trained.items() if name.startswith("v_head.")]
    assert head and not any(value.any() for value in head)
    frozen = weights_of(built.policy, trained=False)
    assert {value.dtype for value in frozen.values()} == {getattr(torch, dtype)}

    # Every linear layer but the output head is adapted: q, k, v, o, gate, up, down.
    adapted = [name for name in trained if "lora_A" in name]
    assert len(adapted) == 7 * built.policy.pretrained_model.config.num_hidden_layers
    assert not [name for name in adapted if "lm_head" in name]


def test_rank_and_targets_of_the_adapter_are_those_of_the_settings(build, make_settings):
    flags = ["--lora-rank", "3", "--lora-alpha", "12", "--lora-targets", "q_proj", "v_proj"]
    policy = build(make_settings(*flags)).policy
    trained = weights_of(policy, trained=True)
    adapted = [name for name in trained if "lora_A" in name]
    assert {trained[name].shape[0] for name in adapted} == {3}
    assert {name.split(".")[-4] for name in adapted} == {"q_proj", "v_proj"}
    layer = policy.pretrained_model.base_model.model.model.layers[0].self_attn.q_proj
    assert layer.scaling["default"] == 4.0


def test_tied_embeddings_are_not_adapted(call_main, demo_model, capsys):
    flags = ["--device", "cpu", "--lora-targets", "embed_tokens"]
    status = call_main("--model-name", demo_model, *flags)
    (problem,) = refusals(status, capsys.readouterr().err)
    assert problem.startswith("LORA_TARGETS is ['embed_tokens']: ")


def test_nothing_is_dropped_out(build, step, gpt2, make_settings):
    """GPT-2 comes with dropout, which would change the ratio of a policy to itself."""
    flags = ["--mini-batch-size", "2", "--learning-rate", "1e-30"]  # so that nothing moves
    built = build(make_settings("--model-name", str(gpt2), *flags))
    stats = step(built)
    assert stats["kl"] == pytest.approx(0, abs=1e-6)
    assert stats["approx_kl"] == pytest.approx(0, abs=1e-9)
    for name, module in built.policy.named_modules():
        if "lora_dropout" in name or name.startswith("v_head."):
            assert not getattr(module, "p", 0), name


def test_the_model_samples_at_the_temperature_that_it_is_trained_for(
    build, make_settings, tmp_path
):
    """And it goes on to where it is saved."""
    built = build(make_settings("--temperature", "0.7", "--max-new-tokens", "9"))
    model, saved = built.policy.pretrained_model, tmp_path / "saved"
    save_model(model, built.tokenizer, built.settings, saved)
    config = AutoModelForCausalLM.from_pretrained(saved).generation_config
    for each in (config, model.generation_config):
        assert each.do_sample and each.top_k == 0
        assert (each.temperature, each.max_new_tokens) == (0.7, 9)


# ---------------------------------------------- before the first update
def test_before_the_first_update_policy_and_base_model_are_one(build, roll_out, settings):
    built = build(settings)
    queries = ask(built.tokenizer, *settings.prompts)
    responses, _ = roll_out(built, queries)
    policy = evaluate(built, queries, responses)
    with built.trainer.optional_peft_ctx():
        base = evaluate(built, queries, responses)
    for (logprobs, values), (ref_logprobs, _) in zip(policy, base):
        assert torch.equal(logprobs, ref_logprobs)
        assert not values.any()
    kls, _ = built.trainer.compare_with_base(queries, responses, is_base=False)
    assert kls == [0] * len(queries)


# ------------------------------------------------ padding and positions
@pytest.mark.parametrize("model", ["demo_model", "gpt2", "bloom"])
def test_padding_changes_no_logprob_and_no_value(build, step, make_settings, request, model):
    folder = str(request.getfixturevalue(model))
    built = build(make_settings("--model-name", folder, "--mini-batch-size", "2"))
    torch.manual_seed(0)
    step(built)  # so that neither adapter nor value head is zero
    queries = ask(built.tokenizer, "Life", "I'm feeling as if I could do it all", "My")
    answers = ["is good", "and so", "day was long and I am so very tired of it all"]
    responses = ask(built.tokenizer, *answers)

    together = evaluate(built, queries, responses)
    for query, response, (logprobs, values) in zip(queries, responses, together):
        assert len(logprobs) == len(response)
        ((logprobs_alone, values_alone),) = evaluate(built, [query], [response])
        torch.testing.assert_close(logprobs, logprobs_alone, atol=2e-5, rtol=0)
        torch.testing.assert_close(values, values_alone, atol=2e-5, rtol=0)
        assert values.any()


@pytest.mark.parametrize(("model", "takes_positions"), [("gpt2", True), ("bloom", False)])
def test_positions_go_only_to_models_that_take_them(
    build, make_settings, request, model, takes_positions
):
    built = build(make_settings("--model-name", str(request.getfixturevalue(model))))
    given = []

    def see(module, args, kwargs):
        given.append(kwargs)

    backbone = built.policy.pretrained_model.get_base_model()
    backbone.register_forward_pre_hook(see, with_kwargs=True)
    queries = [torch.tensor(ids) for ids in ([5, 6, 7], [8])]
    responses = [torch.tensor(ids) for ids in ([9], [10, 11])]
    evaluate(built, queries, responses)
    (arguments,) = given
    if takes_positions:  # the last of the first row is padding
        assert arguments["position_ids"].tolist() == [[0, 1, 2, 3, 3], [0, 0, 0, 1, 2]]
    else:
        assert "position_ids" not in arguments


# --------------------------------------------------------------- update
@EACH_DTYPE
def test_steps_change_adapter_and_value_head_and_not_a_bit_of_the_base_model(
    build, step, make_settings, demo_model, dtype
):
    built = build(make_settings("--dtype", dtype, *ONE_UPDATE))
    frozen = weights_of(built.policy, trained=False)
    trained = weights_of(built.policy, trained=True)
    torch.manual_seed(0)
    for _ in range(2):
        step(built)
    now = dict(built.policy.named_parameters())
    same = {name for name, value in trained.items() if torch.equal(now[name], value)}
    assert not same
    assert all(torch.equal(now[name], value) for name, value in frozen.items())
    base = copy.deepcopy(built.policy.pretrained_model).unload().state_dict()
    for name, value in load_file(demo_model / "model.safetensors").items():
        assert torch.equal(base[name], value.to(getattr(torch, dtype)))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_a_step_on_a_gpu(build, step, roll_out, make_settings, dtype):
    built = build(make_settings("--device", "cuda", "--dtype", dtype))
    queries = ask(built.tokenizer, "Life is", "I")
    responses, _ = roll_out(built, queries)
    batch = make_batch(built, queries, responses)
    assert {part.device.type for part in (*batch.inputs.values(), *batch[1:])} == {"cuda"}
    first, second = step(built), step(built)
    assert first["skipped_updates"] == second["skipped_updates"] == 0
    assert second["kl"] > 0
