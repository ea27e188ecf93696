//! The secondary: a standby that is invited, receives the guest, and runs as its copy until it is the
//! only one.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tandem_devices::GuestMemory;
use tandem_vmm::confinement::Entry;
use tandem_vmm::control::{Handle, StopMode};
use tandem_vmm::migration::address::Listener;
use tandem_vmm::migration::frame::{self, Kind as FrameKind, Purpose};
use tandem_vmm::migration::{Link, MigrationError};
use tandem_vmm::snapshot::GuestState;

use super::base::Base;
use super::checkpoint::{Greeting, Offer, Part, Receiver, hear};
use super::follower::follow;
use super::link_thread::{Talk, listen};
use super::pair::PairCut;
use super::status::Role;
use super::{Pair, ProtectionError};
use crate::arbiter::{Arbiter, Claim, Owner, Term};
use crate::link::{Kind, Message, MessageError};

/// How long a primary may be silent before it counts as dead.
const SILENCE_MAX: Duration = Duration::from_millis(150);
/// How long a checkpoint that came whole may take to be loaded.
const LOAD_TIMEOUT: Duration = Duration::from_secs(10);

/// A primary that said what it has.
pub struct Invitation {
    link: Link,
    /// What it has.
    pub offer: Offer,
}

impl Invitation {
    /// Hears what a primary has.
    ///
    /// # Errors
    /// When it is no primary, or of another version; it is told so.
    pub fn hear(mut link: Link) -> Result<Self, ProtectionError> {
        match hear(&mut link, Purpose::Protection) {
            Ok(offer) => Ok(Self { link, offer }),
            Err(error) => {
                frame::refuse(&mut link, &error.to_string());
                Err(error)
            }
        }
    }

    /// Tells the primary that its guest will not be taken.
    pub fn refuse(mut self, reason: &str) {
        frame::refuse(&mut self.link, reason);
    }

    /// Takes the guest: receives its first checkpoint. `memory` and `base` are new memory of the guest's
    /// size.
    ///
    /// # Errors
    /// When the primary gives up or something breaks.
    pub fn accept(
        mut self,
        listener: &Listener,
        memory: &Arc<GuestMemory>,
        base: Arc<GuestMemory>,
    ) -> Result<Joined, ProtectionError> {
        frame::send(&mut self.link, FrameKind::Accept, &[])?;
        let link = second_connection(listener, self.offer.token)?;
        let mut receiver = Receiver::new(self.link);
        let mut base = Base::new(base);
        loop {
            match receiver.next()? {
                Part::Pages(batch) => base.apply(batch)?,
                Part::Whole(state, cut) => {
                    state.hardware.expect(&self.offer.hello.hardware)?;
                    let none = tandem_vmm::dirty::PageSet::covering(memory);
                    base.loader()(memory, &none)?;
                    return Ok(Joined {
                        receiver,
                        link,
                        base,
                        state,
                        cut,
                        offer: self.offer,
                        since: Instant::now(),
                    });
                }
            }
        }
    }
}

fn second_connection(listener: &Listener, token: u128) -> Result<Link, ProtectionError> {
    let failed = ProtectionError::host("wait for the second connection");
    let mut link = listener.accept().map_err(failed)?;
    let greeting: Greeting = hear(&mut link, Purpose::Pairing)?;
    if greeting.token != token {
        let what = "the second connection of another guest".to_owned();
        return Err(MigrationError::Garbled { what }.into());
    }
    Ok(link)
}

/// A guest that was received whole, and has yet to run.
pub struct Joined {
    receiver: Receiver,
    link: Link,
    base: Base,
    /// Its state.
    pub state: Box<GuestState>,
    cut: PairCut,
    /// What the primary said of it.
    pub offer: Offer,
    since: Instant,
}

impl Joined {
    /// Tells the primary that its guest cannot run here.
    pub fn refuse(mut self, reason: &str) {
        frame::refuse(self.receiver.link(), reason);
    }
}

/// How far the checkpoint under way is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Phase {
    /// There is none: the guest runs.
    Following,
    /// The guest stands since then, and the checkpoint is not complete.
    Cut(Instant),
    /// The checkpoint is being loaded.
    Loading,
    /// No more checkpoints come.
    Over,
}

/// What the threads of a secondary share.
pub(super) struct Shared {
    pub(super) pair: Arc<Pair>,
    pub(super) handle: Handle,
    phase: Mutex<Phase>,
    changed: Condvar,
}

