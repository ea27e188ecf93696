//! The secondary's threads: a standby that is invited receives the guest, runs it as a copy, and goes on as
//! the guest when the primary is lost. One thread reads what the primary says and looks at the clock
//! (`pair`), one receives checkpoints (`follow`), one per question asks the arbiter (`ask`). What they do is
//! decided by [`pair::Secondary`], behind one lock.

use std::io::Write;
use std::path::PathBuf;
use std::sync::{Arc, Condvar, Mutex, OnceLock, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tandem_devices::GuestMemory;
use tandem_vmm::confinement::Entry;
use tandem_vmm::control::{ControlError, Handle, StopMode};
use tandem_vmm::error::causes;
use tandem_vmm::machine::{LoadMemory, Replacement};
use tandem_vmm::migration::frame::{self, Kind as FrameKind, Purpose};
use tandem_vmm::migration::tls::Keys;
use tandem_vmm::migration::{Link, MigrationError};
use tandem_vmm::snapshot::GuestState;

use super::asking::Claims;
use super::calls::{CALLS_TIMEOUT, Calls};
use super::checkpoint::{Greeting, Offer, Part, Receiver, expect_number, hear};
use super::follower::follow;
use super::image::Image;
use super::late;
use super::link_thread::{Talk, listen};
use super::owed::{self, Debtor};
use super::pair::PairCut;
use super::paths::dial::answer;
use super::paths::{Connections, carry};
use super::protector::{Desk, Protect};
use super::replicas::Replicas;
use super::shared::SharedOffer;
use super::standbys::Standbys;
use super::status::Role;
use super::{Pair, ProtectionError, ResyncMode, lock};
use crate::arbiter::Term;
use crate::detector::Scheduling;
use crate::link::{self, Kind, Message, MessageError};
use crate::pair::{self, Action, Actions, Ending, Epoch, Notice, SecondaryEvent, SecondaryState};
use crate::paths::PATHS;

/// How long the mark of a checkpoint that came whole may take to come too.
const MARK_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a thread looks whether there is something to do.
const LOOK: Duration = Duration::from_millis(100);

/// How often what the outside sends here is taken while the guest stands.
const OVERHEAR_LOOK: Duration = Duration::from_millis(5);

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
    pub fn hear((token, mut link): (u128, Link)) -> Result<Self, ProtectionError> {
        let heard = hear(&mut link, Purpose::Protection);
        let fits = |offer: &Offer| {
            expect_token(token, offer.token)?;
            expect_number("term", offer.term)?;
            expect_path(offer.path)
        };
        match heard.and_then(|offer: Offer| fits(&offer).map(|()| offer)) {
            Ok(offer) => Ok(Self { link, offer }),
            Err(error) => {
                frame::refuse(&mut link, &error.to_string());
                Err(error)
            }
        }
    }

    /// Whether all of the guest's memory is kept a second time, as of its last checkpoint.
    pub fn keeps_image(&self) -> bool {
        self.offer.mode == ResyncMode::Running
    }

    /// Tells the primary that its guest will not be taken.
    pub fn refuse(mut self, reason: &str) {
        frame::refuse(&mut self.link, reason);
    }

    /// Takes the guest: receives its first checkpoint, while the primary is answered. `memory` and `beside` are
    /// new memory of the guest's size.
    ///
    /// # Errors
    /// When the primary gives up or something breaks.
    pub fn accept(
        mut self,
        calls: Box<dyn Calls>,
        memory: &Arc<GuestMemory>,
        beside: Arc<GuestMemory>,
        standby: Standby,
        pair: &Arc<Pair>,
    ) -> Result<Joined, ProtectionError> {
        let mut replicas = match Replicas::open(&self.offer, &standby.disks, pair) {
            Ok(replicas) => replicas,
            Err(error) => {
                self.refuse(&causes(&error));
                return Err(error);
            }
        };
        for shared in &self.offer.shared {
            if let Err(error) = check_shared(pair, shared, &standby.disks) {
                self.refuse(&causes(&error));
                return Err(error);
            }
        }
        pair.set_seed(self.offer.token as u64);
        frame::send(&mut self.link, FrameKind::Accept, &[])?;
        replicas.tell(pair, &mut self.link)?;
        let token = self.offer.token;
        let next = |purpose| next_connection(calls.as_ref(), (token, &self.link), purpose);
        let link = next(Purpose::Pairing)?;
        let keeper = match self.offer.keeper {
            true => Some(next(Purpose::Keeping)?),
            false => None,
        };
        // Nobody is to wait for who takes no more.
        let link = self.carry(link, pair, calls, &standby)?;
        pair.become_secondary();
        let checkpoints = share(&self.link)?;
        let core = Core::start(&self.offer, standby, pair, (checkpoints, link), keeper)?;
        let told = self.offer.paced.then(|| Arc::clone(pair));
        let mut receiver = Receiver::new(self.link, told);
        receiver.expect_no_silence(true);
        let mut image = Image::new(self.offer.mode, memory, beside);
        image.give_to_store(pair);
        loop {
            match receiver.next(&|| core.is_over())? {
                Part::Pages(batch) => image.apply(batch)?,
                Part::Deltas(deltas) => image.change(deltas)?,
                Part::Unwritten(part) => pair.stage_unwritten(part)?,
                Part::Changed(told) => replicas.plan(pair, &told)?,
                Part::Digests(first) => replicas.fill(pair, receiver.link(), Some(first))?,
                Part::Whole(state, cut) => {
                    state.hardware.expect(&self.offer.hello.hardware)?;
                    replicas.fill(pair, receiver.link(), None)?;
                    replicas.close(pair, &cut)?;
                    pair.load_disks(cut.epoch)?;
                    image.begin(memory)?;
                    pair.set_checkpoint_memory(image.memory_bytes());
                    receiver.expect_no_silence(false);
                    return Ok(Joined {
                        receiver,
                        image,
                        replicas,
                        state,
                        cut,
                        core,
                    });
                }
            }
        }
    }

    /// Carries the connections over two paths, if the primary does: that of checkpoints, and `messages`, which is
    /// returned as it is used then. More are taken of `calls`.
    fn carry(
        &mut self,
        messages: Link,
        pair: &Arc<Pair>,
        calls: Box<dyn Calls>,
        standby: &Standby,
    ) -> Result<Link, ProtectionError> {
        let Some(path) = self.offer.path else {
            return Ok(messages);
        };
        let connections = Connections {
            messages,
            checkpoints: share(&self.link)?,
            path: usize::from(path),
        };
        let confined = |what: &'static str| {
            let entry = standby.confinement.clone();
            move || {
                let entered = entry.enter();
                if let Err(error) = &entered {
                    tracing::error!(%error, what, "a thread cannot be confined");
                }
                entered.is_ok()
            }
        };
        let (messages, checkpoints, paths) =
            carry(pair, connections, Default::default(), confined("paths"))?;
        answer(paths, calls, self.offer.token, confined("answer"))?;
        self.link = checkpoints;
        Ok(messages)
    }
}

