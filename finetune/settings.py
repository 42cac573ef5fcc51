"""Constants and flags, turned into settings or into messages.

A script declares what its constants may be as a pydantic model: a field for each, in lower case,
with its type, its limits, and whether --resume may change it. Types and limits are told to the user
as the fields have them.
"""

import argparse
import difflib
import inspect
import os
import re
import sys
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

from finetune.errors import SettingsError, shorten

Check = Callable[..., object]


# ---------------------------------------------------------------------------- the types
class Converter:
    """A conversion whose every failure is a ValueError, which pydantic collects.

    Whoever edits a constant may write any object there, and that may raise anything.
    """

    def __init__(self, convert: Callable[[Any], Any]) -> None:
        self.convert = convert

    def __call__(self, value: Any) -> Any:
        """Return the value converted, or raise ValueError."""
        try:
            return self.convert(value)
        except Exception as error:
            raise ValueError(repr(error)) from error


def to_text(value: Any) -> str:
    """Return a text, a path's text or a function's name, or raise anything."""
    text = value.__name__ if inspect.isfunction(value) else os.fspath(value)
    text.encode()  # an error for half a character, as "\ud800"
    if not text.strip() or "\0" in text:
        raise ValueError("empty")
    return text


def to_list(value: Any) -> list[Any]:
    """Return a list, also of a single thing."""
    return list(value) if isinstance(value, list | tuple) else [value]


def to_switch(value: Any) -> bool:
    """Return True or False, also from their texts, or raise KeyError."""
    return {"true": True, "false": False}[str(value).lower()]


def to_number(value: Any) -> float:
    """Return a number, also from its text, or raise anything; True is no number."""
    if isinstance(value, bool):
        raise ValueError("a switch")
    return float(value)


def to_label(value: Any) -> str:
    """Return a label, or the number of one, as a text."""
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return str(value) if is_number else to_text(value)


Text = Annotated[str, BeforeValidator(Converter(to_text))]
Label = Annotated[str, BeforeValidator(Converter(to_label))]
Texts = Annotated[list[Text], BeforeValidator(Converter(to_list)), Field(min_length=1)]
TextsOrNone = Annotated[list[Text], BeforeValidator(Converter(to_list))]
Switch = Annotated[bool, BeforeValidator(Converter(to_switch))]
Whole = Annotated[int, BeforeValidator(Converter(to_number))]
Number = Annotated[float, BeforeValidator(Converter(to_number)), Field(allow_inf_nan=False)]
# float32 holds these rates, and their products.
RateOrAuto = Literal["auto"] | Annotated[Number, Field(ge=1e-30, le=1e30)]
NumberOrAuto = Literal["auto"] | Annotated[Number, Field(ge=-(10**15), le=10**15)]

Quantization = Annotated[Literal["none", "8bit", "4bit"], BeforeValidator(Converter(to_text))]
Device = Annotated[Literal["auto", "cpu", "cuda", "mps"], BeforeValidator(Converter(to_text))]
Dtype = Annotated[
    Literal["auto", "float32", "bfloat16", "float16"], BeforeValidator(Converter(to_text))
]

MILLION = 10**6
CHANGEABLE: dict[str, Any] = {"changeable": True}


def limits(low: float, high: float, changeable: bool = False) -> Any:
    """Return the field of a number that has to be within these limits, both included."""
    return Field(ge=low, le=high, json_schema_extra=CHANGEABLE if changeable else None)


def changeable() -> Any:
    """Return a field that --resume may change: the rest of the run stays the same run."""
    return Field(json_schema_extra=CHANGEABLE)


# --------------------------------------------------------------- what the scripts share
class CommonSettings(BaseModel):
    """What the constants of all four scripts may be."""

    model_config = ConfigDict(validate_assignment=True, protected_namespaces=())

    model_name: Text
    output_dir: Text = changeable()
    quantization: Quantization
    device: Device = changeable()
    dtype: Dtype
    seed: Whole = limits(0, 2**32 - 1)
    resume: Switch = changeable()
    log_every: Whole = limits(1, MILLION, changeable=True)


class TrainingSettings(CommonSettings):
    """What the constants of the three scripts that train may be."""

    lora_alpha: Whole = limits(1, MILLION)
    lora_targets: Texts
    batch_size: Whole = limits(1, MILLION)
    mini_batch_size: Whole = limits(0, MILLION, changeable=True)
    gradient_checkpointing: Switch = changeable()
    max_grad_norm: Number = limits(0, 1e30, changeable=True)
    eval_batch_size: Whole = limits(1, MILLION, changeable=True)
    save_every: Whole = limits(0, MILLION, changeable=True)
    save_adapter: Switch = changeable()
    report_to: TextsOrNone = changeable()

    @property
    def rows_at_once(self) -> int:
        """How many rows of a batch are passed at once: all where MINI_BATCH_SIZE is 0."""
        return self.mini_batch_size or self.batch_size


