//! Where the protection of a guest is asked for, begun and ended.

use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use tandem_vmm::confinement::Entry;
use tandem_vmm::control::Handle;
use tandem_vmm::error::causes;

use super::asking::Claims;
use super::driver::Driver;
use super::moving::{Mover, Turn};
use super::primary::Core;
use super::standbys::Standbys;
use super::status::Role;
use super::{Pair, ProtectionError, lock};
use crate::arbiter::Term;
use crate::keeper::Keeper;
use crate::mode::{Mode, Wish};
use crate::pair::{PrimaryEvent, PrimaryState};

/// How long asking for protection may take: an arbiter's storage is slow at times.
const ANSWER_TIMEOUT: Duration = Duration::from_secs(60);
/// Stack of the thread that makes checkpoints, in bytes.
const THREAD_STACK: usize = 512 << 10;
/// How often it is looked what is to be kept of changed blocks, if nobody asks for it.
const CHANGES_LOOK: Duration = Duration::from_millis(500);
/// How long the last outputs may take to be compared when the guest has ended.
const LAST_OUTPUTS: Duration = Duration::from_millis(500);
/// How long the arbiter may take to say that the last outputs may leave without having been compared.
const LAST_ANSWER: Duration = Duration::from_secs(5);

/// What of a resync the guest waits for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum ResyncMode {
    /// Only for its state and the pages that are left to be copied.
    #[default]
    Running,
    /// For all of it, until the secondary runs too, which can ask for pages meanwhile: it keeps no second
    /// image of the guest.
    Stopped,
}

impl ResyncMode {
    /// The mode in a word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Running => "running",
            Self::Stopped => "stopped",
        }
    }
}

/// How a guest is to be protected.
pub struct Protect {
    /// Where standbys listen: there is one at least.
    pub to: Standbys,
    /// Who decides who owns the guest.
    pub claims: Claims,
    /// Number of this owner.
    pub term: Term,
    /// What of a resync it waits for.
    pub resync: ResyncMode,
    /// In which mode.
    pub wish: Wish,
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
    /// Who holds its taps too while it is protected.
    pub keeper: Option<Keeper>,
    /// Where one may wait, if there is none: who asks for protection can bring it along.
    pub keepers_place: PathBuf,
}

/// What is asked of a protector.
enum Request {
    Protect {
        to: Standbys,
        arbiter: PathBuf,
        resync: ResyncMode,
        wish: Wish,
        answer: SyncSender<Result<(), String>>,
    },
    /// The guest was a copy and is the guest now.
    Succeed(Box<Protect>),
    /// The guest has ended.
    End,
}

/// What all threads of a protector share.
pub(super) struct Shared {
    /// The guest has ended.
    pub(super) stop: AtomicBool,
    /// It is not to be protected any more.
    pub(super) dismiss: AtomicBool,
    pub(super) core: Mutex<Option<Arc<Core>>>,
    /// How it is protected, while it is or is to be.
    pub(super) plan: Mutex<Option<(Standbys, ResyncMode)>>,
    /// It is being moved to another process: no secondary joins.
    pub(super) moving: AtomicBool,
    /// Who moves it waits until no checkpoint is under way.
    pub(super) turn: Mutex<Option<Turn>>,
}

/// Protects a guest when it is asked to, for as long as the guest lives.
pub struct Protector {
    thread: JoinHandle<()>,
    desk: Desk,
}