/// Finds out whether the guest's shared disk is that here too, and is reached.
fn check_shared(
    pair: &Pair,
    shared: &SharedOffer,
    paths: &[PathBuf],
) -> Result<(), ProtectionError> {
    let disk = usize::from(shared.disk);
    match (paths.get(disk), pair.shared_disk(disk)) {
        (Some(path), Some(_)) => Ok(shared.check(path)?),
        _ => Err(ProtectionError::Disk(format!(
            "disk {disk} of the guest is shared, and is not here: its settings need `shared`"
        ))),
    }
}

/// The next of the connections by which a primary's guest and its copy are joined, of which `first` was the first.
fn next_connection(
    calls: &dyn Calls,
    (token, first): (u128, &Link),
    purpose: Purpose,
) -> Result<Link, ProtectionError> {
    let (called, mut link) = calls.next(Some(Instant::now() + CALLS_TIMEOUT), Some(first))?;
    expect_token(called, token)?;
    let greeting: Greeting = hear(&mut link, purpose)?;
    expect_token(greeting.token, token)?;
    Ok(link)
}

fn expect_token(found: u128, wanted: u128) -> Result<(), ProtectionError> {
    if found == wanted {
        return Ok(());
    }
    let what = "a connection of another guest".to_owned();
    Err(MigrationError::Garbled { what }.into())
}

