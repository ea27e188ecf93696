//! The gate of a primary: its guest's writes wait until they may be done.

use std::io;
use std::time::{Duration, Instant};

use super::super::Tally;
use super::super::overlay::Overlay;
use super::told::parse;
use super::{SharedGate, Side};
use crate::compare::writes::Writes;
use crate::link::Kind;
use crate::mode::Mode;
use crate::mode::interval::Waiting;

/// A primary's side.
#[derive(Debug)]
pub(super) struct Primary {
    pub(super) writes: Writes,
    /// Number of the last cut: what the copy wrote before is of no interest.
    epoch: u64,
    /// The copy has yet to load it.
    pub(super) cut: bool,
    /// From the last cut on.
    pub(super) mode: Mode,
    /// Writes that completed and are not done, of before the last cut: a checkpoint covers them.
    pub(super) covered: Overlay,
    /// And of after it.
    pub(super) pending: Overlay,
    /// The checkpoint that covers them is loaded.
    committed: bool,
    /// Up to which of its writes the copy was told that they are done.
    told: u64,
    /// Writes that wait for a checkpoint.
    pub(super) waiting: Option<Waiting>,
    covered_since: Option<Instant>,
    /// Writes completed that nobody compared: a checkpoint is due.
    pub(super) overdue: bool,
    pub(super) tally: Tally,
}

impl Primary {
    /// Writes that completed and are not done.
    pub(super) fn owed(&self) -> Overlay {
        let mut owed = self.covered.clone();
        owed.add(self.pending.clone());
        owed
    }
}

impl Side {
    /// Those that a loaded checkpoint covers.
    fn covered(&self) -> Option<Overlay> {
        match self {
            Self::Primary(primary) if primary.committed => Some(primary.covered.clone()),
            _ => None,
        }
    }
}

impl SharedGate {
    /// Checkpoint `epoch` begins, while the guest stands, from which on `mode` holds. What it covers is
    /// [`Self::covered`].
    pub(crate) fn cut(&self, epoch: u64, patience: Duration, mode: Mode) {
        let mut state = self.lock();
        let mut next = Primary {
            writes: Writes::new(patience),
            epoch,
            cut: true,
            mode,
            covered: Overlay::default(),
            pending: Overlay::default(),
            committed: false,
            told: 0,
            waiting: None,
            covered_since: None,
            overdue: false,
            tally: Tally::default(),
        };
        match std::mem::replace(&mut state.side, Side::Alone) {
            Side::Alone => state.failure = None,
            Side::Owing(owed) => {
                state.failure = None;
                next.covered = owed;
            }
            Side::Primary(before) => {
                next.covered = before.covered;
                next.covered.add(before.pending);
                next.covered_since = before.waiting.map(|waiting| waiting.first);
                next.tally = before.tally;
            }
            copy @ Side::Secondary(_) => {
                state.side = copy;
                return;
            }
        }
        state.side = Side::Primary(Box::new(next));
    }

    /// What the last checkpoint covers and is not done.
    pub(crate) fn covered(&self) -> Overlay {
        match &self.lock().side {
            Side::Primary(primary) => primary.covered.clone(),
            _ => Overlay::default(),
        }
    }

    /// Whether this guest has a copy that may take over the image.
    pub(crate) fn is_primary(&self) -> bool {
        matches!(self.lock().side, Side::Primary(_))
    }

    /// Whether writes completed that are not done.
    pub(crate) fn owes(&self) -> bool {
        match &self.lock().side {
            Side::Owing(_) => true,
            Side::Primary(primary) => !primary.covered.is_empty() || !primary.pending.is_empty(),
            _ => false,
        }
    }

    /// The checkpoint is loaded. Whether [`Self::write_covered`] is to be called: until then outputs are to wait.
    pub(crate) fn commit(&self, now: Instant) -> bool {
        let mut state = self.lock();
        let Side::Primary(primary) = &mut state.side else {
            return false;
        };
        primary.cut = false;
        primary.committed = true;
        primary.writes.begin(now);
        if let Some(since) = primary.covered_since.take() {
            primary.tally.add(now.saturating_duration_since(since));
        }
        self.tell_difference(primary);
        let owes = !primary.covered.is_empty();
        drop(state);
        self.wake();
        owes
    }

