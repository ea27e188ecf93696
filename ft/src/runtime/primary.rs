//! The primary's threads. One makes checkpoints (`protect`), one reads what the secondary says and looks at
//! the clock (`pair`), one per question asks the arbiter (`ask`). What they do is decided by
//! [`pair::Primary`], behind one lock.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tandem_vmm::confinement::Entry;
use tandem_vmm::control::{FreezeTimes, Handle, StopMode};
use tandem_vmm::error::causes;
use tandem_vmm::migration::frame::{self, Kind as FrameKind, Purpose};
use tandem_vmm::migration::pages::PageSender;
use tandem_vmm::migration::{Address, Hello, Link};
use tandem_vmm::snapshot::SnapshotError;
use tandem_vmm::snapshot::save::Session;

use super::asking::Claims;
use super::checkpoint::{Greeting, Offer, encode_rest, expect, greet};
use super::eagerness::Eagerness;
use super::link_thread::{Talk, listen};
use super::{Pair, ProtectionError};
use crate::arbiter::Term;
use crate::detector::Scheduling;
use crate::link::{Kind, Message, MessageError};
use crate::pair::{self, Action, Actions, Cause, Epoch, Notice, PrimaryEvent, PrimaryState};

/// How long the copy of one side may stay behind the other with an output.
const PATIENCE: Duration = Duration::from_millis(50);
/// How long copying the last pages of the first checkpoint may take while the guest stands.
const FIRST_STAND_BUDGET: Duration = Duration::from_millis(5);
/// Pages that are copied while the guest runs before a checkpoint, if it wrote more than that.
const STAGED_PAGES_MAX: u64 = 16 << 10;
/// Room for staged pages that is kept between checkpoints, in bytes.
const STAGING_KEPT: usize = 4 << 20;
/// Rounds of that at most: a guest may write faster than memory is copied.
const ROUNDS_MAX: u32 = 8;
/// Resets of the guest that come in between until a checkpoint is given up.
const RESETS_MAX: u32 = 8;
/// Longest time between checkpoints: what a secondary must undo stays little.
const CHECKPOINT_INTERVAL_MAX: Duration = Duration::from_secs(10);
/// How long the secondary may take to load a checkpoint.
const LOAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause before a secondary that could not be reached is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often a thread that waits looks whether it is to end.
const LOOK: Duration = Duration::from_millis(100);
/// How long asking for protection may take: an arbiter's storage is slow at times.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Stack of the thread that makes checkpoints, in bytes.
const THREAD_STACK: usize = 512 << 10;
/// How long the last outputs may take to be compared when the guest has ended.
const LAST_OUTPUTS: Duration = Duration::from_millis(500);

/// How a guest is to be protected.
pub struct Protect {
    /// Where a standby listens.
    pub to: Address,
    /// Who decides who owns the guest.
    pub claims: Claims,
    /// Number of this owner.
    pub term: Term,
}

/// What of a guest's memory is copied before it is frozen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Copying {
    /// All of it.
    All,
    /// What it wrote, until that is little.
    WhileMuch,
    /// Nothing.
    Nothing,
}

/// What the thread that makes checkpoints is to do.
enum Order {
    Resync(Epoch, Cause),
    /// There is no secondary any more.
    Alone,
}

