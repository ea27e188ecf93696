//! Network card (VIRTIO 1.2, section 5.1).
#![allow(unsafe_code)]
// UNSAFETY: buffers are lent to the device; the driver keeps them until it is done.

use alloc::boxed::Box;
use alloc::rc::Rc;
use alloc::vec::Vec;
use core::cell::RefCell;

mod offload;

use super::queue::{Part, Queue};
use super::{DeviceType, Error, RING_EVENT_INDEX, RING_INDIRECT, Transport, discovery};
use crate::clock;
use crate::irq::Line;

const FEATURE_CHECKSUM: u64 = 1 << 0;
const FEATURE_GUEST_CHECKSUM: u64 = 1 << 1;
const FEATURE_MAC: u64 = 1 << 5;
/// Received frames may be longer than an Ethernet's: segments that nobody cut, over IPv4 and
/// IPv6.
const FEATURE_GUEST_SEGMENTS: u64 = 1 << 7 | 1 << 8;
const FEATURE_SEGMENT_TCP4: u64 = 1 << 11;
const FEATURE_MERGED_BUFFERS: u64 = 1 << 15;

const RECEIVE: u32 = 0;
const TRANSMIT: u32 = 1;

/// Bytes before each frame, in both directions (5.1.6).
const HEADER_BYTES: usize = 12;
/// Offset of the number of buffers in that header.
const HEADER_BUFFERS: usize = 10;

/// Bytes of one buffer, header included: a frame of an Ethernet without jumbo frames.
const BUFFER_BYTES: usize = 2048;
/// Longest frame that can be sent, in bytes.
pub const FRAME_MAX: usize = BUFFER_BYTES - HEADER_BYTES;
/// Buffers that wait for frames to arrive: a few of the longest frames.
const RECEIVE_BUFFERS: u16 = 256;
/// Frames that can be on their way out.
const TRANSMIT_BUFFERS: u16 = 256;
/// Bytes of a buffer for a frame that the device cuts, header included.
const LONG_BUFFER_BYTES: usize = 64 * 1024;
/// Longest frame that can be sent if the device cuts it, in bytes.
pub const LONG_FRAME_MAX: usize = LONG_BUFFER_BYTES - HEADER_BYTES;
/// Such frames that can be on their way out: as few as keep the device busy.
const LONG_BUFFERS: usize = 16;
/// Buffers that one received frame may span.
const MERGE_MAX: u16 = 64;

type Buffer = Box<[u8]>;
type Pool = Rc<RefCell<Vec<Buffer>>>;

/// A network card.
pub struct Net {
    transport: Transport,
    line: Line,
    features: u64,
    mac: [u8; 6],
    receive: Queue,
    transmit: Queue,
    /// Buffers the device holds, by request number.
    receiving: Vec<Option<Buffer>>,
    transmitting: Vec<Option<Buffer>>,
    /// Buffers whose frames were consumed; they go back to the device.
    consumed: Pool,
    /// Buffers to send with; the last is taken first.
    unsent: Vec<Buffer>,
    /// Long ones, made when they are needed.
    unsent_long: Vec<Buffer>,
    /// How many more long ones may be made.
    unmade_long: usize,
}

impl Net {
    /// The first network card, started. With `offload`, checksums are left to the device
    /// where it can: see [`Net::sends_without_checksum`].
    ///
    /// # Errors
    /// If there is none or it cannot be used.
    pub fn open(offload: bool) -> Result<Self, Error> {
        Self::new(discovery::find(DeviceType::Net, 0)?, offload)
    }

    /// Starts the card behind `transport`.
    ///
    /// # Errors
    /// If it cannot be used.
    pub fn new(transport: Transport, offload: bool) -> Result<Self, Error> {
        let features = negotiate(&transport, offload)?;
        let receive = transport.queue(RECEIVE, RECEIVE_BUFFERS, features)?;
        let transmit = transport.queue(TRANSMIT, TRANSMIT_BUFFERS, features)?;
        let mut net = Self {
            mac: mac_address(&transport, features),
            line: transport.start(),
            transport,
            features,
            receiving: (0..receive.size()).map(|_| None).collect(),
            transmitting: (0..transmit.size()).map(|_| None).collect(),
            consumed: Rc::new(RefCell::new(
                (0..receive.size())
                    .map(|_| new_buffer(BUFFER_BYTES))
                    .collect(),
            )),
            unsent: (long_buffers(transmit.size())..transmit.size().into())
                .map(|_| new_buffer(BUFFER_BYTES))
                .collect(),
            unsent_long: Vec::new(),
            unmade_long: long_buffers(transmit.size()),
            receive,
            transmit,
        };
        net.transmit.disarm();
        net.refill();
        Ok(net)
    }

    /// The card's address.
    pub fn mac(&self) -> [u8; 6] {
        self.mac
    }

