"""What a result was made with: machine, versions, and which implementation the original model runs on."""

from __future__ import annotations

import datetime
import platform
import subprocess
from importlib import metadata
from pathlib import Path
from typing import Any

import psutil
import torch

from ..patches import original_forward
from ..upstream.original_kernels import kernels_of

PACKAGES = (
    "hf-gdn",
    "torch",
    "triton",
    "transformers",
    "accelerate",
    "flash-linear-attention",
    "flash-qla",
    "causal-conv1d",
    "kernels",
)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that matter; "not installed" where they are absent."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "not installed"
    found["torch"] = torch.__version__
    return found


def machine(device: torch.device) -> dict[str, Any]:
    """The device and the machine around it."""
    found: dict[str, Any] = {
        "device": str(device),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpus"] = torch.cuda.device_count()
        found["gpu_memory_gib"] = round(properties.total_memory / 2**30, 1)
        found["cuda"] = torch.version.cuda or torch.version.hip
    return found


def clocks(device: torch.device) -> dict[str, str]:
    """Driver and clocks at this moment, as far as the system tells."""
    if device.type == "cuda":
        fields = "driver_version,clocks.sm,clocks.max.sm,clocks.mem,power.limit,temperature.gpu"
        command = ["nvidia-smi", f"--id={device.index or 0}", f"--query-gpu={fields}", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
        except (OSError, subprocess.SubprocessError):
            return {"driver": "unknown: nvidia-smi does not run"}
        return dict(zip(fields.split(","), (value.strip() for value in done.stdout.split(","))))
    frequency = psutil.cpu_freq()
    return {"cpu_mhz": f"{frequency.current:.0f}"} if frequency is not None else {}


def made_with(kind: str, command: str, device: torch.device) -> dict[str, Any]:
    """The head of every file of results."""
    return {
        "kind": kind,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "machine": {**machine(device), **clocks(device)},
        "versions": versions(),
    }


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def baseline(families: list[str]) -> dict[str, str]:
    """Which implementation each kernel function of the families' original forwards resolved to."""
    found: dict[str, str] = {}
    for family in families:
        found |= kernels_of(original_forward(family))
    return found
