"""Where and when a benchmark ran: a number without that is worth nothing."""

import datetime
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"


def describe(device: torch.device) -> dict[str, str]:
    """What the header of a table of results says."""
    return {
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d"),
        "command": " ".join(["python -m", _module(), *sys.argv[1:]]),
        "device": device_name(device),
        "versions": f"Python {platform.python_version()}, torch {torch.__version__}",
        "commit": commit(),
    }


def device_name(device: torch.device) -> str:
    """The accelerator's name, or the processor's with the number of cores that this process may use."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"CPU, {_processor()}, {len(os.sched_getaffinity(0))} cores"


def results_file(name: str, device: torch.device, suffix: str) -> Path:
    """The file of a benchmark's results, named after the kind of device: `model-cpu.json`, `model-h200.md`."""
    kind = torch.cuda.get_device_name(device).split()[-1].lower() if device.type == "cuda" else device.type
    return RESULTS / f"{name}-{kind}{suffix}"


def _module() -> str:
    specification = getattr(sys.modules["__main__"], "__spec__", None)
    return specification.name if specification else Path(sys.argv[0]).stem


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def commit() -> str:
    """The commit that is checked out, marked if files were changed since."""
    found = subprocess.run(
        ["git", "describe", "--always", "--dirty"], capture_output=True, text=True, cwd=RESULTS.parent, check=False
    )
    return found.stdout.strip() or "unknown"
