//! The block device itself.

use std::collections::BTreeMap;
use std::io;

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_F_BLK_SIZE, VIRTIO_BLK_F_DISCARD, VIRTIO_BLK_F_FLUSH, VIRTIO_BLK_F_RO,
    VIRTIO_BLK_F_SEG_MAX, VIRTIO_BLK_F_WRITE_ZEROES, VIRTIO_BLK_S_IOERR, VIRTIO_BLK_S_OK,
    VIRTIO_BLK_S_UNSUPP,
};

use super::backend::{BlockBackend, BlockIo, Operation};
use super::gathering::Gathering;
use super::request::{Refusal, Request, Wish};
use super::{
    GATHER_TIME, ID_SIZE, QUEUE_SIZE, REQUEST_QUEUE, REQUESTS_PER_CALL, SECTOR, ZERO_SECTORS_MAX,
};
use crate::event::Poller;
use crate::pace::Work;
use crate::state::{BlockState, DeviceState, RestoreError, SaveError, expect_equal};
use crate::virtio::buffers::Buffers;
use crate::virtio::{Context, DeviceFault, DeviceKind, VirtioDevice, wrong_kind};

/// Bytes of the configuration space, up to and with `write_zeroes_may_unmap` (5.2.4).
const CONFIG_SIZE: usize = 60;
/// Segments of payload: a chain less header and status.
const SEG_MAX: u32 = QUEUE_SIZE as u32 - 2;
/// Largest payload of a request, in bytes. The ring bounds the segments, this their sum.
const PAYLOAD_MAX: usize = 32 << 20;
/// Token of the backend's events.
const BACKEND_EVENT: u32 = 0;
/// Token of a call that continues after other devices had their turn.
const CONTINUE: u32 = 1;
/// Token of a look at requests that gathered without kicks.
const GATHERED: u32 = 2;

#[derive(Clone, Copy, Debug, Default)]
struct Counters {
    read_ops: u64,
    read_bytes: u64,
    write_ops: u64,
    write_bytes: u64,
    flush_ops: u64,
    discard_ops: u64,
    zero_ops: u64,
    errors: u64,
}

/// A request at the backend.
struct Pending {
    head: u16,
    status: Buffers,
    /// Bytes that the device writes on success, without the status.
    written: u32,
    /// What it is for a nominal disk.
    work: Work,
}

/// What a token stands for.
enum Slot {
    Free,
    Pending(Pending),
    /// A request that was in flight at a reset and could not be waited for.
    Forgotten,
}

/// A block device.
pub struct Block {
    backend: Box<dyn BlockBackend>,
    id: [u8; ID_SIZE],
    config: [u8; CONFIG_SIZE],
    /// By token.
    slots: Vec<Slot>,
    free: Vec<u16>,
    /// Whether the driver flushes; if not, every write has to be durable when it completes.
    driver_flushes: bool,
    gathering: Gathering,
    counters: Counters,
    /// Requests that the host failed.
    failed: u64,
}

impl Block {
    /// A disk that the guest can identify by `id`, cut to [`ID_SIZE`] bytes.
    pub fn new(backend: Box<dyn BlockBackend>, id: &str) -> Self {
        let mut id_bytes = [0; ID_SIZE];
        let len = id.len().min(ID_SIZE);
        id_bytes[..len].copy_from_slice(&id.as_bytes()[..len]);
        Self {
            config: config_space(backend.as_ref()),
            backend,
            id: id_bytes,
            slots: (0..QUEUE_SIZE).map(|_| Slot::Free).collect(),
            free: (0..QUEUE_SIZE).rev().collect(),
            driver_flushes: true,
            gathering: Gathering::default(),
            counters: Counters::default(),
            failed: 0,
        }
    }

    fn shape(&self) -> BlockState {
        BlockState {
            sectors: self.backend.sectors(),
            block_size: self.backend.block_size(),
            readonly: self.backend.is_readonly(),
        }
    }

