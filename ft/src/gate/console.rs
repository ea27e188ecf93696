//! The gate of the console: output is compared byte by byte and leaves once; input reaches both copies.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tandem_vmm::console::{self, ConsoleHub};

use super::Permit;
use crate::link::message::PAYLOAD_MAX;
use crate::link::{Kind, Outbox};

/// Output that may be held or kept, in bytes; the guest waits beyond it.
pub(super) const HELD_MAX: usize = 64 << 10;
/// The console's number among devices, in messages.
pub const CONSOLE: u8 = u8::MAX;

#[derive(Debug, Default)]
struct Primary {
    /// What a checkpoint explains that is not loaded yet.
    covered: Vec<u8>,
    /// What may leave once the permit says so, and how much of it the copy printed too.
    ready: Vec<u8>,
    ready_matched: u64,
    /// What the guest printed and the copy has not, and since when.
    ahead: VecDeque<u8>,
    /// What the copy printed and the guest has not.
    behind: VecDeque<u8>,
    since: Option<Instant>,
    patience: Duration,
    /// Bytes of the copy that are out.
    settled: u64,
    /// A checkpoint is under way: what the copy prints is of before.
    cut: bool,
    mismatch: Option<String>,
}

#[derive(Debug, Default)]
struct Secondary {
    covered: Vec<u8>,
    kept: VecDeque<u8>,
    settled: u64,
}

#[derive(Debug, Default)]
enum Side {
    #[default]
    Alone,
    Primary(Primary),
    Secondary(Secondary),
}

/// The gate of the console.
pub struct ConsoleGate {
    side: Mutex<Side>,
    hub: OnceLock<ConsoleHub>,
    outbox: Arc<Outbox>,
    permit: Arc<Permit>,
}

impl ConsoleGate {
    /// A gate that is open; messages of a pair go to `outbox`, and what was matched leaves as `permit` says.
    pub fn new(outbox: Arc<Outbox>, permit: Arc<Permit>) -> Self {
        Self {
            side: Mutex::default(),
            hub: OnceLock::new(),
            outbox,
            permit,
        }
    }

    /// Where output goes.
    pub(crate) fn connect(&self, hub: ConsoleHub) {
        if self.hub.set(hub).is_err() {
            tracing::error!("the console's gate has a console already");
        }
    }

    fn lock(&self) -> MutexGuard<'_, Side> {
        self.side.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn emit(&self, bytes: &[u8]) {
        if let Some(hub) = self.hub.get().filter(|_| !bytes.is_empty()) {
            hub.emit(bytes);
        }
    }

    /// A checkpoint begins, while the guest stands. Returns the output that it explains and that is not out.
    pub fn cut(&self, patience: Duration) -> Vec<u8> {
        let mut side = self.lock();
        if matches!(*side, Side::Alone) {
            *side = Side::Primary(Primary::default());
        }
        let Side::Primary(primary) = &mut *side else {
            return Vec::new();
        };
        let mut covered = std::mem::take(&mut primary.ready);
        covered.append(&mut primary.covered);
        covered.extend(primary.ahead.drain(..));
        *primary = Primary {
            covered: covered.clone(),
            cut: true,
            patience,
            ..Primary::default()
        };
        covered
    }

    /// The checkpoint is loaded: the output that it explains leaves.
    pub fn commit(&self, now: Instant) {
        if let Side::Primary(primary) = &mut *self.lock() {
            primary.cut = false;
            primary.since = primary.since.map(|_| now);
            primary.ready = std::mem::take(&mut primary.covered);
            self.release_from(primary);
        }
    }

    /// Lets out what may leave now.
    pub fn release(&self) {
        if let Side::Primary(primary) = &mut *self.lock() {
            self.release_from(primary);
        }
    }

    fn release_from(&self, primary: &mut Primary) {
        if primary.ready.is_empty() {
            return;
        }
        if !self.permit.lets_out(Instant::now()) {
            return self.permit.call();
        }
        self.emit(&std::mem::take(&mut primary.ready));
        let matched = std::mem::take(&mut primary.ready_matched);
        if matched > 0 {
            primary.settled += matched;
            self.outbox.tell(Kind::Settled, CONSOLE, primary.settled);
        }
    }

