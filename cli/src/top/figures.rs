//! Figures as short texts: at most five characters, or six with a sign of their unit.

/// Signs for thousands, millions and so on.
const DECIMAL: [&str; 6] = ["k", "M", "G", "T", "P", "E"];
/// Signs for 1024, its square and so on.
const BINARY: [&str; 6] = ["Ki", "Mi", "Gi", "Ti", "Pi", "Ei"];
/// What stands for a figure that is not known.
pub(crate) const UNKNOWN: &str = "-";

/// A count or a rate, such as `0.3`, `17`, `1.2k` or `340M`.
pub(crate) fn count(value: f64) -> String {
    let whole = value.fract() == 0.0;
    if value < 9.95 && !whole {
        return format!("{value:.1}");
    }
    scaled(value, 1000.0, &DECIMAL)
}

/// As [`count`], of a rate that may not be known.
pub(crate) fn rate(value: Option<f64>) -> String {
    value.map_or(UNKNOWN.to_owned(), count)
}

/// Bytes of memory, such as `45.2Mi`.
pub(crate) fn memory(bytes: u64) -> String {
    scaled(bytes as f64, 1024.0, &BINARY)
}

/// A share of a CPU in percent, such as `87.3`, `0.0` or `1600`.
pub(crate) fn percent(share: Option<f64>) -> String {
    match share.map(|share| share * 100.0) {
        None => UNKNOWN.to_owned(),
        Some(percent) if percent < 999.95 => format!("{percent:.1}"),
        Some(percent) => format!("{percent:.0}"),
    }
}

/// A time, such as `812us`, `1.2ms` or `3.4s`.
pub(crate) fn time(microseconds: u64) -> String {
    let value = microseconds as f64;
    match microseconds {
        0..1_000 => format!("{microseconds}us"),
        1_000..1_000_000 => format!("{}ms", three_digits(value / 1e3)),
        _ => format!("{}s", three_digits(value / 1e6)),
    }
}

fn scaled(value: f64, unit: f64, signs: &[&str]) -> String {
    // At 999.5 it would be rounded to four digits.
    if value < 999.5 {
        return format!("{value:.0}");
    }
    let (mut value, mut sign) = (value / unit, 0);
    while value >= 999.5 && sign + 1 < signs.len() {
        value /= unit;
        sign += 1;
    }
    format!("{}{}", three_digits(value), signs[sign])
}

fn three_digits(value: f64) -> String {
    if value < 99.95 {
        format!("{value:.1}")
    } else {
        format!("{value:.0}")
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn counts_have_three_digits_or_so() {
        let values = [
            0.0, 0.04, 0.26, 3.0, 9.96, 17.4, 999.4, 999.6, 1234.0, 99_960.0, 1e6, 2.5e9,
        ];
        let texts = values.map(count);
        let wanted = [
            "0", "0.0", "0.3", "3", "10", "17", "999", "1.0k", "1.2k", "100k", "1.0M", "2.5G",
        ];
        assert_eq!(texts, wanted);
        assert_eq!(rate(None), "-");
    }

    #[test]
    fn memory_is_in_powers_of_1024() {
        let texts = [0, 512, 1000, 1 << 20, 47_395_635, 1 << 34].map(memory);
        assert_eq!(texts, ["0", "512", "1.0Ki", "1.0Mi", "45.2Mi", "16.0Gi"]);
    }

    #[test]
    fn shares_are_percent() {
        let texts = [None, Some(0.0), Some(0.8731), Some(9.9999), Some(16.0)].map(percent);
        assert_eq!(texts, ["-", "0.0", "87.3", "1000", "1600"]);
    }

    #[test]
    fn times_have_the_unit_that_fits() {
        let texts = [0, 999, 1_234, 345_600, 3_400_000, 600_000_000].map(time);
        assert_eq!(texts, ["0us", "999us", "1.2ms", "346ms", "3.4s", "600s"]);
    }

    proptest! {
        #[test]
        fn texts_are_short(value in 0.0..1e20f64, bytes: u64) {
            prop_assert!(count(value).len() <= 5, "{}", count(value));
            prop_assert!(memory(bytes).len() <= 6, "{}", memory(bytes));
        }
    }
}