    /// Takes what the driver offers; `looks` says that it is a look at what gathered.
    fn take_requests(&mut self, ctx: &mut Context<'_>, mut looks: bool) -> Result<(), DeviceFault> {
        let mut budget = REQUESTS_PER_CALL;
        let behind = ctx.driver_is_behind(REQUEST_QUEUE)?;
        loop {
            ctx.stop_kicks(REQUEST_QUEUE)?;
            while self.can_submit() {
                if budget == 0 {
                    ctx.poller.again(CONTINUE);
                    return self.finish_batch(ctx);
                }
                let Some(chain) = ctx.pop(REQUEST_QUEUE)? else {
                    break;
                };
                budget -= 1;
                let request = Request::parse(&chain).map_err(malformed)?;
                self.begin(ctx, chain.head, request)?;
            }
            self.finish_batch(ctx)?;
            let taken = REQUESTS_PER_CALL - budget;
            if std::mem::take(&mut looks) {
                self.gathering.found(taken);
            }
            if behind && taken > 0 && self.gathering.is_worthwhile() {
                ctx.poller.after(GATHERED, GATHER_TIME);
                return Ok(());
            }
            // Without room the next completion continues.
            if !self.can_submit() || !ctx.want_kicks(REQUEST_QUEUE)? {
                return Ok(());
            }
        }
    }

    fn can_submit(&self) -> bool {
        !self.free.is_empty() && self.backend.has_room()
    }

    fn in_flight(&self) -> usize {
        self.slots.len() - self.free.len()
    }

    fn finish_batch(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        self.backend.flush_batch()?;
        self.take_completions(ctx)
    }

    fn begin(
        &mut self,
        ctx: &mut Context<'_>,
        head: u16,
        request: Request,
    ) -> Result<(), DeviceFault> {
        let wish = request
            .wish
            .and_then(|wish| self.check(wish, &request.data));
        let (operation, offset, len) = match wish {
            Err(refusal) => {
                self.counters.errors += 1;
                return answer(ctx, head, &request.status, 0, refusal_status(refusal));
            }
            Ok(Wish::GetId) => {
                let written = request.data.write_at(0, &self.id);
                return answer(ctx, head, &request.status, written as u32, VIRTIO_BLK_S_OK);
            }
            Ok(Wish::Read(at)) => (Operation::Read, at, request.data.len() as u64),
            Ok(Wish::Write(at)) => {
                let durable = !self.driver_flushes;
                (Operation::Write { durable }, at, request.data.len() as u64)
            }
            Ok(Wish::Flush) => (Operation::Flush, 0, 0),
            Ok(Wish::Discard { offset, len }) => (Operation::Discard, offset, len),
            Ok(Wish::WriteZeroes { offset, len, unmap }) => {
                (Operation::WriteZeroes { unmap }, offset, len)
            }
        };
        self.count(operation, len);
        let written = if operation == Operation::Read {
            len as u32
        } else {
            0
        };
        let pending = Pending {
            head,
            status: request.status,
            written,
            work: Work {
                bytes: if moves_data(operation) { len } else { 0 },
                position: (operation != Operation::Flush).then_some(offset),
                begun: ctx.begin(REQUEST_QUEUE),
            },
        };
        let token = self.park(pending)?;
        self.backend.submit(BlockIo {
            token,
            operation,
            offset,
            len,
            buffers: request.data,
        });
        Ok(())
    }

    fn park(&mut self, pending: Pending) -> Result<usize, DeviceFault> {
        let free = self.free.pop();
        let token = usize::from(free.ok_or_else(|| malformed("too many requests in flight"))?);
        self.slots[token] = Slot::Pending(pending);
        Ok(token)
    }

    /// Frees a completed request's token; returns the request unless it was forgotten.
    fn unpark(&mut self, token: usize) -> Option<Pending> {
        let slot = std::mem::replace(self.slots.get_mut(token)?, Slot::Free);
        if matches!(slot, Slot::Free) {
            debug_assert!(false, "a request completed twice");
            return None;
        }
        self.free.push(token as u16);
        match slot {
            Slot::Pending(pending) => Some(pending),
            Slot::Free | Slot::Forgotten => None,
        }
    }

