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

from finetune.errors import SettingsError
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
        print(f"{folder / 'watch.html'} can't be written: {error.strerror}", file=sys.stderr)
        return 1
    size = path.stat().st_size / 1000
    print(f"{path}, {size:,.0f} kB: open it in a browser")
    return 0


def write_page(folder: Path, new: Path | None = None) -> Path:
    """Write watch.html, and return its path.

    folder: of a run. new: where results are that have not moved there yet; then the page
    is written there, to move with them. Raises SettingsError where there is no run.
    """
    page = make_page(folder, new)
    path = (new or folder) / "watch.html"
    # Whoever opens the page meanwhile gets the old one or the new one, whole.
    unfinished = path.with_suffix(".unfinished")
    unfinished.write_text(page, encoding="utf-8")
    os.replace(unfinished, path)
    return path


def add_page(folder: Path, new: Path) -> None:
    """Write the page of a run that ends, see write_page; a file that was spoiled costs it alone."""
    try:
        write_page(folder, new)
    except SettingsError as error:
        print(f"There is no watch.html, for {error}", flush=True)


def make_page(folder: Path, new: Path | None = None) -> str:
    """Return the page of a run as HTML, of at most LARGEST_PAGE bytes; see write_page."""
    parts = Path(__file__).parent
    style = (parts / "watch.css").read_text(encoding="utf-8")
    script = (parts / "watch.js").read_text(encoding="utf-8")
    template = (parts / "watch.html").read_text(encoding="utf-8")

    # Nothing is fetched, and nothing runs but this script: the browser sees to that.
    allowed = "default-src 'none'; img-src data:; base-uri 'none'; form-action 'none'"
    allowed += f"; style-src '{fingerprint(style)}'; script-src '{fingerprint(script)}'"
    pieces = {"ALLOWED": allowed, "STYLE": style, "SCRIPT": script, "CONTENT": ""}
    room = LARGEST_PAGE - len(filled(template, pieces).encode())

    content = page_content(
        read_run(folder, new), room, size=lambda value: len(to_json(value).encode())
    )
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


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
