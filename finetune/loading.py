"""The base model of a run, and those prompts that its template, context and embedding take."""

from typing import Any

import torch
import transformers

from finetune.chat import checked_rendering
from finetune.errors import SettingsError, blame, shorten
from finetune.fields import LeftOut, Tally
from finetune.files import Row
from finetune.hub import config_of, context_of, find_model
from finetune.models import load_base_model
from finetune.prompts import Prompts, is_turn, last_said
from finetune.tokens import check_ids, encode, load_tokenizer


def load_model(
    settings: Any, prompts: Prompts, device: torch.device | str, dtype: str
) -> tuple[Any, transformers.PreTrainedTokenizerBase, Prompts]:
    """Return the base model, its tokenizer, and those of the prompts that fit into it."""
    remedy = "name a language model with config.json, *.safetensors and a tokenizer"
    with blame("MODEL_NAME", settings.model_name, remedy):
        path = find_model("MODEL_NAME", settings.model_name)
        tokenizer = load_tokenizer(path)
        auto_class = "AutoModelForCausalLM"
        if config_of(path).is_encoder_decoder:
            auto_class = "AutoModelForSeq2SeqLM"
            tokenizer.padding_side = "right"  # as encoders have it

        context = context_of(path)
        rows = prompts_that_fit(context, tokenizer, prompts.rows, settings, prompts.tally)
        eval_rows = prompts_that_fit(context, tokenizer, prompts.eval_rows, settings, prompts.tally)
        model = load_base_model(path, device, dtype, settings.quantization, auto_class)
        queries = encode(tokenizer, rows + eval_rows, settings.chat_template)
        check_ids(model, tokenizer, queries)
    return model, tokenizer, prompts._replace(rows=rows, eval_rows=eval_rows)


def prompts_that_fit(
    context: float,
    tokenizer: transformers.PreTrainedTokenizerBase,
    rows: list[Row],
    settings: Any,
    tally: Tally,
) -> list[Row]:
    """Return the rows whose prompts leave room for a response in the model's context.

    context: in tokens, as from context_of. settings: of them CHAT_TEMPLATE and MAX_NEW_TOKENS are
    read. tally: counts the others. Raises SettingsError where the template refuses all prompts, or
    where none of them fits.
    """
    rows = prompts_of_template(tokenizer, rows, settings.chat_template, tally)
    queries = encode(tokenizer, rows, settings.chat_template)
    room = context - settings.max_new_tokens
    fitting = [row for row, query in zip(rows, queries) if len(query) <= room]
    if rows and not fitting:
        first = shorten(last_said(rows[0]["prompt"]))
        problem = f"MAX_NEW_TOKENS is {settings.max_new_tokens}, "
        problem += "too many for every prompt, such as"
        prompt = f"{first!r}, {len(queries[0])} tokens"
        remedy = f"give less, or shorter prompts; the model's context is {context}"
        raise SettingsError(f"{problem} {prompt}: {remedy}")
    tally.left_out["too long"] += len(rows) - len(fitting)
    return fitting


def prompts_of_template(
    tokenizer: transformers.PreTrainedTokenizerBase,
    rows: list[Row],
    chat_template: bool,
    tally: Tally,
) -> list[Row]:
    """Return the rows whose prompts the chat template takes, or which need none."""
    taken = []
    reasons = Tally()
    for row in rows:
        prompt = row["prompt"]
        try:
            if is_turn(prompt, chat_template):
                check_turns(tokenizer, row)
            taken.append(row)
        except LeftOut as reason:
            reasons.left_out[str(reason)] += 1

    if rows and not taken:
        problem = f"CHAT_TEMPLATE is {chat_template}: no prompt can be put into the model's"
        remedy = (
            "name a model with a chat template that takes these prompts, or give texts and False"
        )
        raise SettingsError(f"{problem} template ({reasons.reasons()}): {remedy}")
    tally.left_out.update(reasons.left_out)
    return taken


def check_turns(tokenizer: transformers.PreTrainedTokenizerBase, row: Row) -> None:
    """Raise LeftOut where the chat template does not take the prompt of a row."""
    if not tokenizer.chat_template:
        raise LeftOut("of a conversation, for which the model has none")
    if isinstance(row["prompt"], str):
        checked_rendering(tokenizer, [{"role": "user", "content": row["prompt"]}], None, True)
    else:
        checked_rendering(tokenizer, row["prompt"], row.get("tools"), True)