class StageSettings(TrainingSettings):
    """What the constants of the two stages before PPO may be."""

    data: Text
    eval_share: Number = limits(0.001, 0.9)
    max_length: Whole = limits(2, MILLION)
    lora_dropout: Number = limits(0, 0.9)
    learning_rate: RateOrAuto
    # The rates of all steps depend on how many there are.
    training_epochs: Number = limits(1e-6, MILLION)
    warmup_share: Number = limits(0, 0.9)
    group_by_length: Switch
    eval_every: Whole = limits(0, MILLION, changeable=True)


def fixed_settings(settings: CommonSettings) -> dict[str, Any]:
    """Return the settings that --resume may not change."""
    fields = type(settings).model_fields.items()
    names = [name for name, field in fields if field.json_schema_extra != CHANGEABLE]
    return {name: getattr(settings, name) for name in names}


# -------------------------------------------------------------------------- the reading
def read_settings(
    argv: Sequence[str],
    constants: Mapping[str, Any],
    model: type[BaseModel],
    checks: Iterable[Check],
) -> Any:
    """Return constants as settings, flags in argv before them, or raise all problems at once.

    constants: those of a script by name, its globals. model: what they may be. checks: functions
    whose arguments are settings, by name; each raises SettingsError for what it refuses. With
    --help in argv the constants are shown, and the process ends.
    """
    if "--help" in argv or "-h" in argv:
        show_help(Path(constants["__file__"]).read_text(encoding="utf-8"))
        sys.exit(0)
    values, problems = read_flags(argv, constants, model)

    # Each value is validated as it is set, so that all that are wrong are told at once.
    settings = model.model_construct()
    for name, field in model.model_fields.items():
        try:
            setattr(settings, name, values[name])
        except ValidationError:
            remedy = remedy_of(field)
            problems.append(f"{name.upper()} is {shorten(values[name])}: give {remedy}")
    valid = dict(settings)

    # A check is asked where none of its settings is wrong by itself.
    for check in checks:
        names = inspect.signature(check).parameters
        if valid.keys() >= names.keys():
            try:
                check(**{name: valid[name] for name in names})
            except SettingsError as error:
                problems += error.args
    if problems:
        raise SettingsError(*problems)
    return settings


def read_flags(
    argv: Sequence[str],
    constants: Mapping[str, Any],
    model: type[BaseModel],
) -> tuple[dict[str, Any], list[str]]:
    """Return a value for each field, of its flag or else its constant, and what is no flag."""
    fields = model.model_fields
    switches = [name for name, field in fields.items() if field.annotation is bool]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for name, field in fields.items():
        is_list = typing.get_origin(field.annotation) is list
        parser.add_argument(
            flag_of(name),
            dest=name,
            nargs="*" if is_list else "?",
            const=True if name in switches else None,
            default=constants.get(name.upper()),
        )

    # --no-resume is --resume=false.
    negations = {flag_of(f"no_{name}"): f"{flag_of(name)}=false" for name in switches}
    flags, unknown = parser.parse_known_args([negations.get(text, text) for text in argv])

    problems = []
    known = [flag_of(name) for name in fields]
    for text in unknown:
        similar = difflib.get_close_matches(text.partition("=")[0], known, n=2)
        hint = f"did you mean {' or '.join(similar)}?" if similar else "--help lists all"
        problems.append(f"{shorten(text)} is no flag, and follows none: {hint}")
    return vars(flags), problems


def flag_of(name: str) -> str:
    """Return the flag of a constant: --learning-rate for LEARNING_RATE."""
    return "--" + name.lower().replace("_", "-")


def remedy_of(field: FieldInfo) -> str:
    """Return in words what a field takes: its type, its choices or its limits."""
    if typing.get_origin(field.annotation) is Literal:
        choices = typing.get_args(field.annotation)
        return f"{', '.join(choices[:-1])} or {choices[-1]}"
    if typing.get_origin(field.annotation) is list:
        return "a list of texts, none empty"
    if field.annotation is bool:
        return "True or False"
    if field.annotation is str:
        return "a text"

    number = "a whole number" if field.annotation is int else "a number"
    bounds = list(field.metadata)
    # Of a union, such as of auto and a number, each part has its own.
    for part in typing.get_args(field.annotation):
        number = "a number, or auto,"
        for more in getattr(part, "__metadata__", ()):
            bounds += more.metadata if isinstance(more, FieldInfo) else [more]
    low = next(bound.ge for bound in bounds if hasattr(bound, "ge"))
    high = next(bound.le for bound in bounds if hasattr(bound, "le"))
    return f"{number} from {low} to {high}"


def show_help(source: str) -> None:
    """Print the constants of a script as flags, each with its default and its comment.

    source: the text of the script, whose sections begin with lines like "# --- Model".
    """
    sections = re.findall("^# --- .+?(?=^# -----)", source, flags=re.MULTILINE | re.DOTALL)
    text = "".join(sections).replace("  # fmt: skip", "")
    text = re.sub("^[A-Z_]+", lambda name: flag_of(name[0]), text, flags=re.MULTILINE)
    print(f"usage: {Path(sys.argv[0]).name} [--flag VALUE …]", end="    ")
    print(f"(for this run, in place of a constant)\n\n{text}")
