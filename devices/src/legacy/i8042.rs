//! The keyboard controller, of which only the reset line is left.

use std::cell::Cell;
use std::convert::Infallible;

use vm_superio::{I8042Device, Trigger};

use super::MachineRequest;

#[derive(Debug, Default)]
struct ResetLine(Cell<bool>);

impl Trigger for ResetLine {
    type E = Infallible;

    fn trigger(&self) -> Result<(), Infallible> {
        self.0.set(true);
        Ok(())
    }
}

/// An i8042 that resets the machine on command 0xfe.
#[derive(Debug)]
pub struct I8042(I8042Device<ResetLine>);

impl Default for I8042 {
    fn default() -> Self {
        Self(I8042Device::new(ResetLine::default()))
    }
}

impl I8042 {
    /// Reads the port at `offset` from the data port (0 data, 4 status).
    pub fn read(&mut self, offset: u8) -> u8 {
        self.0.read(offset)
    }

    /// Writes the port at `offset` from the data port.
    pub fn write(&mut self, offset: u8, value: u8) -> Option<MachineRequest> {
        let Ok(()) = self.0.write(offset, value);
        self.0.reset_evt().0.take().then_some(MachineRequest::Reset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_reset_command_resets() {
        let mut i8042 = I8042::default();
        assert_eq!(i8042.write(4, 0xd1), None);
        assert_eq!(i8042.write(0, 0xfe), None);
        assert_eq!(i8042.write(4, 0xfe), Some(MachineRequest::Reset));
        assert_eq!(i8042.write(4, 0xaa), None);
    }
}
