"""Functions that a setting names: one of the script, or one in a file."""

import importlib.util
import inspect
import os
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

from finetune.errors import blame
from finetune.guests import as_guest


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
    with blame(setting, name, "give FILE.py:FUNCTION"), as_guest():
        path, _, function_name = name.rpartition(":")
        module = module_in_file(os.path.abspath(path or name))
        function = getattr(module, function_name, None)
        if not callable(function):
            raise ValueError(f"it has no function {function_name}")
    return function


def module_in_file(path: str) -> ModuleType:
    """Return the module in a file, imported under the file's name, or raise anything.

    So what is in it can be pickled, and found by processes that it starts.
    """
    os.stat(path)  # an error where there is none
    folder, file_name = os.path.split(path)
    if folder not in sys.path:
        sys.path.insert(0, folder)  # for what the file imports

    # Another module may have that name already.
    name = file_name.removesuffix(".py")
    other = sys.modules.get(name)
    if other is not None and getattr(other, "__file__", None) != path:
        name = f"{name}_of_the_user"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ValueError("it is no file of Python")

    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
