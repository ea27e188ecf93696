//! The guest `disk`, which knows what it wrote to its disk and looks at it again and again.

use crate::guest::Guest;

/// What it and its kernel print when something is wrong.
pub const FLAWS: [&str; 3] = ["CORRUPT", "FAILED", "PANIC"];

/// Fails if a line of the guest's console says that something is wrong.
///
/// # Panics
/// That is how it fails.
pub fn expect_no_flaw(console: &[String]) {
    let is_flaw = |line: &&String| FLAWS.iter().any(|flaw| line.contains(flaw));
    assert_eq!(console.iter().find(is_flaw), None, "{console:#?}");
}

/// Waits until a guest has done more, and found nothing wrong.
///
/// # Panics
/// When it found something, or does no more.
pub fn expect_sound(guest: &mut Guest) {
    guest.console_lines();
    let line = guest.wait_for("errors=");
    assert!(line.contains("errors=0"), "{line}");
    expect_no_flaw(guest.console_seen());
}
