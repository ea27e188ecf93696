//! Requests as the driver lays them out (VIRTIO 1.2, 5.2.6).

use virtio_bindings::virtio_blk::{
    VIRTIO_BLK_T_DISCARD, VIRTIO_BLK_T_FLUSH, VIRTIO_BLK_T_GET_ID, VIRTIO_BLK_T_IN,
    VIRTIO_BLK_T_OUT, VIRTIO_BLK_T_WRITE_ZEROES,
};

use super::{SECTOR, ZERO_SECTORS_MAX};
use crate::virtio::buffers::Buffers;
use crate::virtio::chain::Chain;

/// Bytes of the request header: type, reserved, sector.
const HEADER_SIZE: usize = 16;
/// Bytes of a discard or write-zeroes segment: sector, number of sectors, flags.
const SEGMENT_SIZE: usize = 16;
/// Segment flag: space may be given back.
const SEGMENT_UNMAP: u32 = 1;

/// What the driver asks for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Wish {
    /// Read at this byte.
    Read(u64),
    /// Write at this byte.
    Write(u64),
    /// Make writes durable.
    Flush,
    /// The disk's identifier.
    GetId,
    /// Forget a range of bytes.
    Discard { offset: u64, len: u64 },
    /// Zero a range of bytes.
    WriteZeroes { offset: u64, len: u64, unmap: bool },
}

/// Why a request is answered without touching the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Refusal {
    /// VIRTIO_BLK_S_IOERR.
    Error,
    /// VIRTIO_BLK_S_UNSUPP.
    Unsupported,
}

/// A parsed request.
#[derive(Debug)]
pub(super) struct Request {
    /// What is wanted, or why not.
    pub(super) wish: Result<Wish, Refusal>,
    /// Payload: readable for writes, writable for reads and the identifier.
    pub(super) data: Buffers,
    /// The status byte.
    pub(super) status: Buffers,
}

impl Request {
    /// Reads a request; an error is one that cannot even be answered.
    pub(super) fn parse(chain: &Chain) -> Result<Self, &'static str> {
        let mut header = [0; HEADER_SIZE];
        if chain.readable.read_at(0, &mut header) < HEADER_SIZE {
            return Err("no header");
        }
        let Some(status_at) = chain.writable.len().checked_sub(1) else {
            return Err("no status byte");
        };
        let kind = le32(&header, 0);
        let sector = le64(&header, 8);
        let payload = chain.readable.slice(HEADER_SIZE, usize::MAX);
        let room = chain.writable.slice(0, status_at);
        let (wish, data) = match kind {
            VIRTIO_BLK_T_IN => (byte_of(sector).map(Wish::Read), room),
            VIRTIO_BLK_T_OUT => (byte_of(sector).map(Wish::Write), payload),
            VIRTIO_BLK_T_FLUSH => (Ok(Wish::Flush), room),
            VIRTIO_BLK_T_GET_ID => (Ok(Wish::GetId), room),
            VIRTIO_BLK_T_DISCARD => (discard(&payload), payload),
            VIRTIO_BLK_T_WRITE_ZEROES => (write_zeroes(&payload), payload),
            _ => (Err(Refusal::Unsupported), room),
        };
        Ok(Self {
            wish,
            data,
            status: chain.writable.slice(status_at, 1),
        })
    }
}

fn le32(bytes: &[u8], at: usize) -> u32 {
    bytes
        .get(at..at + 4)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u32::from_le_bytes)
}

fn le64(bytes: &[u8], at: usize) -> u64 {
    bytes
        .get(at..at + 8)
        .and_then(|b| b.try_into().ok())
        .map_or(0, u64::from_le_bytes)
}

fn byte_of(sector: u64) -> Result<u64, Refusal> {
    sector.checked_mul(SECTOR).ok_or(Refusal::Error)
}

struct Segment {
    offset: u64,
    len: u64,
    flags: u32,
}

/// The one segment that a request may have, as the configuration space says.
fn segment(payload: &Buffers) -> Result<Segment, Refusal> {
    let mut bytes = [0; SEGMENT_SIZE];
    if payload.len() != SEGMENT_SIZE || payload.read_at(0, &mut bytes) != SEGMENT_SIZE {
        return Err(Refusal::Error);
    }
    let sectors = le32(&bytes, 8);
    if sectors == 0 || sectors > ZERO_SECTORS_MAX {
        return Err(Refusal::Error);
    }
    let offset = byte_of(le64(&bytes, 0))?;
    Ok(Segment {
        offset,
        len: u64::from(sectors) * SECTOR,
        flags: le32(&bytes, 12),
    })
}

/// A discard's unmap flag must be clear, and unknown flags are not supported (5.2.6.2).
fn discard(payload: &Buffers) -> Result<Wish, Refusal> {
    let Segment { offset, len, flags } = segment(payload)?;
    if flags != 0 {
        return Err(Refusal::Unsupported);
    }
    Ok(Wish::Discard { offset, len })
}

fn write_zeroes(payload: &Buffers) -> Result<Wish, Refusal> {
    let Segment { offset, len, flags } = segment(payload)?;
    if flags & !SEGMENT_UNMAP != 0 {
        return Err(Refusal::Unsupported);
    }
    Ok(Wish::WriteZeroes {
        offset,
        len,
        unmap: flags & SEGMENT_UNMAP != 0,
    })
}
