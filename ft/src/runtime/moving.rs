//! A protected guest moves to another process, and is protected there.
//!
//! ```text
//!   source, a primary                         destination                      its copy
//!   Hello: Moving          ---------------->  knows this arbiter and owner?
//!   Pages, while it runs   ---------------->                    <-- checkpoints --> follows
//!   no checkpoint is under way; the guest stands; nothing leaves
//!   Pages, Outputs, State  ---------------->  has everything
//!   taps and disks let go
//!   Complete               ---------------->  opens them; wins the next term
//!                          <----------------  Running; what was held leaves, the guest goes on
//!   dismisses the copy     -------------------------------------------------->  ends, its standby accepts again
//!   ends                                      looks for a copy by the list that came along
//! ```
//!
//! # Who has the guest
//!
//! The source has it, and its copy takes over from it as ever, until the destination has won the next term from the arbiter.
//! The destination asks for it when it has Complete, or everything and the source's process is dead. From its Outputs on the source
//! goes on only when it has won that term itself.
//! Whoever of the three wins that term is the guest's owner, and the other two end: the copy asks for it when it has
//! lost its primary, the source when it hears nothing, or bad news. Since nothing left the source after
//! its guest stood, what either of them goes on from fits what the outside was told.
//!
//! The destination asks in a name that the source drew (`heir`). So a source whose destination died right when it had won
//! knows whose term that is, and takes the one after.
//!
//! What the source does about its pair is done by the thread that makes checkpoints: it knows when none is under way, and it
//! may ask the arbiter. The migration asks it, over a [`Turn`].

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tandem_vmm::control::ControlError;
use tandem_vmm::error::causes;
use tandem_vmm::migration::MigrationError;
use tandem_vmm::migration::protocol::{End, SourceFate, SourcePhase, source_fate};
use tandem_vmm::migration::source::Company;
use tandem_vmm::migration::tls::Keys;
use tandem_vmm::snapshot::SnapshotError;

use super::checkpoint::{decode, encode};
use super::driver::Driver;
use super::primary::{Core, Order};
use super::protector::{Desk, Shared};
use super::stored::Outputs;
use super::{Claims, Pair, Place, Protect, ProtectionError, ResyncMode, Standbys, lock};
use crate::arbiter::{ArbiterError, Claim, Claimant, Term};
use crate::mode::Wish;
use crate::pair::{PrimaryEvent, PrimaryState};

/// How long a move may wait for the checkpoint under way.
const READY_TIMEOUT: Duration = Duration::from_secs(8);
/// How often it is looked whether it is done.
const READY_LOOK: Duration = Duration::from_millis(1);
/// How often who asked the arbiter looks for its answer.
const DECIDE_LOOK: Duration = Duration::from_millis(1);
/// How often a thread that waits looks whether it is to end.
const LOOK: Duration = Duration::from_millis(100);
/// How long the copy of one side may stay behind the other with an output, if the guest stays.
const PATIENCE: Duration = Duration::from_millis(50);
/// How long an arbiter that does not answer is asked by a destination, which is waited for.
const CLAIM_TIMEOUT: Duration = Duration::from_secs(5);
/// Pause before it is asked again.
const CLAIM_AGAIN: Duration = Duration::from_millis(50);

/// What a source says of the protection of its guest first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Moving {
    /// The source's term.
    pub term: u64,
    /// Who won it.
    pub owner: [u8; 16],
    /// As whom the destination is to claim the next one.
    pub heir: [u8; 16],
    /// The directory that decides, as the source reaches it.
    pub arbiter: Option<PathBuf>,
    /// Where the guest's standbys listen.
    pub standbys: Vec<Place>,
    /// What of a resync the guest waits for.
    pub resync: ResyncMode,
    /// The mode that is asked for.
    pub wish: Wish,
}

// The source.

/// What the thread of the migration asks of the one that makes checkpoints.
enum Ask {
    /// The guest stands: nothing leaves from now on, and this is what did not.
    Pack,
    /// Taps and disks are to be let go.
    LetGo,
    /// Who has the guest?
    Decide(End),
}

/// The answer.
enum Answer {
    /// No checkpoint is under way, nor begun before this turn is over.
    Ready,
    Packed(Result<Vec<u8>, ProtectionError>),
    /// So many save the guest for its pair.
    LetGone(usize),
    Decided(SourceFate),
}

