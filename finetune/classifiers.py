"""A sequence classifier as what scores texts."""

from dataclasses import dataclass
from typing import Any

import torch
import transformers

from finetune.beginnings import logits_at_ends, passes_for, reads_beginnings
from finetune.errors import RunError, SettingsError, blame, shorten
from finetune.files import Row
from finetune.hub import find_model
from finetune.judged import judged_ids, prompt_before
from finetune.models import load_weights
from finetune.prompts import last_said
from finetune.scale import Scale
from finetune.tokens import check_ids, pad


@dataclass(frozen=True)
class Output:
    """Which output of a classifier is the score, and how it is taken."""

    index: int
    among_all: bool  # whether its log-odds are those among all labels, of which one is right
    meaning: str  # in words


@dataclass(frozen=True)
class Classifier:
    """A sequence classifier as a function from prompts and completions to scores."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    output: Output  # that is the score
    batch_size: int  # texts at once
    reads_beginnings: bool = False  # whether one pass gives the scores of all beginnings

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        """Return the score of each prompt with its completion."""
        pairs = zip(prompts, completions)
        logits = self.logits_of([prompt + completion for prompt, completion in pairs])
        scores: list[float] = self.scores_of(logits).tolist()
        return scores

    def text_before(self, row: Row, is_chat: bool) -> str:
        """Return what stands before the response to a row's prompt, as the model learned it."""
        form = getattr(self.model.config, "conversation_form", None)
        # A classifier from elsewhere gets the last message.
        if form is None:
            return last_message(row, is_chat)
        return prompt_before(self.tokenizer, row, is_chat, form)

    def logits_of(self, texts: list[str]) -> torch.Tensor:
        """Return the logits, (texts, labels); of a text that is too long the end counts."""
        context = getattr(self.model.config, "max_position_embeddings", None) or 10**6
        length = min(self.tokenizer.model_max_length, context)
        sequences = [judged_ids(self.tokenizer, text, length) for text in texts]
        try:
            check_ids(self.model, self.tokenizer, sequences)
        except ValueError as error:
            remedy = "name another classifier"
            raise RunError(f"{self.model.name_or_path}: {error}: {remedy}") from error
        if self.reads_beginnings:
            return self.logits_by_passes(sequences)

        logits = []
        for start in range(0, len(sequences), self.batch_size):
            inputs = pad(self.tokenizer, sequences[start : start + self.batch_size])
            with torch.no_grad():
                logits.append(self.model(**inputs.to(self.model.device)).logits)
        return torch.cat(logits)

    def logits_by_passes(self, sequences: list[list[int]]) -> torch.Tensor:
        """Return the logits of sequences, of which some are beginnings of others."""
        passes = passes_for(sequences)
        logits = []
        for start in range(0, len(passes), self.batch_size):
            batch = passes[start : start + self.batch_size]
            logits.append(logits_at_ends(self.model, self.tokenizer, batch))
        places = [place for one in passes for place in one.places]
        order = torch.tensor(places).argsort()
        return torch.cat(logits)[order.to(self.model.device)]

    def scores_of(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the scores, (batch,): an output, or its log-odds among all of them."""
        config, chosen = self.model.config, self.output.index
        scores = logits[:, chosen]
        if self.output.among_all:
            others = [index for index in range(logits.shape[1]) if index != chosen]
            scores = scores - logits[:, others].logsumexp(1)

        # Training on comparisons leaves its scores' mean and deviation in the config.
        if getattr(config, "score_mean", None) is None:
            return scores
        return (scores - config.score_mean) / config.score_std


def last_message(row: Row, is_chat: bool) -> str:
    """Return a prompt, or the last message of a conversation, as a scorer of texts gets it."""
    # The answer to what was said in a chat begins on a line of its own.
    return last_said(row["prompt"]) + ("\n" if is_chat else "")


def find_output(config: Any, name: str, wanted: str) -> Output:
    """Return the output that a label means, by its name in any case or by its index.

    name: of the classifier. What an output is depends on problem_type in its config.json, as
    transformers trains it. Raises SettingsError where there is no such label.
    """
    labels = [text for _, text in sorted(config.id2label.items())]
    if len(labels) == 1:
        return Output(0, among_all=False, meaning="its only output")

    lower = [label.lower() for label in labels]
    if wanted.lower() in lower:
        index = lower.index(wanted.lower())
    elif wanted.isdecimal() and int(wanted) < len(labels):
        index = int(wanted)
    else:
        remedy = f"give a label of {shorten(name)}: {shorten(' or '.join(labels))}"
        raise SettingsError(f"REWARD_LABEL is {shorten(wanted)}: {remedy}, or its index")

    label = labels[index]
    if config.problem_type == "regression":
        return Output(index, among_all=False, meaning=f"the output {label}")
    if config.problem_type == "multi_label_classification":
        return Output(index, among_all=False, meaning=f"the log-odds of {label} by itself")
    return Output(index, among_all=True, meaning=f"the log-odds of {label} among its labels")


def load_classifier(
    setting: str,
    name: str,
    label: str,
    batch_size: int,
    device: torch.device,
) -> tuple[Classifier, Scale | None]:
    """Return a sequence classifier, and its scale where its config has one, else None.

    label: that the score is of, where there are several. Raises SettingsError
    for the setting, or for REWARD_LABEL where there is no such label.
    """
    usual = "positive_word_reward or FILE.py:FUNCTION"
    with blame(setting, name, f"name a sequence classifier, or give {usual}"):
        path = find_model(setting, name)
        tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        auto_class = transformers.AutoModelForSequenceClassification
        place = {"": str(device)}
        model = load_weights(auto_class, path, dtype="float32", device_map=place).eval()

    # A text ends with the response: it is padded on the right and cut on the left.
    pad_token = tokenizer.pad_token or tokenizer.unk_token
    tokenizer.pad_token = pad_token or tokenizer.eos_token
    tokenizer.padding_side, tokenizer.truncation_side = "right", "left"
    model.config.pad_token_id = tokenizer.pad_token_id
    with blame(setting, name, "name another classifier"):
        check_ids(model, tokenizer, [])

    output = find_output(model.config, name, label)

    # A text that scores 0 is as likely chosen as rejected.
    scale = None
    if getattr(model.config, "score_mean", None) is not None:
        accuracy = getattr(model.config, "score_accuracy", None)
        scale = Scale(threshold=0.0, accuracy=accuracy)
    is_causal = reads_beginnings(model, tokenizer)
    return Classifier(model, tokenizer, output, batch_size, is_causal), scale
