"""What scores texts: a function or a classifier."""

import copy
import inspect
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import transformers

from finetune.data import Row, is_turn, last_said
from finetune.errors import RunError, SettingsError, blame, shorten
from finetune.functions import function_in_file
from finetune.hub import find_model
from finetune.models import load_weights


# ---------------------------------------------------------------------------- the scale
@dataclass(frozen=True)
class Scale:
    """How scores become what is trained on, and which of them are a success."""

    mean: float = 0.0  # of the scores before training
    deviation: float = 1.0  # of these scores
    graded: bool = False  # whether there are more scores than a rule's two
    threshold: float | None = None  # higher is a success; None = there is none
    accuracy: float | None = None  # of the classifier, on held-out comparisons

    def apply(self, scores: torch.Tensor) -> torch.Tensor:
        """Return scores as they are trained on: graded ones begin as 0 ± 1."""
        scaled = (scores - self.mean) / self.deviation
        # Where good ones are rare, far from the mean, they would be worth any
        # price: so what is graded counts by its logarithm.
        return scaled.asinh() if self.graded else scaled


def scale_of(scores: torch.Tensor) -> Scale:
    """Return the scale for scores of the base model's samples; print what it does.

    scores: (samples,). Two scores or one are a rule's: it is left as it is, and its
    higher score is a success. More are graded.
    """
    values = scores.unique()
    if len(values) <= 2:
        shown = " or ".join(f"{value:g}" for value in values.tolist())
        line = f"the base model's samples score {shown}: left as it is"
        print(f"Scale     {line}\n", flush=True)
        return Scale(threshold=(scores.min() + scores.max()).item() / 2)

    mean, deviation = scores.mean().item(), scores.std().item()
    line = f"the base model's {mean:.3g} ± {deviation:.3g} becomes 0 ± 1"
    print(f"Scale     {line}\n", flush=True)
    return Scale(mean=mean, deviation=deviation, graded=True)


def success_rate(scores: list[float], threshold: float | None) -> float | None:
    """Return the share of scores above the threshold, None where there is none."""
    if threshold is None:
        return None
    return sum(score > threshold for score in scores) / len(scores)


# --------------------------------------------------------------------------- the scorer
@dataclass(frozen=True)
class Scorer:
    """What returns a score for each text that was said to the prompt of a row."""

    setting: str  # that names the function, for messages
    function: Callable[..., Any]  # called as TRL's GRPOTrainer would
    of_texts: bool  # whether the function wants plain texts as prompts, or whole rows
    chat_template: bool  # whether prompts that are texts go through the chat template

    def __call__(self, rows: list[Row], texts: list[str]) -> list[float]:
        """Return the score of the text for each row; raise RunError where there is none."""
        if self.of_texts:
            rows = [self.with_text(row) for row in rows]
        return call_scorer(self.setting, self.function, rows, texts)

    def with_text(self, row: Row) -> Row:
        """Return a row with a text as its prompt, and nothing else."""
        prompt = row["prompt"]
        # The answer to what was said in a chat begins on a line of its own.
        end = "\n" if is_turn(prompt, self.chat_template) else ""
        return {"prompt": last_said(prompt) + end}

    def try_out(self, rows: list[Row]) -> None:
        """Score two texts, one empty as every response begins, or raise SettingsError."""
        try:
            self([rows[0], rows[-1]], ["", " fine"])
        except RunError as error:
            raise SettingsError(str(error)) from error


def load_scorer(
    setting: str,
    name: str,
    function: Callable[..., Any] | None,
    label: str,
    batch_size: int,
    chat_template: bool,
    device: torch.device,
    of_texts: bool = False,
) -> tuple[Scorer, Scale | None]:
    """Return the scorer that a setting names, and its scale, None where it brings none.

    function: of the script, where the setting names one, and of_texts as in Scorer.
    Where it is None, name is FILE.py:FUNCTION or a classifier.
    """
    scale = None
    if function is None and ".py" in name:
        function, of_texts = function_in_file(setting, name), False
    elif function is None:
        function, scale = load_classifier(setting, name, label, batch_size, device)
        of_texts = True
    return Scorer(setting, function, of_texts, chat_template), scale


# ------------------------------------------------------------------------- the function
def call_scorer(
    setting: str,
    function: Callable[..., Any],
    rows: list[Row],
    texts: list[str],
) -> list[float]:
    """Return the scores of texts from a function called as TRL's GRPOTrainer would.

    Raises RunError with the text for which the function fails, and the line.
    """
    arguments = arguments_for(rows, texts)
    try:
        return as_floats(function(**arguments), len(texts))
    except (Exception, SystemExit) as error:
        # Where one text is to blame, the call with it alone raises and names it.
        if len(texts) > 1:
            for row, text in zip(rows, texts):
                call_scorer(setting, function, [row], [text])

        name = getattr(function, "__name__", type(function).__name__)
        place = place_of(function, error)
        problem = f"{shorten(repr(error), 200)} for {texts[0]!r} in {place}"
        remedy = "let f(prompts, completions, **kwargs) return a finite number for each completion"
        raise RunError(f"{setting} is {name}: {problem}: {remedy}") from error


