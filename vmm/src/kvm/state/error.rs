//! Why KVM's state cannot be saved or restored.

use std::io;

/// Why KVM's state cannot be saved or restored.
#[derive(Debug, thiserror::Error)]
pub enum StateError {
    /// KVM refused a request.
    #[error("KVM refused to {action}")]
    Kvm {
        /// What was asked of it.
        action: &'static str,
        /// Why not.
        source: io::Error,
    },
    /// A model-specific register cannot be set.
    #[error("KVM of this host refuses to set model-specific register {index:#x} to {value:#x}")]
    Msr {
        /// Number of the register.
        index: u32,
        /// Its saved value.
        value: u64,
    },
    /// The processor is another maker's.
    #[error("the guest runs on a processor by `{saved}`, and this host's is by `{here}`")]
    Vendor {
        /// The saved processor's.
        saved: String,
        /// This host's.
        here: String,
    },
    /// The processor lacks features.
    #[error(
        "the guest was shown processor features that this host lacks: CPUID leaf {leaf:#x}, index {index}, {register}, bits {missing:#x}"
    )]
    Features {
        /// CPUID leaf.
        leaf: u32,
        /// Its index (ECX).
        index: u32,
        /// Name of the register.
        register: &'static str,
        /// The bits.
        missing: u32,
    },
    /// The time-stamp counter cannot be made to run as fast.
    #[error(
        "the guest's time-stamp counter runs at {saved} kHz, this host's at {here} kHz, and KVM cannot scale it"
    )]
    TscFrequency {
        /// The saved frequency in kHz.
        saved: u32,
        /// This host's in kHz.
        here: u32,
    },
    /// A saved value cannot be.
    #[error("{what} of the saved vCPU is {value}: allowed is {allowed}")]
    Value {
        /// Name of the value.
        what: &'static str,
        /// The value.
        value: u64,
        /// What it may be.
        allowed: &'static str,
    },
    /// The processor's extended state has parts that there is no room for here.
    #[error(
        "the guest's extended processor state takes {saved} bytes, but this host has room for {here}"
    )]
    ExtendedState {
        /// Saved size in bytes.
        saved: usize,
        /// Room here in bytes.
        here: usize,
    },
    /// The vCPU was not stopped as it must be.
    #[error("the vCPU has I/O pending: it must be complete before its state is saved")]
    Pending,
    /// The vCPU's thread has ended.
    #[error("a vCPU has ended: the guest was reset or is ending")]
    Ended,
}

impl StateError {
    /// A refusal of KVM.
    pub(super) fn kvm(action: &'static str) -> impl FnOnce(kvm_ioctls::Error) -> Self {
        move |error| Self::Kvm {
            action,
            source: io::Error::from_raw_os_error(error.errno()),
        }
    }
}
