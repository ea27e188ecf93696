//! Writes to a shared image that the guest was told are done, and that its host cannot do: no room, a path to the storage
//! that fails.
//!
//! They are never given up, and not hidden either: it is tried again and again, for the cause may go. Outputs wait
//! meanwhile, as they may tell of them. A guest that has to wait for longer than for a moment stands, as one of QEMU does
//! under `werror=stop`, and `status` and `events` say why; it goes on when the image has all of it. Writes that it was not
//! told of wait behind those, and fail as those of any disk if the host fails them.

use std::io;
use std::time::{Duration, Instant};

use super::Pair;

/// Pause before it is tried again, which doubles each time up to the second.
const PAUSES: [Duration; 2] = [Duration::from_millis(10), Duration::from_secs(5)];
/// How long the guest may run on: what lasts less it need not notice.
const RUNS_MAX: Duration = Duration::from_secs(1);
/// How often it is looked whether there still is a guest.
const LOOK: Duration = Duration::from_millis(100);

/// What becomes of the guest meanwhile.
pub(super) trait Debtor {
    /// Whether there still is a guest.
    fn lives(&self) -> bool;

    /// It stands from now on.
    fn stand(&self);

    /// It runs on, if it stood by that.
    fn run_on(&self);
}

/// Does `write` until it does not fail, which may be at once. False if there is no guest any more.
pub(super) fn pay(
    pair: &Pair,
    debtor: &impl Debtor,
    mut write: impl FnMut() -> io::Result<()>,
) -> bool {
    let Err(mut error) = write() else {
        return true;
    };
    let begun = Instant::now();
    let mut stands = false;
    let mut pause = PAUSES[0];
    pair.tell_failing(&error, "its outputs wait");
    loop {
        if !rest(pause, debtor) {
            let text = format!(
                "{error}: the guest has ended, and its image lacks {}",
                pair.owed()
            );
            tracing::error!("{text}");
            pair.happened("disk-lost", text);
            return false;
        }
        pause = (pause * 2).min(PAUSES[1]);
        match write() {
            Ok(()) => break,
            Err(again) => error = again,
        }
        if !stands && begun.elapsed() >= RUNS_MAX {
            stands = true;
            debtor.stand();
            pair.tell_failing(&error, "it stands");
        }
    }
    let waited = begun.elapsed().as_millis();
    let text = format!("all that the guest was told is written, {waited} ms late");
    tracing::warn!("{text}");
    pair.happened("disk-works", text);
    pair.lock_status().reason = "its disks work again".into();
    if stands {
        debtor.run_on();
    }
    true
}

/// Waits for `pause`. False if there is no guest any more.
fn rest(pause: Duration, debtor: &impl Debtor) -> bool {
    let until = Instant::now() + pause;
    while debtor.lives() {
        let left = until.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return true;
        }
        std::thread::sleep(left.min(LOOK));
    }
    false
}

impl Pair {
    /// How much the guest was told is written and is not, in words.
    fn owed(&self) -> String {
        let disks = self.shared.iter().filter(|disk| disk.owed_bytes() > 0);
        let each =
            disks.map(|disk| format!("{} bytes of disk {}", disk.owed_bytes(), disk.number()));
        each.collect::<Vec<_>>().join(", ")
    }

    /// An image cannot be written; what the guest does meanwhile.
    fn tell_failing(&self, error: &io::Error, meanwhile: &str) {
        let why = format!(
            "{error}: {} that the guest was told are written cannot be; {meanwhile}, and it is tried again",
            self.owed()
        );
        tracing::error!("{why}");
        self.happened("disk-failing", why.clone());
        self.lock_status().reason = why;
    }
}

#[cfg(test)]
mod tests {
    use std::cell::{Cell, RefCell};

    use super::*;

    /// A guest that ends when it was looked at so often.
    struct Guest {
        lives: Cell<u32>,
        did: RefCell<Vec<&'static str>>,
    }

    impl Guest {
        fn new(lives: u32) -> Self {
            Self {
                lives: Cell::new(lives),
                did: RefCell::default(),
            }
        }
    }

    impl Debtor for Guest {
        fn lives(&self) -> bool {
            self.lives.set(self.lives.get().saturating_sub(1));
            self.lives.get() > 0
        }

        fn stand(&self) {
            self.did.borrow_mut().push("stands");
        }

        fn run_on(&self) {
            self.did.borrow_mut().push("runs");
        }
    }

    /// Fails for so long.
    fn failing(time: Duration) -> impl FnMut() -> io::Result<()> {
        let until = Instant::now() + time;
        move || match Instant::now() < until {
            true => Err(io::ErrorKind::StorageFull.into()),
            false => Ok(()),
        }
    }

    fn events(pair: &Pair) -> Vec<String> {
        pair.events(0)
            .into_iter()
            .map(|event| event.event)
            .collect()
    }

    #[test]
    fn a_guest_stands_while_its_disk_fails_for_long_and_not_before() {
        let pair = Pair::new("guest", 0, 0).unwrap();
        let guest = Guest::new(u32::MAX);
        assert!(pay(&pair, &guest, failing(Duration::ZERO)));
        assert!(events(&pair).is_empty());
        assert!(pay(&pair, &guest, failing(RUNS_MAX / 5)));
        assert_eq!(events(&pair), ["disk-failing", "disk-works"]);
        assert!(guest.did.borrow().is_empty());
        assert!(pay(&pair, &guest, failing(RUNS_MAX * 3 / 2)));
        assert_eq!(*guest.did.borrow(), ["stands", "runs"]);
        assert_eq!(
            events(&pair)[2..],
            ["disk-failing", "disk-failing", "disk-works"]
        );
    }

    #[test]
    fn what_is_lost_with_a_guest_that_ends_is_said() {
        let pair = Pair::new("guest", 0, 0).unwrap();
        assert!(!pay(&pair, &Guest::new(5), failing(RUNS_MAX * 3)));
        assert_eq!(events(&pair), ["disk-failing", "disk-lost"]);
        assert!(pair.status().reason.contains("no storage space"));
    }
}