    /// Writes what the loaded checkpoint covers to the image, as long as the lease holds. Whether that is done, or
    /// nothing is left to be done.
    ///
    /// # Errors
    /// When the image cannot be written to, which [`Self::failure`] tells too.
    pub(crate) fn write_covered(&self) -> io::Result<bool> {
        let _writer = self.lock_writer();
        let Some((image, covered)) = self.find_owed(Side::covered) else {
            return Ok(true);
        };
        let written = image.write(&covered, || self.permit.is_leased(Instant::now()));
        if !written.inspect_err(|error| self.fail(error))? {
            return Ok(false);
        }
        if let Side::Primary(primary) = &mut self.lock().side {
            primary.covered.subtract(&covered);
        }
        self.wake();
        Ok(true)
    }

    /// The copy wrote what `message` says. Whether that differs from what the guest wrote.
    ///
    /// # Errors
    /// When it is no write to this disk.
    pub(crate) fn secondary_write(&self, message: &[u8]) -> Result<bool, String> {
        let mut state = self.lock();
        let bytes = state.image.as_ref().map_or(0, |image| image.bytes);
        let (epoch, told) = parse(message, bytes).ok_or("a write that cannot be")?;
        let Side::Primary(primary) = &mut state.side else {
            return Ok(false);
        };
        // The copy's devices are at work before it is heard that it loaded its checkpoint.
        if epoch != primary.epoch || primary.mode == Mode::Checkpoint {
            return Ok(false);
        }
        let whole = primary.writes.secondary(told);
        let differs = !primary.cut && primary.writes.mismatch().is_some();
        drop(state);
        if !whole.is_empty() {
            self.wake();
        }
        Ok(differs)
    }

    /// Tells the copy which of its writes are done, if those are more than it knows.
    pub(crate) fn tell_done(&self) {
        let mut state = self.lock();
        let Side::Primary(primary) = &mut state.side else {
            return;
        };
        let settled = primary.writes.settled();
        // What completed unseen is not done, and not in the count.
        let whole = primary.covered.is_empty() && primary.pending.is_empty();
        if settled > primary.told && !primary.cut && whole {
            primary.told = settled;
            self.outbox
                .put(Kind::WritesDone, self.number, &settled.to_le_bytes());
        }
    }

    /// Looks for writes that waited for too long.
    pub(crate) fn expire(&self, now: Instant) {
        if let Side::Primary(primary) = &mut self.lock().side
            && !primary.cut
        {
            primary.writes.expire(now);
        }
    }

    /// When [`Self::expire`] is due.
    pub(crate) fn deadline(&self) -> Option<Instant> {
        match &self.lock().side {
            Side::Primary(primary) if !primary.cut => primary.writes.deadline(),
            _ => None,
        }
    }

    /// What does not match, in words.
    pub(crate) fn mismatch(&self) -> Option<String> {
        match &self.lock().side {
            Side::Primary(primary) if !primary.cut => {
                let unseen = primary.overdue.then_some("it completed before the copy's");
                let what = primary.writes.mismatch().or(unseen)?;
                Some(format!("disk {}: {what}", self.number))
            }
            _ => None,
        }
    }

    /// Whether writes wait for the copy's.
    pub(crate) fn waits(&self) -> bool {
        match &self.lock().side {
            Side::Primary(primary) => !primary.cut && primary.writes.waits(),
            _ => false,
        }
    }

    /// Writes that wait for a checkpoint and for nothing else.
    pub(crate) fn waiting(&self) -> Option<Waiting> {
        match &self.lock().side {
            Side::Primary(primary) => primary.waiting,
            _ => None,
        }
    }

    /// How many writes were done, and for how long they had waited.
    pub(crate) fn tally(&self) -> Tally {
        match &self.lock().side {
            Side::Primary(primary) => primary.tally,
            _ => Tally::default(),
        }
    }

    /// The guest has no copy any more, and is this one's: what completed is written to the image, and all that waits
    /// may be done.
    ///
    /// # Errors
    /// When the image cannot be written to. All but reads waits then, until this is called once more and was not in vain.
    pub(crate) fn open(&self) -> io::Result<()> {
        let _writer = self.lock_writer();
        if self.is_copy() {
            return Ok(());
        }
        let written = self.write_owed();
        if written.is_err() {
            let mut state = self.lock();
            if let Some(owed) = state.side.owed() {
                state.side = Side::Owing(owed);
            }
            drop(state);
            self.wake();
        }
        written
    }

    /// Bytes that completed and are not done.
    pub(crate) fn owed_bytes(&self) -> usize {
        let owed = self.lock().side.owed();
        owed.map_or(0, |owed| owed.bytes())
    }
}
