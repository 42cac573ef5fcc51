"""The form of the script: it is there to be read, to be edited, and to be imported by siblings."""

import ast
import dis
import inspect
import io
import os
import re
import subprocess
import sys
import tokenize
from types import CodeType

import pytest

import train_rlhf

BORDER = "nothing below this line is PPO"
LENGTH_OF_PPO = 500
LENGTH = 1702  # 1300 is wanted
FOR_SIBLINGS = (
    *("read_settings", "load_tokenizer", "load_base_model", "claim_output", "save_checkpoint"),
    *("load_checkpoint", "stop_on_signal", "shorten", "blame"),
)


@pytest.fixture(scope="module")
def source(script):
    return script.read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def lines(source):
    return source.splitlines()


@pytest.fixture(scope="module")
def tree(source):
    return ast.parse(source)


@pytest.fixture(scope="module")
def border(lines):
    """Return the number of the line that ends what is PPO."""
    (number,) = (number for number, line in enumerate(lines, start=1) if BORDER in line)
    return number


# ----------------------------------------------------------------------------------- to be read
def test_the_script_is_no_longer_than_it_has_to_be(lines, border):
    assert lines[border - 1].startswith("# ====")
    assert border <= LENGTH_OF_PPO
    assert len(lines) <= LENGTH


def test_lines_are_short(lines):
    long = [line for line in lines if len(line) > 100]
    assert len(long) <= 0.05 * len(lines)


def test_nothing_is_assigned_in_the_middle_of_an_expression(tree):
    assert not [node.lineno for node in ast.walk(tree) if isinstance(node, ast.NamedExpr)]


def functions_and_classes(body):
    """Yield those of a module and of its classes; what is inside a function is its own affair."""
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            yield node
        if isinstance(node, ast.ClassDef):
            yield from functions_and_classes(node.body)


def test_every_function_and_class_says_in_a_sentence_what_it_is(tree):
    found = [*functions_and_classes(tree.body)]
    assert len(found) > 60
    for node in found:
        if node.name != "__init__":  # the class says it
            first, _, rest = (ast.get_docstring(node) or "").partition("\n")
            assert re.fullmatch(r"[A-Z+].*[^.]\.", first), f"{node.name}: {first!r}"
            assert not re.search(r"[.!?] [A-Z]", first), f"{node.name}: {first!r}"
            assert not rest or rest.startswith("\n"), f"{node.name}: no empty line after the first"


def test_nothing_is_handed_on_through_attributes(tree):
    """What a method needs are its arguments, or what __init__ set; all else is hard to follow."""
    holders = {"self", "cls", "trainer", "policy"}
    set_in_init = {
        node
        for function in ast.walk(tree)
        if isinstance(function, ast.FunctionDef) and function.name == "__init__"
        for node in ast.walk(function)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in ("setattr", "delattr"), f"line {node.lineno}"
        if isinstance(node, ast.Attribute | ast.Subscript) and not isinstance(node.ctx, ast.Load):
            root, through_attribute = node, False
            while isinstance(root, ast.Attribute | ast.Subscript):
                through_attribute = through_attribute or isinstance(root, ast.Attribute)
                root = root.value
            if through_attribute and isinstance(root, ast.Name) and root.id in holders:
                assert node in set_in_init, f"line {node.lineno}"


# --------------------------------------------------------------------------------- to be edited
def test_the_constants_are_plain_literals_each_with_what_it_does(source, lines, tree):
    names = [name for *_, names in train_rlhf.RULES for name in names.split()]
    read_line = io.StringIO(source).readline
    comments = {
        token.start[0]: token.string
        for token in tokenize.generate_tokens(read_line)
        if token.type == tokenize.COMMENT
    }
    found = []
    for node in tree.body:
        first = node.lineno
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in names:
            (target,) = node.targets
            found.append(target.id)
            assert getattr(train_rlhf, target.id) == ast.literal_eval(node.value)
            assert lines[first - 1].startswith(f"{target.id} = ")
            comment = comments.get(first, "")
            assert re.match(r"# \S", comment) and len(comment) > 15, f"{target.id}: {comment!r}"
            assert "fmt:" not in comment and "noqa" not in comment
            assert ";" not in lines[first - 1].partition("#")[0]
    assert sorted(found) == sorted(names)  # each has a rule, and each stands there once
    assert len(set(found)) == len(found)


def test_nothing_but_constants_stands_between_them(lines, tree):
    names = {name for *_, names in train_rlhf.RULES for name in names.split()}
    first = next(number for number, line in enumerate(lines, start=1) if line.startswith("# --- "))
    last = next(number for number, line in enumerate(lines, start=1) if line.startswith("# -----"))
    between = {ast.unparse(n.targets[0]) for n in tree.body if first < n.lineno < last}
    assert between == names


# ------------------------------------------------------------------------------- to be imported
IMPORT = """
import pathlib, signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)  # what pytest ignores is ignored here too
def state():
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return handlers, sys.excepthook, sorted(pathlib.Path().rglob("*"))
before = state()
import train_rlhf
assert pathlib.Path(train_rlhf.__file__).parent.samefile(".")
assert state() == before
assert sys.excepthook is sys.__excepthook__
"""


def test_importing_the_script_has_no_side_effects(script, tmp_path):
    (tmp_path / "train_rlhf.py").write_bytes(script.read_bytes())
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HOME": str(tmp_path)}
    command = [sys.executable, "-B", "-c", IMPORT, "--batch-size", "ten"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def globals_of(code):
    """Yield the global names that a function's code, and what is inside it, uses."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL"):
            yield instruction.argval
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from globals_of(constant)


def used_by(name):
    """Return all that a function of the script uses of it, directly or not, {name: object}."""
    used, open_names = {}, [name]
    while open_names:
        name = open_names.pop()
        if name in vars(train_rlhf) and name not in used:
            used[name] = vars(train_rlhf)[name]
            if inspect.ismodule(used[name]):
                continue  # a library, of which there is nothing to read here
            thing = inspect.unwrap(used[name])
            of_the_script = getattr(thing, "__module__", None) == train_rlhf.__name__
            if inspect.isclass(thing) and of_the_script:
                functions = [each for each in vars(thing).values() if inspect.isfunction(each)]
            else:
                functions = [thing] if inspect.isfunction(thing) and of_the_script else []
            for function in functions:
                open_names += globals_of(function.__code__)
    return used


def words_of(thing):
    """Return the words in the names and texts of a function or class, its docstrings left out."""
    tree = ast.parse(inspect.getsource(thing))
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and ast.get_docstring(node):
            node.body[0] = ast.Pass()
    return set(re.findall("[a-z]+", ast.unparse(tree).lower().replace("_", " ")))


@pytest.mark.parametrize("name", FOR_SIBLINGS)
def test_what_siblings_import_knows_nothing_of_ppo(name, border):
    used = used_by(name)
    of_ppo = {"ppo", "kl", "reward", "rewards", "advantage", "advantages", "rollout", "policy"}
    for each, thing in used.items():
        assert not each.isupper(), f"{name} uses the constant {each}: let it be an argument"
        is_library = inspect.ismodule(thing)
        if not is_library and getattr(thing, "__module__", None) == train_rlhf.__name__:
            assert not words_of(thing) & of_ppo, each
            _, line = inspect.getsourcelines(thing)
            assert line > border, f"{name} uses {each}, which stands among PPO"
            assert inspect.getdoc(thing), each
