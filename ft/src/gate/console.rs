//! The gate of the console: output is compared byte by byte and leaves once; input reaches both copies.
//!
//! The copy keeps output until it is written out, not only until it may be: the device loop writes it a moment
//! later, and a primary that dies in between has written nothing.
//!
//! In the mode [`Mode::Checkpoint`] nothing is compared, and a copy that stands keeps input until a checkpoint has
//! seen it.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use tandem_vmm::console::{self, ConsoleHub};

use super::{Permit, Tally};
use crate::link::message::PAYLOAD_MAX;
use crate::link::{Kind, Outbox};
use crate::mode::Mode;
use crate::mode::interval::Waiting;

/// Output that may be held or kept, in bytes; the guest waits beyond it.
pub(super) const HELD_MAX: usize = 64 << 10;
/// Input that is kept for a copy that stands, in bytes; what is typed beyond it is lost to the copy.
const INPUT_MAX: usize = 64 << 10;
/// The console's number among devices, in messages.
pub const CONSOLE: u8 = u8::MAX;

#[derive(Debug, Default)]
struct Primary {
    /// What a checkpoint explains that is not loaded yet.
    covered: Vec<u8>,
    /// What may leave once the permit says so.
    ready: Vec<u8>,
    /// What left and may not be written out, and how much left in all when the last of it did.
    leaving: VecDeque<u8>,
    left: u64,
    /// What the guest printed and the copy has not, and since when.
    ahead: VecDeque<u8>,
    /// What the copy printed and the guest has not.
    behind: VecDeque<u8>,
    since: Option<Instant>,
    patience: Duration,
    /// Bytes that both printed since the checkpoint.
    matched: u64,
    /// Bytes that are out, of those that the checkpoint explains and that both printed since.
    settled: u64,
    /// A checkpoint is under way: what the copy prints is of before.
    cut: bool,
    mismatch: Option<String>,
    /// From the last cut on.
    mode: Mode,
    /// Output that waits for a checkpoint, in [`Mode::Checkpoint`].
    waiting: Option<Waiting>,
    /// Since when the checkpoint under way explains output that waits.
    covered_since: Option<Instant>,
    tally: Tally,
}

#[derive(Debug, Default)]
struct Secondary {
    /// What may not be out: of the checkpoint first.
    kept: VecDeque<u8>,
    settled: u64,
    /// The guest stands until it takes over, or the next checkpoint lets it run.
    stands: bool,
    /// Input that came since, and how much of it the checkpoint under way has seen.
    input: Vec<u8>,
    seen: usize,
}

#[derive(Debug, Default)]
enum Side {
    #[default]
    Alone,
    Primary(Box<Primary>),
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

    /// Bytes of memory that holding or keeping output takes.
    pub fn memory_bytes(&self) -> usize {
        match &*self.lock() {
            Side::Alone => 0,
            Side::Primary(primary) => {
                let queues = [&primary.leaving, &primary.ahead, &primary.behind];
                let queues: usize = queues.into_iter().map(VecDeque::capacity).sum();
                queues + primary.covered.capacity() + primary.ready.capacity()
            }
            Side::Secondary(secondary) => secondary.kept.capacity(),
        }
    }

    /// Hands bytes to the console's readers; how many those were so far.
    fn emit(&self, bytes: &[u8]) -> u64 {
        self.hub.get().map_or(0, |hub| hub.emit(bytes))
    }

    /// A checkpoint begins, while the guest stands. Returns the output that it explains and that is not out.
    /// From it on `mode` holds.
    pub fn cut(&self, patience: Duration, mode: Mode) -> Vec<u8> {
        let mut side = self.lock();
        if matches!(*side, Side::Alone) {
            *side = Side::Primary(Box::default());
        }
        let Side::Primary(primary) = &mut *side else {
            return Vec::new();
        };
        let mut covered = std::mem::take(&mut primary.ready);
        covered.append(&mut primary.covered);
        covered.extend(primary.ahead.drain(..));
        **primary = Primary {
            covered,
            leaving: std::mem::take(&mut primary.leaving),
            left: primary.left,
            cut: true,
            patience,
            mode,
            covered_since: primary.waiting.map(|waiting| waiting.first),
            tally: primary.tally,
            ..Primary::default()
        };
        let unwritten = primary.leaving.iter().chain(&primary.covered);
        unwritten.copied().collect()
    }

