//! The local APIC and the I/O APICs, reached from ring 3 by MMIO.

use crate::{acpi, phys};

const LAPIC: u64 = 0xfee0_0000;
const ID: u64 = LAPIC + 0x20;
const TASK_PRIORITY: u64 = LAPIC + 0x80;
const SPURIOUS: u64 = LAPIC + 0xf0;
const TIMER: u64 = LAPIC + 0x320;
const LINT0: u64 = LAPIC + 0x350;
const LINT1: u64 = LAPIC + 0x360;
const TIMER_INITIAL: u64 = LAPIC + 0x380;
const TIMER_CURRENT: u64 = LAPIC + 0x390;
const TIMER_DIVIDE: u64 = LAPIC + 0x3e0;

const MASKED: u32 = 1 << 16;
const ENABLED: u32 = 1 << 8;
const PERIODIC: u32 = 1 << 17;
const DIVIDE_BY_16: u32 = 0b0011;

/// First vector that is not an exception; line `n` has vector `FIRST_VECTOR + n`.
pub(crate) const FIRST_VECTOR: u32 = 32;
/// Vector of the timer: line [`crate::irq::TIMER_LINE`].
const TIMER_VECTOR: u32 = 62;
/// Vector of spurious interrupts.
const SPURIOUS_VECTOR: u32 = 63;

/// Nanoseconds per count of the timer: a 1 GHz bus divided by 16, as every hypervisor has it.
pub(crate) const NS_PER_COUNT: u64 = 16;

/// I/O APIC that a machine without ACPI tables has.
const IOAPIC_DEFAULT: acpi::IoApic = acpi::IoApic {
    address: 0xfec0_0000,
    first: 0,
};

/// Enables the local APIC; its timer runs once it is given a period.
pub(crate) fn init() {
    // First of all: while it is disabled, the local APIC masks whatever is written below.
    phys::write_u32(SPURIOUS, ENABLED | SPURIOUS_VECTOR);
    phys::write_u32(LINT0, MASKED);
    phys::write_u32(LINT1, MASKED);
    phys::write_u32(TASK_PRIORITY, 0);
    phys::write_u32(TIMER_DIVIDE, DIVIDE_BY_16);
    phys::write_u32(TIMER, PERIODIC | TIMER_VECTOR);
}

/// Starts a period of `counts`; the timer begins again by itself at its end.
pub(crate) fn start_timer(counts: u32) {
    phys::write_u32(TIMER_INITIAL, counts);
}

/// Counts left in the current period.
pub(crate) fn timer_left() -> u32 {
    phys::read_u32(TIMER_CURRENT)
}

/// Routes global interrupt `gsi` to `vector` on this processor, edge-triggered, active high.
pub(crate) fn route(gsi: u32, vector: u32) {
    let (address, register) = entry(gsi);
    let destination = phys::read_u32(ID) & 0xff00_0000;
    write_io(address, register + 1, destination);
    write_io(address, register, vector);
}

/// Lets no more interrupts `gsi` pass.
pub(crate) fn mask(gsi: u32) {
    let (address, register) = entry(gsi);
    write_io(address, register, MASKED);
}

/// The IOAPIC of `gsi` and the first register of its entry.
fn entry(gsi: u32) -> (u64, u32) {
    let apic = acpi::io_apic_for(gsi).unwrap_or(IOAPIC_DEFAULT);
    (apic.address, 0x10 + (gsi - apic.first) * 2)
}

fn write_io(apic: u64, register: u32, value: u32) {
    phys::write_u32(apic, register);
    phys::write_u32(apic + 0x10, value);
}
