"""hf-gdn env: what serves what here."""

from __future__ import annotations

from .app import USE, command


@command(panel=USE, needs=("psutil", "rich"), examples=["hf-gdn env"])
def env() -> None:
    """Which backend serves which op on this machine, and the versions."""
    from ..eval import machine

    machine.show()
