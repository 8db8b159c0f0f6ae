"""Kernels are launched on the device of their tensors, whichever is the current one. (tests/gpu has two of them.)"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

import hf_compressm
from hf_compressm.kernels import on_device_of

PACKAGE = Path(hf_compressm.__file__).parent
GUARD = re.compile(r"on_device_of\((\w+)\)|torch\.cuda\.device\((\w+)\.get_device\(\)\)")


def launches(node: ast.AST, guarded: bool = False) -> Iterator[tuple[str, bool]]:
    """The kernels that are launched, and whether each stands in a guard."""
    if isinstance(node, ast.With):
        guarded = guarded or any(GUARD.fullmatch(ast.unparse(item.context_expr)) for item in node.items)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
        name = ast.unparse(node.func.value)
        if name.endswith("_kernel"):
            yield name, guarded
    for child in ast.iter_child_nodes(node):
        yield from launches(child, guarded)


def test_every_launch_is_on_the_device_of_its_tensors():
    found = [
        (path.name, *launch)
        for path in sorted(PACKAGE.rglob("*.py"))
        for launch in launches(ast.parse(path.read_text("utf-8")))
    ]
    assert {name for name, *_ in found} == {"mamba.py", "mamba2.py", "contribution.py", "modeling_compressm.py"}
    assert [launch for launch in found if not launch[-1]] == []


@pytest.mark.parametrize("compiled", [False, True])
def test_on_a_cpu_it_does_nothing(compiled):
    def double(x: torch.Tensor) -> torch.Tensor:
        with on_device_of(x):
            return 2 * x

    run = torch.compile(double, backend="eager", fullgraph=True) if compiled else double
    assert run(torch.ones(2)).tolist() == [2, 2]
