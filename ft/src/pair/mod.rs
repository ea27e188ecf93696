//! The two roles of a protected pair (US10579485): who runs the guest, and what each side does about it.
//!
//! A [`Primary`] owns the guest under a term and lets its outputs out; a [`Secondary`] runs the same guest,
//! answers beats, and takes over. Both are pure: a runtime tells them what happened and when, and carries out
//! the [`Action`]s that they give, in order. Which outputs may leave is the comparator's matter;
//! *whether* any may is [`Primary::gate`]'s.
//!
//! # The primary
//!
//! ```text
//!                 joined                 loaded(1)
//!      +-------+ -------> +---------+ -----------> +-----------+
//!      | Alone |          | Joining |              | Protected | <----------+
//!      +-------+ <------- +---------+              +-----------+            |
//!          ^     lost, and     |                      |     | mismatch,     | loaded(n+1)
//!          |     nothing sent  | lost                 |     v wish          |
//!          |                   |                 lost |  +----------------+ |
//!          | won term+1        v                      |  | Resyncing(n+1) |-+
//!          |              +----------+ <--------------+  +----------------+
//!          +------------- | Deciding | <---------------------+  lost
//!                         +----------+ ----> back to where it was, when the
//!                              |             silent secondary is heard again
//!                  lost term+1 v
//!                          +--------+
//!                          | Fenced |     the end of this copy
//!                          +--------+
//! ```
//!
//! *Lost* is a secondary whose link was closed by the end of its process, whose link broke, who is silent,
//! or who was given up. The primary asks the arbiter for its next term. Until it has that it lets outputs out only as long as
//! its lease holds, and it stops the guest before the lease ends. A question whose answer did not come may have
//! been heard: it is asked until there is an answer, also when the secondary is heard again meanwhile. The primary
//! then has a newer term, and says so to its secondary.
//!
//! A secondary that was not yet sent a whole checkpoint cannot ask for a term: losing it needs no decision. So
//! the runtime must not send the end of a checkpoint before [`Action::SendCheckpoint`].
//!
//! # The secondary
//!
//! ```text
//!     +---------+ loaded(1)  +-----------+  cut(n+1)  +----------------+
//!     | Loading | ---------> | Following | ---------> | Reloading(n+1) |
//!     +---------+            +-----------+ <--------- +----------------+
//!          | closed,           |       ^   loaded(n+1)        |
//!          | broken       lost |       | heard again,         | lost
//!          v                   v       | not yet asked        |
//!     +--------+            +----------+                      |
//!     | Ended  |            | Deciding | <--------------------+   (also Loading, when all is staged)
//!     +--------+            +----------+
//!                 won term+1  |      |  lost term+1
//!                             v      v
//!                       +------+   +--------+
//!                       | Live |   | Fenced |
//!                       +------+   +--------+
//! ```
//!
//! In the mode [`Checkpoint`](crate::mode::Mode::Checkpoint) the secondary's guest stands while it is *following*, and
//! *restoring* a checkpoint means to keep it, such that the guest can go live from it. The machines need not know.
//!
//! It asks at once when the primary's process is dead, else only when the lease that its answers gave is surely over.
//! Who has asked answers no more beats. A secondary that is lost while it stages a checkpoint goes live from
//! the state before: nothing that the checkpoint covers has left. One that has it whole goes live from that.
//!
//! # What a runtime must keep
//!
//! - It tells of everything that a link brought before it tells of [`PrimaryEvent::Timer`] or
//!   [`SecondaryEvent::Timer`]: else its own stall looks like the peer's silence.
//! - It looks at the gate and the clock right before it lets an output out.
//! - *Closed* means that the peer's process is gone. A side that ends a link while it lives says so before
//!   ([`Action::Dismiss`]); everything else is *broken*.
//! - One question to the arbiter is under way at a time; what takes too long is answered by [`Outcome::Unknown`].
//! - After [`Action::Dismiss`], [`Action::GoAlone`] or [`Action::GoLive`] it tells nothing more of that link,
//!   not even what was received before and waits to be told.

mod asking;
mod primary;
mod secondary;
#[cfg(test)]
mod tests;

use std::fmt;
use std::time::{Duration, Instant};

use smallvec::SmallVec;

use crate::arbiter::{ArbiterError, Claim, Tenure, Term};

pub use primary::{Primary, PrimaryEvent, PrimaryState};
pub use secondary::{Secondary, SecondaryEvent, SecondaryState};

/// How long before its lease ends a primary stops its guest: a timer is up to 19 ms late in real time.
pub const STOP_AHEAD: Duration = Duration::from_millis(20);
/// After which an arbiter that did not answer is asked again.
pub const ASK_AGAIN: Duration = Duration::from_millis(50);

/// Largest number of a term or a checkpoint that another side is believed: what comes next is a number too, and none
/// gets so far.
pub const NUMBER_MAX: u64 = u64::MAX >> 1;

/// Number of a checkpoint of the guest; grows by one with each resync, over all terms.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Epoch(pub u64);

impl Epoch {
    /// Before the first checkpoint.
    pub const NONE: Self = Self(0);

