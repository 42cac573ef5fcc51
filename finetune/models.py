"""Models: loaded whole, and adapted."""

from functools import partial
from typing import Any

import peft
import torch
import transformers
from torch.utils.checkpoint import checkpoint
from transformers import modeling_layers
from transformers.pytorch_utils import Conv1D

from finetune.errors import SettingsError, blame
from finetune.hub import base_of
from finetune.tokens import end_tokens, pad, pad_batch

# What the classifiers of transformers call their heads.
HEADS = ["score", "classifier", "classification_head"]


# -------------------------------------------------------------------------- the loading
def load_base_model(
    path: str,
    device: torch.device | str,
    dtype: str,
    quantization: str,
    auto_class: str = "AutoModelForCausalLM",
    **options: Any,
) -> Any:
    """Load a model, its frozen weights in 32, 16, 8 or 4 bits; an adapter is merged in.

    auto_class: the name of a class of transformers. options: new_head of load_weights,
    and others of from_pretrained. Raises ValueError for a model that can't be used.
    """
    base = base_of(path)
    if base != path:
        model = load_base_model(base, device, dtype, quantization, auto_class, **options)
        return merge_adapter(model, path)

    if quantization != "none":
        has_new_head = "new_head" in options
        options["quantization_config"] = bits_config(quantization, dtype, has_new_head)
    loader = getattr(transformers, auto_class)
    device_map = {"": str(device)}
    model = load_weights(loader, path, dtype=dtype, device_map=device_map, **options)

    # Of a slice of the states a CPU would copy the head's 16-bit weights for each row.
    head = model.get_output_embeddings()
    if head is not None and dtype != "float32":
        head.register_forward_pre_hook(make_contiguous)
    return model


