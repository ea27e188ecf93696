//! What a copy tells its primary of a write: where it is, and a digest of each block's part.

use super::super::overlay::parts;
use crate::compare::writes::Part;
use crate::mirror::BLOCK;

/// Bytes in front of digests in a message: the number of the checkpoint before, offset and length.
const WRITE_HEAD: usize = 24;

/// The message of `len` bytes that are written at `offset`, since checkpoint `epoch`; `told` has their parts.
pub(super) fn encode(epoch: u64, offset: u64, len: u64, told: &[Part]) -> Vec<u8> {
    let mut message = Vec::with_capacity(WRITE_HEAD + 16 * told.len());
    message.extend(epoch.to_le_bytes());
    message.extend(offset.to_le_bytes());
    message.extend(len.to_le_bytes());
    message.extend(told.iter().flat_map(|part| part.digest.to_le_bytes()));
    message
}

/// The parts of the write that a copy told of, and since which checkpoint; the disk has `bytes`.
pub(super) fn parse(message: &[u8], bytes: u64) -> Option<(u64, impl Iterator<Item = Part>)> {
    let (head, digests) = message.split_first_chunk::<WRITE_HEAD>()?;
    let (numbers, _) = head.as_chunks::<8>();
    let [epoch, offset, len] = [0, 1, 2].map(|at| u64::from_le_bytes(numbers[at]));
    let end = offset.checked_add(len).filter(|end| *end <= bytes)?;
    let (digests, []) = digests.as_chunks::<16>() else {
        return None;
    };
    let digests = digests.to_vec();
    let count = if len == 0 {
        0
    } else {
        end.div_ceil(BLOCK) - offset / BLOCK
    };
    if count != digests.len() as u64 {
        return None;
    }
    let all = parts(offset, len).zip(digests);
    let all = all.map(|((block, bytes, _), digest)| Part {
        block,
        from: bytes.start as u16,
        to: bytes.end as u16,
        digest: u128::from_le_bytes(digest),
    });
    Some((epoch, all))
}
