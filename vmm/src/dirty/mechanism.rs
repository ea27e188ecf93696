//! How KVM tells which pages vCPUs wrote.
//!
//! Rings are preferred: their cost follows the pages written and not the size of the guest. But KVM
//! checks only at an entry to the guest that a ring has room, and keeps 64 entries for what comes
//! in between. `kvm_pvm` emulates up to 1,024 instructions of ring 0 at an entry, which can write
//! more pages than that: entries are then overwritten. That is noticed, and ends tracking; so there
//! the log is used, which has no limit and costs the same for guests of up to a few GiB.

use std::io;

use kvm_ioctls::Kvm;

use super::{log, ring};
use crate::cpu::PlatformKind;
use crate::error::Error;
use crate::kvm::vm::Vm;

/// Most entries of a vCPU's ring that [`Mechanism::detect`] asks for: 1 MiB of kernel memory each.
const RING_ENTRIES_MAX: u32 = 1 << 16;

/// How KVM tells which pages vCPUs wrote.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mechanism {
    /// A ring per vCPU.
    Ring {
        /// Entries of each ring: a power of two, at least 256 (1,024 where the processor logs
        /// dirty pages itself), at most what KVM says.
        entries: u32,
    },
    /// A bitmap per memory slot.
    Log,
}

impl Mechanism {
    /// The best that this host has.
    ///
    /// # Errors
    /// When it has none.
    pub fn detect(kvm: &Kvm, platform: PlatformKind) -> Result<Self, Error> {
        Self::choose(platform, ring::entries_max(kvm), log::is_available(kvm)).ok_or_else(|| {
            Error::NoKvm {
                hint: "it can only follow a guest's writes from Linux 5.1 on",
                source: io::ErrorKind::Unsupported.into(),
            }
        })
    }

    /// The best where KVM offers rings of `entries_max` and perhaps a log.
    fn choose(platform: PlatformKind, entries_max: u32, has_log: bool) -> Option<Self> {
        let ring = (entries_max > 0).then_some(Self::Ring {
            entries: entries_max.min(RING_ENTRIES_MAX),
        });
        let log = has_log.then_some(Self::Log);
        match platform {
            PlatformKind::Hardware => ring.or(log),
            PlatformKind::Pvm => log.or(ring),
        }
    }

    /// Makes `vm` able to follow writes by this mechanism. It must have no vCPU yet.
    ///
    /// # Errors
    /// When KVM refuses: a vCPU exists, the mechanism does not, or the ring's size is not allowed.
    pub fn enable(self, vm: &Vm) -> Result<Enabled, Error> {
        match self {
            Self::Ring { entries } => ring::enable(vm.fd(), entries)?,
            Self::Log => log::enable(vm.fd())?,
        }
        Ok(Enabled(self))
    }
}

/// Proof that a virtual machine was made able to follow writes.
#[derive(Debug)]
pub struct Enabled(pub(super) Mechanism);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rings_are_preferred_where_they_cannot_overrun() {
        use PlatformKind::{Hardware, Pvm};
        let ring = |entries| Some(Mechanism::Ring { entries });
        assert_eq!(Mechanism::choose(Hardware, 4096, true), ring(4096));
        assert_eq!(Mechanism::choose(Hardware, 1 << 20, false), ring(1 << 16));
        assert_eq!(Mechanism::choose(Hardware, 0, true), Some(Mechanism::Log));
        assert_eq!(Mechanism::choose(Pvm, 4096, true), Some(Mechanism::Log));
        assert_eq!(Mechanism::choose(Pvm, 4096, false), ring(4096));
        assert_eq!(Mechanism::choose(Pvm, 0, false), None);
    }
}
