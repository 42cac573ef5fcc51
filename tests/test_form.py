"""The form of the scripts: they are there to be read, to be edited, and to share what they have."""

import ast
import collections
import copy
import difflib
import dis
import inspect
import io
import itertools
import os
import re
import shutil
import subprocess
import sys
import tokenize
from functools import cache
from pathlib import Path
from types import CodeType

import pytest

import make_instructions
import train_reward_model
import train_rlhf
import train_sft

BORDER = "nothing below this line is PPO"
LENGTH_OF_PPO = 500
LENGTH = 1931  # 1300 is wanted
SIBLINGS = (train_sft, train_reward_model, make_instructions)
SCRIPTS = (train_rlhf, *SIBLINGS)
STAGES = (train_sft, train_reward_model)
OF_REWARDS = {  # what may speak of PPO and its rewards, and why
    "load_classifier": "it loads what train_reward_model.py made, and scores texts with it",
    "silence_libraries": "it names what TRL says of its own classes",
}
# What every script has of its own: the steps of its run, which are called alike in all of them.
ROLES = {"run", "main", "load_model", "tokenize", "fill", "pad_batch"}
ROLES |= {"announce", "measure", "make_report", "draw", "summarize"}
MAINS = [f"{module.__name__}.main" for module in SCRIPTS]  # a line each, with constants of its own
BEFORE_THE_CONSTANTS = {"Library", "missing_quotes"}  # which need them, so that they stand above


