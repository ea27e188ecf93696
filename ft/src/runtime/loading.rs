//! How long a primary's outputs wait for a secondary that was sent a checkpoint.
//!
//! From the moment at which a checkpoint is cut, outputs wait until it is loaded. A secondary whose process or host is
//! gone is known by its beats. One that lives, and gets no further with the checkpoint, is waited for only as long as
//! nothing moves: neither is anything sent, nor taken, nor asked for. Then the guest goes on alone, and is protected
//! again by a later attempt, like after any loss.
//!
//! How long nothing may move grows with what there is to be put in place, with disks, which may be slow, and with how long
//! this secondary took for its first checkpoint: a host that is slow by nature is not given up each time.
//!
//! There is no clock in here: callers pass in the time.

use std::time::{Duration, Instant};

/// How long nothing may move, for a checkpoint of few pages.
const LOAD_TIME: Duration = Duration::from_millis(500);
/// What more it may take for each page, to be copied and mapped: 1 GiB in a second.
const PAGE_TIME: Duration = Duration::from_micros(4);
/// How long nothing may move while replicas of disks are compared and written, or a copy waits for storage that hosts share:
/// it opens images there, and what it reads of them has to come before it can go on from a checkpoint.
const DISK_TIME: Duration = Duration::from_secs(2);
/// Longest of these times, whatever there is to be put in place.
const LONGEST: Duration = Duration::from_secs(10);

/// What there is to be loaded.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Load {
    /// Pages that are to be put in place.
    pub(super) pages: u64,
    /// Replicas of disks are made the same as well, or the copy has shared disks.
    pub(super) disks: bool,
    /// How long it took to send what is put in place by now.
    pub(super) sending: Duration,
}

impl Load {
    /// How long nothing may move.
    fn patience(&self, first: Duration) -> Duration {
        let pages = u32::try_from(self.pages).unwrap_or(u32::MAX);
        let least = match self.disks {
            true => DISK_TIME,
            false => LOAD_TIME,
        };
        let patience = least + PAGE_TIME.saturating_mul(pages);
        patience.max(self.sending).max(first).min(LONGEST)
    }
}

/// A checkpoint that was cut and is not loaded.
#[derive(Clone, Copy, Debug)]
struct UnderWay {
    began: Instant,
    /// When something moved last, and what had moved then.
    moved: (Instant, u64),
    patience: Duration,
}

/// Checkpoints of one secondary, one after the other.
#[derive(Debug, Default)]
pub(super) struct Loading {
    under_way: Option<UnderWay>,
    /// How long it took for its first one.
    first: Option<Duration>,
}

impl Loading {
    /// A checkpoint is cut at `now`, when so many bytes had `moved`.
    pub(super) fn cut(&mut self, now: Instant, load: &Load, moved: u64) {
        self.under_way = Some(UnderWay {
            began: now,
            moved: (now, moved),
            patience: load.patience(self.first.unwrap_or_default()),
        });
    }

    /// It is loaded.
    pub(super) fn loaded(&mut self, now: Instant) {
        if let Some(load) = self.under_way.take() {
            self.first
                .get_or_insert_with(|| now.saturating_duration_since(load.began));
        }
    }

    /// So many bytes have moved by `now`. For how long nothing may, if that was too long; said once.
    pub(super) fn look(&mut self, now: Instant, moved: u64) -> Option<Duration> {
        let load = self.under_way.as_mut()?;
        if load.moved.1 != moved {
            load.moved = (now, moved);
        }
        let patience = load.patience;
        let over = now.saturating_duration_since(load.moved.0) >= patience;
        over.then(|| {
            self.under_way = None;
            patience
        })
    }

    /// When to look again, at the latest.
    pub(super) fn deadline(&self) -> Option<Instant> {
        let load = self.under_way.as_ref()?;
        Some(load.moved.0 + load.patience)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn who_gets_no_further_is_waited_for_no_longer() {
        let (mut loading, begun) = (Loading::default(), Instant::now());
        assert_eq!(loading.look(begun, 0), None);
        loading.cut(begun, &Load::default(), 10);
        assert_eq!(loading.deadline(), Some(begun + LOAD_TIME));
        assert_eq!(loading.look(begun + LOAD_TIME - MS, 10), None);
        assert_eq!(loading.look(begun + LOAD_TIME, 10), Some(LOAD_TIME));
        assert_eq!(loading.look(begun + 2 * LOAD_TIME, 10), None);
    }

    #[test]
    fn who_gets_further_is_waited_for() {
        let (mut loading, begun) = (Loading::default(), Instant::now());
        loading.cut(begun, &Load::default(), 0);
        for step in 1..200 {
            assert_eq!(
                loading.look(begun + step * LOAD_TIME / 2, step.into()),
                None
            );
        }
        let later = begun + 201 * LOAD_TIME / 2;
        assert_eq!(loading.deadline(), Some(later));
        loading.loaded(later);
        assert_eq!((loading.deadline(), loading.look(later, 0)), (None, None));
    }

    #[test]
    fn more_is_waited_for_longer() {
        let none = Load::default();
        let large = Load {
            pages: 1 << 18,
            ..none
        };
        let disks = Load {
            disks: true,
            ..none
        };
        let slow = Load {
            sending: 3 * LOAD_TIME,
            ..none
        };
        let all = [none, large, disks, slow].map(|load| load.patience(Duration::ZERO));
        assert_eq!(all[0], LOAD_TIME);
        assert!(all[1] > Duration::from_secs(1) && all[1] < Duration::from_secs(2));
        assert_eq!(all[2..], [DISK_TIME, 3 * LOAD_TIME]);
        let endless = Load {
            pages: u64::MAX,
            ..none
        };
        assert_eq!(endless.patience(Duration::ZERO), LONGEST);
        assert_eq!(none.patience(Duration::MAX), LONGEST);
    }

    #[test]
    fn a_secondary_that_is_slow_by_nature_is_known_by_its_first_checkpoint() {
        let (mut loading, begun) = (Loading::default(), Instant::now());
        loading.cut(
            begun,
            &Load {
                pages: 1 << 18,
                ..Load::default()
            },
            0,
        );
        loading.loaded(begun + 2 * LOAD_TIME);
        loading.cut(begun, &Load::default(), 0);
        assert_eq!(loading.deadline(), Some(begun + 2 * LOAD_TIME));
        loading.loaded(begun + 10 * LOAD_TIME);
        loading.cut(begun, &Load::default(), 0);
        assert_eq!(loading.deadline(), Some(begun + 2 * LOAD_TIME));
    }
}
