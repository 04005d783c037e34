"""The machine: whether it can be measured on, and what it is."""

import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path

# Beside PATH: where drivers and container runtimes put their programs.
_DIRECTORIES = ("/usr/bin", "/usr/local/bin", "/usr/local/nvidia/bin", "/opt/nvidia/bin")
# Read, never set.
_STATE = "compute_mode,mig.mode.current,persistence_mode,clocks.sm,clocks.mem,power.draw,temperature.gpu"


@dataclass(frozen=True)
class Gpu:
    """The GPU that is measured."""

    name: str
    uuid: str
    driver: str


def program(name: str) -> Path | None:
    """A program of the driver."""
    path = os.pathsep.join([os.environ.get("PATH", ""), *_DIRECTORIES])
    found = shutil.which(name, path=path)
    return None if found is None else Path(found)


def _query(fields: str) -> list[str] | None:
    nvidia_smi = program("nvidia-smi")
    if nvidia_smi is None:
        return None
    command = [str(nvidia_smi), "-i", "0", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return None
    lines = done.stdout.splitlines()
    if done.returncode != 0 or not lines:
        return None
    return [value.strip() for value in lines[0].split(",")]


@cache
def find_gpu() -> Gpu | None:
    """The GPU with NVML index 0."""
    values = _query("name,uuid,driver_version")
    return None if values is None or len(values) != 3 else Gpu(*values)


def gpu_state() -> dict[str, str]:
    """Modes, clocks, power and temperature of the GPU now."""
    values = _query(_STATE)
    return {} if values is None else dict(zip(_STATE.split(","), values, strict=False))


def reason_to_skip(sim: bool) -> str | None:
    """Why nothing can be measured here, if so."""
    if os.geteuid() != 0:
        return "gcgroupd serve needs root"
    if not Path("/dev/fuse").exists():
        return "there is no /dev/fuse"
    if not sim and find_gpu() is None:
        return "no NVIDIA GPU: nvidia-smi is not there or lists none"
    return None


def describe(sim: bool) -> dict[str, str]:
    """The facts that stand above the figures."""
    gpu = None if sim else find_gpu()
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        "gpu": "simulated" if gpu is None else gpu.name,
        "driver": "none (simulated)" if gpu is None else gpu.driver,
        "kernel": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpus": str(len(os.sched_getaffinity(0))),
        "python": platform.python_version(),
    }