/// A turn in which no checkpoint is made. It is over when who asks is gone.
pub(super) struct Turn {
    asks: Receiver<Ask>,
    answers: SyncSender<Answer>,
    heir: Claimant,
}

/// The part of a guest's pair in its move to another process. The guest cannot be moved by another meanwhile.
pub struct Mover {
    desk: Desk,
    protected: Option<Protected>,
}

struct Protected {
    core: Arc<Core>,
    told: Moving,
    turn: Option<(Sender<Ask>, Receiver<Answer>)>,
    /// From then on the target may go on with the guest.
    packed: bool,
}

impl Mover {
    /// That of the guest of `desk`.
    ///
    /// # Errors
    /// Why the guest cannot move.
    pub(super) fn begin(desk: Desk) -> Result<Self, String> {
        if desk.shared.moving.swap(true, Ordering::SeqCst) {
            return Err("the guest is being moved already".into());
        }
        let mut mover = Self {
            desk,
            protected: None,
        };
        mover.protected = mover.find_protection()?;
        Ok(mover)
    }

    fn find_protection(&self) -> Result<Option<Protected>, String> {
        let Some(core) = lock(&self.desk.shared.core).clone() else {
            return Ok(None);
        };
        if core.state() == PrimaryState::Joining {
            return Err(
                "the guest's copy is being made: move it when it is protected (`tandem status`), or end that by \
                 `tandem unprotect`"
                    .into(),
            );
        }
        if !self.desk.pair.shared.is_empty() {
            return Err(
                "the guest has a shared disk, whose last writes its copy may have to do: end protection first by \
                 `tandem unprotect`"
                    .into(),
            );
        }
        let heir = Claimant::random().map_err(|error| format!("cannot draw a number: {error}"))?;
        let plan = lock(&self.desk.shared.plan).clone();
        let (standbys, resync) = plan.ok_or("the guest's protection is ending: try again")?;
        let told = Moving {
            term: core.term().0,
            owner: core.claims().claimant().to_bytes(),
            heir: heir.to_bytes(),
            arbiter: core.claims().place().map(Path::to_owned),
            standbys: standbys.tell_all(),
            resync,
            wish: self.desk.wish(),
        };
        Ok(Some(Protected {
            core,
            told,
            turn: None,
            packed: false,
        }))
    }
}

impl Drop for Mover {
    fn drop(&mut self) {
        self.desk.shared.moving.store(false, Ordering::SeqCst);
    }
}

fn failed(why: impl Into<String>) -> MigrationError {
    SnapshotError::from(ControlError::Failed(why.into())).into()
}

impl Protected {
    /// Asks for a turn, and waits until it is there.
    fn make_ready(&mut self, shared: &Shared) -> Result<(), MigrationError> {
        let (ask, asks) = channel();
        let (answers, answered) = sync_channel(1);
        *lock(&shared.turn) = Some(Turn {
            asks,
            answers,
            heir: Claimant::from_bytes(self.told.heir),
        });
        self.core.order(Order::Look);
        let deadline = Instant::now() + READY_TIMEOUT;
        while Instant::now() < deadline && lock(&shared.core).is_some() {
            match answered.recv_timeout(LOOK) {
                Ok(Answer::Ready) => {
                    self.turn = Some((ask, answered));
                    return self.expect_term();
                }
                Ok(_) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {}
            }
        }
        drop(lock(&shared.turn).take());
        Err(failed(
            "a checkpoint of the pair takes too long, or its protection ended: the guest stays",
        ))
    }

    /// The destination was told of a term, which has to be the guest's still.
    fn expect_term(&self) -> Result<(), MigrationError> {
        match self.core.term().0 {
            term if term == self.told.term => Ok(()),
            term => Err(failed(format!(
                "the guest's term was {}, and is {term} by now: the guest stays",
                self.told.term
            ))),
        }
    }

    fn ask(&self, ask: Ask) -> Result<Answer, MigrationError> {
        let gone = || failed("the thread that protects the guest has ended");
        let (asks, answers) = self.turn.as_ref().ok_or_else(gone)?;
        asks.send(ask).map_err(|_| gone())?;
        // The arbiter may take as long as it likes, and the guest stands.
        answers.recv().map_err(|_| gone())
    }
}

impl Company for Mover {
    fn tell(&mut self) -> Result<Option<Vec<u8>>, MigrationError> {
        let told = self.protected.as_ref().map(|own| encode(&own.told));
        told.transpose().map_err(|error| failed(causes(&error)))
    }

