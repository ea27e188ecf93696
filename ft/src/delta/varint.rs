//! Numbers of which small ones are short.

/// Bits of a number in one byte.
const BITS: u32 = 7;
/// Set in all bytes but the last.
const MORE: u8 = 1 << BITS;

/// Adds `number` to `bytes`.
pub fn put(bytes: &mut Vec<u8>, mut number: u64) {
    while number >= u64::from(MORE) {
        bytes.push(number as u8 | MORE);
        number >>= BITS;
    }
    bytes.push(number as u8);
}

/// Takes a number from the front of `bytes`; nothing if there is none.
pub fn take(bytes: &mut &[u8]) -> Option<u64> {
    let mut number = 0;
    for shift in (0..u64::BITS).step_by(BITS as usize) {
        let byte = *bytes.split_off_first()?;
        let part = u64::from(byte & !MORE);
        if part.leading_zeros() < shift {
            return None;
        }
        number |= part << shift;
        if byte & MORE == 0 {
            return Some(number);
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn numbers_come_as_they_were_put(number: u64, bits in 0..64u32) {
            let number = number >> bits;
            let mut bytes = Vec::new();
            put(&mut bytes, number);
            let mut rest = &bytes[..];
            prop_assert_eq!(take(&mut rest), Some(number));
            prop_assert!(rest.is_empty());
            for end in 0..bytes.len() {
                prop_assert_eq!(take(&mut &bytes[..end]), None);
            }
        }
    }

    #[test]
    fn numbers_that_are_too_large_are_none() {
        assert_eq!(take(&mut &[0xff; 10][..]), None);
        assert_eq!(take(&mut &[[0x80; 9].as_slice(), &[2]].concat()[..]), None);
        let largest = [[0xff; 9].as_slice(), &[1]].concat();
        assert_eq!(take(&mut &largest[..]), Some(u64::MAX));
    }
}