    /// Checks what the disk allows: its range, whole sectors, writes.
    fn check(&self, wish: Wish, data: &Buffers) -> Result<Wish, Refusal> {
        let transfer = data.len() as u64;
        let (offset, len, writes) = match wish {
            Wish::Flush | Wish::GetId => return Ok(wish),
            Wish::Read(at) => (at, transfer, false),
            Wish::Write(at) => (at, transfer, true),
            Wish::Discard { offset, len } | Wish::WriteZeroes { offset, len, .. } => {
                (offset, len, true)
            }
        };
        let end = offset.checked_add(len).ok_or(Refusal::Error)?;
        let inside = end <= self.backend.sectors() * SECTOR;
        let whole = len > 0 && len.is_multiple_of(SECTOR);
        let small = data.len() <= PAYLOAD_MAX;
        if !inside || !whole || !small || (writes && self.backend.is_readonly()) {
            return Err(Refusal::Error);
        }
        Ok(wish)
    }

    fn count(&mut self, operation: Operation, len: u64) {
        let counters = &mut self.counters;
        match operation {
            Operation::Read => {
                counters.read_ops += 1;
                counters.read_bytes += len;
            }
            Operation::Write { .. } => {
                counters.write_ops += 1;
                counters.write_bytes += len;
            }
            Operation::Flush => counters.flush_ops += 1,
            Operation::Discard => counters.discard_ops += 1,
            Operation::WriteZeroes { .. } => counters.zero_ops += 1,
        }
    }

    fn take_completions(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        while let Some((token, result)) = self.backend.next_completed() {
            let Some(pending) = self.unpark(token) else {
                continue;
            };
            let (written, status) = self.outcome(&pending, result);
            pending.status.write_at(0, &[status as u8]);
            let written = written.saturating_add(1);
            ctx.finish(REQUEST_QUEUE, pending.head, written, pending.work)?;
        }
        Ok(())
    }

    fn outcome(&mut self, pending: &Pending, result: io::Result<()>) -> (u32, u32) {
        match result {
            Ok(()) => (pending.written, VIRTIO_BLK_S_OK),
            Err(error) => {
                self.counters.errors += 1;
                self.warn(&error);
                (0, VIRTIO_BLK_S_IOERR)
            }
        }
    }

    /// Warns of a failure of the host: of the first, the second, the fourth and so on, since a
    /// guest can cause as many as it likes.
    fn warn(&mut self, error: &io::Error) {
        self.failed += 1;
        if self.failed.is_power_of_two() {
            let id = String::from_utf8_lossy(&self.id);
            let (disk, failed) = (id.trim_end_matches('\0'), self.failed);
            tracing::warn!(disk, failed, %error, "the host failed a request of the guest");
        }
    }
}

fn malformed(reason: &'static str) -> DeviceFault {
    DeviceFault::Request {
        queue: REQUEST_QUEUE,
        reason,
    }
}

/// Whether a disk writes or reads the range of an operation.
fn moves_data(operation: Operation) -> bool {
    !matches!(operation, Operation::Flush | Operation::Discard)
}

fn refusal_status(refusal: Refusal) -> u32 {
    match refusal {
        Refusal::Error => VIRTIO_BLK_S_IOERR,
        Refusal::Unsupported => VIRTIO_BLK_S_UNSUPP,
    }
}

/// Writes the status byte and gives the request back. Of a failed request only the status counts
/// as written: its driver must not trust the rest.
fn answer(
    ctx: &mut Context<'_>,
    head: u16,
    status: &Buffers,
    written: u32,
    value: u32,
) -> Result<(), DeviceFault> {
    status.write_at(0, &[value as u8]);
    ctx.complete(REQUEST_QUEUE, head, written.saturating_add(1))
}

