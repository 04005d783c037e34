//! What the mounted files do, driven from outside on a simulated GPU.

mod command_line;
mod configuration;
mod event;
mod fault;
mod freeze;
mod grammar;
mod launch;
mod launch_error;
mod lifecycle;
mod partition;
mod permission;
mod reading;
mod several;
mod survival;
mod table;
