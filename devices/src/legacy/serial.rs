//! The 16550 serial port, the guest's console.
//!
//! Output goes byte by byte to a [`SerialOutput`]; input waits in a bounded queue until the guest's
//! receive buffer has room.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};

use vm_superio::serial::{SerialEvents, SerialState as Registers};
use vm_superio::{Serial, Trigger};

use crate::interrupt::IrqLine;
use crate::state::{RestoreError, SerialState};

/// Input that waits for the guest, in bytes; more is refused.
pub const INPUT_QUEUE_MAX: usize = 64 << 10;
/// Bytes that the receive FIFO holds.
const FIFO_SIZE: usize = 64;

/// Where the bytes go that the guest sends.
pub trait SerialOutput: Send {
    /// Takes one byte. It must have room: see [`SerialOutput::is_full`].
    fn put(&mut self, byte: u8);

    /// Whether a byte more would not fit. The vCPU that wants to send waits until it does.
    fn is_full(&self) -> bool;
}

#[derive(Clone)]
struct Line(Arc<Mutex<dyn IrqLine>>);

impl Trigger for Line {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.lock().map_or(Ok(()), |line| line.raise())
    }
}

/// Counters that the register model bumps from where it only has a shared reference.
#[derive(Clone, Debug, Default)]
struct Counters(Arc<CounterCells>);

#[derive(Debug, Default)]
struct CounterCells {
    rx_bytes: AtomicU64,
    tx_bytes: AtomicU64,
}

impl SerialEvents for Counters {
    fn buffer_read(&self) {
        self.0.rx_bytes.fetch_add(1, Ordering::Relaxed);
    }

    fn out_byte(&self) {
        self.0.tx_bytes.fetch_add(1, Ordering::Relaxed);
    }

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {}
}

