//! Power off and reset: by ACPI where the tables say how, else by what every PC had.
#![allow(unsafe_code)]
// UNSAFETY: the last resort breaks the interrupt table on purpose.

use crate::acpi::{self, Register};
use crate::port;

const KEYBOARD_COMMAND: u16 = 0x64;
const KEYBOARD_RESET: u8 = 0xfe;

/// Turns the machine off; on one that cannot, resets it.
pub fn off() -> ! {
    match acpi::sleep_method() {
        Some(acpi::Sleep::Reduced { control, kind }) => write(control, (kind << 2) | (1 << 5)),
        Some(acpi::Sleep::Pm1a { port, kind }) => {
            port::write_u16(port, (u16::from(kind) << 10) | (1 << 13));
        }
        None => {}
    }
    reboot()
}

/// Resets the machine.
pub fn reboot() -> ! {
    if let Some((register, value)) = acpi::reset_method() {
        write(register, value);
    }
    port::write_u8(KEYBOARD_COMMAND, KEYBOARD_RESET);
    triple_fault()
}

fn write(register: Register, value: u8) {
    match register {
        Register::Memory(address) => crate::phys::write_u8(address, value),
        Register::Port(port) => port::write_u8(port, value),
    }
}

/// Resets the processor by a fault that it cannot report.
pub fn triple_fault() -> ! {
    #[cfg(panic = "abort")]
    {
        unsafe extern "C" {
            static mut boot_idt: [u64; 128];
        }
        // SAFETY: nothing runs after this, by design.
        unsafe {
            (&raw mut boot_idt).write_volatile([0; 128]);
            core::arch::asm!("ud2", options(noreturn));
        }
    }
    #[cfg(not(panic = "abort"))]
    unreachable!("A hosted program does not reset the machine.")
}
