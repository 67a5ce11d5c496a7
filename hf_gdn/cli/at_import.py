"""Do something when a program first imports what `hf_gdn.patch` patches, so that the program comes first.

What the program sets in `os.environ` before its own imports is then seen by torch, transformers and huggingface_hub,
none of which is imported here.
"""

from __future__ import annotations

import functools
import pkgutil
import sys
import threading
from collections.abc import Callable, Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec
from multiprocessing import spawn
from pathlib import Path
from types import ModuleType
from typing import Any

_FAMILIES = Path(__file__).parent.parent / "patches" / "families"
# The modules of the families' layers. These import no other of them, so a family is complete when its module is.
WATCHED = {
    f"transformers.models.{found.name}.modeling_{found.name}" for found in pkgutil.iter_modules([str(_FAMILIES)])
}
WATCHED.add("hf_gdn.patches")  # for programs that ask hf_gdn itself


def arrange(action: Callable[[], None]) -> None:
    """Call `action` once one of `WATCHED` is imported, here and in processes of multiprocessing's spawn and forkserver.

    `action` must be picklable. Forked processes inherit what is arranged or done here.
    """
    if WATCHED & sys.modules.keys():
        action()
    else:
        sys.meta_path.insert(0, _Finder(action))
    prepared = spawn.get_preparation_data
    # Pickled for the new process, which reads it before it imports the main module, and ignores unknown keys.
    spawn.get_preparation_data = lambda name: {**prepared(name), "hf_gdn": _Again(action)}


class _Again:
    """Unpickled, it calls `arrange`."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def __reduce__(self) -> tuple[Any, ...]:
        return arrange, (self.action,)


class _Finder(MetaPathFinder):
    """Finds the watched modules as the other finders do, and acts when the first of them has been executed."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action
        # Held during the action, which imports watched modules, and after it. Nobody waits for it: an import in another
        # thread would hold locks that the action needs.
        self.acted = threading.Lock()

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name not in WATCHED or self.acted.locked():
            return None
        others = sys.meta_path[sys.meta_path.index(self) + 1 :]
        spec = next(filter(None, (finder.find_spec(name, path, target) for finder in others)), None)
        if spec is not None and spec.loader is not None:
            spec.loader.exec_module = functools.partial(self._execute, spec.loader)  # type: ignore[method-assign]
        return spec

    def _execute(self, loader: Any, module: ModuleType) -> None:
        del loader.exec_module  # the loader's own again
        loader.exec_module(module)
        if self.acted.acquire(blocking=False):
            try:
                self.action()
            except BaseException:
                self.acted.release()  # the import fails; so does the next attempt
                raise
