//! Control of processes that the service did not launch, through the mounted
//! files, on a simulated GPU.

mod command_line;
mod control;
mod discovery;
mod doctor;
mod fault;
mod pending;
mod several;
mod survival;
mod window;
