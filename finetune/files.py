"""Files of rows, folders and datasets of the Hub: told from texts, and read."""

# Bad settings are told within a second, and files are read for that. datasets takes
# longer to load: so the functions import it that need it.
import csv
import gzip
import hashlib
import io
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from finetune.errors import shorten
from finetune.fields import parsed
from finetune.hub_data import fetch_file, fetch_rows, quiet_datasets

Row = dict[str, Any]  # the fields of a row by name

# What a file holds, by the ending of its name; each may have .gz behind it.
FORMATS = {
    ".txt": "text",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".jsonlines": "json",
    ".ldjson": "json",
    ".jl": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".parquet": "parquet",
}
USUAL_ENDINGS = ".json, .jsonl, .csv, .tsv, .parquet or .txt"

# Other endings by which a text is taken for the name of a file, to say what to do.
OTHER_ENDINGS = re.compile(
    r"\S+\.(arrow|bin|data|db|docx?|feather|gz|html?|log|md|npy|ods|odt|orc|pdf|pickle|pkl|pt"
    r"|rtf|sqlite|tar|toml|xlsx?|xml|ya?ml|zip|zst)",
    re.IGNORECASE,
)

GZIP = b"\x1f\x8b"  # what a file begins with that gzip has packed

# What a folder that datasets saved has in it: one of these.
OF_A_DATASET = ("dataset_info.json", "dataset_dict.json")


# ----------------------------------------------------------------------- files or texts
def is_file(entry: str) -> bool:
    """Return whether an entry of PROMPTS means a file or a folder of rows, and is no text."""
    if os.path.isfile(entry) or is_saved_dataset(entry) or entry.startswith("hf://"):
        return True
    if ending_of(entry) in FORMATS or OTHER_ENDINGS.fullmatch(entry):
        return True
    # A path without spaces, to a folder or to a file of any ending.
    return bool(re.fullmatch(r"\S+/(\S*\.[a-z]\w{0,7})?", entry, re.ASCII | re.IGNORECASE))


def is_saved_dataset(path: str) -> bool:
    """Return whether this is a folder that was written by save_to_disk of datasets."""
    return any(os.path.isfile(os.path.join(path, name)) for name in OF_A_DATASET)


def is_on_hub(entry: str) -> bool:
    """Return whether DATA names a dataset of the Hub: OWNER/NAME, perhaps with :SPLIT."""
    is_name = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:\S+)?", entry, re.ASCII)
    return bool(is_name) and not os.path.exists(entry) and ending_of(entry) not in FORMATS


def ending_of(path: str) -> str:
    """Return the ending of a file's name in lower case, without .gz."""
    return Path(path.lower().removesuffix(".gz")).suffix


def hash_files(entries: Iterable[str], by_name: bool = False) -> dict[str, str]:
    """Return {entry: SHA-256 of what it holds} of those entries that are no texts.

    by_name: whether an entry may be the name of a dataset of the Hub.
    """
    hashes = {}
    for entry in entries:
        if os.path.isfile(entry):
            content = Path(entry).read_bytes()
        elif is_file(entry) or by_name:
            content = json.dumps(read_table(entry, by_name), default=str).encode()
        else:
            continue
        hashes[entry] = hashlib.sha256(content).hexdigest()
    return hashes


# -------------------------------------------------------------------------- the reading
def read_table(entry: str, by_name: bool = False) -> list[Any]:
    """Return the rows that an entry stands for, dictionaries or texts.

    entry: a file, a folder that datasets saved, a file of the Hub as hf://datasets/…, or, where
    by_name is True, the name of a dataset there. Raises ValueError, OSError, or whatever the
    library raises that reads it.
    """
    if entry.startswith("hf://"):
        return read_file(fetch_file(entry))
    if os.path.isdir(entry):
        return read_folder(entry)
    if by_name and is_on_hub(entry):
        return fetch_rows(entry)
    return read_file(entry)


def read_file(path: str) -> list[Any]:
    """Return the rows of a file, in the form that the ending of its name tells."""
    content = Path(path).read_bytes()
    form = FORMATS.get(ending_of(path))
    if form is None:
        problem = f"its ending does not tell what is in it: give it one of {USUAL_ENDINGS}"
        raise ValueError(f"{problem}, also with .gz")
    if content.startswith(GZIP):
        content = gzip.decompress(content)
    if form == "parquet":
        return parse_parquet(content)

    text = text_of(content)
    if form == "csv":
        return parse_csv(*separate(text, ending_of(path)))
    if form == "json":
        return parse_json(text.strip())

    texts = [line.strip() for line in text.split("\n") if line.strip()]
    if texts and re.match(r'\{\s*"[^"]*"\s*:', texts[0]):
        raise ValueError("its lines are JSON objects: give its name the ending .jsonl")
    if is_list_in_json(text.strip()):
        raise ValueError("it is a list in JSON: give its name the ending .json")
    return texts


def text_of(content: bytes) -> str:
    """Return bytes in UTF-8, with a byte order mark or without, as a text."""
    remedy = "save it as UTF-8"
    if content.startswith(b"PK"):
        raise ValueError("it is packed, as Excel's own files are: save it as .csv, in UTF-8")
    if content[:2] in (b"\xff\xfe", b"\xfe\xff") or b"\0" in content[:4]:
        raise ValueError(f"its encoding is UTF-16, it seems: {remedy}")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        problem = f"line {line} is not in UTF-8, but in another encoding such as cp1252"
        raise ValueError(f"{problem}: {remedy}") from error


