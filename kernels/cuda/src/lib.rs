//! The CUDA engine: [`gcgroup_kernels::engine::Engine`] on a real GPU.
//!
//! It needs the NVIDIA driver's libcuda and nothing else; the kernels are PTX that is compiled in.
//! Without a driver, or with one that lacks a function, [`CudaEngine::open`] says so and does not
//! panic.
//!
//! Three streams of execution work together:
//! - the caller's thread makes every call of the trait,
//! - a waiter thread blocks on the ends of launches and makes the engine's descriptor readable,
//! - a control stream, of the highest priority and outside any SM partition, sets the stop flag
//!   while kernels run.

mod api;
mod context;
mod driver;
mod engine;
mod flag;
mod green;
mod launch;
mod memory;
mod ptx;
mod stream;
mod verify;
mod waiter;
mod workload;

pub use driver::{DeviceName, devices};
pub use engine::CudaEngine;
pub use flag::FlagPath;