def arguments_for(rows: list[Row], texts: list[str]) -> dict[str, Any]:
    """Return prompts, completions and all other fields of the rows, as lists by name.

    They are copies: what a function does to them, it does not do to the rows.
    """
    columns = {name: [row[name] for row in rows] for name in rows[0]}
    arguments: dict[str, Any] = copy.deepcopy(columns)
    prompts = arguments.pop("prompt")

    # To a conversation the completion is a conversation too.
    completions: list[Any] = []
    for prompt, text in zip(prompts, texts):
        turn = {"role": "assistant", "content": text}
        completions.append(text if isinstance(prompt, str) else [turn])
    return arguments | {"prompts": prompts, "completions": completions}


def as_floats(returned: Iterable[Any], count: int) -> list[float]:
    """Return what a function returned for so many texts as floats, or raise."""
    numbers = list(returned)
    has_texts = any(isinstance(number, str) for number in numbers)
    if len(numbers) != count or has_texts:
        raise ValueError(f"it returned {shorten(numbers)} for {count} texts")

    # The square of a score has to be finite in float32 too.
    scores = [float(number) for number in numbers]
    if not all(abs(score) < 1e15 for score in scores):
        raise ValueError(f"{shorten(scores)} has what is not finite or too large")
    return scores


def place_of(function: Callable[..., Any], error: BaseException) -> str:
    """Return the line of a function where an error arose, else where it begins."""
    code = getattr(inspect.unwrap(function), "__code__", None)
    if code is None:
        return "it"

    line = code.co_firstlineno
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == code.co_filename:
            line = frame.lineno
    return f"{code.co_filename}, line {line}"


# ----------------------------------------------------------------------- the classifier
@dataclass(frozen=True)
class Classifier:
    """A sequence classifier as a function from prompts and completions to scores."""

    model: transformers.PreTrainedModel
    tokenizer: transformers.PreTrainedTokenizerBase
    label: str  # whose log-odds are the score where there are several, in any case
    batch_size: int  # texts at once

    def __call__(self, prompts: list[str], completions: list[str]) -> list[float]:
        """Return the score of each prompt with its completion."""
        pairs = zip(prompts, completions)
        texts = [prompt + completion for prompt, completion in pairs]
        scores: list[float] = []
        for start in range(0, len(texts), self.batch_size):
            logits = self.logits_of(texts[start : start + self.batch_size])
            scores += self.scores_of(logits).tolist()
        return scores

    def logits_of(self, texts: list[str]) -> torch.Tensor:
        """Return the logits, (batch, labels); of a text that is too long the end counts."""
        context = getattr(self.model.config, "max_position_embeddings", None) or 10**6
        inputs = self.tokenizer(
            texts,
            padding=True,
            truncation=True,
            max_length=min(self.tokenizer.model_max_length, context),
            return_token_type_ids=False,
            return_tensors="pt",
        )
        with torch.no_grad():
            return self.model(**inputs.to(self.model.device)).logits

    def scores_of(self, logits: torch.Tensor) -> torch.Tensor:
        """Return the scores, (batch,): the only logit, or the log-odds of the label."""
        config, wanted = self.model.config, self.label.lower()
        labels = labels_of(config)
        scores = logits[:, 0]
        if len(labels) > 1:
            others = [index for index, label in enumerate(labels) if label != wanted]
            scores = logits[:, labels.index(wanted)] - logits[:, others].logsumexp(1)

        # Training on comparisons leaves its scores' mean and deviation in the config.
        if getattr(config, "score_mean", None) is None:
            return scores
        return (scores - config.score_mean) / config.score_std


def labels_of(config: Any) -> list[str]:
    """Return a classifier's labels, in lower case, in the order of its logits."""
    return [text.lower() for _, text in sorted(config.id2label.items())]


def load_classifier(
    setting: str,
    name: str,
    label: str,
    batch_size: int,
    device: torch.device,
) -> tuple[Classifier, Scale | None]:
    """Return a sequence classifier, and its scale where its config has one, else None.

    label: whose log-odds are the score, where there are several. Raises SettingsError
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

    labels = labels_of(model.config)
    if len(labels) > 1 and label.lower() not in labels:
        remedy = f"give a label of {shorten(name)}: {shorten(' or '.join(labels))}"
        raise SettingsError(f"REWARD_LABEL is {shorten(label)}: {remedy}")

    # A text that scores 0 is as likely chosen as rejected.
    scale = None
    if getattr(model.config, "score_mean", None) is not None:
        accuracy = getattr(model.config, "score_accuracy", None)
        scale = Scale(threshold=0.0, accuracy=accuracy)
    return Classifier(model, tokenizer, label, batch_size), scale
