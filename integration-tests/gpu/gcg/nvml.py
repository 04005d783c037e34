"""NVML by ctypes: memory of the GPU and of its processes, asked for without a process."""

import ctypes
from ctypes import POINTER, Structure, byref, c_char_p, c_uint, c_ulonglong, c_void_p

from gcg.figure import Skip

_MOST = 256
_NOT_AVAILABLE = 2**64 - 1


class _Memory(Structure):
    _fields_ = [("total", c_ulonglong), ("free", c_ulonglong), ("used", c_ulonglong)]


class _Process(Structure):
    _fields_ = [
        ("pid", c_uint),
        ("used", c_ulonglong),
        ("gpu_instance", c_uint),
        ("compute_instance", c_uint),
    ]


class Nvml:
    """One GPU."""

    def __init__(self, uuid: str | None) -> None:
        if uuid is None:
            raise Skip("the simulated GPU has no NVML")
        self._library = ctypes.CDLL("libnvidia-ml.so.1")
        self._call("nvmlInit_v2")
        self._device = c_void_p()
        self._library.nvmlDeviceGetHandleByUUID.argtypes = [c_char_p, POINTER(c_void_p)]
        self._call("nvmlDeviceGetHandleByUUID", uuid.encode(), byref(self._device))

    def _call(self, name: str, *arguments: object) -> None:
        if status := getattr(self._library, name)(*arguments):
            raise RuntimeError(f"{name} returned {status}")

    def used(self) -> int:
        """Bytes of device memory in use, by whomever."""
        memory = _Memory()
        self._call("nvmlDeviceGetMemoryInfo", self._device, byref(memory))
        return int(memory.used)

    def processes(self) -> dict[int, int | None]:
        """Bytes of each process that computes."""
        count = c_uint(_MOST)
        found = (_Process * _MOST)()
        self._call("nvmlDeviceGetComputeRunningProcesses_v3", self._device, byref(count), found)
        return {
            process.pid: None if process.used == _NOT_AVAILABLE else int(process.used)
            for process in found[: count.value]
        }