/// Where protection is asked for. Cheap to clone.
#[derive(Clone)]
pub struct Desk {
    pub(super) pair: Arc<Pair>,
    pub(super) shared: Arc<Shared>,
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
            core: Mutex::new(None),
            plan: Mutex::new(None),
            moving: AtomicBool::new(false),
            turn: Mutex::new(None),
        });
        let (requests, incoming) = channel();
        let desk = Desk {
            pair: Arc::clone(&guest.pair),
            shared: Arc::clone(&shared),
            requests,
        };
        keep_changes(&guest)?;
        let thread = std::thread::Builder::new()
            .name("protect".into())
            .stack_size(THREAD_STACK)
            .spawn(move || supervise(guest, protect, &shared, &incoming))
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
        self.desk.pair.changed().end();
        let shared = &self.desk.shared;
        let core = lock(&shared.core).clone();
        if let Some(core) = &core
            && (core.has_left() || core.state() == PrimaryState::Fenced)
        {
            // The end of this process says the rest. Who has the guest may wait for that: it locks a shared disk.
            return;
        }
        let mut patience = LAST_OUTPUTS;
        if let Some(core) = &core
            && (self.desk.pair.modes().mode() == Mode::Checkpoint || self.desk.pair.disks_owe())
            && self.desk.pair.holds()
        {
            // No checkpoint of a guest that has ended lets its last outputs go: it does without its secondary.
            core.event(PrimaryEvent::GivenUp);
            patience = LAST_ANSWER;
        }
        let deadline = Instant::now() + patience;
        while self.desk.pair.holds() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        // Who else writes it out has ended.
        self.desk.pair.drain_console(LAST_OUTPUTS);
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
    /// Protects the guest by one who stands by at `to`; the directory `arbiter` decides who owns it. Returns when
    /// its term is won, or it cannot be.
    ///
    /// # Errors
    /// Why not, in words.
    pub fn protect(
        &self,
        to: Standbys,
        arbiter: PathBuf,
        resync: ResyncMode,
        wish: Wish,
    ) -> Result<(), String> {
        self.expect_owner()?;
        self.expect_store_fits(resync)?;
        let (answer, answered) = sync_channel(1);
        let gone = "the guest has ended".to_owned();
        // A protection that is about to end is waited for, as the request is: its guest is alone a moment before that.
        let ends = self.shared.dismiss.load(Ordering::SeqCst);
        if lock(&self.shared.core).is_some() && !ends {
            return Err("the guest is protected already, or is to be: see `tandem status`".into());
        }
        let request = Request::Protect {
            to,
            arbiter,
            resync,
            wish,
            answer,
        };
        self.requests.send(request).map_err(|_| gone.clone())?;
        answered.recv_timeout(ANSWER_TIMEOUT).map_err(|_| gone)?
    }

    /// The guest is not a copy any more: it is protected as `protect` says.
    pub(super) fn succeed(&self, protect: Protect) {
        // It may have ended.
        drop(self.requests.send(Request::Succeed(Box::new(protect))));
    }

    /// The pair's part in a move of the guest to another process, where it is protected as here.
    ///
    /// # Errors
    /// Why it cannot move.
    pub fn begin_move(&self) -> Result<Mover, String> {
        self.expect_owner()?;
        self.expect_no_store("moved: let `tandem resume` go on with it elsewhere")?;
        Mover::begin(self.clone())
    }

    /// A copy makes checkpoints for a store of an image that it keeps, and outputs wait for one of the two.
    fn expect_store_fits(&self, resync: ResyncMode) -> Result<(), String> {
        let status = self.pair.lock_status();
        match &status.checkpoints {
            Some(checkpoints) if checkpoints.commit => Err(
                "outputs of the guest wait for its store (--commit), and cannot wait for a copy too".into(),
            ),
            Some(_) if resync == ResyncMode::Stopped => Err(
                "the guest's checkpoints in a store would come from its copy, which needs --resync running for that".into(),
            ),
            _ => Ok(()),
        }
    }

    /// Whoever has a store's checkpoints of the guest could go on with it too.
    fn expect_no_store(&self, what: &str) -> Result<(), String> {
        match self.pair.lock_status().checkpoints {
            Some(_) => Err(format!(
                "the guest has checkpoints in a store, and cannot be {what}"
            )),
            None => Ok(()),
        }
    }

    /// What is asked for here is the owner's matter.
    ///
    /// # Errors
    /// That it is not the owner who is asked.
    pub fn expect_owner(&self) -> Result<(), String> {
        match self.pair.lock_status().role {
            Role::Primary => Ok(()),
            Role::Secondary => {
                Err("this is the guest's copy: ask where the guest itself runs".into())
            }
        }
    }

    /// Protects the guest in another mode, from the next checkpoint on, which is made at once if the mode is another.
    ///
    /// # Errors
    /// When it is not protected, nor to be.
    pub fn set_mode(&self, wish: Wish) -> Result<(), String> {
        self.expect_owner()?;
        if lock(&self.shared.core).is_none() {
            return Err("the guest is not protected".into());
        }
        let mut modes = self.pair.modes();
        if !modes.knows(wish) {
            return Err(format!(
                "the guest's secondary is of an older version and knows no mode but `{}`",
                Mode::Lockstep.name()
            ));
        }
        modes.ask(Instant::now(), wish);
        drop(modes);
        self.pair.permit().wake();
        Ok(())
    }

    /// What was asked of the guest's protection last.
    pub fn wish(&self) -> Wish {
        self.pair.modes().wish()
    }

    /// Protects the guest no longer: its secondary is dismissed.
    ///
    /// # Errors
    /// When it is not protected.
    pub fn unprotect(&self) -> Result<(), String> {
        self.expect_owner()?;
        if lock(&self.shared.core).is_none() {
            return Err("the guest is not protected".into());
        }
        self.shared.dismiss.store(true, Ordering::SeqCst);
        Ok(())
    }

    /// Makes the secondary the same as the guest once more.
    ///
    /// # Errors
    /// When no secondary runs.
    pub fn resync(&self) -> Result<(), String> {
        self.expect_owner()?;
        let core = lock(&self.shared.core);
        let Some(core) = core.as_ref() else {
            return Err("the guest is not protected".into());
        };
        match core.state() {
            PrimaryState::Protected(_) | PrimaryState::Resyncing(..) => {
                core.event(PrimaryEvent::ResyncDemanded);
                Ok(())
            }
            _ => Err(self.pair.status().reason),
        }
    }

    /// Whether the secondary could take over now, and where it is.
    ///
    /// # Errors
    /// Why not.
    pub fn may_fail_over(&self) -> Result<String, String> {
        self.expect_owner()?;
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
        let core = lock(&self.shared.core).clone();
        let core = core.ok_or("the guest is not protected")?;
        core.hand_over("asked for")
            .map_err(|error| error.to_string())?;
        Ok(peer)
    }
}