/// There are so many paths.
fn expect_path(path: Option<u8>) -> Result<(), ProtectionError> {
    match path {
        Some(path) if usize::from(path) >= PATHS => {
            let what = format!("path {path}; allowed are 0 and 1");
            Err(ProtectionError::Garbled(what))
        }
        _ => Ok(()),
    }
}

fn share(link: &Link) -> Result<Link, ProtectionError> {
    link.try_clone()
        .map_err(ProtectionError::host("share a connection"))
}

/// What a standby needs besides the guest.
pub struct Standby {
    /// Who decides who owns the guest.
    pub claims: Claims,
    /// Images of the guest's disks here, in their order.
    pub disks: Vec<PathBuf>,
    /// Where others stand by for the guest once it is this one's, instead of where its primary says.
    pub standbys: Option<Standbys>,
    /// By what those are verified that the primary told of, if they are.
    pub keys: Option<Keys>,
    /// What its threads may still do.
    pub confinement: Entry,
}

/// A guest that was received whole, and has yet to run.
pub struct Joined {
    pub(super) receiver: Receiver,
    pub(super) image: Image,
    replicas: Replicas,
    /// Its state.
    pub state: Box<GuestState>,
    pub(super) cut: PairCut,
    core: Arc<Core>,
}

impl Joined {
    /// Tells the primary that its guest cannot run here.
    pub fn refuse(mut self, reason: &str) {
        frame::refuse(self.receiver.link(), reason);
    }

    /// Runs the guest of `handle` as a copy, and as the guest when the primary is gone: its protection is asked
    /// for at `desk` then.
    ///
    /// # Errors
    /// When the host has no threads left.
    pub fn start(self, handle: Handle, desk: Desk) -> Result<JoinHandle<()>, ProtectionError> {
        let Self {
            receiver,
            image,
            replicas,
            cut,
            core,
            ..
        } = self;
        if core.desk.set(desk).is_err() || core.handle.set(handle).is_err() {
            return Err(ProtectionError::Garbled("a guest twice".into()));
        }
        std::thread::Builder::new()
            .name("follow".into())
            .spawn(move || {
                if let Err(error) = core.confinement.enter() {
                    tracing::error!(%error, "the thread of checkpoints cannot be confined");
                    return core.fail();
                }
                if core.has_ended() {
                    // That was before there was a guest to be ended.
                    return core.stop();
                }
                follow(&core, receiver, image, replicas, cut);
            })
            .map_err(ProtectionError::host("start the thread of checkpoints"))
    }
}

/// When the marks of checkpoints came.
#[derive(Clone, Copy, Debug)]
struct Mark {
    epoch: Epoch,
    at: Instant,
}

/// A checkpoint with which a guest stands, and that it is restored from when it takes over.
pub(super) struct Standing {
    pub(super) state: GuestState,
    /// When that was read.
    pub(super) since: Instant,
    /// Puts its memory in place, unless that was done.
    pub(super) load: Option<LoadMemory>,
}

