"""What scores texts: a function or a classifier."""

import copy
import inspect
import os
import traceback
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from finetune.classifiers import Classifier, last_message, load_classifier
from finetune.errors import RunError, SettingsError, shorten
from finetune.fields import LeftOut
from finetune.files import Row
from finetune.functions import function_in_file
from finetune.guests import as_guest, awaited
from finetune.prompts import is_turn, last_said
from finetune.scale import Scale


# --------------------------------------------------------------------------- the scorer
@dataclass(frozen=True)
class Scorer:
    """What returns a score for each text that was said to the prompt of a row."""

    setting: str  # that names the function, for messages
    function: Callable[..., Any]  # called as TRL's GRPOTrainer would
    chat_template: bool  # whether prompts that are texts go through the chat template
    # What stands before a response, of a row and of whether its prompt is a turn, for a
    # function that wants plain texts as prompts; None = it gets whole rows.
    text_before: Callable[[Row, bool], str] | None = None

    @property
    def meaning(self) -> str | None:
        """What the score of a classifier is, in words; None of a function."""
        if isinstance(self.function, Classifier):
            return self.function.output.meaning
        return None

    @property
    def reads_beginnings(self) -> bool:
        """Whether the scores of all beginnings of a text are had in one pass."""
        return isinstance(self.function, Classifier) and self.function.reads_beginnings

    def __call__(self, rows: list[Row], texts: list[str]) -> list[float]:
        """Return the score of the text for each row; raise RunError where there is none."""
        return call_scorer(self.setting, self.function, self.asked_of(rows), texts)

    def asked_of(self, rows: list[Row]) -> list[Row]:
        """Return rows as the function gets them: whole, or with a text as prompt alone."""
        if self.text_before is None:
            return rows
        asked = []
        for row in rows:
            prompt_is_turn = is_turn(row["prompt"], self.chat_template)
            asked.append({"prompt": self.text_before(row, prompt_is_turn)})
        return asked

    def try_out(self, rows: list[Row]) -> None:
        """Make sure that all prompts can be scored, and two texts are, one empty as all begin.

        Raises SettingsError.
        """
        for row in rows:
            try:
                self.asked_of([row])
            except LeftOut as reason:
                name = shorten(name_of(self.function))
                prompt = shorten(last_said(row["prompt"]))
                problem = f"{self.setting} is {name}: it can't judge {prompt!r}, a prompt {reason}"
                remedy = "name another, or leave such prompts out"
                raise SettingsError(f"{problem}: {remedy}") from reason
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

    function: of the script, where the setting names one, and of_texts whether it wants
    plain texts. Where it is None, name is FILE.py:FUNCTION or a classifier.
    """
    if function is not None:
        text_before = last_message if of_texts else None
        return Scorer(setting, function, chat_template, text_before), None
    if ".py" in name:
        return Scorer(setting, function_in_file(setting, name), chat_template), None
    classifier, scale = load_classifier(setting, name, label, batch_size, device)
    return Scorer(setting, classifier, chat_template, classifier.text_before), scale


# ------------------------------------------------------------------------- the function
class NoScores(ValueError):
    """Raised where a function returns what is no score for each text."""


def call_scorer(
    setting: str,
    function: Callable[..., Any],
    rows: list[Row],
    texts: list[str],
) -> list[float]:
    """Return the scores of texts from a function called as TRL's GRPOTrainer would.

    A call that fails is tried once more, and then text by text. Raises RunError with the text for
    which the function fails, and the line.
    """
    try:
        return scores_of_call(function, rows, texts)
    except RunError:
        raise
    except (Exception, SystemExit) as failure:
        error = failure

    # What failed by chance, as a service in the network, may go well once more.
    with suppress(Exception, SystemExit):
        if not isinstance(error, NoScores):
            return scores_of_call(function, rows, texts)

    # Where one text is to blame, the call with it alone raises and names it.
    if len(texts) > 1:
        pairs = zip(rows, texts)
        scores = [call_scorer(setting, function, [row], [text])[0] for row, text in pairs]
        if not isinstance(error, NoScores):
            return scores

    cause = error.__cause__ if isinstance(error, NoScores) and error.__cause__ else error
    place = place_of(function, error)
    problem = f"{shorten(repr(cause), 200)} for {texts[0]!r} in {place}"
    raise RunError(f"{setting} is {name_of(function)}: {problem}: {remedy_for(cause)}") from error


def scores_of_call(
    function: Callable[..., Any],
    rows: list[Row],
    texts: list[str],
) -> list[float]:
    """Return the scores from a single call of a function, or raise whatever it raises."""
    arguments = arguments_for(rows, texts)
    with as_guest():
        returned = awaited(function(**arguments))
    try:
        return as_floats(returned, len(texts))
    except Exception as error:
        raise NoScores() from error


def remedy_for(error: BaseException) -> str:
    """Return what to do about the error of a function that scores texts."""
    if isinstance(error, OSError):
        return "see that what it asks can be reached, then go on with --resume"
    return "let f(prompts, completions, **kwargs) return a finite number for each completion"


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a function, or of the model that a classifier was loaded from."""
    if isinstance(function, Classifier):
        return str(function.model.name_or_path)
    return getattr(function, "__name__", type(function).__name__)


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

    path, folder = code.co_filename, os.path.join(os.getcwd(), "")
    path = path.removeprefix(folder)
    line = code.co_firstlineno
    for frame in traceback.extract_tb(error.__traceback__):
        if frame.filename == code.co_filename:
            line = frame.lineno
    return f"{path}, line {line}"
