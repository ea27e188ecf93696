//! Where and with what priority a thread of the VMM runs.

use rustix::thread::{CpuSet, sched_setaffinity};

use crate::kvm::vcpu::Scheduling;

/// Applies `scheduling` to the calling thread. What the host refuses is a warning, not an error:
/// the guest runs all the same.
pub fn apply(scheduling: Scheduling) {
    if let Some(cpu) = scheduling.cpu {
        let mut set = CpuSet::new();
        set.set(cpu);
        if let Err(error) = sched_setaffinity(None, &set) {
            tracing::warn!(cpu, %error, "cannot pin a thread");
        }
    }
    if let Some(priority) = scheduling.realtime
        && let Err(error) = set_fifo(priority)
    {
        tracing::warn!(priority, %error, "cannot give a thread real-time priority");
    }
}

#[allow(unsafe_code)]
// UNSAFETY: sched_setscheduler has no safe wrapper in the crates used here.
fn set_fifo(priority: u8) -> std::io::Result<()> {
    let param = libc::sched_param {
        sched_priority: i32::from(priority),
    };
    // SAFETY: `param` is a valid structure; 0 is the calling thread.
    let result = unsafe { libc::sched_setscheduler(0, libc::SCHED_FIFO, &raw const param) };
    if result == 0 {
        Ok(())
    } else {
        Err(std::io::Error::last_os_error())
    }
}