/// The roles' core and what carries out what it says.
pub(super) struct Core {
    this: Weak<Self>,
    pub(super) pair: Arc<Pair>,
    handle: OnceLock<Handle>,
    desk: OnceLock<Desk>,
    claims: Claims,
    standbys: Standbys,
    resync: ResyncMode,
    /// The checkpoint with which the guest stands, unless it was restored.
    standing: Mutex<Option<Standing>>,
    pub(super) confinement: Entry,
    machine: Mutex<pair::Secondary>,
    /// The newest mark, and whether more may come.
    mark: Mutex<(Option<Mark>, bool)>,
    marked: Condvar,
    /// When the primary was heard last.
    heard: Mutex<Instant>,
    /// The connection to the primary's keeper.
    keeper: Mutex<Option<Link>>,
    /// The connection by which checkpoints come.
    checkpoints: Link,
}

impl Core {
    fn start(
        offer: &Offer,
        standby: Standby,
        pair: &Arc<Pair>,
        (checkpoints, link): (Link, Link),
        keeper: Option<Link>,
    ) -> Result<Arc<Self>, ProtectionError> {
        let kept = keeper.as_ref().map(share).transpose()?;
        let core = Self::new(offer, standby, pair, (checkpoints, share(&link)?), kept)?;
        if let Some(link) = keeper {
            late::listen(Arc::clone(&core), link)?;
        }
        let talking = Arc::clone(&core);
        std::thread::Builder::new()
            .name("pair".into())
            .spawn(move || talk(talking, &link))
            .map_err(ProtectionError::host("start the thread of a link"))?;
        Ok(core)
    }

    /// That of a copy which has nothing of its guest yet, and whose threads have yet to be started. What it says goes
    /// to `link`.
    pub(super) fn new(
        offer: &Offer,
        standby: Standby,
        pair: &Arc<Pair>,
        (checkpoints, link): (Link, Link),
        keeper: Option<Link>,
    ) -> Result<Arc<Self>, ProtectionError> {
        let term = Term(offer.term);
        let standbys = match standby.standbys {
            Some(standbys) => standbys,
            None => Standbys::told(&offer.standbys, offer.here, standby.keys.as_ref())?,
        };
        pair.outbox().connect(link, offer.heard);
        {
            let mut status = pair.lock_status();
            status.role = Role::Secondary;
            status.reason = "it gets its first checkpoint".into();
            status.term = term.0;
            status.resync = offer.mode.name().into();
        }
        if let Some(stored) = &offer.store {
            pair.set_stored(stored.clone());
        }
        let now = Instant::now();
        if let Some(wish) = offer.modes {
            pair.modes().ask(now, wish);
        }
        Ok(Arc::new_cyclic(|this| Self {
            this: this.clone(),
            pair: Arc::clone(pair),
            handle: OnceLock::new(),
            desk: OnceLock::new(),
            claims: standby.claims,
            standbys,
            resync: offer.mode,
            standing: Mutex::new(None),
            confinement: standby.confinement,
            machine: Mutex::new(pair::Secondary::new(now, term, Scheduling::Normal)),
            mark: Mutex::new((None, true)),
            marked: Condvar::new(),
            heard: Mutex::new(now),
            keeper: Mutex::new(keeper),
            checkpoints,
        }))
    }

    /// The guest, once it is there.
    pub(super) fn handle(&self) -> Option<&Handle> {
        self.handle.get()
    }

    /// Lets the guest stand for a checkpoint, unless it is the only one meanwhile, or none of this host's: then nobody
    /// would let it run on. Waits for nothing else, so that beats are answered.
    ///
    /// # Errors
    /// When it is, or is not there. That it stands already, having powered off, is none.
    pub(super) fn halt(&self) -> Result<(), ControlError> {
        let handle = self.handle().ok_or(ControlError::Gone)?;
        // Who lets it go live holds this until it has told the guest to run.
        let machine = lock(&self.machine);
        if is_over(machine.state()) {
            return Err(ControlError::Gone);
        }
        drop(handle.halt());
        Ok(())
    }

