//! Data blocks: a generation, and content that follows from place and generation.

use crate::sealed::{self, CONTENT, CONTENT_WORDS};
use crate::{Bytes, Flaw};

const KIND: u64 = u64::from_le_bytes(*b"TNDMdata");

/// Writes the data block `number` of `volume` in `generation`.
pub fn write(bytes: &mut Bytes, volume: u64, number: u64, generation: u64) {
    let mut filler = sealed::mix(volume ^ number, generation);
    sealed::set_word(bytes, CONTENT, generation);
    for index in CONTENT + 1..CONTENT + CONTENT_WORDS {
        filler = filler.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(1);
        sealed::set_word(bytes, index, filler);
    }
    sealed::seal(bytes, KIND, volume, number);
}

/// Generation of the data block `number` of `volume`.
///
/// # Errors
/// What is wrong with the block, if it is not whole or not this one.
pub fn read(bytes: &Bytes, volume: u64, number: u64) -> Result<u64, Flaw> {
    sealed::check(bytes, KIND, volume, number)?;
    Ok(sealed::word(bytes, CONTENT))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::BLOCK_BYTES;

    proptest! {
        #[test]
        fn what_is_written_is_read(volume: u64, number: u64, generation: u64) {
            let mut bytes = [0; BLOCK_BYTES];
            write(&mut bytes, volume, number, generation);
            prop_assert_eq!(read(&bytes, volume, number), Ok(generation));
            let other = Flaw::Misplaced { volume, place: number };
            prop_assert_eq!(read(&bytes, volume, number ^ 1), Err(other));
            prop_assert_eq!(read(&bytes, volume ^ 1, number), Err(other));
        }

        #[test]
        fn any_changed_byte_is_noticed(at in 0..BLOCK_BYTES, change in 1..=255u8) {
            let mut bytes = [0; BLOCK_BYTES];
            write(&mut bytes, 1, 2, 3);
            bytes[at] ^= change;
            prop_assert_eq!(read(&bytes, 1, 2), Err(Flaw::Torn));
        }

        /// Sectors of two generations never make a block.
        #[test]
        fn torn_writes_are_noticed(sectors in 1..255u8, old: u64, new: u64) {
            prop_assume!(old != new);
            let (mut a, mut b) = ([0; BLOCK_BYTES], [0; BLOCK_BYTES]);
            write(&mut a, 1, 2, old);
            write(&mut b, 1, 2, new);
            for sector in (0..8).filter(|sector| sectors & 1 << sector != 0) {
                a[sector * 512..][..512].copy_from_slice(&b[sector * 512..][..512]);
            }
            prop_assert_eq!(read(&a, 1, 2), Err(Flaw::Torn));
        }
    }

    #[test]
    fn an_empty_block_is_no_data() {
        assert_eq!(read(&[0; BLOCK_BYTES], 0, 0), Err(Flaw::Torn));
    }
}
