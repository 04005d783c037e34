//! The driver's functions, looked up by name.
//!
//! cudarc's own wrappers panic where the library or a symbol is missing, and take a status for a
//! Rust enum, which a newer driver's status would make undefined behaviour. So only its types and
//! its way of finding the library are used, and a status stays a number.

use std::ffi::{c_char, c_int, c_uint, c_void};

use cudarc::driver::sys::{
    self, CUcontext, CUdevResource, CUdevResourceDesc, CUdevice, CUdeviceptr, CUevent, CUfunction,
    CUgreenCtx, CUmodule, CUstream, CUuuid,
};

/// What every function of the driver returns: a CUresult.
pub(crate) type Status = u32;

/// Declares a table of functions and how it is loaded.
macro_rules! functions {
    ($(#[$meta:meta])* $table:ident { $($name:ident($($argument:ty),*);)* }) => {
        $(#[$meta])*
        #[expect(non_snake_case, reason = "the fields have the driver's own names")]
        pub(crate) struct $table {
            $(pub(crate) $name: unsafe extern "C" fn($($argument),*) -> Status,)*
        }

        impl $table {
            /// Looks every function up, or names the first one that is missing. Called only where
            /// the library is present.
            fn load() -> Result<Self, &'static str> {
                Ok(Self {
                    $($name: {
                        let name = concat!(stringify!($name), "\0");
                        // SAFETY: the caller has seen that the library is there, and the types
                        // are those of cuda.h for this name.
                        unsafe { sys::culib().get(name.as_bytes()).map(|symbol| *symbol) }
                            .map_err(|_| stringify!($name))?
                    },)*
                })
            }
        }
    };
}

functions! {
    /// What the engine cannot work without; every driver of CUDA 12 has it.
    Api {
        cuInit(c_uint);
        cuDriverGetVersion(*mut c_int);
        cuGetErrorName(Status, *mut *const c_char);
        cuDeviceGetCount(*mut c_int);
        cuDeviceGet(*mut CUdevice, c_int);
        cuDeviceGetName(*mut c_char, c_int, CUdevice);
        cuDeviceGetUuid_v2(*mut CUuuid, CUdevice);
        cuDeviceGetAttribute(*mut c_int, c_uint, CUdevice);
        cuDeviceTotalMem_v2(*mut usize, CUdevice);
        cuDevicePrimaryCtxRetain(*mut CUcontext, CUdevice);
        cuDevicePrimaryCtxRelease_v2(CUdevice);
        cuCtxSetCurrent(CUcontext);
        cuCtxPushCurrent_v2(CUcontext);
        cuCtxPopCurrent_v2(*mut CUcontext);
        cuCtxGetStreamPriorityRange(*mut c_int, *mut c_int);
        cuModuleLoadData(*mut CUmodule, *const c_void);
        cuModuleUnload(CUmodule);
        cuModuleGetFunction(*mut CUfunction, CUmodule, *const c_char);
        cuFuncSetAttribute(CUfunction, c_uint, c_int);
        cuLaunchKernel(
            CUfunction,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            c_uint,
            CUstream,
            *mut *mut c_void,
            *mut *mut c_void
        );
        cuMemAlloc_v2(*mut CUdeviceptr, usize);
        cuMemFree_v2(CUdeviceptr);
        cuMemGetInfo_v2(*mut usize, *mut usize);
        cuMemHostAlloc(*mut *mut c_void, usize, c_uint);
        cuMemFreeHost(*mut c_void);
        cuMemcpyDtoHAsync_v2(*mut c_void, CUdeviceptr, usize, CUstream);
        cuMemcpyHtoDAsync_v2(CUdeviceptr, *const c_void, usize, CUstream);
        cuMemsetD8Async(CUdeviceptr, u8, usize, CUstream);
        cuStreamCreateWithPriority(*mut CUstream, c_uint, c_int);
        cuStreamDestroy_v2(CUstream);
        cuStreamSynchronize(CUstream);
        cuStreamWaitEvent(CUstream, CUevent, c_uint);
        cuStreamWriteValue32_v2(CUstream, CUdeviceptr, u32, c_uint);
        cuEventCreate(*mut CUevent, c_uint);
        cuEventDestroy_v2(CUevent);
        cuEventRecord(CUevent, CUstream);
        cuEventQuery(CUevent);
        cuEventSynchronize(CUevent);
        cuEventElapsedTime(*mut f32, CUevent, CUevent);
    }
}

functions! {
    /// What SM partitions need; drivers from CUDA 12.5 on have it.
    GreenApi {
        cuDeviceGetDevResource(CUdevice, *mut CUdevResource, c_uint);
        cuDevSmResourceSplitByCount(
            *mut CUdevResource,
            *mut c_uint,
            *const CUdevResource,
            *mut CUdevResource,
            c_uint,
            c_uint
        );
        cuDevResourceGenerateDesc(*mut CUdevResourceDesc, *mut CUdevResource, c_uint);
        cuGreenCtxCreate(*mut CUgreenCtx, CUdevResourceDesc, CUdevice, c_uint);
        cuGreenCtxDestroy(CUgreenCtx);
        cuGreenCtxGetDevResource(CUgreenCtx, *mut CUdevResource, c_uint);
        cuGreenCtxStreamCreate(*mut CUstream, CUgreenCtx, c_uint, c_int);
        cuCtxFromGreenCtx(*mut CUcontext, CUgreenCtx);
    }
}

/// Both tables.
pub(crate) struct Tables {
    /// Always there.
    pub(crate) api: Api,
    /// `None`, or rather the name of what is missing, where the driver has no green contexts.
    pub(crate) green: Result<GreenApi, &'static str>,
}

impl Tables {
    /// Finds the library and its functions.
    ///
    /// # Errors
    /// What is missing, in words.
    pub(crate) fn load() -> Result<Self, String> {
        // SAFETY: loading libcuda runs its constructors, which ask nothing of the program.
        if !unsafe { sys::is_culib_present() } {
            return Err("there is no libcuda.so.1, so no NVIDIA driver".to_owned());
        }
        let api = Api::load().map_err(|name| format!("the driver lacks {name}"))?;
        Ok(Self {
            api,
            green: GreenApi::load(),
        })
    }
}
