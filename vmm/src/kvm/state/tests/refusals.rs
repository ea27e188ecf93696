//! States that this host refuses, and why.
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use kvm_bindings::{KVM_MP_STATE_INIT_RECEIVED, KVM_MP_STATE_RUNNABLE, KVM_MP_STATE_UNINITIALIZED};
use kvm_ioctls::VcpuFd;

use super::guest::{Counting, Machine, Stop};
use crate::kvm::state::{StateError, VcpuProbe, VcpuState};

/// A guest's state; none where there is no KVM.
fn state() -> Option<(Machine, VcpuState)> {
    let mut machine = Machine::started(2, Counting::Once)?;
    assert_eq!(machine.run(&mut 0), Stop::Number);
    machine.complete();
    let (_, state) = machine.capture();
    Some((machine, state))
}

fn refusal(change: impl FnOnce(&mut VcpuState)) -> Option<StateError> {
    let (_, mut state) = state()?;
    change(&mut state);
    let new = Machine::empty().unwrap();
    let refused = state
        .check_host(&new.kvm, &new.vcpu)
        .and_then(|()| state.restore(new.vm.fd(), &new.vcpu));
    Some(refused.unwrap_err())
}

#[test]
fn a_register_that_the_host_lacks_is_named() {
    let Some(refused) = refusal(|state| state.msrs.insert(3, (0x1234_5678, 5))) else {
        println!("skipped: there is no KVM");
        return;
    };
    assert_eq!(
        refused.to_string(),
        "KVM of this host refuses to set model-specific register 0x12345678 to 0x5"
    );
}

#[test]
fn a_feature_that_the_host_lacks_is_named() {
    // Bit 31 of EDX in leaf 1 is pending break enable, which KVM never shows.
    let Some(refused) = refusal(|state| {
        let leaf = state.cpuid.iter_mut().find(|e| e.leaf == 1);
        leaf.unwrap().edx |= 1 << 31;
    }) else {
        println!("skipped: there is no KVM");
        return;
    };
    assert!(
        refused
            .to_string()
            .ends_with("CPUID leaf 0x1, index 0, EDX, bits 0x80000000"),
        "{refused}"
    );
}

#[test]
fn parts_of_another_size_are_refused() {
    let Some(lapic) = refusal(|state| state.lapic.truncate(1000)) else {
        println!("skipped: there is no KVM");
        return;
    };
    assert!(
        matches!(lapic, StateError::Value { value: 1000, .. }),
        "{lapic}"
    );
    let xsave = refusal(|state| state.xsave.truncate(100)).unwrap();
    assert!(
        matches!(xsave, StateError::ExtendedState { saved: 100, .. }),
        "{xsave}"
    );
    let xsave = refusal(|state| state.xsave.resize(1 << 20, 1)).unwrap();
    assert!(matches!(xsave, StateError::ExtendedState { .. }), "{xsave}");
    let xcrs = refusal(|state| state.xcrs = vec![(0, 1); 17]).unwrap();
    assert!(
        matches!(xcrs, StateError::Value { value: 17, .. }),
        "{xcrs}"
    );
    let msrs = refusal(|state| state.msrs = vec![(0x10, 1); 2000]).unwrap();
    assert!(
        matches!(msrs, StateError::Value { value: 2000, .. }),
        "{msrs}"
    );
}

/// A second vCPU, which nobody has started, and its state.
fn waiting(machine: &Machine) -> (VcpuFd, VcpuProbe, VcpuState) {
    let mut second = machine.vm.create_vcpu(1).unwrap();
    let mut probe = VcpuProbe::new(&machine.kvm, machine.vm.fd(), &second).unwrap();
    let state = VcpuState::capture(&mut second, &mut probe).unwrap();
    assert_eq!(state.mp_state, KVM_MP_STATE_UNINITIALIZED);
    (second, probe, state)
}

#[test]
fn a_vcpu_that_waits_to_be_started_still_does() {
    let Some(machine) = Machine::empty() else {
        println!("skipped: there is no KVM");
        return;
    };
    let (_, mut probe, state) = waiting(&machine);
    let other = Machine::empty().unwrap();
    let mut restored = other.vm.create_vcpu(1).unwrap();
    state.restore(other.vm.fd(), &restored).unwrap();
    let again = VcpuState::capture(&mut restored, &mut probe).unwrap();
    assert_eq!(again.mp_state, state.mp_state);
    assert_eq!(again.lapic, state.lapic);
}

#[test]
fn a_vcpu_is_started_and_waits_again_in_place() {
    let Some(machine) = Machine::empty() else {
        println!("skipped: there is no KVM");
        return;
    };
    let (mut second, mut probe, waits) = waiting(&machine);
    let mut asked = waits.clone();
    asked.mp_state = KVM_MP_STATE_INIT_RECEIVED;
    let mut runs = waits.clone();
    runs.mp_state = KVM_MP_STATE_RUNNABLE;
    runs.registers.rax = 7;
    let orders = [&waits, &runs, &asked, &runs, &waits, &asked, &waits];
    for state in orders {
        state.restore_in_place(machine.vm.fd(), &second).unwrap();
        let found = VcpuState::capture(&mut second, &mut probe).unwrap();
        assert_eq!(found.mp_state, state.mp_state);
        assert_eq!(found.registers, state.registers);
        assert_eq!(found.lapic, state.lapic);
    }
}
