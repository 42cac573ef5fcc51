"""Functions that a setting names: one of the script, or one in a file."""

import inspect
import os
import runpy
import sys
from collections.abc import Callable
from typing import Any

from finetune.errors import blame


def local_function(name: str, constant: Any, names: dict[str, Any]) -> Callable[..., Any] | None:
    """Return the function of a script or notebook that is meant by its name, None if there is none.

    constant: the setting's, which may be a function itself, and wins over one of the
    same name. names: the globals of the script.
    """
    for candidate in (constant, names.get(name)):
        if inspect.isfunction(candidate) and candidate.__name__ == name:
            return candidate
    return None


def function_in_file(setting: str, name: str) -> Callable[..., Any]:
    """Return the function that FILE.py:FUNCTION names, or raise SettingsError."""
    with blame(setting, name, "give FILE.py:FUNCTION"):
        path, _, function_name = name.rpartition(":")
        folder = os.path.dirname(os.path.abspath(path))
        sys.path.insert(0, folder)  # for what the file imports

        function = runpy.run_path(path or name).get(function_name)
        if not callable(function):
            raise ValueError(f"it has no function {function_name}")
    return function
