"""The CUDA driver's own interface by ctypes: what a program needs that has no PyTorch.

Two kernels: `spin` computes for as long as it is told, the same on every GPU and
stretched by nothing but the time it does not run, and stores how far its first thread
is in the host's memory; `empty` does nothing.
"""

import ctypes
from collections.abc import Callable
from ctypes import byref, c_char_p, c_float, c_int, c_size_t, c_uint, c_uint64, c_void_p
from typing import Any

# A chunk is 128 rounds of 8 dependent multiply-adds: 4 us with 1024 threads an SM.
PTX = b"""
.version 8.0
.target sm_80
.address_size 64

.visible .entry empty()
{
    ret;
}

.visible .entry spin(
    .param .u64 progress,
    .param .u64 base,
    .param .u64 chunks,
    .param .u64 out
)
{
    .reg .pred %leader, %again, %more;
    .reg .f32 %x, %a, %b;
    .reg .b32 %lane, %block, %width, %index, %left;
    .reg .b64 %progress, %done, %chunks, %out, %offset, %place;

    ld.param.u64 %progress, [progress];
    ld.param.u64 %done, [base];
    ld.param.u64 %chunks, [chunks];
    ld.param.u64 %out, [out];
    mov.u32 %lane, %tid.x;
    mov.u32 %block, %ctaid.x;
    mov.u32 %width, %ntid.x;
    mad.lo.s32 %index, %block, %width, %lane;
    setp.eq.u32 %leader, %index, 0;
    cvt.rn.f32.u32 %x, %index;
    mov.f32 %a, 0f3F000000;
    mov.f32 %b, 0f3F800000;
    add.u64 %chunks, %chunks, %done;

CHUNK:
    mov.u32 %left, 128;
ROUND:
    fma.rn.f32 %x, %x, %a, %b;
    fma.rn.f32 %x, %x, %a, %b;
    fma.rn.f32 %x, %x, %a, %b;
    fma.rn.f32 %x, %x, %a, %b;
    fma.rn.f32 %x, %x, %a, %b;
    fma.rn.f32 %x, %x, %a, %b;
    fma.rn.f32 %x, %x, %a, %b;
    fma.rn.f32 %x, %x, %a, %b;
    sub.u32 %left, %left, 1;
    setp.ne.u32 %again, %left, 0;
    @%again bra ROUND;
    add.u64 %done, %done, 1;
    @%leader st.relaxed.sys.global.u64 [%progress], %done;
    setp.lt.u64 %more, %done, %chunks;
    @%more bra CHUNK;

    mul.wide.u32 %offset, %index, 4;
    add.u64 %place, %out, %offset;
    st.global.f32 [%place], %x;
    ret;
}
"""

_SM_COUNT = 16
_HOST_PORTABLE_MAPPED = 3
_CAPTURE_RELAXED = 2
_NOT_READY = 600

_TYPES: dict[str, list[Any]] = {
    "cuInit": [c_uint],
    "cuDeviceGet": [c_void_p, c_int],
    "cuDeviceGetAttribute": [c_void_p, c_int, c_int],
    "cuDevicePrimaryCtxRetain": [c_void_p, c_int],
    "cuDevicePrimaryCtxRelease_v2": [c_int],
    "cuCtxCreate_v2": [c_void_p, c_uint, c_int],
    "cuCtxDestroy_v2": [c_void_p],
    "cuCtxGetCurrent": [c_void_p],
    "cuCtxSetCurrent": [c_void_p],
    "cuCtxSynchronize": [],
    "cuModuleLoadData": [c_void_p, c_char_p],
    "cuModuleGetFunction": [c_void_p, c_void_p, c_char_p],
    "cuMemAlloc_v2": [c_void_p, c_size_t],
    "cuMemFree_v2": [c_void_p],
    "cuMemHostAlloc": [c_void_p, c_size_t, c_uint],
    "cuMemHostGetDevicePointer_v2": [c_void_p, c_void_p, c_uint],
    "cuStreamCreate": [c_void_p, c_uint],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamBeginCapture_v2": [c_void_p, c_int],
    "cuStreamEndCapture": [c_void_p, c_void_p],
    "cuGraphInstantiateWithFlags": [c_void_p, c_void_p, c_uint64],
    "cuGraphLaunch": [c_void_p, c_void_p],
    "cuEventCreate": [c_void_p, c_uint],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventSynchronize": [c_void_p],
    "cuEventQuery": [c_void_p],
    "cuEventElapsedTime": [c_void_p, c_void_p, c_void_p],
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, c_void_p, c_void_p],
    "cuCheckpointProcessLock": [c_int, c_void_p],
    "cuCheckpointProcessCheckpoint": [c_int, c_void_p],
    "cuCheckpointProcessRestore": [c_int, c_void_p],
    "cuCheckpointProcessUnlock": [c_int, c_void_p],
}

