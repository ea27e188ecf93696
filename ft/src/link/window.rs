//! How much of a connection may be on its way, so that beats, which share the link with it, do not wait behind it.
//!
//! A link that is slower than its sender has a queue somewhere: in a socket, a switch, a tunnel. Who sends without
//! end fills it, and everything else waits for as long as it takes to empty: 4 MiB at 20 MB/s are 200 ms, in
//! which a live peer is taken for dead. So who receives says how much of the connection it has taken, and who sends
//! lets no more than a window be on its way: the primary of checkpoints, and either side of inputs and outputs. The time from when a byte was sent until it is said to be taken is that
//! of the link without a queue, the least that was seen, and what the queue adds. While that is little, the window grows;
//! when it is more than [`QUEUE_MAX`], the window shrinks, once for each window that is sent.
//!
//! A window of its least size costs nothing on a link that takes less than a millisecond. One that shrank because
//! the other side was late has its size again after some dozen reports. What the link takes without a queue is never
//! forgotten: a queue that stands for long would pass for it. Where a route gets longer meanwhile, windows stay small.
//!
//! There is no clock in here: callers pass in the time.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

/// Who receives says what it has taken whenever it has one more times so many bytes.
pub const REPORT: u64 = 64 << 10;
/// Smallest window in bytes, 13 ms of 20 MB/s.
pub const WINDOW_MIN: u64 = 4 * REPORT;
/// The first window of inputs and outputs in bytes, which hardly any link fills: both copies wait for each other's all the time.
const MESSAGES_FIRST: u64 = 32 * REPORT;
/// Largest window in bytes.
pub const WINDOW_MAX: u64 = 16 << 20;
/// The first window in bytes.
const WINDOW_FIRST: u64 = 8 * REPORT;
/// How much longer than the link takes something may be on its way: a part of the shortest limit after which
/// a peer is silent.
pub const QUEUE_MAX: Duration = Duration::from_millis(20);
/// Moments that are remembered, at most: one per [`REPORT`] bytes of the largest window.
const MOMENTS_MAX: usize = (WINDOW_MAX / REPORT) as usize;

/// What is said of a connection by who receives.
#[derive(Clone, Copy, Debug, Default)]
pub struct Reports {
    told: u64,
}

impl Reports {
    /// So many bytes were taken since the beginning. Whether to say so now.
    pub fn are_due(&mut self, taken: u64) -> bool {
        let due = taken / REPORT > self.told / REPORT;
        if due {
            self.told = taken;
        }
        due
    }
}

/// The other side says that it took what cannot be.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("the other side took {taken} bytes; allowed are {before} to {sent}")]
pub struct WindowError {
    /// What it said.
    pub taken: u64,
    /// What it said before.
    pub before: u64,
    /// What was sent.
    pub sent: u64,
}

/// What is on its way over one connection.
#[derive(Clone, Debug)]
pub struct Window {
    sent: u64,
    taken: u64,
    size: u64,
    /// When so many bytes had been sent; the oldest first.
    moments: VecDeque<(u64, Instant)>,
    /// What the link takes by itself.
    least: Option<Duration>,
    /// It doubles with each window that is taken, until it shrinks for the first time.
    doubles: bool,
    /// It does not shrink again before so many bytes are taken.
    shrunk_until: u64,
}

impl Default for Window {
    fn default() -> Self {
        Self {
            sent: 0,
            taken: 0,
            size: WINDOW_FIRST,
            moments: VecDeque::new(),
            least: None,
            doubles: true,
            shrunk_until: 0,
        }
    }
}

impl Window {
    /// One of inputs and outputs.
    pub fn of_messages() -> Self {
        Self {
            size: MESSAGES_FIRST,
            ..Self::default()
        }
    }

    /// Bytes that may be sent now.
    pub fn room(&self) -> u64 {
        self.size.saturating_sub(self.sent - self.taken)
    }

    /// Its size in bytes.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// Bytes that were sent, and those that were taken, together.
    pub fn moved(&self) -> u64 {
        self.sent.wrapping_add(self.taken)
    }

    /// So many bytes are about to be sent; must be called before they are.
    pub fn sending(&mut self, now: Instant, bytes: u64) {
        self.sending_by(|| now, bytes);
    }

    /// The same by a `clock`, which is seldom looked at.
    pub fn sending_by(&mut self, clock: impl FnOnce() -> Instant, bytes: u64) {
        self.sent += bytes;
        // That is when the other side says what it has taken: what comes behind may be long in coming.
        let reported = self.sent - self.sent % REPORT;
        let newest = self.moments.back().map_or(self.taken, |(sent, _)| *sent);
        if reported > newest && self.moments.len() < MOMENTS_MAX {
            self.moments.push_back((reported, clock()));
        }
    }

    /// The other side has taken so many bytes since the beginning.
    ///
    /// # Errors
    /// When it cannot have.
    pub fn taken(&mut self, now: Instant, taken: u64) -> Result<(), WindowError> {
        if taken < self.taken || taken > self.sent {
            return Err(WindowError {
                taken,
                before: self.taken,
                sent: self.sent,
            });
        }
        let was_used = self.room() < self.size / 2;
        let came = taken - self.taken;
        self.taken = taken;
        let mut since = None;
        while let Some((_, at)) = self.moments.pop_front_if(|(sent, _)| *sent <= taken) {
            since = Some(at);
        }
        if let Some(at) = since {
            self.measured(now.saturating_duration_since(at), came, was_used);
        }
        Ok(())
    }