    /// The guest stands, and is to go on elsewhere: what did not leave here leaves there. As [`ConsoleGate::cut`] for a
    /// guest with a copy, but what is being written out here still is; nothing at all for one without.
    pub fn pack(&self, patience: Duration, mode: Mode) -> Vec<u8> {
        if !matches!(*self.lock(), Side::Primary(_)) {
            return Vec::new();
        }
        self.cut(patience, mode);
        match &*self.lock() {
            Side::Primary(primary) => primary.covered.clone(),
            _ => Vec::new(),
        }
    }

    /// The checkpoint is loaded: the output that it explains leaves.
    pub fn commit(&self, now: Instant) {
        if let Side::Primary(primary) = &mut *self.lock() {
            primary.cut = false;
            primary.since = primary.since.map(|_| now);
            if let Some(since) = primary.covered_since.take() {
                primary.tally.add(now.saturating_duration_since(since));
            }
            primary.ready = std::mem::take(&mut primary.covered);
            self.release_from(primary);
            self.tell_settled(primary);
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
        primary.left = self.emit(&primary.ready);
        primary.leaving.extend(primary.ready.drain(..));
    }

    /// Tells the copy what it need not keep, unless it has yet to load what that counts from.
    fn tell_settled(&self, primary: &Primary) {
        if primary.settled > 0 && !primary.cut {
            self.outbox.tell(Kind::Settled, CONSOLE, primary.settled);
        }
    }

    /// Output of the copy. True if it does not match.
    pub fn secondary_output(&self, now: Instant, bytes: &[u8]) -> bool {
        let mut side = self.lock();
        let Side::Primary(primary) = &mut *side else {
            return false;
        };
        if primary.cut || primary.mode == Mode::Checkpoint {
            return false;
        }
        primary.compare(now, bytes, false);
        self.release_from(primary);
        primary.mismatch.is_some()
    }

    /// Output that waits for a checkpoint and for nothing else.
    pub fn waiting(&self) -> Option<Waiting> {
        match &*self.lock() {
            Side::Primary(primary) => primary.waiting,
            _ => None,
        }
    }

    /// How often output left that had waited for a checkpoint, and for how long.
    pub fn tally(&self) -> Tally {
        match &*self.lock() {
            Side::Primary(primary) => primary.tally,
            _ => Tally::default(),
        }
    }

    /// Looks for output that one side has waited for too long.
    pub fn expire(&self, now: Instant) {
        let Side::Primary(primary) = &mut *self.lock() else {
            return;
        };
        if primary.deadline().is_some_and(|at| now >= at) {
            let silent = if primary.behind.is_empty() {
                "secondary"
            } else {
                "primary"
            };
            primary.mismatch = Some(format!("console: the {silent} printed nothing"));
        }
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

    /// Waits until what left is written, however slow its readers are, but not for longer than `patience`.
    pub fn drain(&self, patience: Duration) {
        if let Some(hub) = self.hub.get() {
            hub.drain(patience);
        }
    }

    /// Whether everything is out that may leave.
    pub fn is_even(&self) -> bool {
        match &*self.lock() {
            Side::Primary(primary) => primary.ready.is_empty(),
            _ => true,
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
        if let Side::Secondary(secondary) = &mut *self.lock()
            && secondary.stands
        {
            let room = INPUT_MAX.saturating_sub(secondary.input.len());
            secondary.input.extend(&bytes[..bytes.len().min(room)]);
            return;
        }
        self.inject(bytes);
    }

    fn inject(&self, bytes: &[u8]) {
        if let Some(hub) = self.hub.get().filter(|_| !bytes.is_empty()) {
            hub.inject(bytes);
        }
    }

    /// What came so far, the checkpoint under way has seen.
    pub fn mark_cut(&self) {
        if let Side::Secondary(secondary) = &mut *self.lock() {
            secondary.seen = secondary.input.len();
        }
    }

    /// Of what the checkpoint explains and of what came since, the first `count` bytes are out.
    pub fn settle(&self, count: u64) {
        if let Side::Secondary(secondary) = &mut *self.lock() {
            let out = count.saturating_sub(secondary.settled) as usize;
            let out = out.min(secondary.kept.len());
            secondary.kept.drain(..out);
            secondary.settled += out as u64;
        }
    }

    /// The guest goes on from a checkpoint that explains `covered`, which may not be out, or stands with it, by
    /// `mode`.
    pub fn loaded(&self, covered: Vec<u8>, mode: Mode) {
        if let Side::Secondary(secondary) = &mut *self.lock() {
            let mut input = std::mem::take(&mut secondary.input);
            input.drain(..secondary.seen.min(input.len()));
            let stands = mode == Mode::Checkpoint;
            if !stands {
                self.inject(&std::mem::take(&mut input));
            }
            *secondary = Secondary {
                kept: covered.into(),
                stands,
                input,
                ..Secondary::default()
            };
        }
    }

    /// The guest is the only one now: what it kept leaves.
    pub fn go_live(&self) {
        let mut side = self.lock();
        if let Side::Secondary(secondary) = std::mem::take(&mut *side) {
            self.emit(&Vec::from(secondary.kept));
            self.inject(&secondary.input);
        }
    }
}

impl console::ConsoleGate for ConsoleGate {
    fn output(&self, bytes: &[u8]) -> bool {
        let mut side = self.lock();
        match &mut *side {
            Side::Alone => return false,
            Side::Primary(primary) => {
                if primary.take(Instant::now(), bytes) {
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
            Side::Primary(primary) => {
                primary.ahead.len() + primary.ready.len() + primary.leaving.len() >= HELD_MAX
            }
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

    fn written(&self, written: u64) {
        if let Side::Primary(primary) = &mut *self.lock() {
            let waits = primary.left.saturating_sub(written) as usize;
            let out = primary.leaving.len().saturating_sub(waits);
            if out > 0 {
                primary.leaving.drain(..out);
                primary.settled += out as u64;
                self.tell_settled(primary);
            }
        }
    }
}

impl Primary {
    fn deadline(&self) -> Option<Instant> {
        let since = self.since.filter(|_| !self.cut);
        since.map(|since| since + self.patience)
    }

    /// Takes output of the guest. True if somebody is to look: it differs, or begins to wait for a checkpoint.
    fn take(&mut self, now: Instant, bytes: &[u8]) -> bool {
        self.compare(now, bytes, true);
        if self.mode == Mode::Lockstep {
            return self.mismatch.is_some();
        }
        let full = self.ahead.len() >= HELD_MAX;
        Waiting::add(&mut self.waiting, now, full)
    }

    /// Compares output of one side with what the other is ahead; what both printed becomes ready.
    fn compare(&mut self, now: Instant, bytes: &[u8], own: bool) {
        let compares = self.mode == Mode::Lockstep && self.mismatch.is_none();
        if !compares || self.cut {
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
        self.matched += same as u64;
        if same < common {
            let at = self.matched;
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
    use std::fs::File;
    use std::io::Seek;

    use vmm_sys_util::eventfd::EventFd;

    use super::*;

    fn primary() -> Primary {
        Primary {
            patience: Duration::from_millis(50),
            ..Primary::default()
        }
    }

    /// A primary's gate whose copy runs from its first checkpoint, with a console that is written to a file.
    fn gate() -> (Arc<ConsoleGate>, ConsoleHub, File) {
        let file = tempfile::tempfile().unwrap();
        let event = || EventFd::new(libc::EFD_NONBLOCK).unwrap();
        let output = console::Primary::File(file.try_clone().unwrap());
        let hub = ConsoleHub::new(output, Arc::new(event()));
        let permit = Arc::new(Permit::new(event()));
        let gate = Arc::new(ConsoleGate::new(Arc::default(), permit));
        gate.connect(hub.clone());
        hub.guard(gate.clone());
        assert!(gate.cut(Duration::MAX, Mode::Lockstep).is_empty());
        gate.commit(Instant::now());
        (gate, hub, file)
    }

    fn settled(gate: &ConsoleGate) -> u64 {
        match &*gate.lock() {
            Side::Primary(primary) => primary.settled,
            _ => panic!("it is a primary's"),
        }
    }

    fn printed(file: &mut File) -> String {
        file.rewind().unwrap();
        std::io::read_to_string(file).unwrap()
    }

    #[test]
    fn output_is_settled_when_it_is_written_and_not_before() {
        let (gate, hub, mut file) = gate();
        hub.put(b"line");
        assert!(!gate.secondary_output(Instant::now(), b"line"));
        assert_eq!((settled(&gate), printed(&mut file).as_str()), (0, ""));
        hub.flush();
        assert_eq!((settled(&gate), printed(&mut file).as_str()), (4, "line"));
    }

    #[test]
    fn a_checkpoint_explains_what_left_and_is_not_written_and_it_is_written_once() {
        let (gate, hub, mut file) = gate();
        hub.put(b"one two");
        gate.secondary_output(Instant::now(), b"one");
        assert_eq!(gate.cut(Duration::MAX, Mode::Lockstep), b"one two");
        hub.flush();
        assert_eq!(printed(&mut file), "one");
        gate.commit(Instant::now());
        assert_eq!(settled(&gate), 3);
        hub.flush();
        assert_eq!(
            (settled(&gate), printed(&mut file).as_str()),
            (7, "one two")
        );
    }

    #[test]
    fn a_copy_keeps_what_is_not_settled_in_order() {
        let (gate, hub, mut file) = gate();
        gate.become_secondary();
        gate.loaded(b"one ".to_vec(), Mode::Lockstep);
        hub.put(b"two three");
        gate.settle(6);
        gate.go_live();
        hub.flush();
        assert_eq!(printed(&mut file), "o three");
    }

    #[test]
    fn output_waits_for_the_next_checkpoint_where_nothing_is_compared() {
        let (gate, hub, mut file) = gate();
        gate.cut(Duration::MAX, Mode::Checkpoint);
        gate.commit(Instant::now());
        assert!(!gate.permit.take_call() && gate.waiting().is_none());
        hub.put(b"one");
        assert!(gate.permit.take_call() && gate.waiting().is_some());
        assert!(!gate.secondary_output(Instant::now(), b"other"));
        gate.expire(Instant::now() + Duration::from_secs(10));
        assert_eq!(gate.mismatch(), None);
        assert_eq!(gate.cut(Duration::MAX, Mode::Lockstep), b"one");
        hub.put(b" two");
        gate.commit(Instant::now());
        hub.flush();
        assert_eq!(
            (printed(&mut file).as_str(), gate.tally().outputs),
            ("one", 1)
        );
        assert!(!gate.secondary_output(Instant::now(), b" two"));
        hub.flush();
        assert_eq!(printed(&mut file), "one two");
    }

    #[test]
    fn a_copy_that_stands_keeps_input_that_its_checkpoint_has_not_seen() {
        let (gate, hub, _file) = gate();
        gate.become_secondary();
        gate.loaded(Vec::new(), Mode::Checkpoint);
        gate.input(b"seen");
        gate.mark_cut();
        gate.input(b"new");
        gate.loaded(Vec::new(), Mode::Checkpoint);
        assert!(!hub.has_injected());
        gate.input(&vec![b'x'; 2 * INPUT_MAX]);
        gate.go_live();
        let input = hub.read_input(2 * INPUT_MAX);
        assert!(input.starts_with(b"newxx"));
        assert_eq!(input.len(), INPUT_MAX);
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
        assert_eq!((p.matched, p.deadline(), p.mismatch), (11, None, None));
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