/// The roles' core and what carries out what it says.
struct Core {
    this: Weak<Self>,
    pair: Arc<Pair>,
    handle: Handle,
    claims: Claims,
    machine: Mutex<pair::Primary>,
    orders: Mutex<Option<Sender<Order>>>,
    link: Mutex<Option<Link>>,
    /// The guest stands because the core said so.
    suspended: AtomicBool,
    /// The secondary is to take over: nothing is said to anybody any more.
    left: AtomicBool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Core {
    /// Tells the core of `event` and carries out what it says, in its order. True if the checkpoint is to be
    /// sent that was just cut.
    fn event(&self, event: PrimaryEvent) -> bool {
        let mut machine = lock(&self.machine);
        if self.left.load(Ordering::SeqCst) {
            return false;
        }
        let actions = machine.handle(Instant::now(), event);
        self.pair.permit().set(machine.gate());
        self.pair.lock_status().term = machine.term().0;
        let send = self.carry_out(actions);
        drop(machine);
        send
    }

    fn state(&self) -> PrimaryState {
        lock(&self.machine).state()
    }

    /// Nothing leaves here any more, and nothing is decided; what is held the secondary has too.
    fn leave(&self) {
        let machine = lock(&self.machine);
        self.left.store(true, Ordering::SeqCst);
        self.pair.permit().set(pair::Gate::Shut);
        drop(machine);
    }

    fn carry_out(&self, actions: Actions) -> bool {
        let mut send = false;
        for action in actions {
            match action {
                Action::SendBeat(number) => self.pair.outbox().tell(Kind::Beat, 0, number),
                Action::Release => self.pair.release(),
                Action::StartResync(epoch, cause) => {
                    let began = (cause != Cause::Join).then(Instant::now);
                    self.pair.lock_status().resync_began = began;
                    self.order(Order::Resync(epoch, cause));
                }
                Action::SendCheckpoint(_) => send = true,
                Action::Commit(epoch) => {
                    self.pair.commit(epoch.0);
                    self.pair.lock_status().count_resync();
                }
                Action::StopGuest => {
                    let stands = self.handle.pause().is_ok();
                    self.suspended.store(stands, Ordering::SeqCst);
                }
                Action::ResumeGuest => {
                    if self.suspended.swap(false, Ordering::SeqCst) {
                        // It may have ended.
                        drop(self.handle.resume());
                    }
                }
                Action::GoAlone(_) => {
                    self.pair.open();
                    self.order(Order::Alone);
                }
                Action::Dismiss => {
                    self.pair.outbox().put(Kind::End, 0, &[]);
                    self.pair.outbox().flush();
                }
                Action::TellTerm(term) => self.pair.outbox().tell(Kind::Term, 0, term.0),
                Action::Ask(term) => self.ask(term),
                Action::End(_) => {
                    self.order(Order::Alone);
                    // It may have ended by itself.
                    drop(self.handle.stop(StopMode::Force));
                }
                Action::Report(notice) => self.report(&notice),
                Action::Answer(_)
                | Action::Restore(_)
                | Action::SendLoaded(_)
                | Action::GoLive(..) => unreachable!("those are a secondary's"),
            }
        }
        send
    }

    fn order(&self, order: Order) {
        if let Some(orders) = &*lock(&self.orders) {
            // It may have ended.
            drop(orders.send(order));
        }
    }

    fn ask(&self, term: Term) {
        let Some(core) = self.this.upgrade() else {
            return;
        };
        self.claims.ask(term, move |outcome| {
            core.event(PrimaryEvent::Claimed(term, outcome));
            core.pair.permit().wake();
        });
    }

    fn report(&self, notice: &Notice) {
        self.pair.report(notice);
        let mut status = self.pair.lock_status();
        match notice {
            Notice::Protected(_) => {
                status.protected = true;
                status.reason = "both copies run".into();
            }
            Notice::Alone(_) | Notice::Ended(_) => {
                status.protected = false;
                status.peer = None;
                if status.reason == "both copies run" {
                    status.reason = "the secondary was lost".into();
                }
            }
            Notice::Deciding(..) => {
                status.protected = false;
                status.reason = "the secondary is lost: the arbiter is asked".into();
            }
            Notice::HeardAgain => {
                status.protected = true;
                status.reason = "both copies run".into();
            }
            _ => {}
        }
    }
}

/// A guest that may be protected.
pub struct Guest {
    /// Its gates.
    pub pair: Arc<Pair>,
    /// It itself.
    pub handle: Handle,
    /// Its file, as `tandem run` takes it.
    pub description: String,
    /// What the threads that protect it may still do.
    pub confinement: Entry,
}

/// What is asked of a protector.
enum Request {
    Protect {
        to: Address,
        arbiter: PathBuf,
        answer: SyncSender<Result<(), String>>,
    },
    /// The guest has ended.
    End,
}

/// What all threads of a protector share.
struct Shared {
    /// The guest has ended.
    stop: AtomicBool,
    /// It is not to be protected any more.
    dismiss: AtomicBool,
    /// The secondary is to take over.
    leave: AtomicBool,
    core: Mutex<Option<Arc<Core>>>,
}

/// Protects a guest when it is asked to, for as long as the guest lives.
pub struct Protector {
    thread: JoinHandle<()>,
    desk: Desk,
}

/// Where protection is asked for. Cheap to clone.
#[derive(Clone)]
pub struct Desk {
    pair: Arc<Pair>,
    handle: Handle,
    shared: Arc<Shared>,
    requests: Sender<Request>,
}

impl Protector {
    /// Stands ready to protect `guest`, and begins with it if `protect` says how.
    ///
    /// # Errors
    /// When the host has no threads left.
    pub fn start(guest: Guest, protect: Option<Protect>) -> Result<Self, ProtectionError> {
        let shared = Arc::new(Shared {
            stop: AtomicBool::new(false),
            dismiss: AtomicBool::new(false),
            leave: AtomicBool::new(false),
            core: Mutex::new(None),
        });
        let (requests, incoming) = channel();
        let desk = Desk {
            pair: Arc::clone(&guest.pair),
            handle: guest.handle.clone(),
            shared: Arc::clone(&shared),
            requests,
        };
        let thread = std::thread::Builder::new()
            .name("protect".into())
            .stack_size(THREAD_STACK)
            .spawn(move || supervise(&guest, protect, &shared, &incoming))
            .map_err(ProtectionError::host("start the protecting thread"))?;
        Ok(Self { thread, desk })
    }