# ---------------------------------------------------------------------------- the forms
def parse_json(text: str) -> list[Any]:
    """Return the rows of a list in JSON, of a single object, or of JSON in each line."""
    if text.startswith("["):
        return json.loads(text, object_pairs_hook=with_names_once)
    try:
        row = json.loads(text, object_pairs_hook=with_names_once)
    except ValueError as error:
        return parse_json_lines(text, error)

    # Some files are one object, and the rows are in it.
    for name in ("data", "train", "rows", "examples", "items"):
        rows = row.get(name) if isinstance(row, dict) else None
        if isinstance(rows, list) and all(isinstance(part, dict) for part in rows):
            problem = f"its rows are in the field {name} of a single object"
            raise ValueError(f"{problem}: save that list alone")
    return [row]


def with_names_once(pairs: list[tuple[str, Any]]) -> Row:
    """Return an object of JSON; refuse one that has a name twice, of which one would be lost."""
    row = dict(pairs)
    if len(row) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"it has the field {shorten(twice)} twice")
    return row


def parse_json_lines(text: str, error_of_all: ValueError) -> list[Any]:
    """Return the row in each line; empty lines have none.

    error_of_all: why the lines together are no JSON, which is told where the first is none.
    """
    # A line ends at a line feed alone: a text may well have other signs that end a line.
    rows = []
    for number, line in enumerate(text.split("\n"), start=1):
        if line.strip():
            try:
                rows.append(json.loads(line, object_pairs_hook=with_names_once))
            except json.JSONDecodeError as error:
                if line.rstrip().endswith(","):
                    problem = f"line {number} ends with a comma"
                    raise ValueError(f"{problem}: take it away") from error
                if not rows:
                    raise error_of_all from error
                raise ValueError(f"line {number} is no JSON: {error.msg}") from error
    return rows


def is_list_in_json(text: str) -> bool:
    """Return whether a text is a list in JSON."""
    if not text.startswith("["):
        return False
    try:
        return isinstance(json.loads(text), list)
    except ValueError:
        return False


def separate(text: str, ending: str) -> tuple[str, str]:
    """Return a table, and what separates its fields.

    That is what stands most often between the names in the first line, a comma, ; or a tab, if no
    line before it says so, as Excel writes it.
    """
    if ending == ".tsv":
        return text, "\t"
    first_line, _, others = text.partition("\n")
    told = re.fullmatch("sep=(.)", first_line.strip("\r"))
    if told:
        return others, told[1]
    without_quoted = re.sub(r'"[^"]*"', "", first_line)
    return text, max(",;\t", key=without_quoted.count)


def parse_csv(text: str, separator: str) -> list[Row]:
    """Return the rows of a table, whose first line has the names; all that is in it is text."""
    if re.match(r"\s*(\[\s*)?\{", text):
        raise ValueError("it is JSON: give its name the ending .jsonl, or .json of a list")
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    rows = []
    try:
        names = [name.strip() for name in next(reader, [])]
        check_names(names)
        for fields in reader:
            if len(fields) > len(names):
                problem = f"line {reader.line_num} has {len(fields)} fields"
                remedy = 'put a field with the separator in it between quotes, "…"'
                raise ValueError(f"{problem}, the first line {len(names)}: {remedy}")
            # A line may be empty, or end early: then it lacks the last fields.
            if fields:
                values = [messages_or_text(field) for field in fields]
                rows.append(dict(zip(names, values)))
    except csv.Error as error:
        remedy = 'write a quote inside of a field twice, ""'
        raise ValueError(f"line {reader.line_num}: {error}: {remedy}") from error
    return rows


def check_names(names: list[str]) -> None:
    """Refuse a table whose first line gives a name twice."""
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"its first line has the name {shorten(name)} twice")


def messages_or_text(field: str) -> Any:
    """Return a field of a table; messages, which are written there as a text, as what they are."""
    if not re.match(r"\s*\[?\s*\{", field):
        return field
    value = parsed(field)
    first = value[0] if isinstance(value, list) else value
    is_message = isinstance(first, dict) and not {"role", "from"}.isdisjoint(first)
    return value if is_message else field


def parse_parquet(content: bytes) -> list[Row]:
    """Return the rows of a table in the form of Apache Parquet."""
    import pyarrow.parquet

    return pyarrow.parquet.read_table(io.BytesIO(content)).to_pylist()


def read_folder(path: str) -> list[Row]:
    """Return the rows of a folder that datasets saved, a dataset or one of several splits."""
    if not is_saved_dataset(path):
        raise ValueError("it is a folder, but none that save_to_disk of datasets has written")
    dataset = quiet_datasets().load_from_disk(path)
    if not isinstance(dataset, dict):
        return dataset.to_list()
    if len(dataset) == 1:
        return next(iter(dataset.values())).to_list()
    splits = [os.path.join(path, split) for split in dataset]
    raise ValueError(f"it has several splits: give one of them, {' or '.join(splits)}")