def imported_from(module, sibling):
    """Return the names that a script imports from another of ours, by its own statements."""
    with open(sibling.__file__, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    return {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module == module.__name__
        for alias in node.names
    }


FOR_SIBLINGS = sorted(
    name
    for name in set().union(*(imported_from(train_rlhf, sibling) for sibling in SIBLINGS))
    if not inspect.ismodule(vars(train_rlhf)[name])
)


@pytest.fixture(scope="module", params=SCRIPTS, ids=lambda module: module.__name__)
def module(request):
    return request.param


@pytest.fixture(scope="module")
def source(module):
    return Path(module.__file__).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def lines(source):
    return source.splitlines()


@pytest.fixture(scope="module")
def tree(source):
    return ast.parse(source)


@pytest.fixture(scope="module")
def border(script):
    """Return the number of the line that ends what is PPO."""
    lines = script.read_text(encoding="utf-8").splitlines()
    (number,) = (number for number, line in enumerate(lines, start=1) if BORDER in line)
    return number


# ----------------------------------------------------------------------------------- to be read
def test_the_script_is_no_longer_than_it_has_to_be(script, border):
    lines = script.read_text(encoding="utf-8").splitlines()
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


def test_every_function_and_class_says_in_a_sentence_what_it_is(module, tree):
    found = [*functions_and_classes(tree.body)]
    assert len(found) > (60 if module is train_rlhf else 20)
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


def own_functions(module):
    """Return {name: function or class} of those that stand in a script itself."""
    tree = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    return {
        node.name: node
        for node in functions_and_classes(tree.body)
        if not (node.name.startswith("__") or node.name == "forward")
    }


class Anonymous(ast.NodeTransformer):
    """A function without what it calls things: its names by their order, no docstring."""

    def __init__(self):
        self.names = {}

    def new_name(self, name):
        return self.names.setdefault(name, f"name_{len(self.names)}")

    def visit_Name(self, node):
        return ast.Name(self.new_name(node.id), node.ctx)

    def visit_arg(self, node):
        return ast.arg(self.new_name(node.arg))

    def visit_FunctionDef(self, node):
        node.name = "function"
        if ast.get_docstring(node):
            node.body = node.body[1:] or [ast.Pass()]
        return self.generic_visit(node)


def anonymous(node):
    """Return the code of a function as it would be under any other names."""
    return ast.unparse(Anonymous().visit(copy.deepcopy(node)))


def test_a_function_under_other_names_is_told_as_the_same():
    one, other, third = (
        ast.parse(text).body[0]
        for text in (
            "def mean(values):\n    'Return it.'\n    total = sum(values)\n    return total",
            "def average(xs):\n    s = sum(xs)\n    return s",
            "def first(xs):\n    s = sum(xs)\n    return xs",
        )
    )
    assert anonymous(one) == anonymous(other) != anonymous(third)


def test_no_function_or_class_stands_twice():
    """Neither by its name, nor by what it does under other names, nor nearly so."""
    places, bodies = collections.defaultdict(list), collections.defaultdict(list)
    for module in SCRIPTS:
        for name, node in own_functions(module).items():
            body = anonymous(node)
            places[name].append(body)
            bodies[body].append(f"{module.__name__}.{name}")
    assert {name for name, found in places.items() if len(found) > 1} == ROLES
    assert [found for found in bodies.values() if len(found) > 1] == [MAINS]
    for name in ROLES - {"main"}:
        for one, other in itertools.combinations(places[name], 2):
            assert difflib.SequenceMatcher(None, one, other).ratio() < 0.7, name


# --------------------------------------------------------------------------------- to be edited
def test_the_constants_are_plain_literals_each_with_what_it_does(module, source, lines, tree):
    names = [name for *_, names in module.RULES for name in names.split()]
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
            assert getattr(module, target.id) == ast.literal_eval(node.value)
            assert lines[first - 1].startswith(f"{target.id} = ")
            comment = comments.get(first, "")
            assert re.match(r"# \S", comment) and len(comment) > 15, f"{target.id}: {comment!r}"
            assert "fmt:" not in comment and "noqa" not in comment
            assert ";" not in lines[first - 1].partition("#")[0]
    assert sorted(found) == sorted(names)  # each has a rule, and each stands there once
    assert len(set(found)) == len(found)


def test_nothing_but_constants_stands_between_them(module, lines, tree):
    names = {name for *_, names in module.RULES for name in names.split()}
    first = next(number for number, line in enumerate(lines, start=1) if line.startswith("# --- "))
    last = next(number for number, line in enumerate(lines, start=1) if line.startswith("# -----"))
    between = {ast.unparse(n.targets[0]) for n in tree.body if first < n.lineno < last}
    assert between == names


def test_what_a_constant_has_to_be_is_the_same_in_all_scripts():
    """The same name has the same limits, and the same default where it means the same."""
    kinds = collections.defaultdict(set)
    for module in STAGES:
        for kind, limits, free, names in module.RULES:
            for name in names.split():
                kinds[name].add((kind, limits, free))
    assert {name for name, found in kinds.items() if len(found) > 1} == {"LORA_RANK"}  # 0 = frozen
    for name in ("LORA_RANK", "LORA_ALPHA", "QUANTIZATION", "DEVICE", "DTYPE", "SEED", "REPORT_TO"):
        assert len({str(getattr(module, name)) for module in (train_rlhf, *STAGES)}) == 1, name


def test_every_constant_of_a_stage_is_read_by_its_code():
    """As settings.name, or as the argument of that name which a check has."""
    shared = "".join(inspect.getsource(module) for module in (train_rlhf, train_sft))
    for module in STAGES:
        read = set(re.findall(r"settings\.([a-z_]+)", inspect.getsource(module) + shared))
        for *_, names in module.RULES:
            for name in names.split():
                assert name.lower() in read, name


# ------------------------------------------------------------------------------- to be imported
IMPORT = """
import pathlib, signal, sys
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_DFL)  # what pytest ignores is ignored here too
def state():
    handlers = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return handlers, sys.excepthook, sorted(pathlib.Path().rglob("*"))
before = state()
import train_rlhf, train_sft, train_reward_model, make_instructions
for module in (train_rlhf, train_sft, train_reward_model, make_instructions):
    assert pathlib.Path(module.__file__).parent.samefile(".")
assert not {"torch", "transformers", "numpy"} & {*sys.modules}
assert state() == before
assert sys.excepthook is sys.__excepthook__
"""


def test_importing_the_scripts_has_no_side_effects(tmp_path):
    for module in SCRIPTS:
        shutil.copy(module.__file__, tmp_path)
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


@cache
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
    settings = {name for *_, names in train_rlhf.RULES for name in names.split()}
    of_ppo = {"ppo", "kl", "reward", "rewards", "advantage", "advantages", "rollout", "policy"}
    for each, thing in used.items():
        is_constant = each in settings | {"RULES", "CHECKS"}
        assert not is_constant, f"{name} uses the constant {each}: let it be an argument"
        is_library = inspect.ismodule(thing)
        if not is_library and getattr(thing, "__module__", None) == train_rlhf.__name__:
            assert bool(words_of(thing) & of_ppo) == (each in OF_REWARDS), each
            _, line = inspect.getsourcelines(thing)
            below = line > border or each in BEFORE_THE_CONSTANTS
            assert below, f"{name} uses {each}, which stands among PPO"
            assert inspect.getdoc(thing), each