    /// Tells the core of `event` and carries out what it says, in its order. The checkpoint that is to be
    /// restored, if it says so.
    pub(super) fn event(&self, event: SecondaryEvent) -> Option<Epoch> {
        let mut machine = lock(&self.machine);
        let actions = machine.handle(Instant::now(), event);
        // The primary may have won another one, and heard this side again.
        self.pair.lock_status().term = machine.term().0;
        self.carry_out(actions)
    }

    pub(super) fn state(&self) -> SecondaryState {
        lock(&self.machine).state()
    }

    pub(super) fn is_over(&self) -> bool {
        is_over(self.state())
    }

    /// The guest is another's, or nobody's.
    fn has_ended(&self) -> bool {
        matches!(self.state(), SecondaryState::Fenced | SecondaryState::Ended)
    }

    fn carry_out(&self, actions: Actions) -> Option<Epoch> {
        let mut restore = None;
        for action in actions {
            match action {
                Action::Answer(number) => self.pair.outbox().tell(Kind::Answer, 0, number),
                Action::Restore(epoch) => restore = Some(epoch),
                Action::SendLoaded(epoch) => self.pair.outbox().tell(Kind::Loaded, 0, epoch.0),
                Action::Ask(term) => self.ask(term),
                Action::GoLive(term, _) => self.go_live(term),
                Action::End(ending) => self.end(&ending),
                Action::Report(notice) => self.report(&notice),
                other => unreachable!("{other:?} is a primary's"),
            }
        }
        restore
    }

    fn ask(&self, term: Term) {
        let Some(core) = self.this.upgrade() else {
            return;
        };
        self.claims.ask(term, move |outcome| {
            core.event(SecondaryEvent::Claimed(term, outcome));
            core.pair.permit().wake();
        });
    }

    /// The guest stands with a checkpoint from now on.
    pub(super) fn stand_with(&self, standing: Standing) {
        *lock(&self.standing) = Some(standing);
    }

    /// The guest is restored from a later one.
    pub(super) fn stand_no_more(&self) {
        *lock(&self.standing) = None;
    }

    /// Puts the memory of the checkpoint with which the guest stands in place, so that little is left to be done when
    /// it takes over.
    pub(super) fn load_ahead(&self) -> Result<(), ProtectionError> {
        // Whoever lets it take over waits for this.
        let mut standing = lock(&self.standing);
        let load = standing.as_mut().and_then(|standing| standing.load.take());
        let (Some(load), Some(handle)) = (load, self.handle.get()) else {
            return Ok(());
        };
        let loaded = handle.load_ahead(load);
        if loaded.is_err() {
            // Its memory is that of no checkpoint.
            *standing = None;
        }
        Ok(loaded?)
    }

    /// Restores the guest from the checkpoint with which it stands, if it does and was not restored. It stands
    /// afterwards too.
    pub(super) fn restore_standing(&self) {
        let mut kept = lock(&self.standing);
        let (Some(standing), Some(handle)) = (kept.take(), self.handle.get()) else {
            return;
        };
        let begun = Instant::now();
        let restored = handle.replace(Replacement {
            state: standing.state,
            since: standing.since,
            load: standing.load.unwrap_or_else(|| Box::new(|_, _| Ok(()))),
        });
        match restored {
            Ok(()) => tracing::debug!(took = ?begun.elapsed(), "restored"),
            // That ends the guest.
            Err(error) => tracing::error!(%error, "the last checkpoint cannot be restored"),
        }
    }

    /// The primary is lost, and it is not yet known who has the guest.
    pub(super) fn is_deciding(&self) -> bool {
        matches!(self.state(), SecondaryState::Deciding(..))
    }