impl Shared {
    pub(super) fn phase(&self) -> MutexGuard<'_, Phase> {
        self.phase.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) fn set_phase(&self, phase: Phase) {
        *self.phase() = phase;
        self.changed.notify_all();
    }

    /// Waits until the mark of a checkpoint that came whole has come too: when the guest stood.
    pub(super) fn wait_cut(&self) -> Option<Instant> {
        let deadline = Instant::now() + LOAD_TIMEOUT;
        let mut phase = self.phase();
        loop {
            match *phase {
                Phase::Cut(since) => {
                    *phase = Phase::Loading;
                    return Some(since);
                }
                Phase::Over => return None,
                Phase::Following | Phase::Loading => {}
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            let waited = self.changed.wait_timeout(phase, left);
            phase = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

/// What a standby needs besides the guest.
pub struct Standby {
    /// Who decides who owns the guest.
    pub arbiter: Box<dyn Arbiter>,
    /// Who claims to own it.
    pub owner: Owner,
    /// What its threads may still do.
    pub confinement: Entry,
}

impl Standby {
    /// Runs the guest of `handle` as a copy, and as the guest when the primary is gone.
    ///
    /// # Errors
    /// When the host has no threads left.
    pub fn start(
        self,
        joined: Joined,
        pair: Arc<Pair>,
        handle: Handle,
    ) -> Result<JoinHandle<()>, ProtectionError> {
        std::thread::Builder::new()
            .name("pair".into())
            .spawn(move || {
                if let Err(error) = self.run(joined, &pair, &handle) {
                    tracing::error!(error = %tandem_vmm::error::causes(&error), "the copy ends");
                    // It may have ended already.
                    drop(handle.stop(StopMode::Force));
                }
            })
            .map_err(ProtectionError::host("start the thread of a link"))
    }

    fn run(self, joined: Joined, pair: &Arc<Pair>, handle: &Handle) -> Result<(), ProtectionError> {
        let confined = self.confinement.enter();
        confined
            .map_err(|e| ProtectionError::host("confine a thread")(std::io::Error::other(e)))?;
        let Joined {
            receiver,
            link,
            base,
            cut,
            offer,
            since,
            ..
        } = joined;
        let share = |link: &Link| {
            link.try_clone()
                .map_err(ProtectionError::host("share a connection"))
        };
        let checkpoints = share(receiver.shared_link())?;
        let outbox = share(&link)?;
        pair.outbox().connect(outbox);
        let term = Term(offer.term);
        {
            let mut status = pair.lock_status();
            status.role = Role::Secondary;
            status.protected = true;
            status.reason = "both copies run".into();
            status.term = term.0;
        }
        handle.begin_save()?;
        pair.loaded(cut)?;
        handle.resume()?;
        tracing::info!(epoch = pair.epoch(), loaded = ?since.elapsed(), "the copy runs");
        let shared = Arc::new(Shared {
            pair: Arc::clone(pair),
            handle: handle.clone(),
            phase: Mutex::new(Phase::Following),
            changed: Condvar::new(),
        });
        let following = Arc::clone(&shared);
        let follower = std::thread::Builder::new()
            .name("follow".into())
            .spawn(move || follow(&following, receiver, base))
            .map_err(ProtectionError::host("start the thread of checkpoints"))?;
        let mut talk = SecondaryTalk {
            shared: Arc::clone(&shared),
            heard: Instant::now(),
        };
        let end = listen(&link, pair.outbox(), &mut talk);
        let lost_at = talk.heard;
        link.shut_down();
        // What came whole can still be read.
        checkpoints.shut_down();
        match end {
            End::Asked => {
                shared.set_phase(Phase::Over);
                tracing::info!("the primary ended");
                drop(handle.stop(StopMode::Force));
                Ok(())
            }
            End::Lost(why) => {
                tracing::warn!(%why, "the primary is lost");
                self.take_over(&shared, term, follower, lost_at)
            }
        }
    }

    /// Becomes the guest, if the arbiter says so.
    fn take_over(
        &self,
        shared: &Shared,
        term: Term,
        follower: JoinHandle<()>,
        lost_at: Instant,
    ) -> Result<(), ProtectionError> {
        let suspected = Instant::now();
        // A checkpoint that came whole is loaded first.
        drop(follower.join());
        let name = shared.pair.lock_status().name.clone();
        let next = Term(term.0 + 1);
        match self.arbiter.claim(&name, next, &self.owner)? {
            Claim::Won => {}
            Claim::Lost(owner) => {
                tracing::warn!(?owner, "another owns the guest: the copy ends");
                drop(shared.handle.stop(StopMode::Force));
                return Ok(());
            }
        }
        let decided = Instant::now();
        let kept = shared.pair.go_live();
        shared.handle.go_live()?;
        // It stands if a checkpoint was under way.
        drop(shared.handle.resume());
        let running = Instant::now();
        shared.handle.end_save()?;
        let mut status = shared.pair.lock_status();
        status.role = Role::Primary;
        status.protected = false;
        status.reason = "it took over and has no secondary".into();
        status.term = next.0;
        tracing::warn!(
            term = next.0,
            kept,
            silent = ?suspected - lost_at,
            decided = ?decided - suspected,
            running = ?running - decided,
            "took over"
        );
        Ok(())
    }
}

enum End {
    Asked,
    Lost(String),
}

/// What the secondary does with what the primary says.
struct SecondaryTalk {
    shared: Arc<Shared>,
    heard: Instant,
}

impl SecondaryTalk {
    fn cut(&self) -> Result<(), End> {
        self.shared.pair.mark_cut();
        let since = Instant::now();
        // It may stand already, having powered off.
        if let Err(error) = self.shared.handle.pause() {
            tracing::debug!(%error, "the copy stands already");
        }
        self.shared.set_phase(Phase::Cut(since));
        Ok(())
    }
}

impl Talk for SecondaryTalk {
    type End = End;

    fn hear(&mut self, now: Instant, message: Message<'_>) -> Result<(), End> {
        self.heard = now;
        let pair = &self.shared.pair;
        let number = || message.number().map_err(|e| End::Lost(e.to_string()));
        match message.kind {
            Kind::Input => {
                if !pair.input(message.device, message.payload) {
                    return Err(End::Lost("too many inputs wait for the guest".into()));
                }
            }
            Kind::ConsoleInput => pair.console_input(message.payload),
            Kind::Settled => pair.settle(message.device, number()?),
            Kind::Cut => return self.cut(),
            Kind::Committed => pair.committed(),
            Kind::Beat => pair.outbox().put(Kind::Answer, 0, message.payload),
            Kind::End => return Err(End::Asked),
            kind => return Err(End::Lost(format!("the primary said {kind:?}"))),
        }
        Ok(())
    }

    fn tick(&mut self, now: Instant) -> Result<Option<Instant>, End> {
        let silent = self.heard + SILENCE_MAX;
        if now >= silent {
            return Err(End::Lost("it is silent".into()));
        }
        Ok(Some(silent))
    }

    fn lost(&mut self, error: MessageError) -> End {
        End::Lost(error.to_string())
    }
}
