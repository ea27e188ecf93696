//! Saving a running guest: its memory is copied while it runs, round after round, until what it
//! writes meanwhile is little; then it stands for the rest.
//!
//! ```text
//!   begin > all of memory > the pages written meanwhile, again and again > freeze > the rest > thaw or leave
//! ```
//!
//! The guest stands for the freeze and for copying the pages of the last round. A guest that writes
//! faster than memory can be copied stands for longer: rounds are bounded.

use std::time::{Duration, Instant};

use super::{GuestState, SnapshotError};
use crate::control::{ControlError, Frozen, Handle, Saving};
use crate::dirty::PageSet;
use crate::error::Error;
use crate::kvm::standing::Stand;

/// Most rounds of copying while the guest runs.
pub const ROUNDS_MAX: u32 = 30;
/// What is left to copy is given up as too little to matter below this many pages.
const PAGES_ENOUGH: u64 = 64;

/// Where the memory of a running guest is copied to.
pub trait PageSink {
    /// Copies all of guest memory, which may change meanwhile; returns the bytes that were copied.
    ///
    /// # Errors
    /// When it cannot be copied.
    fn all(&mut self) -> Result<u64, SnapshotError>;

    /// Copies these pages, again; returns the bytes that were copied.
    ///
    /// # Errors
    /// When they cannot be copied.
    fn pages(&mut self, pages: &PageSet) -> Result<u64, SnapshotError>;
}

/// What copying while the guest ran came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Precopy {
    /// Rounds, the first one of all memory included.
    pub rounds: u32,
    /// Bytes copied.
    pub bytes: u64,
    /// How long it took.
    pub time: Duration,
    /// Pages that are left to be copied while the guest stands, as of the last round.
    pub pages_left: u64,
    /// Time per page in the last rounds.
    pub per_page: Duration,
}

/// A save of a guest under way. Whatever becomes of it, the guest goes on when it is dropped, but
/// for [`Session::leave`].
pub struct Session<'a> {
    guest: &'a Handle,
    saving: Saving,
    left: PageSet,
    frozen: bool,
    released: bool,
    over: bool,
}

impl<'a> Session<'a> {
    /// Begins to save `guest`: its writes are followed from now on.
    ///
    /// # Errors
    /// When too many save it already, or its writes cannot be followed.
    pub fn begin(guest: &'a Handle) -> Result<Self, SnapshotError> {
        let saving = guest.begin_save()?;
        let left = saving.tracker.page_set();
        Ok(Self {
            guest,
            saving,
            left,
            frozen: false,
            released: false,
            over: false,
        })
    }

    /// Begins to save `guest`, which stands from the same moment on: for guests that reset themselves
    /// again and again. All of its pages are to be copied.
    ///
    /// # Errors
    /// As [`Session::begin`] and [`Session::freeze`].
    pub fn begin_frozen(guest: &'a Handle) -> Result<(Self, Frozen), SnapshotError> {
        let (saving, frozen) = guest.begin_frozen()?;
        let session = Self {
            guest,
            left: PageSet::all_of(&saving.memory),
            saving,
            frozen: true,
            released: false,
            over: false,
        };
        Ok((session, frozen))
    }

    /// Begins anew as [`Session::begin_frozen`] does, after the guest was reset.
    ///
    /// # Errors
    /// As that.
    pub fn begin_again(&mut self) -> Result<Frozen, SnapshotError> {
        // It may have been reset, or ended, in any phase.
        drop(self.end());
        let (session, frozen) = Self::begin_frozen(self.guest)?;
        *self = session;
        Ok(frozen)
    }

    /// What there is to save.
    pub fn saving(&self) -> &Saving {
        &self.saving
    }

    /// Copies memory while the guest runs, until the rest takes at most `budget` or rounds no
    /// longer help.
    ///
    /// # Errors
    /// When `sink` fails or writes cannot be followed.
    pub fn precopy(
        &mut self,
        sink: &mut impl PageSink,
        budget: Duration,
    ) -> Result<Precopy, SnapshotError> {
        let start = Instant::now();
        let mut done = Precopy {
            rounds: 1,
            bytes: sink.all()?,
            ..Precopy::default()
        };
        self.harvest()?;
        let (mut copied_pages, mut copied_in) = (self.saving.memory_pages(), start.elapsed());
        loop {
            done.pages_left = self.left.len();
            done.per_page = copied_in / u32::try_from(copied_pages.max(1)).unwrap_or(u32::MAX);
            let rest = done
                .per_page
                .saturating_mul(u32::try_from(done.pages_left).unwrap_or(u32::MAX));
            // A round that left as much as it found would go on for ever.
            let helps = done.rounds == 1 || done.pages_left < copied_pages;
            let enough = done.pages_left <= PAGES_ENOUGH || rest <= budget;
            if enough || !helps || done.rounds >= ROUNDS_MAX {
                done.time = start.elapsed();
                return Ok(done);
            }
            let round = Instant::now();
            copied_pages = done.pages_left;
            done.bytes += self.copy_left(sink)?;
            done.rounds += 1;
            self.harvest()?;
            copied_in = round.elapsed();
        }
    }

    /// Stops the guest, reads its state, and copies the pages that are left.
    ///
    /// # Errors
    /// When the guest cannot be stopped, was reset meanwhile, or `sink` fails.
    pub fn freeze(&mut self, sink: &mut impl PageSink) -> Result<Stopped, SnapshotError> {
        let frozen = self.guest.freeze(self.saving.id)?;
        self.frozen = true;
        if frozen.resets != self.saving.resets {
            return Err(SnapshotError::Reset);
        }
        self.copy_rest(frozen, sink)
    }