    /// Where protection is asked for.
    pub fn desk(&self) -> Desk {
        self.desk.clone()
    }

    /// The guest has ended: its last outputs are compared, and the secondary is told, unless it is to take
    /// over.
    pub fn finish(self) {
        let shared = &self.desk.shared;
        let core = lock(&shared.core).clone();
        if shared.leave.load(Ordering::SeqCst) {
            // The end of this process says the rest.
            return;
        }
        let deadline = Instant::now() + LAST_OUTPUTS;
        while self.desk.pair.holds() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        shared.stop.store(true, Ordering::SeqCst);
        if let Some(core) = core {
            core.event(PrimaryEvent::GuestEnded);
        }
        // It may have ended.
        drop(self.desk.requests.send(Request::End));
        // It may be in the middle of a checkpoint of a guest that is gone, and finds out.
        drop(self.thread.join());
    }
}

impl Desk {
    /// Protects the guest by who stands by at `to`; the directory `arbiter` decides who owns it. Returns when
    /// its term is won, or it cannot be.
    ///
    /// # Errors
    /// Why not, in words.
    pub fn protect(&self, to: Address, arbiter: PathBuf) -> Result<(), String> {
        let (answer, answered) = sync_channel(1);
        let gone = "the guest has ended".to_owned();
        if lock(&self.shared.core).is_some() {
            return Err("the guest is protected already, or is to be: see `tandem status`".into());
        }
        let request = Request::Protect {
            to,
            arbiter,
            answer,
        };
        self.requests.send(request).map_err(|_| gone.clone())?;
        answered.recv_timeout(ANSWER_TIMEOUT).map_err(|_| gone)?
    }