#[derive(Clone)]
struct Output(Arc<Mutex<dyn SerialOutput>>);

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if let Ok(mut output) = self.0.lock() {
            bytes.iter().for_each(|b| output.put(*b));
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// A serial port.
pub struct SerialPort {
    registers: Serial<Line, Counters, Output>,
    line: Line,
    output: Output,
    counters: Counters,
    input: VecDeque<u8>,
}

impl SerialPort {
    /// A port at power-on.
    pub fn new(irq: impl IrqLine + 'static, output: impl SerialOutput + 'static) -> Self {
        let counters = Counters::default();
        let line = Line(Arc::new(Mutex::new(irq)));
        let output = Output(Arc::new(Mutex::new(output)));
        let registers = Serial::with_events(line.clone(), counters.clone(), output.clone());
        Self {
            registers,
            line,
            output,
            counters,
            input: VecDeque::new(),
        }
    }

    /// Reads the register at `offset` (0 to 7).
    pub fn read(&mut self, offset: u8) -> u8 {
        let value = self.registers.read(offset);
        self.feed();
        value
    }

    /// Writes the register at `offset` (0 to 7).
    pub fn write(&mut self, offset: u8, value: u8) {
        if let Err(error) = self.registers.write(offset, value) {
            tracing::warn!(%error, "serial port");
        }
    }

    /// Whether the next byte that the guest sends would not find room.
    pub fn output_is_full(&self) -> bool {
        self.output.0.lock().is_ok_and(|output| output.is_full())
    }

    /// Takes input for the guest; returns how many bytes had room in the queue.
    pub fn input(&mut self, bytes: &[u8]) -> usize {
        let room = INPUT_QUEUE_MAX - self.input.len();
        let taken = bytes.len().min(room);
        self.input.extend(&bytes[..taken]);
        self.feed();
        taken
    }

    /// Bytes that [`SerialPort::input`] would take now.
    pub fn input_room(&self) -> usize {
        INPUT_QUEUE_MAX - self.input.len()
    }

    /// Back to power-on; input that waits is kept for the next boot.
    pub fn reset(&mut self) {
        self.registers = Serial::with_events(
            self.line.clone(),
            self.counters.clone(),
            self.output.clone(),
        );
    }

    /// Registers and input that waits.
    pub fn save(&self) -> SerialState {
        let registers = self.registers.state();
        let (waiting, rest) = self.input.as_slices();
        SerialState {
            divisor: u16::from_le_bytes([registers.baud_divisor_low, registers.baud_divisor_high]),
            interrupt_enable: registers.interrupt_enable,
            interrupt_identification: registers.interrupt_identification,
            line_control: registers.line_control,
            line_status: registers.line_status,
            modem_control: registers.modem_control,
            modem_status: registers.modem_status,
            scratch: registers.scratch,
            fifo: registers.in_buffer,
            waiting: [waiting, rest].concat(),
        }
    }

    /// Takes over what [`SerialPort::save`] gave and raises the interrupts that are due: the
    /// interrupt line has to be connected.
    ///
    /// # Errors
    /// When there is more input than fits; the port is as before then.
    pub fn restore(&mut self, state: &SerialState) -> Result<(), RestoreError> {
        let limits = [
            (
                "the receive FIFO",
                state.fifo.len(),
                FIFO_SIZE,
                "at most 64 bytes",
            ),
            (
                "waiting input",
                state.waiting.len(),
                INPUT_QUEUE_MAX,
                "at most 64 KiB",
            ),
        ];
        for (what, len, max, allowed) in limits {
            if len > max {
                return Err(too_long(what, len, allowed));
            }
        }
        let [low, high] = state.divisor.to_le_bytes();
        let registers = Registers {
            baud_divisor_low: low,
            baud_divisor_high: high,
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.fifo.clone(),
        };
        let (line, counters, output) = (
            self.line.clone(),
            self.counters.clone(),
            self.output.clone(),
        );
        self.registers =
            Serial::from_state(&registers, line, counters, output).map_err(|error| {
                RestoreError::Start {
                    device: "serial",
                    source: io::Error::other(error.to_string()).into(),
                }
            })?;
        self.input = state.waiting.iter().copied().collect();
        Ok(())
    }

    /// Bytes (received, sent) by the guest.
    pub fn counters(&self) -> (u64, u64) {
        let cells = &self.counters.0;
        (
            cells.rx_bytes.load(Ordering::Relaxed),
            cells.tx_bytes.load(Ordering::Relaxed),
        )
    }

    fn feed(&mut self) {
        let room = self.registers.fifo_capacity().min(self.input.len());
        if room == 0 {
            return;
        }
        let bytes: Vec<u8> = self.input.drain(..room).collect();
        if let Err(error) = self.registers.enqueue_raw_bytes(&bytes) {
            tracing::warn!(%error, "serial port input");
        }
    }
}

fn too_long(what: &'static str, len: usize, allowed: &'static str) -> RestoreError {
    RestoreError::Value {
        device: "serial",
        what,
        value: len as u64,
        allowed,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::testing::CountingIrq;

    #[derive(Clone, Default)]
    struct Sink(Arc<Mutex<Vec<u8>>>);

    impl SerialOutput for Sink {
        fn put(&mut self, byte: u8) {
            self.0.lock().unwrap().push(byte);
        }

        fn is_full(&self) -> bool {
            self.0.lock().unwrap().len() >= 4
        }
    }

    #[test]
    fn bytes_go_out_and_a_full_output_is_seen() {
        let sink = Sink::default();
        let mut port = SerialPort::new(CountingIrq::default(), sink.clone());
        for byte in *b"abcd" {
            assert!(!port.output_is_full());
            port.write(0, byte);
        }
        assert!(port.output_is_full());
        assert_eq!(*sink.0.lock().unwrap(), b"abcd");
        assert_eq!(port.counters(), (0, 4));
    }

    #[test]
    fn input_is_bounded_and_comes_in_order() {
        let mut port = SerialPort::new(CountingIrq::default(), Sink::default());
        let sent: Vec<u8> = (0..=255).cycle().take(INPUT_QUEUE_MAX + 1000).collect();
        let taken = port.input(&sent);
        assert!(
            (INPUT_QUEUE_MAX..sent.len()).contains(&(taken + 64)),
            "{taken}"
        );
        let mut got = Vec::new();
        while port.read(5) & 1 != 0 {
            got.push(port.read(0));
        }
        assert_eq!(got, sent[..taken]);
    }

    #[test]
    fn reset_returns_to_power_on_but_keeps_the_ends() {
        let irq = CountingIrq::default();
        let sink = Sink::default();
        let mut port = SerialPort::new(irq.clone(), sink.clone());
        port.write(7, 0x5a);
        port.write(1, 0x0f);
        port.reset();
        assert_eq!(port.read(7), 0);
        assert_eq!(port.read(1), 0);
        port.write(0, b'x');
        assert_eq!(*sink.0.lock().unwrap(), b"x");
        port.write(1, 0x02);
        assert!(irq.0.load(Ordering::SeqCst) > 0);
    }
}
