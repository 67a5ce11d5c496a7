"""What holds for every Triton launch, read off the source: no machine here has two GPUs."""

import ast
from pathlib import Path

import pytest

import hf_gdn.kernels

FILES = sorted(Path(hf_gdn.kernels.__file__).parent.rglob("*.py"))


def launches(tree: ast.AST, under: bool = False):
    """Every ``kernel[(grid,)](...)``, and whether it stands in ``with on_device(...)``."""
    if isinstance(tree, ast.With):
        contexts = [item.context_expr for item in tree.items]
        under |= any(isinstance(c, ast.Call) and getattr(c.func, "id", "") == "on_device" for c in contexts)
    if isinstance(tree, ast.Call) and isinstance(tree.func, ast.Subscript) and isinstance(tree.func.slice, ast.Tuple):
        yield tree, under
    for child in ast.iter_child_nodes(tree):
        yield from launches(child, under)


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_launches_are_on_the_tensors_device_and_by_keyword(file):
    for launch, under in launches(ast.parse(file.read_text("utf-8"))):
        assert under, f"{file.name}, line {launch.lineno}: not under on_device(): the current device may be another one"
        assert not launch.args, f"{file.name}, line {launch.lineno}: arguments by position"


def test_launches_are_found():
    assert sum(len(list(launches(ast.parse(file.read_text("utf-8"))))) for file in FILES) >= 8