    /// The newest bytes of those that were taken were on their way for so long.
    fn measured(&mut self, took: Duration, came: u64, was_used: bool) {
        let least = self.least.map_or(took, |before| before.min(took));
        self.least = Some(least);
        if took - least > QUEUE_MAX {
            self.shrink();
        } else if was_used && took - least < QUEUE_MAX / 2 {
            let more = match self.doubles {
                true => came,
                false => REPORT,
            };
            self.size = (self.size + more).min(WINDOW_MAX);
        }
    }

    fn shrink(&mut self) {
        if self.taken < self.shrunk_until {
            return;
        }
        self.doubles = false;
        self.size = (self.size / 4 * 3).max(WINDOW_MIN);
        self.shrunk_until = self.sent;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MS: Duration = Duration::from_millis(1);
    const LOOK: Duration = Duration::from_micros(100);

    /// A link of so many bytes per second, which takes `delay` in each direction, with a queue without end.
    struct Link {
        window: Window,
        now: Instant,
        rate: f64,
        delay: Duration,
        /// When the queue is empty.
        free: Instant,
        /// What arrives when.
        arriving: VecDeque<(Instant, u64)>,
        came: u64,
        told: Reports,
        /// Reports on their way back.
        reports: VecDeque<(Instant, u64)>,
    }

    impl Link {
        fn new(rate: f64, delay: Duration) -> Self {
            let now = Instant::now();
            Self {
                window: Window::default(),
                now,
                rate,
                delay,
                free: now,
                arriving: VecDeque::new(),
                came: 0,
                told: Reports::default(),
                reports: VecDeque::new(),
            }
        }

        fn step(&mut self) {
            self.now += LOOK;
            let now = self.now;
            while let Some((_, taken)) = self.reports.pop_front_if(|(at, _)| *at <= now) {
                self.window.taken(now, taken).unwrap();
            }
            while let Some((_, bytes)) = self.arriving.pop_front_if(|(at, _)| *at <= now) {
                self.came += bytes;
                if self.told.are_due(self.came) {
                    self.reports.push_back((now + self.delay, self.came));
                }
            }
            while self.window.room() > 0 {
                let bytes = self.window.room().min(16 << 10);
                self.window.sending(now, bytes);
                let took = Duration::from_secs_f64(bytes as f64 / self.rate);
                self.free = self.free.max(now) + took;
                self.arriving.push_back((self.free + self.delay, bytes));
            }
        }

        fn run(&mut self, time: Duration) -> f64 {
            let (end, before) = (self.now + time, self.came);
            while self.now < end {
                self.step();
            }
            (self.came - before) as f64 / time.as_secs_f64()
        }

        /// How long a beat that is sent now waits.
        fn queue(&self) -> Duration {
            self.free.saturating_duration_since(self.now)
        }
    }

    #[test]
    fn beats_wait_little_on_a_slow_link_which_is_used() {
        for rate in [20e6, 100e6] {
            let mut link = Link::new(rate, MS);
            let mut worst = Duration::ZERO;
            for _ in 0..5000 {
                link.run(MS);
                worst = worst.max(link.queue());
            }
            assert!(worst < QUEUE_MAX * 3, "{rate} {worst:?}");
            let used = link.run(MS * 1000);
            assert!(used > rate * 0.9, "{used} of {rate}");
        }
    }

    #[test]
    fn a_fast_link_is_used_at_once() {
        let mut link = Link::new(1e9, MS / 5);
        let used = link.run(MS * 100);
        assert!(used > 0.7e9, "{used}");
        let mut far = Link::new(500e6, MS * 10);
        far.run(MS * 500);
        let used = far.run(MS * 500);
        assert!(used > 0.8 * 500e6, "{used}");
    }

    #[test]
    fn who_took_what_was_not_sent_or_not_what_it_took_before_is_refused() {
        let now = Instant::now();
        let mut window = Window::default();
        window.sending(now, 100);
        window.taken(now, 60).unwrap();
        for taken in [59, 101, u64::MAX] {
            let error = window.taken(now, taken).unwrap_err();
            assert_eq!((error.before, error.sent), (60, 100));
        }
        window.taken(now, 100).unwrap();
        assert_eq!(window.room(), window.size());
    }

    #[test]
    fn a_pause_is_not_taken_for_a_queue() {
        let now = Instant::now();
        let mut window = Window::default();
        let mut told = Reports::default();
        for at in (0..100).map(|step| now + MS * 1000 * step) {
            window.sending(at, REPORT + 1);
            if told.are_due(window.sent) {
                window.taken(at + MS, window.sent).unwrap();
            }
        }
        assert!(window.size() >= WINDOW_FIRST);
    }

    proptest! {
        #[test]
        fn windows_are_bounded_and_open_again(
            steps in proptest::collection::vec((0..4_000_000_u64, 0..200_u64, 0..=100_u64), 1..300),
        ) {
            let mut window = Window::default();
            let mut now = Instant::now();
            for (bytes, pause, percent) in steps {
                let bytes = bytes.min(window.room());
                window.sending(now, bytes);
                now += MS * pause as u32;
                let open = window.sent - window.taken;
                window.taken(now, window.taken + open * percent / 100).unwrap();
                prop_assert!((WINDOW_MIN..=WINDOW_MAX).contains(&window.size()));
                prop_assert!(window.moments.len() <= MOMENTS_MAX);
            }
            window.taken(now, window.sent).unwrap();
            prop_assert!(window.room() >= WINDOW_MIN);
        }
    }
}