    /// The next checkpoint's.
    ///
    /// # Panics
    /// After 2^64 checkpoints.
    pub fn next(self) -> Self {
        Self(self.0.checked_add(1).expect("checkpoints are rarer"))
    }
}

impl fmt::Display for Epoch {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Why the secondary is made identical.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// It is new.
    Join,
    /// The comparator found different outputs, or waited too long for one.
    Mismatch,
    /// As many outputs are held, or as much memory differs, as may be.
    Bound,
    /// Somebody asked for it.
    Demand,
    /// Outputs wait for it: the secondary does not run.
    Outputs,
    /// From it on another [`Mode`](crate::mode::Mode) is to hold.
    Mode,
    /// The secondary makes checkpoints for a store, and waits for one.
    Store,
}

/// How the other side was lost.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Its process ended: the link was closed.
    Closed,
    /// The link failed.
    Broken,
    /// Nothing is heard of it.
    Silent,
    /// It was given up, or does not keep to the protocol.
    GivenUp,
}

/// What the arbiter said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// The term is ours.
    Won,
    /// It is another's, or there is a newer one.
    Lost(Tenure),
    /// There was no answer. The term may be ours.
    Unknown,
}

impl From<Result<Claim, ArbiterError>> for Outcome {
    fn from(claim: Result<Claim, ArbiterError>) -> Self {
        match claim {
            Ok(Claim::Won) => Self::Won,
            Ok(Claim::Lost(found)) => Self::Lost(found),
            Err(_) => Self::Unknown,
        }
    }
}

/// Whether outputs that the comparator lets go may leave.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Gate {
    /// They may.
    Open,
    /// They may before this moment.
    Until(Instant),
    /// They may not.
    Shut,
}

impl Gate {
    /// Whether an output may leave now.
    pub fn lets_out(self, now: Instant) -> bool {
        match self {
            Self::Open => true,
            Self::Until(end) => now < end,
            Self::Shut => false,
        }
    }
}

/// How a copy of the guest ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Ending {
    /// Another owns the guest.
    Fenced(Tenure),
    /// The primary dismissed this secondary.
    Dismissed,
    /// The primary was lost before this secondary had a state to go live from.
    NothingLoaded(Loss),
    /// This copy cannot go on: its state cannot be restored.
    Failed,
    /// The guest itself ended.
    GuestEnded,
}

/// What a user may want to know.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Notice {
    /// A secondary joined; it is sent the first checkpoint.
    Joining(Epoch),
    /// Both copies are identical as of this checkpoint.
    Protected(Epoch),
    /// The secondary is made identical again.
    Resyncing(Epoch, Cause),
    /// The other side is lost; the arbiter is asked for this term, now or when the lease is over.
    Deciding(Term, Loss),
    /// It was heard again.
    HeardAgain,
    /// The arbiter did not answer.
    ArbiterSilent(Term),
    /// The guest stands, for the lease ends.
    Suspended,
    /// It runs again.
    Resumed,
    /// The guest runs here, without a secondary.
    Alone(Term),
    /// The secondary took the guest over.
    Live(Term, Epoch),
    /// This copy ended.
    Ended(Ending),
}

/// What the runtime is to do, in the order given.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Action {
    /// Primary: send this beat.
    SendBeat(u64),
    /// Primary: the gate is open, or open for longer, and outputs wait: let out what the comparator lets go.
    Release,
    /// Primary: begin a resync; freeze the guest, read its state, then tell of [`PrimaryEvent::CutDone`].
    StartResync(Epoch, Cause),
    /// Primary: put the mark on the link, tell the comparator of the cut, let the guest go on, send the rest.
    SendCheckpoint(Epoch),
    /// Primary: the secondary has loaded it: tell the comparator.
    Commit(Epoch),
    /// Primary: vCPUs must stand before the lease ends.
    StopGuest,
    /// Primary: they may run again.
    ResumeGuest,
    /// Primary: the secondary is gone for good, outputs need no match: tell the comparator; drop the link.
    GoAlone(Term),
    /// Primary: tell the secondary that it is no longer needed, then close the link.
    Dismiss,
    /// Primary: tell the secondary that this is the term now.
    TellTerm(Term),
    /// Secondary: answer this beat.
    Answer(u64),
    /// Secondary: all of the checkpoint is here; restore or keep it, then tell of [`SecondaryEvent::Loaded`].
    Restore(Epoch),
    /// Secondary: tell the primary that it is loaded.
    SendLoaded(Epoch),
    /// Secondary: emit what was kept, own the tap and the console, run on. What is staged but not restored is dropped.
    GoLive(Term, Epoch),
    /// Ask the arbiter for this term and tell of the answer.
    Ask(Term),
    /// Stop the guest, drop what is held or kept, leave.
    End(Ending),
    /// Tell the user.
    Report(Notice),
}

/// What to do, in order.
pub type Actions = SmallVec<[Action; 4]>;

/// The earlier of two moments that may be.
fn earliest(moments: impl IntoIterator<Item = Option<Instant>>) -> Option<Instant> {
    moments.into_iter().flatten().min()
}