    fn make_ready(&mut self) -> Result<(), MigrationError> {
        match &mut self.protected {
            Some(own) => own.make_ready(&self.desk.shared),
            None => Ok(()),
        }
    }

    fn pack(&mut self) -> Result<Option<Vec<u8>>, MigrationError> {
        let packed = match &mut self.protected {
            Some(own) => {
                own.packed = true;
                match own.ask(Ask::Pack)? {
                    Answer::Packed(packed) => packed,
                    _ => return Err(failed("no outputs")),
                }
            }
            // Without one only what the guest's connections are for the outside has to be known.
            None if self.desk.pair.is_mapped() => self.desk.pair.pack(),
            None => return Ok(None),
        };
        packed.map(Some).map_err(|error| failed(causes(&error)))
    }

    fn let_go(&mut self) -> Result<usize, MigrationError> {
        match &self.protected {
            Some(own) => match own.ask(Ask::LetGo)? {
                Answer::LetGone(others) => Ok(others),
                _ => Err(failed("no answer")),
            },
            None => Ok(0),
        }
    }

    fn decide(&mut self, phase: SourcePhase, end: End) -> SourceFate {
        // What the target does not have it cannot go on from.
        let Some(own) = self.protected.as_ref().filter(|own| own.packed) else {
            return source_fate(phase, end);
        };
        match own.ask(Ask::Decide(end)) {
            Ok(Answer::Decided(fate)) => fate,
            // That thread ends with the guest only.
            _ => SourceFate::Leave,
        }
    }

    fn stay(&mut self) {
        if let Some(own) = &mut self.protected {
            own.turn = None;
        }
    }
}

impl Pair {
    /// Whether the outside knows the guest's connections by other numbers than the guest.
    fn is_mapped(&self) -> bool {
        self.nets().iter().any(|net| net.is_mapped())
    }

    /// What did not leave of a guest that stands, and is to leave where it goes on.
    fn pack(&self) -> Result<Vec<u8>, ProtectionError> {
        let cut = self.cut_to_move(PATIENCE);
        Outputs::of(&cut).to_bytes()
    }
}

impl Shared {
    /// Whether a move waits for its turn.
    pub(super) fn has_turn(&self) -> bool {
        lock(&self.turn).is_some()
    }

    /// Whether the guest is being moved.
    pub(super) fn moves(&self) -> bool {
        self.moving.load(Ordering::SeqCst)
    }
}

/// Asks an arbiter, and again after a pause while it does not answer and that `goes_on`.
fn insist<T>(
    pause: Duration,
    goes_on: impl Fn() -> bool,
    ask: impl Fn() -> Result<T, ArbiterError>,
) -> Result<T, ArbiterError> {
    loop {
        match ask() {
            Err(error) if goes_on() => {
                tracing::warn!(why = %causes(&error), "the arbiter does not answer");
                std::thread::sleep(pause);
            }
            answered => return answered,
        }
    }
}

