//! Ctrl-C and SIGTERM: remembered, so that whoever waits stops, returns an error, and lets its
//! guards remove what it made.

use std::sync::Arc;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::{Context, Result, bail};
use signal_hook::consts::{SIGINT, SIGTERM};
use signal_hook::flag;

static INTERRUPTED: OnceLock<Arc<AtomicBool>> = OnceLock::new();

/// Starts to remember interrupts instead of dying of them.
pub(crate) fn install() -> Result<()> {
    let interrupted = INTERRUPTED.get_or_init(Arc::default);
    for signal in [SIGINT, SIGTERM] {
        flag::register(signal, Arc::clone(interrupted))
            .with_context(|| format!("cannot handle signal {signal}"))?;
    }
    Ok(())
}

/// An error once an interrupt came.
pub(crate) fn check() -> Result<()> {
    match INTERRUPTED.get() {
        Some(interrupted) if interrupted.load(Ordering::Relaxed) => bail!("interrupted"),
        _ => Ok(()),
    }
}