    /// Whether [`Net::send`] may be given frames without a TCP or UDP checksum.
    pub fn sends_without_checksum(&self) -> bool {
        self.features & FEATURE_CHECKSUM != 0
    }

    /// Whether [`Net::send_segmented`] may be told to cut frames.
    pub fn cuts_segments(&self) -> bool {
        let needed = FEATURE_CHECKSUM | FEATURE_SEGMENT_TCP4;
        self.features & needed == needed && self.transmit.size() > 1
    }

    /// Whether received frames may have an incomplete TCP or UDP checksum, and need none.
    pub fn receives_without_checksum(&self) -> bool {
        self.features & FEATURE_GUEST_CHECKSUM != 0
    }

    /// The next frame that arrived.
    pub fn receive(&mut self) -> Option<Frame> {
        let (buffer, len) = self.pop_received()?;
        let count = u16::from_le_bytes([buffer[HEADER_BUFFERS], buffer[HEADER_BUFFERS + 1]]);
        let first = Frame {
            vouched: buffer[0] & (offload::NEEDS_CHECKSUM | offload::CHECKSUM_RIGHT) != 0,
            buffer: Some(buffer),
            joined: Vec::new(),
            len,
            pool: self.pool(),
        };
        match count.min(MERGE_MAX) {
            0 | 1 => Some(first),
            more => Some(self.join(&first, more - 1)),
        }
    }

    /// Whether a frame can be sent. If not, [`Net::kick`], and [`Net::wait`] until one can.
    pub fn can_send(&mut self) -> bool {
        if !self.has_unsent() {
            self.reclaim();
        }
        self.has_unsent()
    }

    /// Queues a frame of `len` bytes, which `fill` writes; [`Net::kick`] sends it. Where
    /// [`Net::sends_without_checksum`], the TCP or UDP checksum is the device's business and
    /// what `fill` leaves in its place does not matter.
    ///
    /// # Panics
    /// If [`Net::can_send`] is false, or `len` is above [`FRAME_MAX`].
    pub fn send<R>(&mut self, len: usize, fill: impl FnOnce(&mut [u8]) -> R) -> R {
        assert!(
            len <= FRAME_MAX,
            "A frame of {len} bytes is longer than {FRAME_MAX}."
        );
        self.send_segmented(len, None, fill)
    }

    /// Like [`Net::send`], for a frame that may be longer if the device is to cut the TCP
    /// segment in it, over IPv4, into segments that carry `segment_bytes` each.
    ///
    /// # Panics
    /// If [`Net::can_send`] is false, `len` is above [`LONG_FRAME_MAX`], or the frame is to be
    /// cut by a device that cannot ([`Net::cuts_segments`]).
    pub fn send_segmented<R>(
        &mut self,
        len: usize,
        segment_bytes: Option<u16>,
        fill: impl FnOnce(&mut [u8]) -> R,
    ) -> R {
        assert!(
            segment_bytes.is_none() || self.cuts_segments(),
            "The device does not cut segments."
        );
        assert!(self.can_send(), "No buffer is free to send with.");
        let mut buffer = self.take_unsent(HEADER_BYTES + len);
        buffer[..HEADER_BYTES].fill(0);
        let result = fill(&mut buffer[HEADER_BYTES..HEADER_BYTES + len]);
        if self.sends_without_checksum() {
            offload::request(&mut buffer[..HEADER_BYTES + len], segment_bytes);
        }
        self.queue_transmit(buffer, HEADER_BYTES + len);
        result
    }

    /// Gives the device everything that was queued and the buffers of consumed frames.
    pub fn kick(&mut self) {
        self.transport.kick(&mut self.transmit);
        self.reclaim();
        self.refill();
    }

    /// Waits for a frame, for room to send if there was none, or for any other interrupt,
    /// at most until `deadline` (microseconds of [`crate::clock`]). May return early.
    ///
    /// An interrupt that ends the wait is acknowledged by the next one: what arrived is
    /// answered first.
    pub fn wait(&mut self, deadline: Option<u64>) {
        self.transport.take_interrupt(self.line);
        let room = self.can_send() || self.transmit.arm();
        if self.receive.arm() && room {
            clock::wait_until(deadline);
        }
        self.transmit.disarm();
    }

    fn pool(&self) -> Pool {
        Rc::clone(&self.consumed)
    }

    fn pop_received(&mut self) -> Option<(Buffer, usize)> {
        let used = self.receive.pop()?;
        let buffer = self.receiving[usize::from(used.head)].take();
        let buffer = buffer.expect("every request in flight has its buffer");
        Some((
            buffer,
            (used.len as usize).clamp(HEADER_BYTES, BUFFER_BYTES),
        ))
    }

