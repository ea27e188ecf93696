//! Traps that KVM tells nobody of.
//!
//! KVM_GET_VCPU_EVENTS leaves out the exceptions of `int3` and `into`: hardware that stops before it
//! delivers one executes the instruction again. kvm_pvm is beyond the instruction by then, so a
//! vCPU that stops there and is restored elsewhere never takes the trap. It looks just as one that
//! came back from the trap's handler and executed nothing since: the only remedy is to let it go on
//! for a moment, for whoever enters the guest delivers the trap.

use kvm_ioctls::VcpuFd;
use tandem_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::StateError;

/// `int3`.
const BREAKPOINT: u8 = 0xcc;
/// `int 3` and `int 4` in two bytes.
const INTERRUPTS: [[u8; 2]; 2] = [[0xcd, 3], [0xcd, 4]];

/// Whether `vcpu` of kvm_pvm is right behind an instruction whose trap may not be delivered yet.
///
/// # Errors
/// When KVM refuses.
pub fn trap_may_be_on_its_way(vcpu: &VcpuFd, mem: &GuestMemory) -> Result<bool, StateError> {
    let registers = vcpu
        .get_regs()
        .map_err(StateError::kvm("read a vCPU's registers"))?;
    let byte = |before: u64| -> Option<u8> {
        let place = vcpu
            .translate_gva(registers.rip.wrapping_sub(before))
            .ok()
            .filter(|place| place.valid != 0)?;
        mem.read_obj(GuestAddress(place.physical_address)).ok()
    };
    let Some(last) = byte(1) else {
        return Ok(false);
    };
    if last == BREAKPOINT {
        return Ok(true);
    }
    let is_second = INTERRUPTS.iter().any(|bytes| bytes[1] == last);
    Ok(is_second && byte(2).is_some_and(|first| INTERRUPTS.contains(&[first, last])))
}
