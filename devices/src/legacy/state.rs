//! Saved state of the legacy devices.
//!
//! The keyboard controller has none: its reset line has no memory.

use serde::{Deserialize, Serialize};

/// A serial port: registers as the UART has them, and input that waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SerialState {
    /// Divisor latch.
    pub divisor: u16,
    /// Interrupt enable register.
    pub interrupt_enable: u8,
    /// Interrupt identification register.
    pub interrupt_identification: u8,
    /// Line control register.
    pub line_control: u8,
    /// Line status register.
    pub line_status: u8,
    /// Modem control register.
    pub modem_control: u8,
    /// Modem status register.
    pub modem_status: u8,
    /// Scratch register.
    pub scratch: u8,
    /// Bytes in the receive FIFO, oldest first.
    #[serde(with = "serde_bytes")]
    pub fifo: Vec<u8>,
    /// Bytes that wait for room in the FIFO, oldest first.
    #[serde(with = "serde_bytes")]
    pub waiting: Vec<u8>,
}

impl SerialState {
    /// Version of the type.
    pub const VERSION: u32 = 1;
}

/// The ACPI power management registers.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PmState {
    /// PM1 status register.
    pub status: u16,
    /// PM1 enable register.
    pub enable: u16,
}

impl PmState {
    /// Version of the type.
    pub const VERSION: u32 = 1;
}

/// The CMOS clock. It shows the host's time, which is not saved.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CmosState {
    /// The selected register, below 128.
    pub index: u8,
}

impl CmosState {
    /// Version of the type.
    pub const VERSION: u32 = 1;
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

    use std::sync::{Arc, Mutex};
    use std::time::SystemTime;

    use proptest::collection::vec;
    use proptest::prelude::{any, prop_assert_eq, prop_compose, proptest};

    use super::*;
    use crate::legacy::cmos::Cmos;
    use crate::legacy::pm::PowerManagement;
    use crate::legacy::serial::{INPUT_QUEUE_MAX, SerialOutput, SerialPort};
    use crate::virtio::testing::CountingIrq;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl SerialOutput for Sink {
        fn put(&mut self, byte: u8) {
            self.0.lock().unwrap().push(byte);
        }

        fn is_full(&self) -> bool {
            false
        }
    }

    fn port() -> SerialPort {
        SerialPort::new(CountingIrq::default(), Sink::default())
    }

    prop_compose! {
        fn serial()(
            divisor: u16,
            registers: [u8; 8],
            fifo in vec(any::<u8>(), 0..=64),
            waiting in vec(any::<u8>(), 0..200),
        ) -> SerialState {
            let [ier, iir, lcr, lsr, mcr, msr, scratch, _] = registers;
            SerialState {
                divisor,
                interrupt_enable: ier,
                interrupt_identification: iir,
                line_control: lcr,
                line_status: lsr,
                modem_control: mcr,
                modem_status: msr,
                scratch,
                fifo,
                waiting,
            }
        }
    }

    proptest! {
        #[test]
        fn any_serial_state_is_kept_and_harmless(state in serial(), pokes in vec((0u8..8, any::<u8>()), 0..50)) {
            let mut port = port();
            port.restore(&state).unwrap();
            prop_assert_eq!(port.save(), state);
            for (register, value) in pokes {
                port.read(register);
                port.write(register, value);
            }
            let after = port.save();
            let mut other = self::port();
            other.restore(&after).unwrap();
            prop_assert_eq!(other.save(), after);
        }

        /// A guest that reads goes on reading the same bytes elsewhere.
        #[test]
        fn input_goes_on_elsewhere(input in vec(any::<u8>(), 0..500), before in 0usize..500) {
            let mut port = port();
            port.input(&input);
            let mut got = Vec::new();
            let mut read = |port: &mut SerialPort, most: usize| {
                for _ in 0..most {
                    if port.read(5) & 1 == 0 {
                        break;
                    }
                    got.push(port.read(0));
                }
            };
            read(&mut port, before);
            let mut other = self::port();
            other.restore(&port.save()).unwrap();
            read(&mut other, usize::MAX);
            prop_assert_eq!(got, input);
        }

        #[test]
        fn power_management_is_kept(status: u16, enable: u16) {
            let state = PmState { status, enable };
            let mut pm = PowerManagement::default();
            let possible = status & !0x100 == 0 && enable & !0x720 == 0;
            prop_assert_eq!(pm.restore(&state).is_ok(), possible);
            if possible {
                prop_assert_eq!(pm.save(), state);
                prop_assert_eq!(pm.interrupt_asserted(), status & enable != 0);
            }
        }
    }

    #[test]
    fn an_interrupt_that_was_due_comes_again() {
        let irq = CountingIrq::default();
        let mut old = port();
        old.write(1, 0x02);
        let mut new = SerialPort::new(irq.clone(), Sink::default());
        new.restore(&old.save()).unwrap();
        assert_eq!(irq.0.load(std::sync::atomic::Ordering::SeqCst), 1);
    }

    #[test]
    fn too_much_input_is_refused() {
        let mut state = port().save();
        state.fifo = vec![0; 65];
        let refused = port().restore(&state).unwrap_err();
        assert_eq!(
            refused.to_string(),
            "the receive FIFO of the saved serial device is 65: allowed is at most 64 bytes"
        );
        state.fifo.clear();
        state.waiting = vec![0; INPUT_QUEUE_MAX + 1];
        assert!(port().restore(&state).is_err());
    }

    #[test]
    fn the_selected_clock_register_is_kept() {
        let new = || Cmos::new(Box::new(SystemTime::now), 256 << 20);
        let mut cmos = new();
        cmos.write(0, 0x0d);
        let mut other = new();
        other.restore(&cmos.save()).unwrap();
        assert_eq!(other.read(1), 0x80);
        assert!(other.restore(&CmosState { index: 0x80 }).is_err());
    }
}
