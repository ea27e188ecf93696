//! The entropy device itself.

use std::collections::BTreeMap;

use super::stream::{SeededStream, StreamState};
use super::{BYTES_PER_CALL, QUEUE_SIZE, REQUEST_MAX, REQUEST_QUEUE};
use crate::event::Poller;
use crate::state::{DeviceState, RestoreError, RngState, SaveError};
use crate::virtio::buffers::Buffers;
use crate::virtio::chain::Chain;
use crate::virtio::{Context, DeviceFault, DeviceKind, VirtioDevice, wrong_kind};

/// A batch ended early.
const TOKEN_AGAIN: u32 = 0;
/// Bytes taken from the stream at a time, a multiple of its words.
const PIECE: usize = 1024;

/// An entropy device.
#[derive(Debug)]
pub struct Rng {
    stream: SeededStream,
    read_ops: u64,
    read_bytes: u64,
}

impl Rng {
    /// A device that gives out `stream`.
    pub fn new(stream: SeededStream) -> Self {
        Self {
            stream,
            read_ops: 0,
            read_bytes: 0,
        }
    }

    /// Where the stream is.
    pub fn state(&self) -> StreamState {
        self.stream.state()
    }

    fn fill_requests(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        let mut left = BYTES_PER_CALL;
        loop {
            ctx.stop_kicks(REQUEST_QUEUE)?;
            while let Some(chain) = ctx.pop(REQUEST_QUEUE)? {
                let len = request_len(&chain)?;
                if len > left {
                    ctx.queues[REQUEST_QUEUE].undo_pop();
                    ctx.poller.again(TOKEN_AGAIN);
                    return Ok(());
                }
                left -= len;
                self.fill(&chain.writable, len);
                ctx.complete(REQUEST_QUEUE, chain.head, len as u32)?;
            }
            if !ctx.want_kicks(REQUEST_QUEUE)? {
                return Ok(());
            }
        }
    }

    fn fill(&mut self, into: &Buffers, len: usize) {
        let mut piece = [0; PIECE];
        for at in (0..len).step_by(PIECE) {
            let bytes = &mut piece[..PIECE.min(len - at)];
            self.stream.fill(bytes);
            into.write_at(at, bytes);
        }
        self.read_ops += 1;
        self.read_bytes += len as u64;
    }
}

/// How much a request is given.
fn request_len(chain: &Chain) -> Result<usize, DeviceFault> {
    let reason = if !chain.readable.is_empty() {
        "an entropy request has a read-only part"
    } else if chain.writable.is_empty() {
        "an entropy request has no room"
    } else {
        return Ok(chain.writable.len().min(REQUEST_MAX));
    };
    Err(DeviceFault::Request {
        queue: REQUEST_QUEUE,
        reason,
    })
}

impl VirtioDevice for Rng {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> &[u8] {
        &[]
    }

    fn activate(&mut self, _features: u64, _ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        Ok(())
    }

    fn kick(&mut self, _queue: usize, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        self.fill_requests(ctx)
    }

    fn ready(&mut self, _token: u32, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        self.fill_requests(ctx)
    }

    /// Nothing to do: the stream goes on, as it does on a computer that is started anew.
    fn reset(&mut self, _poller: &mut dyn Poller) {}

    fn save(&self) -> Result<DeviceState, SaveError> {
        let StreamState { seed, position } = self.stream.state();
        Ok(DeviceState::Rng(RngState { seed, position }))
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Rng(RngState { seed, position }) = *state else {
            return Err(wrong_kind(self, state));
        };
        self.stream = SeededStream::resume(StreamState { seed, position });
        Ok(())
    }

    fn counters(&self) -> BTreeMap<&'static str, u64> {
        BTreeMap::from([("read_ops", self.read_ops), ("read_bytes", self.read_bytes)])
    }
}
