"""The kernels' folder as its sources show it: imports between backends, private names, and how kernels are launched."""

import ast
from pathlib import Path

import pytest

import hf_gdn.kernels
from hf_gdn import registry

ROOT = Path(hf_gdn.kernels.__file__).parent
BACKENDS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
FILES = sorted(ROOT.rglob("*.py"))
TRITON = [file for file in FILES if file.parent.name == "triton"]
TREES = {file: ast.parse(file.read_text("utf-8")) for file in FILES}
every_file = pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")


def relative_imports(tree: ast.AST) -> list[tuple[str, str]]:
    """``(module, name)`` of every relative import."""
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    return [("." * node.level + (node.module or ""), alias.name) for node in nodes for alias in node.names]


@every_file
def test_imports_stay_in_the_backends_folder(file):
    """Backends do not know each other, and no file uses another file's private names."""
    for module, name in relative_imports(TREES[file]):
        assert not name.startswith("_"), f"imports the private name {name} of {module}"
        outside = f"{module}.{name}".removeprefix("..").lstrip(".").split(".")[0] if module.startswith("..") else ""
        assert file.parent == ROOT or outside not in BACKENDS, f"imports {name} of {module}"


def test_an_op_has_the_same_file_in_every_backend():
    for kernel in registry.kernels():
        if kernel.backend in BACKENDS:
            files = {kernel.op, kernel.op.rsplit("_", 1)[0]}
            assert any((ROOT / kernel.backend / f"{name}.py").exists() for name in files), kernel


def launches(tree: ast.AST, under: bool = False):
    """Every ``launch(kernel, grid, ...)``, and whether it stands in ``with on_device(...)``."""
    if isinstance(tree, ast.With):
        contexts = [item.context_expr for item in tree.items]
        under |= any(isinstance(c, ast.Call) and getattr(c.func, "id", "") == "on_device" for c in contexts)
    if isinstance(tree, ast.Call) and getattr(tree.func, "id", "") == "launch":
        yield tree, under
    for child in ast.iter_child_nodes(tree):
        yield from launches(child, under)


@pytest.mark.parametrize("file", TRITON, ids=lambda file: file.stem)
def test_launches_are_on_the_tensors_device_and_by_keyword(file):
    """Read off the source: no machine here has two GPUs."""
    for launch, under in launches(TREES[file]):
        assert under, f"{file.name}, line {launch.lineno}: not under on_device(): the current device may be another one"
        assert len(launch.args) == 2, f"{file.name}, line {launch.lineno}: a kernel, its grid, and arguments by name"


def test_launches_are_found():
    assert sum(len(list(launches(TREES[file]))) for file in TRITON) >= 20


@pytest.mark.parametrize("file", TRITON, ids=lambda file: file.stem)
def test_pointers_are_named_as_pointers(file):
    """`prepared.launch` tells them by their names; all other arguments are part of what a kernel is kept by."""
    for kernel in ast.walk(TREES[file]):
        if isinstance(kernel, ast.FunctionDef) and kernel.name.endswith("_kernel"):
            names = [x.arg for x in kernel.args.args if not x.annotation]
            others = [name for name in names if not name.startswith(("p_", "stride_"))]
            loaded = {ast.unparse(call.args[0]) for call in ast.walk(kernel) if isinstance(call, ast.Call) and call.args
                      and ast.unparse(call.func) in ("tl.load", "tl.store")}  # fmt: skip
            assert not loaded & set(others), f"{kernel.name} loads from or stores to {loaded & set(others)}"