    /// The guest is the only one: what it kept leaves, and it runs on.
    fn go_live(&self, term: Term) {
        let begun = Instant::now();
        let heard = *lock(&self.heard);
        self.restore_standing();
        if !owed::pay(&self.pair, self, || self.pair.take_disks_over()) {
            return self.stop();
        }
        let kept = self.pair.go_live(heard);
        self.tell_keeper(term);
        let released = begun.elapsed();
        if let Some(handle) = self.handle.get() {
            // Each may have been done, or the guest have ended.
            drop(handle.go_live());
            drop(handle.resume());
            drop(handle.follow_copy_no_more());
        }
        let silent = begun - heard;
        let mut status = self.pair.lock_status();
        status.role = Role::Primary;
        status.protected = false;
        status.reason = "it took over and has no secondary".into();
        status.term = term.0;
        drop(status);
        let text = format!(
            "{kept} frames left that were kept; the primary was heard {} us before that, they left in {} us, \
             the guest runs after {} us",
            silent.as_micros(),
            released.as_micros(),
            begun.elapsed().as_micros(),
        );
        self.pair.happened("took-over", text);
        self.checkpoints.shut_down();
        self.protect_again(term);
    }

    /// The guest is this one's: it is to have a copy again, if it is known where.
    fn protect_again(&self, term: Term) {
        if let Some(desk) = self.desk.get()
            && !self.standbys.others().is_empty()
        {
            desk.succeed(Protect {
                to: self.standbys.clone(),
                claims: self.claims.clone(),
                term,
                resync: self.resync,
                wish: self.pair.modes().wish(),
            });
        }
    }

    /// The primary's keeper is to send what still comes there.
    fn tell_keeper(&self, term: Term) {
        let Some(mut link) = lock(&self.keeper).take() else {
            return;
        };
        let mut bytes = Vec::new();
        link::put(&mut bytes, Kind::Term, 0, &term.0.to_le_bytes());
        // It may be gone, as its host.
        drop(link.write_all(&bytes));
    }

    fn end(&self, ending: &Ending) {
        let mut status = self.pair.lock_status();
        status.protected = false;
        status.reason = format!("{ending:?}");
        drop(status);
        self.stop();
    }

    /// Ends the copy.
    fn stop(&self) {
        self.no_more_marks();
        self.checkpoints.shut_down();
        match self.handle.get() {
            // It may have ended by itself.
            Some(handle) => drop(handle.stop(StopMode::Force)),
            // Who starts the guest ends it.
            None => tracing::warn!("the primary was lost before its guest was here"),
        }
    }

    pub(super) fn fail(&self) {
        self.event(SecondaryEvent::Failed);
    }

    fn report(&self, notice: &Notice) {
        self.pair.report(notice);
        let mode = self.pair.modes().mode();
        let mut status = self.pair.lock_status();
        match notice {
            Notice::Protected(_) | Notice::HeardAgain => status.protected_in(mode),
            Notice::Deciding(..) => {
                status.protected = false;
                status.reason = "the primary is lost: the arbiter is asked".into();
            }
            _ => {}
        }
    }

    fn mark(&self, epoch: Epoch) {
        lock(&self.mark).0 = Some(Mark {
            epoch,
            at: Instant::now(),
        });
        self.marked.notify_all();
    }

    fn no_more_marks(&self) {
        lock(&self.mark).1 = false;
        self.marked.notify_all();
    }

    /// Waits for the mark of checkpoint `epoch`, which came whole: when it came.
    pub(super) fn wait_mark(&self, epoch: Epoch) -> Option<Instant> {
        let deadline = Instant::now() + MARK_TIMEOUT;
        let mut mark = lock(&self.mark);
        loop {
            match *mark {
                (Some(mark), _) if mark.epoch == epoch => return Some(mark.at),
                (_, false) => return None,
                _ => {}
            }
            let left = deadline.checked_duration_since(Instant::now())?;
            let waited = self.marked.wait_timeout(mark, left);
            mark = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }
}

impl Debtor for Core {
    fn lives(&self) -> bool {
        let stats = self.handle.get().map(Handle::stats);
        !matches!(stats, Some(Err(ControlError::Gone)))
    }

