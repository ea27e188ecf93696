//! Guests with checkpoints in a store: what tests wait for, and who has such a guest.

use std::time::{Duration, Instant};

use serde_json::Value;

use crate::guest::{Guest, PATIENCE};

/// Pause before it is looked again how checkpoints stand.
const LOOK: Duration = Duration::from_millis(5);
/// What one says of which another has the guest, whenever it finds out.
const LOST: [&str; 3] = [
    "was taken by",
    "goes on elsewhere",
    "does not count any more",
];

/// How many checkpoints are complete, by what a guest's status says of them.
///
/// # Panics
/// When it says no number.
pub fn completed(checkpoints: &Value) -> u64 {
    checkpoints["completed"].as_u64().expect("a number")
}

/// Waits until the guest's checkpoints are as `wanted`; what its status says of them then.
///
/// # Panics
/// When they are not for longer than [`PATIENCE`].
pub fn wait_checkpoints(guest: &Guest, wanted: impl Fn(&Value) -> bool) -> Value {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let status = guest.protection().unwrap_or_default();
        let found = &status["checkpoints"];
        if found.is_object() && wanted(found) {
            return found.clone();
        }
        assert!(Instant::now() < deadline, "{found} {}", guest.log());
        std::thread::sleep(LOOK);
    }
}

/// Waits until `least` checkpoints are complete that the guest's process made.
///
/// # Panics
/// As [`wait_checkpoints`].
pub fn wait_completed(guest: &Guest, least: u64) -> Value {
    wait_checkpoints(guest, |checkpoints| completed(checkpoints) >= least)
}

/// Which of two that resume one guest has it; the other ends by itself, and says why.
///
/// # Panics
/// When it does not, or both do.
pub fn winner(mut both: [Guest; 2]) -> Guest {
    let deadline = Instant::now() + PATIENCE;
    let first_won = loop {
        match both.each_mut().map(Guest::runs) {
            [true, false] => break true,
            [false, true] => break false,
            [true, true] if Instant::now() < deadline => std::thread::sleep(LOOK),
            run => panic!("{run:?} {} {}", both[0].log(), both[1].log()),
        }
    };
    let [first, second] = both;
    let (winner, loser) = match first_won {
        true => (first, second),
        false => (second, first),
    };
    let said = loser.wait().messages.join("\n");
    assert!(LOST.iter().any(|text| said.contains(text)), "{said}");
    winner
}
