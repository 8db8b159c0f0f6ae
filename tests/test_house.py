"""The house stands as the package's docstring draws it: imports run down, nothing runs in circles, privates in one room."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hf_compressm
from hf_compressm import layers
from hf_compressm.compat.used import CHECKED, USED

PACKAGE = Path(hf_compressm.__file__).parent
ROOMS = re.findall(r"^    (\w+)(?:/|\.py) ", hf_compressm.__doc__, flags=re.MULTILINE)
MODULES = {
    ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__"): ast.parse(
        path.read_text("utf-8")
    )
    for path in PACKAGE.rglob("*.py")
}
# Stands alone beside saved models, so it can't import from the room of privates.
STANDS_ALONE = "modeling.modeling_compressm"


def room(module: str) -> str:
    return module.partition(".")[0]


def imports(module: str) -> Iterator[tuple[str, str]]:
    """The modules of this package that one imports, with the name taken, wherever in the file it does."""
    is_package = (PACKAGE / module.replace(".", "/")).is_dir() or module == "__init__"
    here = [] if module == "__init__" else module.split(".")
    for node in ast.walk(MODULES[module]):
        if isinstance(node, ast.ImportFrom) and node.level:
            up = node.level - 1 if is_package else node.level
            base = here[: len(here) - up] + (node.module.split(".") if node.module else [])
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "hf_compressm":
            base = node.module.split(".")[1:]
        else:
            continue
        for alias in node.names:
            whole = ".".join([*base, alias.name])
            yield (whole if whole in MODULES else ".".join(base) or "__init__"), alias.name


ARROWS = {module: {target for target, _ in imports(module)} - {module} for module in MODULES}


def test_the_docstring_names_every_room():
    there = {path.name.removesuffix(".py") for path in PACKAGE.iterdir()} - {
        "__init__",
        "__pycache__",
        "py.typed",
        "reference",
    }
    assert sorted(ROOMS) == sorted(there)
    assert len(list(PACKAGE.glob("*.py"))) <= 4


def test_imports_only_run_down():
    up = [
        f"{module} -> {target}"
        for module, targets in ARROWS.items()
        for target in targets
        if module != "__init__" and room(target) != room(module)
        if target == "__init__" or ROOMS.index(room(target)) > ROOMS.index(room(module))
    ]
    assert not up


def test_nothing_runs_in_circles():
    """Not between modules either, lazy imports and those for types included."""
    done: set[str] = set()

    def visit(module: str, above: tuple[str, ...]) -> None:
        assert module not in above, " -> ".join([*above[above.index(module) :], module])
        if module not in done:
            for target in ARROWS[module]:
                visit(target, (*above, module))
            done.add(module)

    for module in MODULES:
        # A package's __init__ gathers what its modules offer, and they may come back to the package itself for nothing.
        visit(module, ())


def test_families_and_realizations_are_known_in_their_room_alone():
    classes = {name for module in MODULES if room(module) == "layers" for name in class_names(module)}
    offered = {name for name in layers.__all__ if name in classes}
    taken = {
        f"{module}: {name}"
        for module in MODULES
        if room(module) != "layers"
        for target, name in imports(module)
        if room(target) == "layers" and name in classes
    }
    assert (
        {entry.split(": ")[1] for entry in taken}
        <= offered
        == {"Engine", "Layer", "MixerLayer", "ParameterCut", "Realization", "Sizes"}
    )


def class_names(module: str) -> set[str]:
    return {node.name for node in MODULES[module].body if isinstance(node, ast.ClassDef)}


def test_what_is_private_in_others_is_touched_in_one_room():
    own = {
        name
        for tree in MODULES.values()
        for node in ast.walk(tree)
        for name in (
            [node.name]
            if isinstance(node, ast.FunctionDef | ast.ClassDef)
            else [node.attr]
            if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store)
            else [node.id]
            if isinstance(node, ast.Name)
            else []
        )
    }
    touched = {
        f"{module}: {node.attr}"
        for module, tree in MODULES.items()
        if room(module) != "compat" and module != STANDS_ALONE
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__")
        if node.attr not in own
    }
    assert not touched


@pytest.mark.parametrize("name", USED)
def test_it_is_still_there(name):
    """If this fails, a new release took away what `USED` says is needed, and why."""
    module, attributes = name, []
    while not _is_module(module):
        module, _, last = module.rpartition(".")
        attributes.insert(0, last)
    owner = importlib.import_module(module)
    for attribute in attributes:
        if not hasattr(owner, attribute):  # set on its instances
            assert re.search(rf"\b{attribute}\b", inspect.getsource(owner)), USED[name]
            return
        owner = getattr(owner, attribute)


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


def test_the_versions_it_was_checked_on_are_named():
    assert any(torch.__version__.startswith(version) for version in CHECKED["torch"])
