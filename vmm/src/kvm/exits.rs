//! Exits of vCPUs to the VMM, counted by kind.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};

/// Why a vCPU left the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(usize)]
pub enum ExitKind {
    /// Read of an I/O port.
    IoIn,
    /// Write to an I/O port.
    IoOut,
    /// Read of a device register in memory.
    MmioRead,
    /// Write to a device register in memory.
    MmioWrite,
    /// A kick by the VMM or a signal.
    Interrupted,
    /// A halt that reached the VMM.
    Halt,
    /// A triple fault.
    Shutdown,
    /// KVM's reset or shutdown event.
    SystemEvent,
    /// The vCPU's ring of dirty pages is full.
    DirtyRingFull,
    /// KVM cannot go on.
    InternalError,
    /// Anything else.
    Other,
}

const KINDS: [(ExitKind, &str); 11] = [
    (ExitKind::IoIn, "io_in"),
    (ExitKind::IoOut, "io_out"),
    (ExitKind::MmioRead, "mmio_read"),
    (ExitKind::MmioWrite, "mmio_write"),
    (ExitKind::Interrupted, "interrupted"),
    (ExitKind::Halt, "halt"),
    (ExitKind::Shutdown, "shutdown"),
    (ExitKind::SystemEvent, "system_event"),
    (ExitKind::DirtyRingFull, "dirty_ring_full"),
    (ExitKind::InternalError, "internal_error"),
    (ExitKind::Other, "other"),
];

/// Counts of one vCPU. Written by its thread, read by any.
#[derive(Debug, Default)]
pub struct ExitCounters([AtomicU64; KINDS.len()]);

impl ExitCounters {
    /// Counts one exit. Only the vCPU's own thread counts, so a plain store suffices.
    pub fn count(&self, kind: ExitKind) {
        let counter = &self.0[kind as usize];
        counter.store(counter.load(Ordering::Relaxed) + 1, Ordering::Relaxed);
    }

    /// All counts by name.
    pub fn by_name(&self) -> BTreeMap<String, u64> {
        KINDS
            .iter()
            .map(|(kind, name)| {
                (
                    (*name).to_owned(),
                    self.0[*kind as usize].load(Ordering::Relaxed),
                )
            })
            .collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_is_counted_under_its_own_name() {
        let counters = ExitCounters::default();
        for (times, (kind, _)) in KINDS.iter().enumerate() {
            (0..times).for_each(|_| counters.count(*kind));
        }
        let by_name = counters.by_name();
        assert_eq!(by_name.len(), KINDS.len());
        for (times, (_, name)) in KINDS.iter().enumerate() {
            assert_eq!(by_name[*name], times as u64);
        }
    }
}
