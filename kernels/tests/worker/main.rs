//! The worker over a scripted GPU: on a virtual clock, where every figure can
//! be told exactly, and once over a real socket on the real clock.

mod accounting;
mod commands;
mod freezing;
mod quotas;
mod rig;
mod scripted;
mod serving;