    /// Output of the copy. True if it does not match.
    pub fn secondary_output(&self, now: Instant, bytes: &[u8]) -> bool {
        let mut side = self.lock();
        let Side::Primary(primary) = &mut *side else {
            return false;
        };
        if primary.cut {
            return false;
        }
        primary.compare(now, bytes, false);
        self.release_from(primary);
        primary.mismatch.is_some()
    }

    /// Looks for output that one side has waited for too long. True if there is a mismatch.
    pub fn expire(&self, now: Instant) -> bool {
        let Side::Primary(primary) = &mut *self.lock() else {
            return false;
        };
        if primary.deadline().is_some_and(|at| now >= at) {
            let silent = if primary.behind.is_empty() {
                "secondary"
            } else {
                "primary"
            };
            primary.mismatch = Some(format!("console: the {silent} printed nothing"));
        }
        primary.mismatch.is_some()
    }

    /// When [`ConsoleGate::expire`] is due.
    pub fn deadline(&self) -> Option<Instant> {
        match &*self.lock() {
            Side::Primary(primary) => primary.deadline(),
            _ => None,
        }
    }

    /// What does not match, in words.
    pub fn mismatch(&self) -> Option<String> {
        match &*self.lock() {
            Side::Primary(primary) if !primary.cut => primary.mismatch.clone(),
            _ => None,
        }
    }

    /// Nobody compares any more: all that is held leaves.
    pub fn open(&self) {
        let mut side = self.lock();
        if let Side::Primary(primary) = &mut *side {
            primary.covered.extend(primary.ahead.drain(..));
            self.emit(&primary.ready);
            self.emit(&primary.covered);
            *side = Side::Alone;
        }
    }

    /// Whether output is held.
    pub fn holds(&self) -> bool {
        match &*self.lock() {
            Side::Primary(primary) => {
                let held = [
                    primary.ahead.len(),
                    primary.covered.len(),
                    primary.ready.len(),
                ];
                held.iter().any(|length| *length > 0)
            }
            _ => false,
        }
    }

    /// The guest is a copy: nothing of it leaves.
    pub fn become_secondary(&self) {
        *self.lock() = Side::Secondary(Secondary::default());
    }

    /// Input for the guest, from the other side.
    pub fn input(&self, bytes: &[u8]) {
        if let Some(hub) = self.hub.get() {
            hub.inject(bytes);
        }
    }

    /// The first `count` bytes since the checkpoint are out.
    pub fn settle(&self, count: u64) {
        if let Side::Secondary(secondary) = &mut *self.lock() {
            let out = count.saturating_sub(secondary.settled) as usize;
            let out = out.min(secondary.kept.len());
            secondary.kept.drain(..out);
            secondary.settled += out as u64;
        }
    }

    /// The guest goes on from a checkpoint that explains `covered`, which may not be out.
    pub fn loaded(&self, covered: Vec<u8>) {
        if let Side::Secondary(secondary) = &mut *self.lock() {
            *secondary = Secondary {
                covered,
                ..Secondary::default()
            };
        }
    }

    /// What the last checkpoint explains is out.
    pub fn committed(&self) {
        if let Side::Secondary(secondary) = &mut *self.lock() {
            secondary.covered.clear();
        }
    }

    /// The guest is the only one now: what it kept leaves.
    pub fn go_live(&self) {
        let mut side = self.lock();
        if let Side::Secondary(secondary) = std::mem::take(&mut *side) {
            self.emit(&secondary.covered);
            self.emit(&Vec::from(secondary.kept));
        }
    }
}

