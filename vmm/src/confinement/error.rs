//! Why a thread could not be confined.

use std::io;

/// Why a thread could not be confined.
#[derive(Debug, thiserror::Error)]
pub enum ConfinementError {
    /// There are tables of system calls for one architecture.
    #[error(
        "no confinement on {found}: the tables of system calls are for x86_64; give --confine off"
    )]
    Architecture {
        /// This machine's architecture.
        found: &'static str,
    },
    /// The host's kernel refused.
    #[error("the host refused to {action}")]
    Refused {
        /// What was asked of it.
        action: &'static str,
        /// What it said.
        source: io::Error,
    },
    /// A filter could not be made or installed.
    #[error("cannot {action} a filter of system calls; kernels with CONFIG_SECCOMP_FILTER take it")]
    Filter {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        source: seccompiler::Error,
    },
    /// Files could not be restricted.
    #[error("cannot restrict files by Landlock")]
    Landlock(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl ConfinementError {
    /// A refusal of the host.
    pub(super) fn refused(action: &'static str) -> impl FnOnce(rustix::io::Errno) -> Self {
        move |errno| Self::Refused {
            action,
            source: errno.into(),
        }
    }
}