    /// Protects the guest no longer: its secondary is dismissed.
    ///
    /// # Errors
    /// When it is not protected.
    pub fn unprotect(&self) -> Result<(), String> {
        if lock(&self.shared.core).is_none() {
            return Err("the guest is not protected".into());
        }
        self.shared.dismiss.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Whether the secondary could take over now, and where it is.
    ///
    /// # Errors
    /// Why not.
    pub fn may_fail_over(&self) -> Result<String, String> {
        let state = lock(&self.shared.core).as_ref().map(|core| core.state());
        match state {
            Some(PrimaryState::Protected(_)) => {
                let peer = self.pair.status().peer;
                Ok(peer.unwrap_or_default())
            }
            Some(_) => Err(self.pair.status().reason),
            None => Err("the guest is not protected".into()),
        }
    }

    /// Ends the guest here, so that its secondary takes over.
    ///
    /// # Errors
    /// When it could not.
    pub fn fail_over(&self) -> Result<String, String> {
        let peer = self.may_fail_over()?;
        self.shared.leave.store(true, Ordering::SeqCst);
        if let Some(core) = &*lock(&self.shared.core) {
            core.leave();
        }
        self.pair.happened(
            "failing-over",
            format!("the secondary at {peer} is to take over"),
        );
        self.handle
            .stop(StopMode::Force)
            .map_err(|error| error.to_string())?;
        Ok(peer)
    }
}

/// Protects the guest whenever that is asked for, until it ends.
fn supervise(
    guest: &Guest,
    mut protect: Option<Protect>,
    shared: &Arc<Shared>,
    requests: &Receiver<Request>,
) {
    if let Err(error) = guest.confinement.enter() {
        tracing::error!(%error, "the protecting thread cannot be confined");
        return;
    }
    loop {
        if let Some(protect) = protect.take() {
            Driver::new(guest, protect, shared).run();
            *lock(&shared.core) = None;
        }
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        let Ok(Request::Protect {
            to,
            arbiter,
            answer,
        }) = requests.recv()
        else {
            return;
        };
        let opened = open(guest, to, &arbiter);
        let told = opened.map(|opened| protect = Some(opened));
        // Whoever asked may have stopped waiting.
        drop(answer.send(told.map_err(|error| causes(&error))));
    }
}

fn open(guest: &Guest, to: Address, arbiter: &Path) -> Result<Protect, ProtectionError> {
    let name = guest.pair.status().name;
    let claims = Claims::open(arbiter, &name)?;
    let term = claims.claim_next()?;
    let term = term.ok_or_else(|| ProtectionError::Garbled("that another won the guest".into()))?;
    Ok(Protect { to, claims, term })
}

struct Driver<'a> {
    core: Arc<Core>,
    to: Address,
    guest: &'a Guest,
    shared: Arc<Shared>,
}

/// A secondary that is connected.
struct Connected<'a> {
    session: Session<'a>,
    checkpoints: Link,
    /// Where the pages of a checkpoint are put together while the guest stands. It is used again: new memory
    /// costs more than the copy.
    staged: PageSender<Vec<u8>>,
    orders: Receiver<Order>,
    thread: JoinHandle<()>,
}

impl<'a> Driver<'a> {
    fn new(guest: &'a Guest, protect: Protect, shared: &Arc<Shared>) -> Self {
        let Protect { to, claims, term } = protect;
        let epoch = Epoch(guest.pair.epoch());
        let machine = pair::Primary::alone(term, epoch, Scheduling::Normal);
        let core = Arc::new_cyclic(|this| Core {
            this: this.clone(),
            pair: Arc::clone(&guest.pair),
            handle: guest.handle.clone(),
            claims,
            machine: Mutex::new(machine),
            orders: Mutex::new(None),
            link: Mutex::new(None),
            suspended: AtomicBool::new(false),
            left: AtomicBool::new(false),
        });
        shared.dismiss.store(false, Ordering::SeqCst);
        *lock(&shared.core) = Some(Arc::clone(&core));
        let mut status = guest.pair.lock_status();
        status.term = term.0;
        status.reason = "a secondary is looked for".into();
        drop(status);
        Self {
            core,
            to,
            guest,
            shared: Arc::clone(shared),
        }
    }