/// Begins to keep which regions of the guest's disks change, if that is wanted of any.
fn keep_changes(guest: &Guest) -> Result<(), ProtectionError> {
    if guest.pair.all_changes().next().is_none() {
        return Ok(());
    }
    let (pair, confinement) = (Arc::clone(&guest.pair), guest.confinement.clone());
    let keep = move || {
        if let Err(error) = confinement.enter() {
            // Writes to further regions wait from then on, as they would for a thread that hangs.
            tracing::error!(%error, "the thread that keeps changed blocks cannot be confined");
            return;
        }
        while pair.changed().wait(CHANGES_LOOK) {
            pair.all_changes().for_each(|changes| changes.look_after());
        }
    };
    std::thread::Builder::new()
        .name("changes".into())
        .stack_size(THREAD_STACK)
        .spawn(keep)
        .map(drop)
        .map_err(ProtectionError::host(
            "start the thread that keeps changed blocks",
        ))
}

/// Protects the guest whenever that is asked for, until it ends.
fn supervise(
    mut guest: Guest,
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
            Driver::new(&guest, protect, shared).run();
            *lock(&shared.core) = None;
            *lock(&shared.plan) = None;
            // From now on protection may be asked for anew.
            guest.pair.lock_status().trying = None;
        }
        if shared.stop.load(Ordering::SeqCst) {
            return;
        }
        let (to, arbiter, modes, answer) = match requests.recv() {
            Ok(Request::Protect {
                to,
                arbiter,
                resync,
                wish,
                answer,
            }) => (to, arbiter, (resync, wish), answer),
            Ok(Request::Succeed(succeeded)) => {
                protect = Some(*succeeded);
                continue;
            }
            Ok(Request::End) | Err(_) => return,
        };
        guest.find_keeper();
        let opened = open(&guest, to, &arbiter, modes);
        let told = opened.map(|opened| protect = Some(opened));
        // Whoever asked may have stopped waiting.
        drop(answer.send(told.map_err(|error| causes(&error))));
    }
}

impl Guest {
    /// Takes on the keeper that somebody brought along, unless there is one.
    fn find_keeper(&mut self) {
        if self.keeper.is_none() {
            let found = Keeper::meet(&self.keepers_place);
            self.keeper = found
                .inspect_err(|error| {
                    tracing::info!(%error, place = %self.keepers_place.display(), "no keeper of the guest's taps waits");
                })
                .ok();
        }
    }
}

fn open(
    guest: &Guest,
    to: Standbys,
    arbiter: &Path,
    (resync, wish): (ResyncMode, Wish),
) -> Result<Protect, ProtectionError> {
    let name = guest.pair.status().name;
    let claims = Claims::open(arbiter, &name)?;
    let term = claims.claim_next()?;
    let term = term.ok_or_else(|| ProtectionError::Garbled("that another won the guest".into()))?;
    Ok(Protect {
        to,
        claims,
        term,
        resync,
        wish,
    })
}
