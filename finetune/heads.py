"""A model with one output, the score of a text: made of another, saved, and asked."""

from pathlib import Path
from typing import Any

import torch
import transformers

from finetune.classifiers import load_classifier
from finetune.comparisons import read_judged
from finetune.errors import blame
from finetune.fields import Tally
from finetune.held_out import end_line
from finetune.hub import base_of, context_of, find_model
from finetune.judged import judged_text
from finetune.models import add_adapter, load_base_model
from finetune.saving import save_model
from finetune.settings import StageSettings


def load_with_head(
    settings: Any,
    device: torch.device,
    dtype: str,
) -> tuple[Any, transformers.PreTrainedTokenizerBase]:
    """Return a model with one output, its head zero, and its tokenizer.

    With LORA_RANK 0 the head alone is trained, else an adapter too. Raises SettingsError for a
    model that can't be used. Of the settings those of a stage and LORA_RANK are read.
    """
    files = "config.json, *.safetensors and a tokenizer"
    remedy = f"name a language model or a classifier with {files}"
    with blame("MODEL_NAME", settings.model_name, remedy):
        path = find_model("MODEL_NAME", settings.model_name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(base_of(path))
        model = load_base_model(
            path,
            device,
            dtype,
            settings.quantization,
            auto_class="AutoModelForSequenceClassification",
            new_head=True,
            num_labels=1,
        )
        length = min(settings.max_length, tokenizer.model_max_length, context_of(path))
        tokenizer.model_max_length = int(length)

    set_up_padding(model, tokenizer)
    heads = heads_of(model)
    zero_head(model)
    for head in heads:
        model.get_submodule(head).float()
    if settings.lora_rank == 0:
        freeze_all_but(model, heads)
        return model, tokenizer

    adapted = add_adapter(
        model,
        settings,
        lora_dropout=settings.lora_dropout,
        modules_to_save=heads,
        exclude_modules=heads,
        task_type="SEQ_CLS",
    )
    return adapted, tokenizer


def set_up_padding(
    model: transformers.PreTrainedModel,
    tokenizer: transformers.PreTrainedTokenizerBase,
) -> None:
    """Let texts be padded on the right and cut on the left: an answer is the end."""
    tokenizer.padding_side = "right"
    tokenizer.truncation_side = "left"

    # The score is read where the last token stands that is no pad: no other may be the pad.
    others = (None, tokenizer.eos_token, tokenizer.bos_token, tokenizer.unk_token)
    if tokenizer.pad_token in others:
        tokenizer.add_special_tokens({"pad_token": "<|pad|>"})
        embeddings: Any = model.get_input_embeddings()
        if len(tokenizer) > embeddings.num_embeddings:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.config.pad_token_id = tokenizer.pad_token_id


def heads_of(model: transformers.PreTrainedModel) -> list[str]:
    """Return the names of the modules that have weights and are not of the body."""
    heads = []
    for name, module in model.named_children():
        has_weights = any(True for _ in module.parameters())
        if has_weights and name != model.base_model_prefix:
            heads.append(name)
    return heads


def zero_head(model: transformers.PreTrainedModel) -> None:
    """Set the last linear layer to zero: random first scores would mean nothing."""
    layers = [module for module in model.modules() if isinstance(module, torch.nn.Linear)]
    for parameter in layers[-1].parameters():
        torch.nn.init.zeros_(parameter)


def freeze_all_but(model: transformers.PreTrainedModel, heads: list[str]) -> None:
    """Let the heads alone be trained."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad = name.split(".")[0] in heads


def save_with_head(
    model: Any,
    tokenizer: transformers.PreTrainedTokenizerBase,
    settings: StageSettings,
    folder: Path,
) -> None:
    """Save the model, its adapter merged in and by itself too, or without one as it is."""
    if hasattr(model, "peft_config"):
        # The base of the adapter has no embedding of a pad token that was added.
        base_tokenizer = transformers.AutoTokenizer.from_pretrained(tokenizer.name_or_path)
        save_model(model, tokenizer, settings, folder, base_tokenizer)
    else:
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def show_scores(settings: Any, device: torch.device) -> None:
    """Print the scores of the texts in SCORE by the model in OUTPUT_DIR, as PPO would get them."""
    classifier, _ = load_classifier(
        setting="OUTPUT_DIR",
        name=settings.output_dir,
        label="",
        batch_size=settings.eval_batch_size,
        device=device,
    )
    form = getattr(classifier.model.config, "conversation_form", "lines")
    texts = []
    tally = Tally()
    remedy = "give texts, or files of rows with text, prompt and completion, or messages"
    for entry in settings.score:
        with blame("SCORE", entry, remedy):
            for dialogue in read_judged(entry, tally):
                texts.append(judged_text(classifier.tokenizer, dialogue, form))

    if tally.unused:
        print(f"{len(texts)} texts{tally.in_words()}", flush=True)
    prompts = [""] * len(texts)
    for text, score in zip(texts, classifier(prompts, texts)):
        print(f"{score:+8.3f}  {end_line(text)}", flush=True)