    /// Protects the guest until that is not wanted any more, or it ends.
    fn run(&self) {
        while !self.stopped() {
            match self.connect() {
                Ok(connected) => self.serve(connected),
                Err(error) => {
                    let why = causes(&error);
                    tracing::debug!(%why, "the guest is not protected yet");
                    self.core.pair.lock_status().reason = format!("no secondary: {why}");
                }
            }
            self.rest();
        }
        if self.dismissed() {
            let mut status = self.core.pair.lock_status();
            status.reason = "protection was ended".into();
            status.peer = None;
        }
    }

    fn dismissed(&self) -> bool {
        self.shared.dismiss.load(Ordering::SeqCst)
    }

    fn stopped(&self) -> bool {
        let over = matches!(
            self.core.state(),
            PrimaryState::Fenced | PrimaryState::Ended
        );
        over || self.dismissed() || self.shared.stop.load(Ordering::SeqCst)
    }

    fn rest(&self) {
        let until = Instant::now() + RETRY;
        while Instant::now() < until && !self.stopped() {
            std::thread::sleep(LOOK);
        }
    }

    fn connect(&self) -> Result<Connected<'_>, ProtectionError> {
        let core = &self.core;
        let mut checkpoints = self.to.connect()?;
        let session = Session::begin(&core.handle)?;
        let token = token();
        let offer = Offer {
            token,
            term: lock(&core.machine).term().0,
            hello: Hello {
                description: self.guest.description.clone(),
                hardware: session.saving().hardware.clone(),
            },
        };
        greet(&mut checkpoints, Purpose::Protection, &offer)?;
        expect(&mut checkpoints, FrameKind::Accept)?;
        let mut link = self.to.connect()?;
        greet(&mut link, Purpose::Pairing, &Greeting { token })?;
        let share = |link: &Link| {
            link.try_clone()
                .map_err(ProtectionError::host("share a connection"))
        };
        core.pair.outbox().connect(share(&link)?);
        *lock(&core.link) = Some(share(&checkpoints)?);
        let (tell, orders) = channel();
        *lock(&core.orders) = Some(tell);
        core.pair.lock_status().peer = Some(self.to.to_string());
        core.event(PrimaryEvent::Joined);
        let talking = Arc::clone(core);
        let thread = std::thread::Builder::new()
            .name("pair".into())
            .spawn(move || talk(&talking, &link))
            .map_err(ProtectionError::host("start the thread of a link"))?;
        Ok(Connected {
            staged: PageSender::new(Vec::new(), session.saving().clone()),
            session,
            checkpoints,
            orders,
            thread,
        })
    }

    /// Makes checkpoints until the secondary is lost or the guest is to end.
    fn serve(&self, mut connected: Connected<'_>) {
        let mut last = Instant::now();
        loop {
            match connected.orders.recv_timeout(LOOK) {
                Ok(Order::Resync(epoch, cause)) => {
                    if let Err(error) = self.checkpoint(&mut connected, epoch, cause) {
                        let why = causes(&error);
                        tracing::warn!(%epoch, %why, "a checkpoint failed");
                        self.core.pair.lock_status().reason = why;
                        self.core.event(PrimaryEvent::GivenUp);
                    }
                    last = Instant::now();
                }
                Ok(Order::Alone) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => self.look(&mut last),
            }
        }
        if let Some(link) = lock(&self.core.link).take() {
            link.shut_down();
        }
        *lock(&self.core.orders) = None;
        self.core.pair.permit().wake();
        drop(connected.thread.join());
    }

    /// Nothing is to be done for a while.
    fn look(&self, last: &mut Instant) {
        if self.dismissed() {
            self.core.event(PrimaryEvent::GivenUp);
            return;
        }
        let event = match self.core.state() {
            PrimaryState::Protected(_) if last.elapsed() >= CHECKPOINT_INTERVAL_MAX => {
                *last = Instant::now();
                PrimaryEvent::BoundReached
            }
            PrimaryState::Joining | PrimaryState::Resyncing(..)
                if last.elapsed() >= LOAD_TIMEOUT =>
            {
                self.core.pair.lock_status().reason =
                    ProtectionError::Slow(LOAD_TIMEOUT.as_secs()).to_string();
                PrimaryEvent::GivenUp
            }
            _ => return,
        };
        self.core.event(event);
    }

    /// Makes the secondary the same as the primary. A guest that was reset is copied whole.
    fn checkpoint(
        &self,
        connected: &mut Connected<'_>,
        epoch: Epoch,
        cause: Cause,
    ) -> Result<(), ProtectionError> {
        let copying = match cause {
            Cause::Join => Copying::All,
            _ => Copying::WhileMuch,
        };
        let mut made = self.try_checkpoint(connected, epoch, cause, copying);
        for _ in 0..RESETS_MAX {
            match made {
                Err(ProtectionError::Snapshot(SnapshotError::Reset)) => {}
                made => return made,
            }
            tracing::info!(%epoch, "the guest was reset: all of it is copied");
            match connected.session.begin_again() {
                // It may be reset again before long.
                Ok(()) => {
                    let saving = connected.session.saving().clone();
                    connected.staged = PageSender::new(Vec::new(), saving);
                    made = self.try_checkpoint(connected, epoch, cause, Copying::Nothing);
                }
                Err(error) => made = Err(error.into()),
            }
        }
        made
    }

    fn try_checkpoint(
        &self,
        connected: &mut Connected<'_>,
        epoch: Epoch,
        cause: Cause,
        copying: Copying,
    ) -> Result<(), ProtectionError> {
        let core = &self.core;
        let why = core.pair.mismatch();
        let Connected {
            session,
            checkpoints,
            staged,
            ..
        } = connected;
        let saving = session.saving().clone();
        if copying == Copying::All {
            let mut sender = PageSender::new(&mut *checkpoints, saving.clone());
            session.precopy(&mut sender, FIRST_STAND_BUDGET)?;
        }
        for _ in 0..ROUNDS_MAX {
            if copying == Copying::Nothing || session.pending()? <= STAGED_PAGES_MAX {
                break;
            }
            let mut sender = PageSender::new(&mut *checkpoints, saving.clone());
            session.copy_pending(&mut sender)?;
        }
        // A checkpoint that came to nothing may have left some.
        staged.sink().clear();
        let stopped = session.freeze(staged)?;
        if !core.event(PrimaryEvent::CutDone(epoch)) {
            // The secondary is gone meanwhile.
            session.thaw()?;
            return Ok(());
        }
        let mut cut = core.pair.cut(epoch.0, PATIENCE);
        let FreezeTimes { stop, quiesce, .. } = stopped.frozen.times;
        cut.age = (stopped.frozen.since + stop + quiesce).elapsed();
        core.pair.outbox().tell(Kind::Cut, 0, epoch.0);
        let stand = session.thaw()?;
        let pause = stand.until - stand.from;
        // The secondary takes the pages while the rest is put together.
        let pages = staged.sink();
        checkpoints.write_all(pages).map_err(frame::broken)?;
        let rest = encode_rest(&stopped.frozen.state, &cut)?;
        checkpoints.write_all(&rest).map_err(frame::broken)?;
        let bytes = pages.len() + rest.len();
        pages.clear();
        pages.shrink_to(STAGING_KEPT);
        if cause != Cause::Join {
            let why = why.unwrap_or_else(|| match cause {
                Cause::Mismatch => "the outputs before differed each time".into(),
                cause => format!("{cause:?}").to_lowercase(),
            });
            tracing::debug!(%epoch, %why, ?pause, pages = stopped.pages, "checkpoint");
            let mut status = core.pair.lock_status();
            status.resyncs += 1;
            status.last_resync = Some(why);
            status.pauses.add(pause);
            status.resync_pages += stopped.pages;
            status.resync_bytes += bytes as u64;
        }
        Ok(())
    }
}

