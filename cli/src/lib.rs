//! The parts of the `tandem` command: settings, runtime directory, API server and clients.

pub mod api;
pub mod args;
mod bucket;
mod checkpoints;
pub mod client;
mod confine;
pub mod control;
pub mod exit;
pub mod failure;
pub mod keys;
pub mod logging;
pub mod output;
pub mod protect;
pub mod receive;
mod reception;
pub mod restore;
pub mod resume;
pub mod run;
pub mod runtime_dir;
pub mod settings;
pub mod signals;
pub mod standby;
pub mod terminal;
pub mod top;
pub mod verbs;
