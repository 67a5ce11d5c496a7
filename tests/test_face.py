"""What `import hf_gdn` offers: names, exceptions, logging."""

import os
import subprocess
import sys

import pytest

import hf_gdn
from hf_gdn import caches, errors, registry


def test_every_public_name_is_there_and_listed():
    assert set(hf_gdn.__all__) <= set(dir(hf_gdn))
    for name in hf_gdn.__all__:
        assert getattr(hf_gdn, name) is not None
    assert {name for name in dir(hf_gdn) if not name.startswith("_")} == set(hf_gdn.__all__)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        hf_gdn.nothing  # noqa: B018


def test_exceptions_have_one_base():
    assert issubclass(hf_gdn.PatchError, errors.HfGdnError) and issubclass(errors.UserError, errors.HfGdnError)
    assert hf_gdn.PatchError is errors.PatchError
    found = [value for value in vars(errors).values() if isinstance(value, type) and issubclass(value, Exception)]
    assert len(found) == 7 and all(issubclass(error, errors.HfGdnError) for error in found)
    assert registry.BackendError is errors.BackendError and caches.SnapshotError is errors.SnapshotError


def run(code: str, **env) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env={**os.environ, **env})


@pytest.mark.parametrize(
    ("level", "said"), [("", ["warning", "info"]), ("ERROR", []), ("debug", ["warning", "info"])], ids=str
)
def test_the_host_program_decides_on_the_level(level, said):
    """Unless the environment does."""
    code = """
import logging
logging.basicConfig(level=logging.INFO, format="%(message)s")
import hf_gdn
logging.getLogger("hf_gdn").warning("warning")
logging.getLogger("hf_gdn.patches").info("info")
"""
    assert run(code, HF_GDN_LOG=level).stderr.split() == said


def test_an_unknown_level_is_named():
    done = run("import hf_gdn", HF_GDN_LOG="verbose")
    assert done.returncode == 0 and "HF_GDN_LOG=verbose is not a log level; levels: DEBUG, INFO" in done.stderr


def test_warnings_are_seen_in_programs_that_configure_no_logging():
    code = "import hf_gdn; from hf_gdn.log import warn_once; warn_once('slow kernels'); warn_once('slow kernels')"
    assert run(code, HF_GDN_LOG="").stderr.split("\n") == ["slow kernels", ""]