impl console::ConsoleGate for ConsoleGate {
    fn output(&self, bytes: &[u8]) -> bool {
        let mut side = self.lock();
        match &mut *side {
            Side::Alone => return false,
            Side::Primary(primary) => {
                primary.compare(Instant::now(), bytes, true);
                if primary.mismatch.is_some() {
                    self.permit.call();
                }
                self.release_from(primary);
            }
            Side::Secondary(secondary) => {
                for part in bytes.chunks(PAYLOAD_MAX) {
                    self.outbox.put(Kind::ConsoleOutput, 0, part);
                }
                self.outbox.flush();
                secondary.kept.extend(bytes);
            }
        }
        true
    }

    fn is_full(&self) -> bool {
        match &*self.lock() {
            Side::Alone => false,
            Side::Primary(primary) => primary.ahead.len() + primary.ready.len() >= HELD_MAX,
            Side::Secondary(secondary) => secondary.kept.len() >= HELD_MAX,
        }
    }

    fn input(&self, bytes: &[u8]) -> bool {
        match &*self.lock() {
            Side::Alone => true,
            Side::Primary(_) => {
                for part in bytes.chunks(PAYLOAD_MAX) {
                    self.outbox.put(Kind::ConsoleInput, 0, part);
                }
                self.outbox.flush();
                true
            }
            // Its input is the primary's.
            Side::Secondary(_) => false,
        }
    }
}

impl Primary {
    fn deadline(&self) -> Option<Instant> {
        let since = self.since.filter(|_| !self.cut);
        since.map(|since| since + self.patience)
    }

    /// Compares output of one side with what the other is ahead; what both printed becomes ready.
    fn compare(&mut self, now: Instant, bytes: &[u8], own: bool) {
        if self.mismatch.is_some() || self.cut {
            if own {
                self.ahead.extend(bytes);
            }
            return;
        }
        let (mine, other) = if own {
            (&mut self.ahead, &mut self.behind)
        } else {
            (&mut self.behind, &mut self.ahead)
        };
        let common = bytes.len().min(other.len());
        let same = bytes.iter().zip(other.iter()).take_while(|(a, b)| a == b);
        let same = same.count();
        self.ready.extend(other.drain(..same));
        self.ready_matched += same as u64;
        if same < common {
            let at = self.settled + self.ready_matched;
            self.mismatch = Some(format!("console: byte {at} differs"));
            if own {
                self.ahead.extend(&bytes[same..]);
            }
            self.since = None;
            return;
        }
        mine.extend(&bytes[same..]);
        let waits = !mine.is_empty() || !other.is_empty();
        // Progress begins the wait anew.
        if !waits || same > 0 {
            self.since = None;
        }
        if waits {
            self.since.get_or_insert(now);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn primary() -> Primary {
        Primary {
            patience: Duration::from_millis(50),
            ..Primary::default()
        }
    }

    fn out(primary: &mut Primary) -> Vec<u8> {
        std::mem::take(&mut primary.ready)
    }

    #[test]
    fn bytes_leave_when_both_printed_them_however_they_were_cut() {
        let now = Instant::now();
        let mut p = primary();
        p.compare(now, b"hel", true);
        assert!(out(&mut p).is_empty());
        p.compare(now, b"hello", false);
        assert_eq!(out(&mut p), b"hel");
        p.compare(now, b"lo there", true);
        assert_eq!(out(&mut p), b"lo");
        p.compare(now, b" there", false);
        assert_eq!(out(&mut p), b" there");
        assert_eq!(
            (p.ready_matched, p.deadline(), p.mismatch),
            (11, None, None)
        );
    }

    #[test]
    fn nothing_leaves_behind_a_difference() {
        let now = Instant::now();
        let mut p = primary();
        p.compare(now, b"one", true);
        p.compare(now, b"oXe", false);
        assert_eq!(out(&mut p), b"o");
        assert!(p.mismatch.is_some());
        p.compare(now, b" two", true);
        assert!(out(&mut p).is_empty());
        assert_eq!(Vec::from(p.ahead), b"ne two");
    }

    #[test]
    fn a_side_that_prints_nothing_is_waited_for_so_long() {
        let now = Instant::now();
        let mut p = primary();
        p.compare(now, b"x", false);
        assert_eq!(p.deadline(), Some(now + p.patience));
    }
}
