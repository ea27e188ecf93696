//! The 16550 serial port at 0x3f8: polled output, input by interrupt or polling.

use core::fmt::{self, Write};

use crate::port;

const DATA: u16 = 0x3f8;
const INTERRUPT_ENABLE: u16 = DATA + 1;
const FIFO_CONTROL: u16 = DATA + 2;
const MODEM_CONTROL: u16 = DATA + 4;
const LINE_STATUS: u16 = DATA + 5;

const DATA_READY: u8 = 1 << 0;
const TRANSMITTER_EMPTY: u8 = 1 << 5;

/// Bytes that fit in the transmit FIFO, so that one status read covers as many.
const FIFO_BYTES: usize = 16;
/// Status reads before a byte is sent regardless: a port without a listener must not hang.
const POLLS_MAX: u32 = 100_000;

/// ISA interrupt of the port.
pub const IRQ: u32 = 4;

/// Turns the FIFOs on.
pub(crate) fn init() {
    port::write_u8(FIFO_CONTROL, 0x07);
}

/// Sends bytes as they are.
pub fn write_bytes(bytes: &[u8]) {
    for burst in bytes.chunks(FIFO_BYTES) {
        wait_empty();
        for &byte in burst {
            port::write_u8(DATA, byte);
        }
    }
}

/// The next received byte, if there is one.
pub fn read_byte() -> Option<u8> {
    let ready = port::read_u8(LINE_STATUS) & DATA_READY != 0;
    ready.then(|| port::read_u8(DATA))
}

/// Lets received bytes raise [`IRQ`].
pub fn enable_input_interrupt() {
    port::write_u8(MODEM_CONTROL, 0x0b);
    port::write_u8(INTERRUPT_ENABLE, 0x01);
}

fn wait_empty() {
    for _ in 0..POLLS_MAX {
        if port::read_u8(LINE_STATUS) & TRANSMITTER_EMPTY != 0 {
            return;
        }
    }
}

/// What [`crate::print!`] calls.
#[doc(hidden)]
pub fn print(arguments: fmt::Arguments) {
    let mut line = Line::default();
    // Formatting into a `Line` does not fail by itself; a broken Display loses its own text.
    let _ = line.write_fmt(arguments);
    line.flush();
}

/// What [`crate::println!`] calls.
#[doc(hidden)]
pub fn print_line(arguments: fmt::Arguments) {
    let mut line = Line::default();
    let _ = line.write_fmt(arguments);
    let _ = line.write_str("\n");
    line.flush();
}

/// Collects pieces of formatted text, so that status reads are per burst, not per piece.
struct Line {
    bytes: [u8; 128],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Self {
            bytes: [0; 128],
            len: 0,
        }
    }
}

impl Line {
    fn flush(&mut self) {
        write_bytes(&self.bytes[..self.len]);
        self.len = 0;
    }
}

impl Write for Line {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        for &byte in text.as_bytes() {
            if self.len == self.bytes.len() {
                self.flush();
            }
            self.bytes[self.len] = byte;
            self.len += 1;
        }
        Ok(())
    }
}
