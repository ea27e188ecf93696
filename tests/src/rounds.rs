//! How often tests repeat what could go wrong once in a hundred times.

/// Names the number of rounds, where more are wanted than fit into the suite.
const ROUNDS: &str = "TANDEM_ROUNDS";

/// As many as `TANDEM_ROUNDS` says, or else `few`.
///
/// # Panics
/// When it says no number.
pub fn rounds(few: usize) -> usize {
    number_from(ROUNDS, few)
}

/// What the environment says by `variable`, or else `otherwise`.
///
/// # Panics
/// When it says no number.
pub fn number_from(variable: &str, otherwise: usize) -> usize {
    match std::env::var(variable) {
        Ok(text) => text
            .parse()
            .unwrap_or_else(|_| panic!("{variable} is to be a number, and is `{text}`")),
        Err(_) => otherwise,
    }
}