/// Reads what the secondary says until it is gone for good.
fn talk(core: &Arc<Core>, link: &Link) {
    let mut talk = PrimaryTalk {
        core: Arc::clone(core),
        mismatch_in: None,
        eagerness: Eagerness::default(),
    };
    core.pair.permit().set_eager(false);
    let event = core.pair.permit().event();
    listen(link, core.pair.outbox(), event, &mut talk);
    link.shut_down();
}

/// What the primary does with what the secondary says.
struct PrimaryTalk {
    core: Arc<Core>,
    /// The epoch in which a mismatch was told.
    mismatch_in: Option<u64>,
    eagerness: Eagerness,
}

impl PrimaryTalk {
    fn look_at_gates(&mut self, now: Instant) {
        let pair = &self.core.pair;
        let called = pair.permit().take_call();
        if pair.deadline().is_some_and(|due| now >= due) {
            pair.expire(now);
        } else if !called {
            return;
        }
        if pair.mismatch().is_some() {
            self.differs();
        } else if self.eagerness.is_eager() && pair.waits() {
            self.hurry();
        }
        if called {
            self.core.event(PrimaryEvent::OutputsQueued);
        }
    }

    fn differs(&mut self) {
        let epoch = self.core.pair.epoch();
        if self.mismatch_in.replace(epoch) != Some(epoch) {
            self.eagerness.differed(self.core.pair.matched());
            self.resync();
        }
    }

