"""What transformers offers Hugging Face's ``kernels`` package for replacement, and how that package holds it."""

from __future__ import annotations

from importlib import metadata
from typing import Any

from ..errors import PatchError
from . import seams, versions

# Names of layers that write with a beta up to 2 (hf_gdn.patches.families has the same as `beta_scale`).
_WRITE_TWICE = ("olmo_hybrid",)


def check() -> None:
    """Raise PatchError unless the installed transformers lets the installed ``kernels`` replace its functions."""
    versions.check()
    utils, integration = "transformers.utils.import_utils", "transformers.integrations.hub_kernels"
    oldest, below = (seams.class_of(utils, f"KERNELS_{end}_VERSION") for end in ("MIN", "MAX"))
    seams.class_of(integration, "use_kernel_func_from_hub_with_fallback")
    if not seams.class_of(utils, "is_kernels_available")():
        try:
            found = f"kernels {metadata.version('kernels')} is"
        except metadata.PackageNotFoundError:
            found = "none is"
        raise PatchError(f"{versions.installed()} takes kernels >= {oldest} and < {below}; {found} installed")
    if not seams.class_of(integration, "_kernels_enabled"):
        raise PatchError("USE_HUB_KERNELS is off in the environment, so transformers lets no function be replaced")


def wrapped(layer: Any) -> Any:
    """The function that ``kernels`` made a layer of, whatever forward it has since; its own forward if it made none."""
    # Such a forward is a closure over the function alone. torch.compile traces this line.
    forward = type(layer).forward
    return forward.__closure__[0].cell_contents if forward.__closure__ else forward


def writes_twice(layer: Any) -> bool:
    """Whether a delta rule's function is of a family that writes with a beta up to 2, which calls do not say."""
    return any(name in wrapped(layer).__module__ for name in _WRITE_TWICE)
