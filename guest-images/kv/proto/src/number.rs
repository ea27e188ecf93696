//! Signed 64-bit decimals in the one spelling that the protocol takes for an integer.

/// Digits of the longest value, `-9223372036854775808`.
const DECIMAL_BYTES_MAX: usize = 20;

/// Parses `text` if it is the canonical decimal spelling of an `i64`: no plus sign, no leading
/// zero, no `-0`, nothing around it.
pub(crate) fn parse_i64(text: &[u8]) -> Option<i64> {
    let (negative, digits) = match text {
        [b'-', rest @ ..] => (true, rest),
        _ => (false, text),
    };
    match digits {
        [] => return None,
        [b'0'] => return (!negative).then_some(0),
        [b'0', ..] => return None,
        _ if digits.len() >= DECIMAL_BYTES_MAX => return None,
        _ => {}
    }
    let mut value: i64 = 0;
    for digit in digits {
        if !digit.is_ascii_digit() {
            return None;
        }
        let digit = i64::from(digit - b'0');
        value = value.checked_mul(10)?;
        value = if negative {
            value.checked_sub(digit)?
        } else {
            value.checked_add(digit)?
        };
    }
    Some(value)
}

/// The decimal spelling of an `i64`, kept without an allocation.
pub(crate) struct Decimal {
    text: [u8; DECIMAL_BYTES_MAX],
    start: usize,
}

impl Decimal {
    /// Spells `value`.
    pub(crate) fn new(value: i64) -> Self {
        let mut decimal = Self {
            text: [0; DECIMAL_BYTES_MAX],
            start: DECIMAL_BYTES_MAX,
        };
        let mut rest = value.unsigned_abs();
        loop {
            decimal.prepend(b'0' + (rest % 10) as u8);
            rest /= 10;
            if rest == 0 {
                break;
            }
        }
        if value < 0 {
            decimal.prepend(b'-');
        }
        decimal
    }

    fn prepend(&mut self, octet: u8) {
        self.start -= 1;
        self.text[self.start] = octet;
    }

    /// The spelling in ASCII.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.text[self.start..]
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn refuses_what_is_not_canonical() {
        for text in [
            "",
            "-",
            "+1",
            "01",
            "-0",
            " 1",
            "1 ",
            "1a",
            "9223372036854775808",
            "--1",
        ] {
            assert_eq!(parse_i64(text.as_bytes()), None, "{text:?}");
        }
    }

    #[test]
    fn takes_the_extremes() {
        assert_eq!(parse_i64(b"9223372036854775807"), Some(i64::MAX));
        assert_eq!(parse_i64(b"-9223372036854775808"), Some(i64::MIN));
        assert_eq!(Decimal::new(i64::MIN).as_bytes(), b"-9223372036854775808");
        assert_eq!(Decimal::new(0).as_bytes(), b"0");
    }

    proptest! {
        #[test]
        fn spelling_parses_back(value: i64) {
            let (decimal, text) = (Decimal::new(value), value.to_string());
            prop_assert_eq!(parse_i64(decimal.as_bytes()), Some(value));
            prop_assert_eq!(decimal.as_bytes(), text.as_bytes());
        }

        #[test]
        fn agrees_with_the_standard_library(text in "-?[0-9]{1,21}") {
            if let Some(value) = parse_i64(text.as_bytes()) {
                prop_assert_eq!(text.parse::<i64>().ok(), Some(value));
            }
        }
    }
}
