//! The interference kernels and the worker that runs one of them.
//!
//! [`catalogue`] has one row a kernel, [`protocol`] what the service and a
//! worker say to each other, [`engine`] what a worker needs of a GPU, and
//! [`worker`] the state machine over it, the same on a real GPU and on a
//! simulated one.

pub mod catalogue;
pub mod engine;
pub mod protocol;
pub mod reference;
pub mod worker;
