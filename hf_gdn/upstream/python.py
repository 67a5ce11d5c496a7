"""A private function of Python's standard library, as of Python 3.10 to 3.14. It imports nothing else."""

from __future__ import annotations

import runpy
from collections.abc import Callable

# What ``python -m`` calls: with a module's name, and whether ``sys.argv[0]`` becomes its file.
run_module_as_main: Callable[..., object] = runpy._run_module_as_main  # type: ignore[attr-defined]