    /// Copies the pages that are left of a guest that stands.
    ///
    /// # Errors
    /// When `sink` fails, or writes could not be followed.
    pub fn copy_rest(
        &mut self,
        frozen: Frozen,
        sink: &mut impl PageSink,
    ) -> Result<Stopped, SnapshotError> {
        let read = Instant::now();
        self.saving
            .tracker
            .final_harvest(&mut self.left)
            .map_err(|e| self.untracked(&e))?;
        let harvested = Instant::now();
        let pages = self.left.len();
        let bytes = self.copy_left(sink)?;
        Ok(Stopped {
            frozen,
            pages,
            bytes,
            harvest: harvested - read,
            copy: harvested.elapsed(),
        })
    }

    /// Copies all memory of a guest that stands.
    ///
    /// # Errors
    /// When `sink` fails.
    pub fn copy_all(
        &mut self,
        frozen: Frozen,
        sink: &mut impl PageSink,
    ) -> Result<Stopped, SnapshotError> {
        let start = Instant::now();
        let bytes = sink.all()?;
        Ok(Stopped {
            frozen,
            pages: self.saving.memory_pages(),
            bytes,
            harvest: Duration::ZERO,
            copy: start.elapsed(),
        })
    }

    /// How many pages the guest wrote that are not copied.
    ///
    /// # Errors
    /// When its writes cannot be followed.
    pub fn pending(&mut self) -> Result<u64, SnapshotError> {
        self.harvest()?;
        Ok(self.left.len())
    }

    /// Copies the pages that [`Session::pending`] counted, while the guest runs; returns their bytes.
    ///
    /// # Errors
    /// When `sink` fails.
    pub fn copy_pending(&mut self, sink: &mut impl PageSink) -> Result<u64, SnapshotError> {
        self.copy_left(sink)
    }

    /// Counts `pages` among those that are not copied: their copies came to nothing.
    ///
    /// # Errors
    /// When they are another guest's.
    pub fn copy_again(&mut self, pages: &PageSet) -> Result<(), SnapshotError> {
        match self.left.insert_all(pages) {
            true => Ok(()),
            false => Err(SnapshotError::Tracking("pages of another guest".into())),
        }
    }

    /// Lets a frozen guest go on, if it ran before. Its writes are still followed: it can be frozen
    /// again, and then only what it wrote meanwhile is copied. Returns how long it stood.
    ///
    /// # Errors
    /// When the guest is not frozen, or has ended.
    pub fn thaw(&mut self) -> Result<Stand, SnapshotError> {
        self.frozen = false;
        Ok(self.guest.thaw(self.saving.id)?)
    }

    /// Lets the guest go on, if it ran before, and ends the save.
    ///
    /// # Errors
    /// When the guest has ended.
    pub fn finish(mut self) -> Result<(), SnapshotError> {
        Ok(self.end()?)
    }

    /// Lets go of the frozen guest's disks, taps and sockets, so that another process can take them.
    /// `state` is the guest's, by which it goes on if it has to. So many `others` save it too, and know of that.
    ///
    /// # Errors
    /// When it is not frozen, has ended, or more save it.
    pub fn release(&mut self, state: GuestState, others: usize) -> Result<(), SnapshotError> {
        self.guest.release(state, others)?;
        self.released = true;
        Ok(())
    }

    /// Leaves the released guest as it is, for the user to decide.
    ///
    /// # Errors
    /// When it is not released, or has ended.
    pub fn leave_in_doubt(mut self) -> Result<(), SnapshotError> {
        self.over = true;
        Ok(self.guest.doubt()?)
    }

    /// Ends the frozen guest: it goes on elsewhere.
    ///
    /// # Errors
    /// When it is not frozen, or has ended.
    pub fn leave(mut self) -> Result<(), SnapshotError> {
        self.guest.leave()?;
        self.over = true;
        Ok(())
    }

    fn harvest(&mut self) -> Result<(), SnapshotError> {
        self.saving
            .tracker
            .harvest(&mut self.left)
            .map_err(|e| self.untracked(&e))
    }

    fn untracked(&self, error: &Error) -> SnapshotError {
        match self.saving.tracker.is_detached() {
            true => SnapshotError::Reset,
            false => SnapshotError::Tracking(error.to_string()),
        }
    }

    fn copy_left(&mut self, sink: &mut impl PageSink) -> Result<u64, SnapshotError> {
        let bytes = sink.pages(&self.left)?;
        self.left.clear();
        Ok(bytes)
    }

    fn end(&mut self) -> Result<(), ControlError> {
        self.over = true;
        if self.released {
            self.guest.reacquire()?;
        }
        if self.frozen {
            self.guest.thaw(self.saving.id)?;
        }
        self.guest.end_save(self.saving.id)
    }
}

impl Drop for Session<'_> {
    fn drop(&mut self) {
        // A guest that has ended need not go on.
        if !self.over
            && let Err(error) = self.end()
        {
            tracing::debug!(%error, "a save could not be ended");
        }
    }
}

/// A guest that stands, all of it saved.
#[derive(Debug)]
pub struct Stopped {
    /// Its state.
    pub frozen: Frozen,
    /// Pages copied while it stood.
    pub pages: u64,
    /// Bytes copied while it stood.
    pub bytes: u64,
    /// Time to find out which pages.
    pub harvest: Duration,
    /// Time to copy them.
    pub copy: Duration,
}