    /// Joins a frame that spans buffers: all but the first have no header.
    fn join(&mut self, first: &Frame, more: u16) -> Frame {
        let mut joined = Vec::with_capacity(BUFFER_BYTES * (usize::from(more) + 1));
        joined.extend_from_slice(first);
        for _ in 0..more {
            let Some((buffer, len)) = self.pop_received() else {
                break;
            };
            joined.extend_from_slice(&buffer[..len]);
            self.consumed.borrow_mut().push(buffer);
        }
        Frame {
            buffer: None,
            vouched: first.vouched,
            len: joined.len(),
            joined,
            pool: self.pool(),
        }
    }

    /// Gives buffers of consumed frames back to the device.
    fn refill(&mut self) {
        let mut pool = self.consumed.borrow_mut();
        while let Some(mut buffer) = pool.pop() {
            let part = part_of(&mut buffer[..], true);
            // SAFETY: the buffer stays in `receiving`, untouched, until it is popped.
            let head = unsafe { self.receive.add(&[part]) };
            let head = head.expect("there are as many entries as buffers");
            self.receiving[usize::from(head)] = Some(buffer);
        }
        drop(pool);
        self.transport.kick(&mut self.receive);
    }

    fn queue_transmit(&mut self, mut buffer: Buffer, len: usize) {
        let part = part_of(&mut buffer[..len], false);
        // SAFETY: the buffer stays in `transmitting`, untouched, until it is popped.
        let head = unsafe { self.transmit.add(&[part]) };
        let head = head.expect("there are as many entries as buffers");
        self.transmitting[usize::from(head)] = Some(buffer);
    }

    fn has_unsent(&self) -> bool {
        let long = !self.unsent_long.is_empty() || self.unmade_long > 0;
        !self.unsent.is_empty() && (long || !self.cuts_segments())
    }

    /// A buffer of at least `len` bytes.
    fn take_unsent(&mut self, len: usize) -> Buffer {
        if len <= BUFFER_BYTES {
            return self.unsent.pop().expect("can_send was true");
        }
        assert!(
            len <= LONG_BUFFER_BYTES,
            "A frame of {len} bytes with its header is longer than {LONG_BUFFER_BYTES}."
        );
        self.unsent_long.pop().unwrap_or_else(|| {
            self.unmade_long -= 1;
            new_buffer(LONG_BUFFER_BYTES)
        })
    }

    fn reclaim(&mut self) {
        while let Some(used) = self.transmit.pop() {
            match self.transmitting[usize::from(used.head)].take() {
                Some(long) if long.len() > BUFFER_BYTES => self.unsent_long.push(long),
                short => self.unsent.extend(short),
            }
        }
    }
}

/// A received frame. Dropping it gives its buffer back at the next [`Net::kick`].
pub struct Frame {
    buffer: Option<Buffer>,
    joined: Vec<u8>,
    len: usize,
    vouched: bool,
    pool: Pool,
}

impl Frame {
    /// Whether the sender on this host or the device vouches for the TCP or UDP checksum.
    pub fn is_vouched_for(&self) -> bool {
        self.vouched
    }
}

impl core::ops::Deref for Frame {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.buffer {
            Some(buffer) => &buffer[HEADER_BYTES..self.len],
            None => &self.joined,
        }
    }
}

impl Drop for Frame {
    fn drop(&mut self) {
        self.pool.borrow_mut().extend(self.buffer.take());
    }
}

/// Settles on features. Frames longer than a buffer need merged buffers.
fn negotiate(transport: &Transport, offload: bool) -> Result<u64, Error> {
    let basic = FEATURE_MAC | FEATURE_MERGED_BUFFERS | RING_EVENT_INDEX | RING_INDIRECT;
    if !offload {
        return transport.negotiate(basic);
    }
    let short = basic | FEATURE_CHECKSUM | FEATURE_GUEST_CHECKSUM | FEATURE_SEGMENT_TCP4;
    let features = transport.negotiate(short | FEATURE_GUEST_SEGMENTS)?;
    if features & FEATURE_GUEST_SEGMENTS != 0 && features & FEATURE_MERGED_BUFFERS == 0 {
        return transport.negotiate(short);
    }
    Ok(features)
}

fn new_buffer(len: usize) -> Buffer {
    alloc::vec![0; len].into_boxed_slice()
}

/// Entries of the transmit queue that are for long frames; the others are for ordinary ones.
fn long_buffers(entries: u16) -> usize {
    LONG_BUFFERS.min(usize::from(entries / 2))
}

fn part_of(bytes: &mut [u8], device_writes: bool) -> Part {
    Part {
        address: bytes.as_mut_ptr() as u64,
        len: bytes.len() as u32,
        device_writes,
    }
}

fn mac_address(transport: &Transport, features: u64) -> [u8; 6] {
    /// Address of a card that has none: locally administered.
    const DEFAULT: [u8; 6] = [0x02, 0, 0, 0, 0, 1];
    if features & FEATURE_MAC == 0 {
        return DEFAULT;
    }
    [0, 1, 2, 3, 4, 5].map(|at| transport.config_u8(at))
}