fn config_space(backend: &dyn BlockBackend) -> [u8; CONFIG_SIZE] {
    let mut config = [0; CONFIG_SIZE];
    config[0..8].copy_from_slice(&backend.sectors().to_le_bytes());
    config[12..16].copy_from_slice(&SEG_MAX.to_le_bytes());
    config[20..24].copy_from_slice(&backend.block_size().to_le_bytes());
    // Discard: sectors, segments, alignment. Write zeroes: sectors, segments, may unmap.
    config[36..40].copy_from_slice(&ZERO_SECTORS_MAX.to_le_bytes());
    config[40..44].copy_from_slice(&1u32.to_le_bytes());
    config[44..48].copy_from_slice(&8u32.to_le_bytes());
    config[48..52].copy_from_slice(&ZERO_SECTORS_MAX.to_le_bytes());
    config[52..56].copy_from_slice(&1u32.to_le_bytes());
    config[56] = 1;
    config
}

impl VirtioDevice for Block {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Block
    }

    fn queue_sizes(&self) -> &[u16] {
        &[QUEUE_SIZE]
    }

    fn features(&self) -> u64 {
        let common =
            1 << VIRTIO_BLK_F_SEG_MAX | 1 << VIRTIO_BLK_F_BLK_SIZE | 1 << VIRTIO_BLK_F_FLUSH;
        if self.backend.is_readonly() {
            return common | 1 << VIRTIO_BLK_F_RO;
        }
        common | 1 << VIRTIO_BLK_F_DISCARD | 1 << VIRTIO_BLK_F_WRITE_ZEROES
    }

    fn config(&self) -> &[u8] {
        &self.config
    }

    fn activate(&mut self, features: u64, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        self.driver_flushes = features & 1 << VIRTIO_BLK_F_FLUSH != 0;
        self.gathering = Gathering::default();
        Ok(self.backend.start(ctx.poller, BACKEND_EVENT)?)
    }

    fn kick(&mut self, _queue: usize, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        self.gathering.kicked();
        self.take_requests(ctx, false)
    }

    fn ready(&mut self, token: u32, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        self.take_completions(ctx)?;
        self.take_requests(ctx, token == GATHERED)
    }

    fn paced_span(&self) -> Option<u64> {
        Some(self.backend.sectors() * SECTOR)
    }

    fn reset(&mut self, poller: &mut dyn Poller) {
        while self.in_flight() > 0 {
            if let Err(error) = self.backend.wait() {
                tracing::error!(%error, "cannot wait for requests in flight");
                break;
            }
            while let Some((token, _)) = self.backend.next_completed() {
                self.unpark(token);
            }
        }
        for slot in &mut self.slots {
            if matches!(slot, Slot::Pending(_)) {
                *slot = Slot::Forgotten;
            }
        }
        self.backend.stop(poller);
    }

    fn quiesce(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        while self.in_flight() > 0 {
            self.backend.wait()?;
            self.take_completions(ctx)?;
        }
        Ok(())
    }

    fn settle(&mut self, ctx: &mut Context<'_>) -> Result<bool, DeviceFault> {
        self.take_completions(ctx)?;
        Ok(self.in_flight() == 0)
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        match self.in_flight() {
            0 => Ok(DeviceState::Block(self.shape())),
            requests => Err(SaveError::Busy {
                device: self.kind().name(),
                requests,
            }),
        }
    }

    fn restore(&mut self, state: &DeviceState) -> Result<(), RestoreError> {
        let DeviceState::Block(saved) = state else {
            return Err(wrong_kind(self, state));
        };
        let (name, here) = (self.kind().name(), self.shape());
        expect_equal(name, "a size in sectors of", &saved.sectors, &here.sectors)?;
        expect_equal(name, "a block size of", &saved.block_size, &here.block_size)?;
        expect_equal(name, "read-only as", &saved.readonly, &here.readonly)
    }

    fn counters(&self) -> BTreeMap<&'static str, u64> {
        let c = &self.counters;
        let mut counters = BTreeMap::from([
            ("read_ops", c.read_ops),
            ("read_bytes", c.read_bytes),
            ("write_ops", c.write_ops),
            ("write_bytes", c.write_bytes),
            ("flush_ops", c.flush_ops),
            ("discard_ops", c.discard_ops),
            ("zero_ops", c.zero_ops),
            ("errors", c.errors),
            ("in_flight", self.in_flight() as u64),
        ]);
        counters.extend(self.backend.figures());
        counters
    }
}