    /// Outputs would differ: they are not waited for.
    fn hurry(&mut self) {
        let epoch = self.core.pair.epoch();
        if self.mismatch_in.replace(epoch) != Some(epoch) {
            self.eagerness.hurried(self.core.pair.matched());
            self.resync();
        }
    }

    fn resync(&self) {
        let permit = self.core.pair.permit();
        permit.set_eager(self.eagerness.is_eager());
        self.core.event(PrimaryEvent::Mismatch);
    }
}

impl Talk for PrimaryTalk {
    fn hear(&mut self, now: Instant, message: Message<'_>) -> Result<(), String> {
        let core = &self.core;
        let number = || message.number().map_err(|e| e.to_string());
        let differs = match message.kind {
            Kind::Output => core
                .pair
                .secondary_output(now, message.device, message.payload),
            Kind::ConsoleOutput => core.pair.secondary_console(now, message.payload),
            Kind::Loaded => {
                core.event(PrimaryEvent::Loaded(Epoch(number()?)));
                false
            }
            Kind::Answer => {
                core.event(PrimaryEvent::Answered(number()?));
                false
            }
            kind => return Err(format!("the secondary said {kind:?}")),
        };
        if differs {
            self.differs();
        }
        Ok(())
    }

    fn tick(&mut self, now: Instant) -> Option<Instant> {
        self.look_at_gates(now);
        let core = &self.core;
        core.pair.tell_committed();
        let due = lock(&core.machine).deadline();
        if due.is_some_and(|due| now >= due) {
            core.event(PrimaryEvent::Timer);
        }
        match core.state() {
            PrimaryState::Alone | PrimaryState::Fenced | PrimaryState::Ended => return None,
            _ => {}
        }
        let due = lock(&core.machine).deadline();
        let all = [due, core.pair.deadline()].into_iter().flatten().min();
        Some(all.unwrap_or(now + LOOK))
    }

    fn lost(&mut self, _now: Instant, error: &MessageError) {
        tracing::debug!(why = %causes(error), "the link ended");
        self.core.event(match error {
            MessageError::Closed => PrimaryEvent::LinkClosed,
            MessageError::Refused(_) | MessageError::Damaged | MessageError::Length { .. } => {
                PrimaryEvent::GivenUp
            }
            MessageError::Broken(_) => PrimaryEvent::LinkBroken,
        });
    }
}

/// A number that no other pair of connections has.
fn token() -> u128 {
    let part = || u128::from(RandomState::new().build_hasher().finish());
    part() << 64 | part()
}
