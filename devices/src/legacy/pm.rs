//! ACPI power management: the fixed PM1 event and control blocks (ACPI 6.5, 4.8.3).
//!
//! Power-off is sleep type 5 with SLP_EN; the power button is a fixed event by which the host asks
//! the guest to shut down. The SCI line is level-triggered: it is asserted while an enabled event
//! is pending.

use super::MachineRequest;
use crate::state::{PmState, RestoreError};

/// Sleep type that means S5, as the `_S5` package of the DSDT says.
pub const SLEEP_TYPE_S5: u16 = 5;
/// PM1 event: power button, in status and enable registers.
const POWER_BUTTON: u16 = 1 << 8;
/// Events that can be enabled: global lock, power button, sleep button, clock. Only the power button
/// ever comes, but a kernel checks that the bits it sets stay set.
const EVENTS: u16 = 1 << 5 | POWER_BUTTON | 1 << 9 | 1 << 10;
/// PM1 control: the machine is in ACPI mode (read-only here: there is no other mode).
const SCI_EN: u16 = 1;
/// PM1 control: sleep type field.
const SLEEP_TYPE_SHIFT: u16 = 10;
/// PM1 control: enter the sleep state (write-only).
const SLEEP_ENABLE: u16 = 1 << 13;

/// The PM1 register blocks: 0 status, 2 enable, 4 control, each 16 bits.
#[derive(Clone, Debug, Default)]
pub struct PowerManagement {
    status: u16,
    enable: u16,
}

impl PowerManagement {
    /// Reads `data.len()` bytes at `offset`.
    pub fn read(&self, offset: u16, data: &mut [u8]) {
        let mut block = [0u8; 6];
        block[0..2].copy_from_slice(&self.status.to_le_bytes());
        block[2..4].copy_from_slice(&self.enable.to_le_bytes());
        block[4..6].copy_from_slice(&SCI_EN.to_le_bytes());
        for (at, byte) in (usize::from(offset)..).zip(data) {
            *byte = block.get(at).copied().unwrap_or(0xff);
        }
    }

    /// Writes `data` at `offset`.
    pub fn write(&mut self, offset: u16, data: &[u8]) -> Option<MachineRequest> {
        let mut value = [0u8; 2];
        let len = data.len().min(2);
        value[..len].copy_from_slice(&data[..len]);
        let value = u16::from_le_bytes(value);
        match offset {
            0 => self.status &= !value,
            2 => self.enable = value & EVENTS,
            4 if value & SLEEP_ENABLE != 0 && (value >> SLEEP_TYPE_SHIFT) & 7 == SLEEP_TYPE_S5 => {
                return Some(MachineRequest::PowerOff);
            }
            _ => {}
        }
        None
    }

    /// Presses the power button; false if the guest does not listen for it.
    pub fn press_power_button(&mut self) -> bool {
        self.status |= POWER_BUTTON;
        self.enable & POWER_BUTTON != 0
    }

    /// The registers.
    pub fn save(&self) -> PmState {
        PmState {
            status: self.status,
            enable: self.enable,
        }
    }

    /// Takes over what [`PowerManagement::save`] gave. The SCI line has to be set after it.
    ///
    /// # Errors
    /// When bits are set that the registers do not have.
    pub fn restore(&mut self, state: &PmState) -> Result<(), RestoreError> {
        for (what, value, allowed, bits) in [
            ("the status register", state.status, "bit 8", POWER_BUTTON),
            (
                "the enable register",
                state.enable,
                "bits 5, 8, 9 and 10",
                EVENTS,
            ),
        ] {
            if value & !bits != 0 {
                return Err(RestoreError::Value {
                    device: "power management",
                    what,
                    value: value.into(),
                    allowed,
                });
            }
        }
        (self.status, self.enable) = (state.status, state.enable);
        Ok(())
    }

    /// Whether the SCI line is asserted.
    pub fn interrupt_asserted(&self) -> bool {
        self.status & self.enable != 0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read16(pm: &PowerManagement, offset: u16) -> u16 {
        let mut data = [0; 2];
        pm.read(offset, &mut data);
        u16::from_le_bytes(data)
    }

    #[test]
    fn sleep_type_5_powers_off_and_no_other() {
        let mut pm = PowerManagement::default();
        let sleep = |t: u16| (t << 10 | 1 << 13).to_le_bytes();
        assert_eq!(pm.write(4, &sleep(3)), None);
        assert_eq!(pm.write(4, &(5u16 << 10).to_le_bytes()), None);
        assert_eq!(pm.write(4, &sleep(5)), Some(MachineRequest::PowerOff));
    }

    #[test]
    fn power_button_is_an_event_until_the_guest_clears_it() {
        let mut pm = PowerManagement::default();
        assert!(!pm.press_power_button());
        assert!(!pm.interrupt_asserted());
        pm.write(0, &POWER_BUTTON.to_le_bytes());
        pm.write(2, &0xffffu16.to_le_bytes());
        assert!(pm.press_power_button());
        assert!(pm.interrupt_asserted());
        assert_eq!(read16(&pm, 0), POWER_BUTTON);
        pm.write(0, &POWER_BUTTON.to_le_bytes());
        assert!(!pm.interrupt_asserted());
        assert_eq!(read16(&pm, 4), SCI_EN);
    }

    #[test]
    fn odd_accesses_are_harmless() {
        let mut pm = PowerManagement::default();
        let mut data = [0; 8];
        pm.read(5, &mut data);
        assert_eq!(data[0], 0);
        assert_eq!(data[1], 0xff);
        assert_eq!(pm.write(9, &[1, 2, 3, 4]), None);
        assert_eq!(pm.write(0, &[]), None);
    }
}
