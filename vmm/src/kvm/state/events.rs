//! Exceptions, interrupts, NMIs and system management interrupts on their way to the guest.

use kvm_bindings::{
    KVM_VCPUEVENT_VALID_NMI_PENDING, KVM_VCPUEVENT_VALID_PAYLOAD, KVM_VCPUEVENT_VALID_SHADOW,
    KVM_VCPUEVENT_VALID_SIPI_VECTOR, KVM_VCPUEVENT_VALID_SMM, KVM_VCPUEVENT_VALID_TRIPLE_FAULT,
    kvm_vcpu_events, kvm_vcpu_events__bindgen_ty_1 as kvm_exception,
    kvm_vcpu_events__bindgen_ty_2 as kvm_interrupt, kvm_vcpu_events__bindgen_ty_3 as kvm_nmi,
    kvm_vcpu_events__bindgen_ty_4 as kvm_smi, kvm_vcpu_events__bindgen_ty_5 as kvm_triple_fault,
};
use serde::{Deserialize, Serialize};

use super::registers::mirror;

/// Flags that only say which fields KVM filled in and we know.
const KNOWN_FLAGS: u32 = KVM_VCPUEVENT_VALID_NMI_PENDING
    | KVM_VCPUEVENT_VALID_SIPI_VECTOR
    | KVM_VCPUEVENT_VALID_SHADOW
    | KVM_VCPUEVENT_VALID_SMM
    | KVM_VCPUEVENT_VALID_PAYLOAD
    | KVM_VCPUEVENT_VALID_TRIPLE_FAULT;

mirror! {
    /// An exception.
    ExceptionState = kvm_exception {
        /// Whether it is being injected.
        injected: u8 = injected,
        /// Its vector.
        vector: u8 = nr,
        /// Whether it has an error code.
        has_error_code: u8 = has_error_code,
        /// Whether it waits for injection.
        pending: u8 = pending,
        /// The error code.
        error_code: u32 = error_code,
    }
}

mirror! {
    /// An external interrupt.
    InterruptState = kvm_interrupt {
        /// Whether it is being injected.
        injected: u8 = injected,
        /// Its vector.
        vector: u8 = nr,
        /// Whether it is a software interrupt.
        soft: u8 = soft,
        /// Whether the last instruction holds interrupts off.
        shadow: u8 = shadow,
    }
}

mirror! {
    /// Non-maskable interrupts.
    NmiState = kvm_nmi {
        /// Whether one is being injected.
        injected: u8 = injected,
        /// How many wait.
        pending: u8 = pending,
        /// Whether they are held off.
        masked: u8 = masked,
    }
}

mirror! {
    /// System management interrupts.
    SmiState = kvm_smi {
        /// Whether the vCPU is in system management mode.
        smm: u8 = smm,
        /// Whether one waits.
        pending: u8 = pending,
        /// Whether the mode was entered inside an NMI.
        inside_nmi: u8 = smm_inside_nmi,
        /// Whether an INIT waits.
        latched_init: u8 = latched_init,
    }
}

/// Events of a vCPU.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct EventsState {
    /// Exceptions.
    pub exception: ExceptionState,
    /// The exception's payload: the faulting address or DR6 bits, where KVM told it.
    pub exception_payload: Option<u64>,
    /// External interrupts.
    pub interrupt: InterruptState,
    /// Non-maskable interrupts.
    pub nmi: NmiState,
    /// System management interrupts.
    pub smi: SmiState,
    /// Start-up vector that came by SIPI.
    pub sipi_vector: u32,
    /// Whether a triple fault waits.
    pub triple_fault: u8,
    /// Which fields KVM filled in (KVM_VCPUEVENT_VALID_*, KVM API 4.31).
    pub flags: u32,
}

impl From<kvm_vcpu_events> for EventsState {
    fn from(kvm: kvm_vcpu_events) -> Self {
        Self {
            exception: kvm.exception.into(),
            exception_payload: (kvm.exception_has_payload != 0).then_some(kvm.exception_payload),
            interrupt: kvm.interrupt.into(),
            nmi: kvm.nmi.into(),
            smi: kvm.smi.into(),
            sipi_vector: kvm.sipi_vector,
            triple_fault: kvm.triple_fault.pending,
            flags: kvm.flags & KNOWN_FLAGS,
        }
    }
}

impl From<EventsState> for kvm_vcpu_events {
    fn from(state: EventsState) -> Self {
        Self {
            exception: state.exception.into(),
            exception_has_payload: state.exception_payload.is_some().into(),
            exception_payload: state.exception_payload.unwrap_or_default(),
            interrupt: state.interrupt.into(),
            nmi: state.nmi.into(),
            smi: state.smi.into(),
            sipi_vector: state.sipi_vector,
            triple_fault: kvm_triple_fault {
                pending: state.triple_fault,
            },
            // KVM says that the vector of a SIPI and pending NMIs are valid only where it is asked
            // to set them.
            flags: state.flags | KVM_VCPUEVENT_VALID_NMI_PENDING | KVM_VCPUEVENT_VALID_SIPI_VECTOR,
            ..Default::default()
        }
    }
}
