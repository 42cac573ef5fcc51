"""Functions that a setting names: those of a script, and those in files of the user."""

import pickle
import sys
from pathlib import Path

import pytest
import torch

from finetune.errors import SettingsError, shorten
from finetune.functions import function_in_file, local_function


def kindness(prompts, completions, **kwargs):
    return [1.0] * len(completions)


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path[:])


def test_a_function_of_the_script_is_meant_by_its_name():
    def another():
        pass

    def of_that_name():
        pass

    of_that_name.__name__ = "kindness"
    others = {"kindness": of_that_name, "meanness": another, "number": 7, "str": str}
    assert local_function("kindness", "kindness", others) is of_that_name
    assert local_function("kindness", kindness, others) is kindness  # the constant itself
    assert local_function("another", kindness, {"another": another}) is another  # a flag
    for name in ("meanness", "number", "str", "nothing"):
        assert local_function(name, name, others) is None


def test_a_function_in_a_file_may_need_what_lies_beside_it(tmp_path):
    """Whatever is called there may be one, also where its file is in another folder."""
    folder = tmp_path / "rewards"
    folder.mkdir()
    (folder / "neighbour_of_mine.py").write_text("weight = 2", encoding="utf-8")
    code = "from neighbour_of_mine import weight\nclass Weigh:\n    def __call__(self):\n"
    code += "        return weight\nweigh = Weigh()"
    (folder / "mine.py").write_text(code, encoding="utf-8")
    assert function_in_file("REWARD", "rewards/mine.py:weigh")() == 2


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (None, "[Errno 2] No such file or directory"),
        ("x = 1\ndef score(completions) return 1", "expected ':' (mine.py, line 2)"),
        ("import no_such_module", "No module named 'no_such_module'"),
        ("1 / 0", "division by zero"),
        ("raise SystemExit(3)", "SystemExit(3)"),
        ("quit()", "SystemExit(None)"),
        ("def other(prompts, completions): return 1.0", "it has no function score"),
        ("score = 1.0", "it has no function score"),
    ],
)
def test_a_file_that_has_no_function_is_refused(tmp_path, code, reason):
    if code is not None:
        (tmp_path / "mine.py").write_text(code, encoding="utf-8")
    with pytest.raises(SettingsError) as error:
        function_in_file("REWARD", "mine.py:score")
    (problem,) = error.value.args
    assert problem.startswith(f"REWARD is mine.py:score: it can't be used ({reason}")
    assert problem.endswith("): give FILE.py:FUNCTION")


@pytest.mark.parametrize("name", ["mine.py", "folder.py:score", f"{'a' * 300}.py:score"])
def test_a_name_without_a_function_or_without_a_file_is_refused(tmp_path, name):
    (tmp_path / "mine.py").write_text("def score(): return 1", encoding="utf-8")
    (tmp_path / "folder.py").mkdir()
    with pytest.raises(SettingsError) as error:
        function_in_file("REWARD", name)
    (problem,) = error.value.args
    assert problem.startswith(f"REWARD is {shorten(name)}: it can't be used (")
    assert problem.endswith("): give FILE.py:FUNCTION")


def test_a_file_is_a_module_of_its_name_whose_functions_can_be_pickled(tmp_path):
    """So a function may hand its own functions to processes that it starts."""
    code = "from concurrent.futures import ProcessPoolExecutor\n"
    code += "from multiprocessing import get_context\n"
    code += "def weigh(text):\n    return float(len(text))\n"
    code += "def score(prompts, completions, **kwargs):\n"
    code += "    with ProcessPoolExecutor(1, get_context('fork')) as pool:\n"
    code += "        return list(pool.map(weigh, completions))\n"
    (tmp_path / "weighing_of_mine.py").write_text(code, encoding="utf-8")
    score = function_in_file("REWARD", "weighing_of_mine.py:score")
    assert score.__module__ == "weighing_of_mine"
    assert pickle.loads(pickle.dumps(score)) is score
    assert score(["", ""], ["a", "abc"]) == [1.0, 3.0]


def test_a_file_may_have_the_name_of_another_module(tmp_path):
    (tmp_path / "json.py").write_text("def score(): return 'mine'", encoding="utf-8")
    assert function_in_file("REWARD", "json.py:score")() == "mine"
    assert sys.modules["json"].__file__ != str(tmp_path / "json.py")


def test_what_a_file_does_to_the_process_when_it_is_read_is_undone(tmp_path):
    code = "import os, torch\nos.chdir('/')\ntorch.set_grad_enabled(False)\ndef score(): return 1"
    (tmp_path / "rude.py").write_text(code, encoding="utf-8")
    assert function_in_file("REWARD", "rude.py:score")() == 1
    assert Path.cwd() == tmp_path and torch.is_grad_enabled()
