"""A page on which one watches a run, in one file that needs nothing else.

    python -m finetune.watch trained_model    # makes trained_model/watch.html

Also while a run goes on, and of one that was stopped.
"""

# It is made in well under a second, so no library is loaded that takes longer.
import argparse
import base64
import hashlib
import json
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune.errors import SettingsError, shorten, telling_text
from finetune.pages import page_content
from finetune.run_files import read_run

LARGEST_PAGE = 2_000_000  # bytes

# In a script element some texts would end it; in JSON they may be written in another way.
ESCAPED = {
    character: f"\\u{ord(character):04x}" for character in ("<", ">", "&", "\u2028", "\u2029")
}


def main(argv: Sequence[str]) -> int:
    """Make the page of a run's folder; return the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m finetune.watch",
        description="Make watch.html in the folder of a run: one page on which to watch it.",
    )
    parser.add_argument("folder", nargs="?", default="trained_model", help="OUTPUT_DIR of the run")
    folder = Path(parser.parse_args(argv).folder)
    try:
        path = write_page(folder)
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 2
    except OSError as error:
        path = Path(error.filename or folder / "watch.html")
        print(f"{path} can't be used: {error.strerror}", file=sys.stderr)
        return 1
    size = path.stat().st_size / 1000
    print(f"{path}, {size:,.0f} kB: open it in a browser")
    return 0


def write_page(folder: Path) -> Path:
    """Write watch.html into the folder of a run; return its path.

    Raises SettingsError where there is no run.
    """
    page = make_page(folder)
    path = folder / "watch.html"
    # Whoever opens the page meanwhile gets the old one or the new one, whole; and others may
    # be making it too.
    unfinished = folder / f"watch.{os.getpid()}.unfinished"
    try:
        unfinished.write_text(page, encoding="utf-8")
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    return path


def add_page(folder: Path) -> None:
    """Write the page of a run that has ended, see write_page; whatever fails costs it alone."""
    try:
        write_page(folder)
    except Exception as error:
        reason = shorten(telling_text(error), 200)
        print(f"There is no new watch.html ({reason})", flush=True)


def make_page(folder: Path) -> str:
    """Return the page of a run as HTML, of at most LARGEST_PAGE bytes; see write_page."""
    sources = Path(__file__).parent
    style = (sources / "watch.css").read_text(encoding="utf-8")
    script = (sources / "watch.js").read_text(encoding="utf-8")
    template = (sources / "watch.html").read_text(encoding="utf-8")

    # Nothing is fetched, and nothing runs but this script: the browser sees to that.
    allowed = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
    allowed += f"; style-src '{fingerprint(style)}'; script-src '{fingerprint(script)}'"
    pieces = {"ALLOWED": allowed, "STYLE": style, "SCRIPT": script, "CONTENT": ""}
    room = LARGEST_PAGE - len(filled(template, pieces).encode())

    content = page_content(read_run(folder), room, size_of)
    pieces["CONTENT"] = to_json(content)
    return filled(template, pieces)


def filled(template: str, pieces: dict[str, str]) -> str:
    """Return a template with {{NAME}} replaced by pieces, in one go: they may have such names too."""
    return re.sub(r"\{\{([A-Z]+)\}\}", lambda match: pieces[match[1]], template)


def fingerprint(text: str) -> str:
    """Return the SHA-256 of a text as a Content-Security-Policy names it."""
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def to_json(value: Any) -> str:
    """Return a value as JSON that can stand in a script element, whatever texts are in it."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character, escaped in ESCAPED.items():
        text = text.replace(character, escaped)
    return text


def size_of(value: Any) -> int:
    """Return how many bytes a value takes on the page."""
    return len(to_json(value).encode())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