_library = ctypes.CDLL("libcuda.so.1")


class CudaError(Exception):
    """A call of the driver that failed."""


def call(name: str, *arguments: object) -> None:
    """Calls the driver; other threads run meanwhile."""
    function = getattr(_library, name)
    function.argtypes = _TYPES[name]
    if status := function(*arguments):
        raise CudaError(f"{name} returned {status}")


def _made(name: str, *arguments: object) -> int:
    """Calls what writes a handle to its first argument; the handle."""
    handle = c_void_p()
    call(name, byref(handle), *arguments)
    if handle.value is None:
        raise CudaError(f"{name} made nothing")
    return handle.value


def init() -> None:
    """Begins to use the driver."""
    call("cuInit", 0)


def device(index: int) -> int:
    """A GPU by its index."""
    found = c_int()
    call("cuDeviceGet", byref(found), index)
    return found.value


def sm_count(of: int) -> int:
    """SMs of a GPU."""
    count = c_int()
    call("cuDeviceGetAttribute", byref(count), _SM_COUNT, of)
    return count.value


def primary(of: int) -> int:
    """The GPU's primary context, the one that PyTorch uses; current from here on."""
    context = _made("cuDevicePrimaryCtxRetain", of)
    call("cuCtxSetCurrent", context)
    return context


def current() -> int:
    """The context of this thread."""
    return _made("cuCtxGetCurrent")


def create_context(of: int) -> int:
    """A further context, current from here on."""
    return _made("cuCtxCreate_v2", 0, of)


def function(name: bytes) -> int:
    """A kernel, loaded into the current context."""
    return _made("cuModuleGetFunction", _made("cuModuleLoadData", PTX), name)


def stream() -> int:
    """A stream that waits for no other."""
    return _made("cuStreamCreate", 1)


def event() -> int:
    """An event with a time."""
    return _made("cuEventCreate", 0)


def has_happened(what: int) -> bool:
    """Whether an event has."""
    function = _library.cuEventQuery
    function.argtypes = _TYPES["cuEventQuery"]
    status = function(what)
    if status not in (0, _NOT_READY):
        raise CudaError(f"cuEventQuery returned {status}")
    return bool(status == 0)


def elapsed_us(first: int, last: int) -> float:
    """Time between two events that have happened, microseconds."""
    milliseconds = c_float()
    call("cuEventElapsedTime", byref(milliseconds), first, last)
    return milliseconds.value * 1000


def allocate(size: int) -> int:
    """Device memory."""
    return _made("cuMemAlloc_v2", size)


class Word:
    """64 bits in the host's memory that a kernel can write to."""

    def __init__(self) -> None:
        host = _made("cuMemHostAlloc", 64, _HOST_PORTABLE_MAPPED)
        self._value = c_uint64.from_address(host)
        self._value.value = 0
        self.address = _made("cuMemHostGetDevicePointer_v2", host, 0)

    def read(self) -> int:
        """What is there now."""
        return self._value.value


class Launch:
    """A kernel with its grid and its 64-bit parameters."""

    def __init__(self, kernel: int, blocks: int, threads: int, *parameters: int) -> None:
        self._kernel, self._grid = kernel, (blocks, 1, 1, threads, 1, 1, 0)
        self.values = [c_uint64(value) for value in parameters]
        # One more, since an array of C has at least one.
        pointers = [ctypes.addressof(value) for value in self.values] + [0]
        self._pointers = (c_void_p * len(pointers))(*pointers)

    def on(self, where: int) -> None:
        """Launches it on a stream."""
        call("cuLaunchKernel", self._kernel, *self._grid, where, self._pointers, None)


def capture(launches: list[Launch], where: int) -> int:
    """An executable graph of these launches."""
    call("cuStreamBeginCapture_v2", where, _CAPTURE_RELAXED)
    for launch in launches:
        launch.on(where)
    return _made("cuGraphInstantiateWithFlags", _made_from(where), 0)


def _made_from(where: int) -> int:
    graph = c_void_p()
    call("cuStreamEndCapture", where, byref(graph))
    if graph.value is None:
        raise CudaError("cuStreamEndCapture made nothing")
    return graph.value


def fast_call(name: str) -> Callable[..., int]:
    """A function that costs as little to call as Python allows: it takes values of
    ctypes as they are, and no other thread runs meanwhile."""
    found: Callable[..., int] = getattr(ctypes.PyDLL("libcuda.so.1"), name)
    return found