    fn stand(&self) {
        if let Some(handle) = self.handle.get() {
            // It stands already in the mode `checkpoint`.
            drop(handle.halt());
        }
    }

    fn run_on(&self) {
        // Who lets it go live does.
    }
}

/// The guest is no copy any more.
fn is_over(state: SecondaryState) -> bool {
    matches!(
        state,
        SecondaryState::Live(_) | SecondaryState::Fenced | SecondaryState::Ended
    )
}

/// Reads what the primary says until it is gone for good.
pub(super) fn talk(core: Arc<Core>, link: &Link) {
    if let Err(error) = core.confinement.enter() {
        tracing::error!(%error, "the thread of a link cannot be confined");
        return core.fail();
    }
    let pair = Arc::clone(&core.pair);
    let overhears = Instant::now();
    let mut talk = SecondaryTalk { core, overhears };
    listen(link, pair.outbox(), pair.permit().event(), &mut talk);
    talk.core.no_more_marks();
    link.shut_down();
}

/// What the secondary does with what the primary says.
struct SecondaryTalk {
    core: Arc<Core>,
    /// When to look at what the outside sends here.
    overhears: Instant,
}

impl SecondaryTalk {
    fn cut(&self, epoch: Epoch) {
        let core = &self.core;
        core.event(SecondaryEvent::Cut(epoch));
        core.pair.mark_cut();
        if !core.pair.copy_stands() {
            // It may have yet to come, or be live. Its disks are waited for by another thread.
            drop(core.halt());
        }
        core.mark(epoch);
    }
}

impl Talk for SecondaryTalk {
    fn hear(&mut self, now: Instant, message: Message<'_>) -> Result<(), String> {
        let core = &self.core;
        *lock(&core.heard) = now;
        let pair = &core.pair;
        let number = || message.number().map_err(|e| e.to_string());
        match message.kind {
            Kind::Input => {
                if !pair.input(message.device, message.payload) {
                    return Err("too many inputs wait for the guest".into());
                }
            }
            Kind::ConsoleInput => pair.console_input(message.payload),
            Kind::WritesDone => pair.settle_writes(message.device, number()?),
            Kind::Settled => pair.settle(message.device, number()?),
            Kind::Cut => self.cut(Epoch(number()?)),
            Kind::Committed => pair.committed(number()?),
            Kind::Beat => drop(core.event(SecondaryEvent::Beat(number()?))),
            Kind::Store => match number()? {
                u64::MAX => return Err("the store's last term is over".into()),
                term => pair.feed().grant(Term(term)),
            },
            Kind::Term => drop(core.event(SecondaryEvent::TermIs(Term(number()?)))),
            Kind::End => drop(core.event(SecondaryEvent::Dismissed)),
            kind => return Err(format!("the primary said {kind:?}")),
        }
        Ok(())
    }

    fn tick(&mut self, now: Instant) -> Option<Instant> {
        let core = &self.core;
        core.pair.call_devices();
        if now >= self.overhears {
            core.pair.overhear();
            self.overhears = now + OVERHEAR_LOOK;
        }
        if let Some(why) = core.pair.disk_failure() {
            tracing::error!(%why, "the copy ends: its guest must not see that");
            core.pair.lock_status().reason = why;
            core.fail();
        }
        let due = lock(&core.machine).deadline();
        if due.is_some_and(|due| now >= due) {
            core.event(SecondaryEvent::Timer);
        }
        if core.is_over() {
            return None;
        }
        Some(lock(&core.machine).deadline().unwrap_or(now + LOOK))
    }

    fn has_room(&self) {
        self.core.pair.wake_nets();
    }

    fn lost(&mut self, _now: Instant, error: &MessageError) {
        tracing::debug!(why = %causes(error), "the link ended");
        self.core.event(match error {
            MessageError::Closed => SecondaryEvent::LinkClosed,
            _ => SecondaryEvent::LinkBroken,
        });
    }
}