impl Driver<'_> {
    /// Stands aside for a move that waits for its turn, unless a checkpoint is under way. `let_go` lets go of what else
    /// has the guest's disks and taps, and says how many save the guest meanwhile.
    pub(super) fn stand_aside(&self, let_go: &mut dyn FnMut() -> usize) {
        if !self.shared.has_turn() {
            return;
        }
        if !self.core.is_even() {
            // It is soon loaded, or given up.
            std::thread::sleep(READY_LOOK);
            return;
        }
        let Some(turn) = lock(&self.shared.turn).take() else {
            return;
        };
        // Whoever asked may have stopped waiting.
        if turn.answers.send(Answer::Ready).is_err() {
            return;
        }
        self.serve_turn(&turn, let_go);
        if !self.core.has_left() {
            self.core.shut(false);
        }
    }

    /// Does what is asked for until nobody asks. What was packed it is either decided about, or the guest has gone.
    fn serve_turn(&self, turn: &Turn, let_go: &mut dyn FnMut() -> usize) {
        let core = &self.core;
        while let Ok(ask) = turn.asks.recv() {
            let answer = match ask {
                Ask::Pack => {
                    core.shut(true);
                    Answer::Packed(core.pair.pack())
                }
                Ask::LetGo => Answer::LetGone(let_go()),
                Ask::Decide(end) => Answer::Decided(self.decide(end, turn.heir)),
            };
            // Whoever asked waits for it, or has ended with the guest.
            drop(turn.answers.send(answer));
        }
    }

    /// Who has the guest that was handed over, once that is known.
    fn decide(&self, end: End, heir: Claimant) -> SourceFate {
        let core = &self.core;
        if end == End::Running {
            core.hand_on();
            return SourceFate::Leave;
        }
        tracing::warn!(
            ?end,
            "the guest was handed over and does not run there, as far as is known: the arbiter is asked"
        );
        if matches!(end, End::Closed | End::Refused) {
            self.look_at_heir(heir);
        }
        core.event(PrimaryEvent::Doubted);
        core.pair.lock_status().reason =
            "the guest was handed over, and is not known to run there: the arbiter is asked".into();
        loop {
            match core.state() {
                PrimaryState::Alone => return SourceFate::GoOn,
                PrimaryState::Fenced | PrimaryState::Ended => return SourceFate::Leave,
                _ => {}
            }
            if self.shared.stop.load(Ordering::SeqCst) {
                return SourceFate::Leave;
            }
            core.look_at_clock();
            std::thread::sleep(DECIDE_LOOK);
        }
    }

    /// The destination does not run the guest, and will not. It may have won the next term before.
    fn look_at_heir(&self, heir: Claimant) {
        let core = &self.core;
        let goes_on = || !self.shared.stop.load(Ordering::SeqCst);
        let current = insist(LOOK, goes_on, || core.claims().current());
        if let Ok(Some(tenure)) = current
            && tenure.owner.claimant == heir
        {
            core.event(PrimaryEvent::HeirDied(tenure.term));
        }
    }
}

// The destination.

/// A protected guest that moves here: who may own it next.
pub struct Heir {
    told: Moving,
    claims: Claims,
}

impl Heir {
    /// What the source says of its guest's protection, as [`Company::tell`] told it.
    ///
    /// # Errors
    /// When it cannot be understood.
    pub fn told(company: &[u8]) -> Result<Moving, ProtectionError> {
        decode(company, "protection")
    }

    /// That of the guest `name`, whose terms the directory `arbiter` decides, or the one that the source told of.
    ///
    /// # Errors
    /// When it is not the directory that gave the guest to the source. Blocks on storage.
    pub fn find(told: Moving, arbiter: Option<&Path>, name: &str) -> Result<Self, ProtectionError> {
        let place = arbiter.or(told.arbiter.as_deref()).ok_or_else(|| {
            let what = "a guest whose arbiter is no directory: --arbiter says which one is";
            ProtectionError::Garbled(what.into())
        })?;
        let claims = Claims::open_as(Claimant::from_bytes(told.heir), place, name)?;
        let current = claims.current()?;
        let known = current.as_ref().is_some_and(|tenure| {
            tenure.term.0 == told.term && tenure.owner.claimant.to_bytes() == told.owner
        });
        if known {
            return Ok(Self { told, claims });
        }
        let what = match current {
            Some(found) => format!("it gave guest `{name}` to {found}"),
            None => format!("it knows of no guest `{name}`"),
        };
        let what = format!(
            "{what}, and not to the source with term {}; allowed is the source's own",
            told.term
        );
        let path = place.to_owned();
        Err(ArbiterError::Unfit { path, what }.into())
    }

    /// Takes the guest, all of which is here: how it is to be protected, by `standbys` if they are given and else by those
    /// that the source told of, which `keys` verify.
    ///
    /// # Errors
    /// When another has it, or the arbiter does not answer. The guest must not run here then.
    pub fn inherit(
        self,
        standbys: Option<Standbys>,
        keys: Option<&Keys>,
    ) -> Result<Protect, ProtectionError> {
        let Self { told, claims } = self;
        let to = match standbys {
            Some(standbys) => standbys,
            None => Standbys::heard(&told.standbys, keys)?,
        };
        let term = Term(told.term).next();
        let deadline = Instant::now() + CLAIM_TIMEOUT;
        let goes_on = || Instant::now() < deadline;
        if let Claim::Lost(found) = insist(CLAIM_AGAIN, goes_on, || claims.claim(term))? {
            let what = format!("a guest that another has by now: {found}");
            return Err(ProtectionError::Garbled(what));
        }
        Ok(Protect {
            to,
            claims,
            term,
            resync: told.resync,
            wish: told.wish,
        })
    }
}

#[cfg(test)]
#[path = "moving_tests.rs"]
mod tests;
