"""Common to all tests: no network, one thread, NaN in uninitialised memory, clean patches, tiny models."""

from __future__ import annotations

import logging
import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny tensors: threads that wait for each other on a busy machine cost 30x
os.environ["HF_GDN_VERIFY"] = "0"  # tests of kernels compare more, and tests/test_verification.py sets it

import pytest
import torch
import transformers

import hf_gdn
from hf_gdn import registry
from hf_gdn.kernels.triton.runtime import INTERPRET
from tests import tiny_models as tiny
from tests.access_checker import AccessChecker


def pytest_addoption(parser):
    parser.addoption("--all", action="store_true", help="every family in every test, and tests marked `extended`")


# Tests of the layers themselves take every family.
_OF_ALL_FAMILIES = (
    "test_full_forward",
    "test_prefill_then_decode_is_the_full_forward",
    "test_generate",
    "test_gradients",
    "test_padding_is_as_if_it_were_not_there",
)


def _extended(item) -> bool:
    named = item.callspec.params.values() if hasattr(item, "callspec") else ()
    other = any(isinstance(x, str) and x in tiny.EXTENDED for x in named)
    return "extended" in item.keywords or (other and item.originalname not in _OF_ALL_FAMILIES)


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--all"):
        left_out = [item for item in items if _extended(item)]
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if not _extended(item)]
    if not torch.cuda.is_available():
        skip = pytest.mark.skip(reason="needs a CUDA device")
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(skip)


def pytest_terminal_summary(terminalreporter):
    terminalreporter.write_line(f"transformers {transformers.__version__}, torch {torch.__version__}")


@pytest.fixture(autouse=True, scope="session")
def _nan_in_uninitialised_memory():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills torch.empty with NaN
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


class _NoOldNames(logging.Handler):
    """transformers logs the use of an old name of an output, rather than warn: an error in tests, as warnings are."""

    def emit(self, record):
        assert "deprecated. Use `cache`" not in record.getMessage(), record.getMessage()


@pytest.fixture(autouse=True, scope="session")
def _old_names_are_errors():
    handler = _NoOldNames(logging.WARNING)
    logging.getLogger("transformers").addHandler(handler)
    yield
    logging.getLogger("transformers").removeHandler(handler)


@pytest.fixture(scope="session")
def access_checker():
    """Watches all launches in Triton's interpreter from the first test that needs it on."""
    checker = AccessChecker()
    checker.install()
    return checker


@pytest.fixture(autouse=True)
def _no_races(request):
    """Fails a test in whose launches programs race, or threads do, or an address lies outside the launch's tensors."""
    if not INTERPRET or "interpret" not in request.keywords:
        yield
        return
    checker = request.getfixturevalue("access_checker")
    checker.findings.clear()
    yield
    assert not checker.findings, f"found in the test's launches: {sorted(checker.findings)}"


@pytest.fixture(autouse=True)
def _unpatched_afterwards():
    yield
    hf_gdn.unpatch()


@pytest.fixture
def without_numba():
    """No numba backend, which comes before eager on a CPU where the package is installed."""
    taken = [kernel for kernel in registry.kernels() if kernel.backend == "numba"]
    for kernel in taken:
        registry.unregister(kernel.op, kernel.backend)
    yield
    for kernel in taken:
        registry.register(kernel)


@pytest.fixture(params=sorted(tiny.ALL))
def family(request):
    """Name of a family that the installed transformers has."""
    if request.param not in tiny.CONFIGS:
        pytest.skip(f"transformers {transformers.__version__} has no {request.param}")
    return request.param
