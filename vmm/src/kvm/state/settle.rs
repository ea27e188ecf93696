//! Making KVM inject the interrupt of a local APIC timer that expired.
//!
//! When the timer expires while the vCPU is outside the guest, KVM only remembers that, and injects
//! the interrupt at the next run. Its register page does not show it: an expired one-shot timer
//! looks the same whether its interrupt is yet to be injected, or was handled long ago. A restored
//! timer that was started fires, though. So a saved page would lose the interrupt or repeat it.
//!
//! A run that a signal waits for injects it and comes back before the guest executes anything:
//! afterwards the interrupt is in the page. The signal is blocked in the thread but not in
//! KVM_RUN (KVM_SET_SIGNAL_MASK), so that it ends the run and reaches no handler.
#![allow(unsafe_code)]
// UNSAFETY: the ioctl is missing from kvm-ioctls, and signals of a thread are blocked, sent and
// taken by C functions.

use std::io;
use std::mem::MaybeUninit;
use std::time::Duration;

use kvm_bindings::{KVM_EXIT_DIRTY_RING_FULL, KVMIO, kvm_signal_mask};
use kvm_ioctls::{VcpuExit, VcpuFd};
use vmm_sys_util::ioctl::{ioctl_with_ptr, ioctl_with_ref};
use vmm_sys_util::ioctl_iow_nr;
use vmm_sys_util::signal::SIGRTMIN;

use super::StateError;

ioctl_iow_nr!(KVM_SET_SIGNAL_MASK, KVMIO, 0x8b, kvm_signal_mask);

/// The signal that ends the run, after that of kicks: SIGRTMIN + 1. It never reaches a handler.
const SETTLE_SIGNAL: i32 = 1;
/// Signals there are.
const SIGNALS: i32 = 64;

/// The set of blocked signals as KVM takes it: bit 0 is signal 1.
#[repr(C)]
struct Mask {
    len: u32,
    sigset: [u8; 8],
}

/// What a run that ends at once came to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Settled {
    /// What was due is injected.
    Yes,
    /// KVM came back for another reason before it injected anything.
    No,
}

/// Makes KVM inject what is due.
///
/// # Errors
/// When the vCPU was not stopped as it must be, or the host refuses.
pub(super) fn settle(vcpu: &mut VcpuFd) -> Result<Settled, StateError> {
    let signal = SIGRTMIN() + SETTLE_SIGNAL;
    let blocked = Blocked::new(signal).map_err(host)?;
    let before = blocked.mask_without(signal);
    set_mask(vcpu, Some(&before))?;
    raise(signal);
    let outcome = match vcpu.run() {
        Err(error) if error.errno() == libc::EINTR => Ok(Settled::Yes),
        Err(error) => Err(StateError::kvm("inject the interrupts that are due")(error)),
        Ok(VcpuExit::Unsupported(KVM_EXIT_DIRTY_RING_FULL)) => Ok(Settled::No),
        Ok(_) => Err(StateError::Pending),
    };
    take(signal);
    set_mask(vcpu, None)?;
    drop(blocked);
    outcome
}

fn host(source: io::Error) -> StateError {
    StateError::Kvm {
        action: "end a run by a signal",
        source,
    }
}

/// Blocks a signal in this thread until it is dropped.
struct Blocked {
    before: libc::sigset_t,
}

impl Blocked {
    fn new(signal: i32) -> io::Result<Self> {
        let mut set = MaybeUninit::uninit();
        let mut before = MaybeUninit::uninit();
        // SAFETY: the sets are initialised by `sigemptyset` and by `pthread_sigmask` before they
        // are read.
        unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            libc::sigaddset(set.as_mut_ptr(), signal);
            match libc::pthread_sigmask(libc::SIG_BLOCK, set.as_ptr(), before.as_mut_ptr()) {
                0 => Ok(Self {
                    before: before.assume_init(),
                }),
                error => Err(io::Error::from_raw_os_error(error)),
            }
        }
    }

    /// The signals that were blocked before, without `signal`.
    fn mask_without(&self, signal: i32) -> Mask {
        let is_blocked = |signal| {
            // SAFETY: the set is initialised, and the number is that of a signal.
            let member = unsafe { libc::sigismember(&raw const self.before, signal) };
            member == 1
        };
        let bits = (1..=SIGNALS)
            .filter(|other| *other != signal && is_blocked(*other))
            .fold(0u64, |bits, other| bits | 1 << (other - 1));
        Mask {
            len: 8,
            sigset: bits.to_le_bytes(),
        }
    }
}

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the set is initialised.
        unsafe {
            libc::pthread_sigmask(
                libc::SIG_SETMASK,
                &raw const self.before,
                std::ptr::null_mut(),
            )
        };
    }
}

fn set_mask(vcpu: &VcpuFd, mask: Option<&Mask>) -> Result<(), StateError> {
    let done = match mask {
        // SAFETY: KVM reads the length and as many bytes after it, which are there.
        Some(mask) => unsafe { ioctl_with_ref(vcpu, KVM_SET_SIGNAL_MASK(), mask) },
        // SAFETY: without a mask KVM reads nothing.
        None => unsafe { ioctl_with_ptr(vcpu, KVM_SET_SIGNAL_MASK(), std::ptr::null::<Mask>()) },
    };
    match done {
        0 => Ok(()),
        _ => Err(host(io::Error::last_os_error())),
    }
}

/// Sends `signal` to this thread, in which it is blocked.
fn raise(signal: i32) {
    // SAFETY: the thread is the one that runs.
    unsafe { libc::pthread_kill(libc::pthread_self(), signal) };
}

/// Takes the blocked `signal` if it waits.
fn take(signal: i32) {
    let no_time = libc::timespec {
        tv_sec: Duration::ZERO.as_secs() as libc::time_t,
        tv_nsec: 0,
    };
    let mut set = MaybeUninit::uninit();
    // SAFETY: the set is initialised by `sigemptyset`; nobody asks for the signal's origin.
    unsafe {
        libc::sigemptyset(set.as_mut_ptr());
        libc::sigaddset(set.as_mut_ptr(), signal);
        libc::sigtimedwait(set.as_ptr(), std::ptr::null_mut(), &raw const no_time);
    }
}
