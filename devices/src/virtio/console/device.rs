//! The console device itself.

use std::collections::BTreeMap;

use super::backend::{ConsoleBackend, WindowSize};
use super::{BUFFERS_PER_CALL, BYTES_PER_CALL, INPUT_QUEUE, OUTPUT_QUEUE, QUEUE_SIZE};
use crate::event::Poller;
use crate::state::{ConsoleState, DeviceState, RestoreError, SaveError};
use crate::virtio::chain::Chain;
use crate::virtio::{Context, DeviceFault, DeviceKind, VirtioDevice, wrong_kind};

/// VIRTIO_CONSOLE_F_SIZE (5.3.3).
const FEATURE_SIZE: u64 = 1;
/// Bytes of the configuration space (5.3.4): columns, rows, number of ports, emergency write.
const CONFIG_SIZE: usize = 12;

/// The backend's descriptors changed.
const TOKEN_BACKEND: u32 = 0;
/// A batch ended early.
const TOKEN_AGAIN: u32 = 1;

#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    read_bytes: u64,
    write_bytes: u64,
    write_full: u64,
}

/// A console with one port.
pub struct Console {
    backend: Box<dyn ConsoleBackend>,
    features: u64,
    config: [u8; CONFIG_SIZE],
    config_changed: bool,
    /// Bytes of the first waiting output buffer that are out already.
    written: usize,
    /// The backend was full; nothing is written before its next event.
    write_blocked: bool,
    /// The backend may have input: it was not found empty since its last event.
    may_read: bool,
    counters: Counters,
}

impl Console {
    /// A console whose bytes go to `backend`.
    pub fn new(backend: Box<dyn ConsoleBackend>) -> Self {
        let window = backend.window();
        Self {
            backend,
            features: if window.is_some() { FEATURE_SIZE } else { 0 },
            config: config_space(window),
            config_changed: false,
            written: 0,
            write_blocked: false,
            may_read: false,
            counters: Counters::default(),
        }
    }

    fn look_at_window(&mut self) {
        let config = config_space(self.backend.window());
        if self.features & FEATURE_SIZE != 0 && self.config != config {
            self.config = config;
            self.config_changed = true;
        }
    }

    /// Writes what the driver has, until the backend is full.
    fn write(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        if self.write_blocked {
            return Ok(());
        }
        let mut left = BYTES_PER_CALL;
        for _ in 0..BUFFERS_PER_CALL {
            let Some(chain) = next_request(OUTPUT_QUEUE, ctx)? else {
                return Ok(());
            };
            let done = self.write_part(&chain, &mut left)?;
            if !done {
                ctx.queues[OUTPUT_QUEUE].undo_pop();
            } else {
                ctx.complete(OUTPUT_QUEUE, chain.head, 0)?;
            }
            if self.write_blocked {
                return Ok(());
            }
            if left == 0 {
                break;
            }
        }
        ctx.poller.again(TOKEN_AGAIN);
        Ok(())
    }

    /// Writes what is left of a buffer, `left` bytes at most; true if all of it is out.
    fn write_part(&mut self, chain: &Chain, left: &mut usize) -> Result<bool, DeviceFault> {
        if !chain.writable.is_empty() {
            return Err(DeviceFault::Request {
                queue: OUTPUT_QUEUE,
                reason: "output has a device-writable part",
            });
        }
        let part = chain.readable.slice(self.written, *left);
        let taken = self.backend.write(&part).min(part.len());
        *left -= taken;
        self.counters.write_bytes += taken as u64;
        self.written += taken;
        if taken < part.len() {
            self.write_blocked = true;
            self.counters.write_full += 1;
        }
        if self.written < chain.readable.len() {
            return Ok(false);
        }
        self.written = 0;
        Ok(true)
    }

    /// Reads until the backend has nothing more or the driver has no room.
    fn read(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        let mut left = BYTES_PER_CALL;
        for _ in 0..BUFFERS_PER_CALL {
            if !self.may_read || left == 0 {
                break;
            }
            let Some(chain) = next_request(INPUT_QUEUE, ctx)? else {
                return Ok(());
            };
            if !chain.readable.is_empty() || chain.writable.is_empty() {
                return Err(DeviceFault::Request {
                    queue: INPUT_QUEUE,
                    reason: "an input buffer has no room or a read-only part",
                });
            }
            let len = self.backend.read(&chain.writable.slice(0, left));
            if len == 0 {
                ctx.queues[INPUT_QUEUE].undo_pop();
                self.may_read = false;
                return Ok(());
            }
            left = left.saturating_sub(len);
            self.counters.read_bytes += len as u64;
            ctx.complete(INPUT_QUEUE, chain.head, len as u32)?;
        }
        if self.may_read {
            ctx.poller.again(TOKEN_AGAIN);
        }
        Ok(())
    }
}

/// The next buffer of a queue. If there is none, the driver kicks for the next one.
fn next_request(queue: usize, ctx: &mut Context<'_>) -> Result<Option<Chain>, DeviceFault> {
    ctx.stop_kicks(queue)?;
    loop {
        if let Some(chain) = ctx.pop(queue)? {
            return Ok(Some(chain));
        }
        if !ctx.want_kicks(queue)? {
            return Ok(None);
        }
    }
}

fn config_space(window: Option<WindowSize>) -> [u8; CONFIG_SIZE] {
    let mut config = [0; CONFIG_SIZE];
    if let Some(window) = window {
        config[..2].copy_from_slice(&window.columns.to_le_bytes());
        config[2..4].copy_from_slice(&window.rows.to_le_bytes());
    }
    config
}

impl VirtioDevice for Console {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE, QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, _features: u64, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        self.may_read = true;
        self.backend.start(ctx.poller, TOKEN_BACKEND)?;
        self.look_at_window();
        Ok(())
    }

    fn kick(&mut self, queue: usize, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        match queue {
            INPUT_QUEUE => self.read(ctx),
            _ => self.write(ctx),
        }
    }

    fn ready(&mut self, token: u32, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        if token == TOKEN_BACKEND {
            self.may_read = true;
            self.write_blocked = false;
            self.look_at_window();
        }
        self.read(ctx)?;
        self.write(ctx)
    }

    fn take_config_change(&mut self) -> bool {
        std::mem::take(&mut self.config_changed)
    }

    fn reset(&mut self, poller: &mut dyn Poller) {
        self.backend.stop(poller);
        self.config = config_space(self.backend.window());
        self.config_changed = false;
        self.written = 0;
        self.write_blocked = false;
        self.may_read = false;
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        let [c0, c1, r0, r1, ..] = self.config;
        Ok(DeviceState::Console(ConsoleState {
            written: self.written as u64,
            columns: u16::from_le_bytes([c0, c1]),
            rows: u16::from_le_bytes([r0, r1]),
        }))
    }

    /// A window of another size is told to the driver once it is active.
    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Console(state) = state else {
            return Err(wrong_kind(self, state));
        };
        self.written = usize::try_from(state.written).unwrap_or(usize::MAX);
        self.config = config_space(Some(WindowSize {
            columns: state.columns,
            rows: state.rows,
        }));
        Ok(())
    }

    fn counters(&self) -> BTreeMap<&'static str, u64> {
        BTreeMap::from([
            ("read_bytes", self.counters.read_bytes),
            ("write_bytes", self.counters.write_bytes),
            ("write_full", self.counters.write_full),
        ])
    }
}
