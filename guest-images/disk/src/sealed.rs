//! The frame that all blocks share: kind, volume and place in front, a checksum at the end.

use crate::{BLOCK_BYTES, Bytes, Flaw};

/// Words of a block.
const WORDS: usize = BLOCK_BYTES / 8;
/// Word of the checksum.
const CHECKSUM: usize = WORDS - 1;
/// First word that the kind decides about.
pub(crate) const CONTENT: usize = 3;
/// Words that the kind decides about.
pub(crate) const CONTENT_WORDS: usize = CHECKSUM - CONTENT;

/// Odd constants of the mixing steps (golden ratio; first digits of pi).
const MIX_A: u64 = 0x9e37_79b9_7f4a_7c15;
const MIX_B: u64 = 0x2431_f6a8_885a_308d;

/// Makes a well-spread number of any two.
pub(crate) fn mix(a: u64, b: u64) -> u64 {
    let spread = (a ^ MIX_B).wrapping_mul(MIX_A).rotate_left(32) ^ b;
    let spread = (spread ^ spread >> 29).wrapping_mul(MIX_B);
    (spread ^ spread >> 32).wrapping_mul(MIX_A)
}

/// Word `index` of a block.
pub(crate) fn word(bytes: &Bytes, index: usize) -> u64 {
    let mut word = [0; 8];
    word.copy_from_slice(&bytes[index * 8..index * 8 + 8]);
    u64::from_le_bytes(word)
}

/// Sets word `index` of a block.
pub(crate) fn set_word(bytes: &mut Bytes, index: usize, value: u64) {
    bytes[index * 8..index * 8 + 8].copy_from_slice(&value.to_le_bytes());
}

/// Frames a block whose content is in place.
pub(crate) fn seal(bytes: &mut Bytes, kind: u64, volume: u64, place: u64) {
    set_word(bytes, 0, kind);
    set_word(bytes, 1, volume);
    set_word(bytes, 2, place);
    let sum = checksum(bytes);
    set_word(bytes, CHECKSUM, sum);
}

/// Checks the frame.
pub(crate) fn check(bytes: &Bytes, kind: u64, volume: u64, place: u64) -> Result<(), Flaw> {
    if word(bytes, CHECKSUM) != checksum(bytes) {
        return Err(Flaw::Torn);
    }
    let says = [0, 1, 2].map(|index| word(bytes, index));
    if says == [kind, volume, place] {
        Ok(())
    } else {
        Err(Flaw::Misplaced {
            volume: says[1],
            place: says[2],
        })
    }
}

/// Checksum of all words but the last, in four independent lanes for speed.
fn checksum(bytes: &Bytes) -> u64 {
    let mut lanes = [1u64, 2, 3, 4];
    for (index, chunk) in bytes[..CHECKSUM * 8].chunks_exact(8).enumerate() {
        let mut word = [0; 8];
        word.copy_from_slice(chunk);
        let lane = &mut lanes[index % 4];
        *lane = (*lane ^ u64::from_le_bytes(word))
            .wrapping_mul(MIX_A)
            .rotate_left(29);
    }
    lanes.into_iter().fold(0, mix)
}
