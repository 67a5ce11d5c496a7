"""The kernels room: backends do not know each other, and no file uses another file's private names."""

import ast
from pathlib import Path

import pytest

import hf_gdn.kernels
from hf_gdn import registry

ROOT = Path(hf_gdn.kernels.__file__).parent
BACKENDS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
FILES = sorted(ROOT.glob("*/*.py"))


def relative_imports(path: Path) -> list[tuple[str, str]]:
    """``(module, name)`` of every relative import."""
    tree = ast.parse(path.read_text("utf-8"))
    nodes = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.level]
    return [("." * node.level + (node.module or ""), alias.name) for node in nodes for alias in node.names]


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.stem}")
def test_imports_stay_in_the_backends_folder(path):
    for module, name in relative_imports(path):
        outside = f"{module}.{name}".removeprefix("..").lstrip(".").split(".")[0] if module.startswith("..") else ""
        assert outside not in BACKENDS, f"imports {name} of {module}"
        assert not name.startswith("_"), f"imports the private name {name} of {module}"


def test_an_op_has_the_same_file_in_every_backend():
    for kernel in registry.kernels():
        if kernel.backend in BACKENDS:
            files = {kernel.op, kernel.op.rsplit("_", 1)[0]}
            assert any((ROOT / kernel.backend / f"{name}.py").exists() for name in files), kernel
