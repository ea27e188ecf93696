//! How often tests repeat what could go wrong once in a hundred times.

/// Names the number of rounds, where more are wanted than fit into the suite.
const ROUNDS: &str = "TANDEM_ROUNDS";

/// As many as `TANDEM_ROUNDS` says, or else `few`.
///
/// # Panics
/// When it says no number.
pub fn rounds(few: usize) -> usize {
    match std::env::var(ROUNDS) {
        Ok(text) => text.parse().expect("TANDEM_ROUNDS is a number"),
        Err(_) => few,
    }
}