def make_contiguous(layer: Any, arguments: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    """Let a layer get its states in one piece of memory; a hook."""
    states, *others = arguments
    return (states.contiguous(), *others)


def merge_adapter(model: transformers.PreTrainedModel, path: str) -> Any:
    """Return the model with the adapter in a folder merged into its weights."""
    # Left beside them, it would give its place to a second adapter, without a word.
    config = peft.PeftConfig.from_pretrained(path)
    config.task_type = None  # which asks for a model of one kind
    adapted: Any = peft.PeftModel.from_pretrained(model, path, config=config)
    merged = adapted.merge_and_unload()
    check_finite(merged)
    return merged


def bits_config(quantization: str, dtype: str, has_new_head: bool) -> Any:
    """Return how bitsandbytes keeps frozen weights in 8 or 4 bits, computing in dtype."""
    bits: dict[str, Any] = {f"load_in_{quantization}": True}
    if has_new_head:
        bits["llm_int8_skip_modules"] = HEADS  # a head is trained as it is
    return transformers.BitsAndBytesConfig(
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        bnb_4bit_use_double_quant=True,
        **bits,
    )


def load_weights(auto_class: Any, path: str, new_head: bool = False, **options: Any) -> Any:
    """Load a model from safetensors, and make sure that it is whole and finite.

    auto_class: a class of transformers. new_head: whether the head, and nothing else, may
    be random. options: of from_pretrained. Raises ValueError for what can't be used.
    """
    model, loading = auto_class.from_pretrained(
        path,
        ignore_mismatched_sizes=new_head,
        use_safetensors=True,
        trust_remote_code=False,
        output_loading_info=True,
        **options,
    )
    if not new_head:
        check_class(model, auto_class)
    check_complete(model, loading, new_head)
    check_quantized(model)

    # bitsandbytes would repack the weights for good.
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False

    check_finite(model)
    return model


# --------------------------------------------------------------------------- the checks
def check_class(model: transformers.PreTrainedModel, auto_class: Any) -> None:
    """Refuse a classifier as a language model, and the other way round."""
    # Tied weights would hide it: then nothing lacks.
    architecture = (model.config.architectures or ["model of no architecture"])[0]
    is_classifier = "SequenceClassification" in architecture
    if is_classifier != (auto_class is transformers.AutoModelForSequenceClassification):
        raise ValueError(f"it is a {architecture}")


def check_complete(model: Any, loading: dict[str, Any], new_head: bool) -> None:
    """Refuse a model that lacks weights: transformers would go on with random numbers.

    loading: what from_pretrained tells of it. new_head: whether those of the head may lack.
    """
    mismatched = [key[0] for key in loading["mismatched_keys"]]
    lacking = {*loading["missing_keys"], *mismatched}
    if new_head:
        body = f"{model.base_model_prefix}."
        lacking = {name for name in lacking if name.startswith(body)}
    if lacking:
        raise ValueError(f"it lacks weights such as {min(lacking)}")


def check_quantized(model: transformers.PreTrainedModel) -> None:
    """Refuse a model that could not be saved after it was quantized."""
    quantizer = getattr(model, "hf_quantizer", None)
    if not quantizer:
        return
    if quantizer.pre_quantized:
        raise ValueError("it is quantized already, take the model that it was made from")

    # A layer of bitsandbytes knows the class that it took the place of; others know none.
    replaced = {getattr(module, "source_cls", None) for module in model.modules()}
    if replaced == {None} or Conv1D in replaced:
        raise ValueError("it could not be saved after QUANTIZATION, give none for that")


def check_finite(model: torch.nn.Module) -> None:
    """Refuse a model with weights that are no numbers."""
    for name, weight in model.named_parameters():
        if not weight.isfinite().all():
            raise ValueError(f"it has weights that are not finite, such as {name}")


def check_padding(
    wrapped: Any,
    tokenizer: transformers.PreTrainedTokenizerBase,
    length: int = 3,
) -> None:
    """Refuse a model that says something else when padded, or knows what follows.

    wrapped: the model with a value head, as train_rlhf.py has it. length: in tokens.
    """
    model = wrapped.pretrained_model
    query = tokenizer("I am so very glad today", return_tensors="pt")["input_ids"][0]
    queries = [query[:2], query]  # beside the second the first is padded
    with torch.no_grad():
        output = model.generate(
            **pad(tokenizer, queries).to(model.device),
            min_new_tokens=length,
            max_new_tokens=length,
            do_sample=False,
            output_logits=True,
            return_dict_in_generate=True,
        )
        logits = torch.stack(output.logits, dim=1)[0].float()
        expected = torch.softmax(logits, dim=-1)

        # The first query alone, and padded. A high temperature would hide what differs.
        for count in (1, 2):
            responses = list(output.sequences[:count, -length:].cpu())
            inputs, mask = pad_batch(tokenizer, queries[:count], responses, model.device)
            states, _ = wrapped(**inputs, earned=mask.float())
            logits = wrapped.head(states[0]) * wrapped.head.temperature
            probabilities = torch.softmax(logits, dim=-1)

            # This is 2 where nothing is alike; weights in 16 bits make 0.04.
            difference = (expected - probabilities).abs().sum(-1).mean()
            if difference > 0.2:
                raise ValueError("padding, or what follows, changes its probabilities")


def head_is_whole(
    wrapped: Any, unsplit: Any, tokenizer: transformers.PreTrainedTokenizerBase
) -> bool:
    """Return whether the head that was found makes the very logits that the model makes.

    wrapped, unsplit: the model with a value head, as train_rlhf.py has it, with that head
    and without.
    """
    model, layer = wrapped.pretrained_model, wrapped.head.layer
    if layer is None:
        return False
    query = tokenizer("I am so very glad today", return_tensors="pt")["input_ids"][0]
    inputs, mask = pad_batch(tokenizer, [query], [query[-2:]], model.device)
    inputs["earned"] = mask.float()

    # What a family does to large logits is seen in large logits alone.
    factors = (1, 8)
    with torch.no_grad():
        try:
            states, _ = wrapped(**inputs)
            found = torch.cat([wrapped.head(factor * states) for factor in factors])
        # A model may make its logits without its head, or in another form.
        except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
            return False
        logits = []
        for factor in factors:
            multiply = partial(multiply_states, factor=factor)
            handle = layer.register_forward_pre_hook(multiply)
            states, _ = unsplit(**inputs)
            logits.append(unsplit.head(states))
            handle.remove()
    wanted = torch.cat(logits)

    # Of the same states the same is made, but for the order of sums.
    tolerance = max(1e-4, 4 * torch.finfo(model.dtype).eps)
    is_alike = found.shape == wanted.shape
    return is_alike and torch.allclose(found, wanted, rtol=tolerance, atol=tolerance)


def multiply_states(layer: Any, arguments: tuple[Any, ...], factor: float) -> tuple[Any, ...]:
    """Let a layer get so many times its states; a hook."""
    return (factor * arguments[0], *arguments[1:])


# ----------------------------------------------------------------------- the adaptation
def add_adapter(model: transformers.PreTrainedModel, settings: Any, **options: Any) -> Any:
    """Return the model with a LoRA adapter on the layers that LORA_TARGETS names.

    options: of peft.LoraConfig, beside rank, alpha and targets, which the settings have.
    """
    targets = settings.lora_targets
    adapts_all = targets == ["all-linear"]
    torch.manual_seed(settings.seed)  # of the adapter's first values
    with blame("LORA_TARGETS", targets, "name linear layers of this model, or all-linear"):
        config = peft.LoraConfig(
            r=settings.lora_rank,
            lora_alpha=settings.lora_alpha,
            target_modules="all-linear" if adapts_all else targets,
            **options,
        )
        adapted: Any = peft.get_peft_model(model, config)

        # PEFT refuses unknown names only where it knows none of them.
        names = " ".join(f".{name} " for name in adapted.base_model.targeted_module_names)
        unknown = [target for target in targets if f".{target} " not in names]
        if unknown and not adapts_all:
            raise ValueError(f"the model has no layer {unknown}")
    return adapted


def set_sampling(
    model: Any, tokenizer: transformers.PreTrainedTokenizerBase, settings: Any
) -> None:
    """Set how the model samples: by TEMPERATURE, up to MAX_NEW_TOKENS or an end token."""
    # Logprobs have to be those of the very distribution that is sampled: so no top-k,
    # penalty or minimum is taken over from the model.
    before = model.generation_config
    model.generation_config = transformers.GenerationConfig(
        do_sample=True,
        temperature=settings.temperature,
        top_k=0,
        max_new_tokens=settings.max_new_tokens,
        bos_token_id=before.bos_token_id,
        decoder_start_token_id=before.decoder_start_token_id,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_tokens(before.eos_token_id, tokenizer),
    )


def checkpoint_layers(model: torch.nn.Module) -> None:
    """Let backward compute again what is inside of a layer, so that it need not be kept.

    Raises SettingsError where the model has no layers that are made for it.
    """
    # The setting of transformers acts in training mode alone, where dropout would be on.
    layer_class = modeling_layers.GradientCheckpointingLayer
    layers = [module for module in model.modules() if isinstance(module, layer_class)]
    if not layers:
        remedy = "give False, since the model has no layers made for it"
        raise SettingsError(f"GRADIENT_CHECKPOINTING is True: {remedy}")

    # The states of random numbers are not kept: a layer without dropout draws none.
    options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, **options)
