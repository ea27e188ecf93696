//! The thread that makes checkpoints of a primary's guest: it connects to a standby, sends all of the guest, and
//! then what changed, whenever the roles ask for it.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tandem_devices::GuestMemory;
use tandem_vmm::control::ControlError;
use tandem_vmm::error::causes;
use tandem_vmm::migration::frame::Purpose;
use tandem_vmm::migration::{Hello, Link, Route};
use tandem_vmm::snapshot::SnapshotError;
use tandem_vmm::snapshot::save::Session;

use super::checkpoint::Offer;
use super::copying::{self, Copied};
use super::inviting::{self, carry, entrust, invite};
use super::owed::{self, Debtor};
use super::pacing::Paced;
use super::paths;
use super::primary::{Core, Order, talk};
use super::protector::{Guest, Protect, ResyncMode, Shared};
use super::retry::{Attempt, Retry};
use super::standbys::Standbys;
use super::wanted::give;
use super::{ProtectionError, lock};
use crate::delta::{Ahead, Encoder, Staging};
use crate::mirror::bitmap::Told;
use crate::mirror::{self, DISK_MAX, Grain, Image};
use crate::mode::Mode;
use crate::pair::{Cause, Epoch, PrimaryEvent, PrimaryState};

mod making;

use making::Copying;

/// Longest time between checkpoints: what a secondary must undo stays little.
const CHECKPOINT_INTERVAL_MAX: Duration = Duration::from_secs(10);
/// The same while the secondary stands: what the guest did since is done again after a takeover, unseen as it was.
const STANDING_INTERVAL_MAX: Duration = Duration::from_secs(1);
/// Bytes of disks that may be written between checkpoints: all are read and compared then.
const WRITTEN_MAX: u64 = 1 << 30;
/// How long the secondary may take to load a checkpoint, if what it does meanwhile is not known (see [`super::loading`]).
const LOAD_TIMEOUT: Duration = Duration::from_secs(10);
/// How often a thread that waits looks whether it is to end.
const LOOK: Duration = Duration::from_millis(100);

/// How often it is looked whether the guest wrote much since the last checkpoint.
const ROLLING_INTERVAL: Duration = Duration::from_secs(1);
/// Pages that it may have written until they are copied while it runs: copying them takes 4 ms or so while it
/// stands.
const ROLLING_PAGES: u64 = 4 << 10;
/// How often it is looked whether a guest that is being moved still is.
const MOVING_LOOK: Duration = Duration::from_millis(5);
/// How often a guest that stands until its secondary has loaded a checkpoint is looked after.
const LOADED_LOOK: Duration = Duration::from_micros(50);

pub(super) struct Driver<'a> {
    pub(super) core: Arc<Core>,
    standbys: Standbys,
    mode: ResyncMode,
    guest: &'a Guest,
    pub(super) shared: Arc<Shared>,
}

/// A secondary that is connected.
struct Connected<'a> {
    session: Session<'a>,
    checkpoints: Paced,
    /// Where the pages of a checkpoint are kept while the guest stands. It is used again: new memory costs
    /// more than the copy.
    staged: Staging,
    encoder: Encoder,
    /// Disks that the guest may write to.
    images: Vec<Image>,
    /// The number of this pair of connections.
    token: u128,
    /// How it knows what of its replicas differs.
    grain: Grain,
    /// What the secondary said of its replicas, if it knows of bases.
    told: Option<Vec<Told>>,
    /// When the disks were made those of a base last.
    based: Instant,
    orders: Receiver<Order>,
    thread: JoinHandle<()>,
    /// Where there are two.
    paths: Option<paths::Told>,
}

impl Connected<'_> {
    /// Lets go of what else than the guest has its disks and taps. How many save the guest meanwhile.
    fn let_go(&mut self, guest: &Guest) -> usize {
        self.images.clear();
        if let Some(keeper) = &guest.keeper {
            keeper.release();
        }
        1
    }

    /// Says what memory it takes.
    fn count_memory(&self, core: &Core) {
        let bytes = self.staged.batch().memory_bytes() + self.encoder.memory_bytes();
        core.pair.set_checkpoint_memory(bytes);
    }
}

impl<'a> Driver<'a> {
    pub(super) fn new(guest: &'a Guest, protect: Protect, shared: &Arc<Shared>) -> Self {
        let Protect {
            to: standbys,
            claims,
            term,
            resync: mode,
            wish,
        } = protect;
        let pair = Arc::clone(&guest.pair);
        let core = Core::alone(pair, guest.handle.clone(), claims, term);
        shared.dismiss.store(false, Ordering::SeqCst);
        *lock(&shared.plan) = Some((standbys.clone(), mode));
        *lock(&shared.core) = Some(Arc::clone(&core));
        guest.pair.modes().ask(Instant::now(), wish);
        let mut status = guest.pair.lock_status();
        status.term = term.0;
        status.resync = mode.name().into();
        status.reason = "a secondary is looked for".into();
        drop(status);
        Self {
            core,
            standbys,
            mode,
            guest,
            shared: Arc::clone(shared),
        }
    }

    /// Protects the guest until that is not wanted any more, or it ends.
    pub(super) fn run(&self) {
        let others = self.standbys.others();
        let mut retry = Retry::new(others.len());
        while !self.stopped() && !others.is_empty() {
            let attempt = retry.next(chance());
            let (number, place) = &others[attempt.place];
            if !self.rest_before(attempt, place) {
                break;
            }
            if let Some(lasted) = self.try_standby(*number, place) {
                retry.ended_after(lasted);
            }
        }
        if self.dismissed() {
            let mut status = self.core.pair.lock_status();
            status.reason = "protection was ended".into();
            status.peer = None;
        }
    }

    /// Protects the guest by who stands by at `place`. How long that lasted, if it came about.
    fn try_standby(&self, number: usize, place: &Route) -> Option<Duration> {
        let pair = &self.core.pair;
        match self.connect(number, place) {
            Ok(connected) => {
                pair.happened("joined", format!("a secondary at {place} joined"));
                let joined = Instant::now();
                self.serve(connected);
                if !self.stopped() {
                    pair.happened("lost", format!("the secondary at {place} is lost"));
                }
                Some(joined.elapsed())
            }
            Err(error) => {
                let why = causes(&error);
                tracing::debug!(%place, %why, "the guest is not protected yet");
                pair.lock_status().reason = format!("no secondary: {why}");
                None
            }
        }
    }

    fn dismissed(&self) -> bool {
        self.shared.dismiss.load(Ordering::SeqCst)
    }

    /// Whether the guest has ended, or is another's.
    fn is_over(&self) -> bool {
        let over = [PrimaryState::Fenced, PrimaryState::Ended];
        over.contains(&self.core.state())
    }

    fn stopped(&self) -> bool {
        self.is_over() || self.dismissed() || self.shared.stop.load(Ordering::SeqCst)
    }

    /// Waits until `place` is to be tried. False if it is not to be any more.
    fn rest_before(&self, attempt: Attempt, place: &Route) -> bool {
        let until = Instant::now() + attempt.pause;
        let pair = &self.core.pair;
        pair.lock_status().trying = Some((place.to_string(), until));
        if attempt.round == 0 {
            pair.happened("trying", format!("a secondary is looked for at {place}"));
        }
        while !self.stopped() {
            self.stand_aside(&mut || 0);
            let left = until.saturating_duration_since(Instant::now());
            match self.shared.moves() {
                true => std::thread::sleep(MOVING_LOOK),
                false if left.is_zero() => return true,
                false => std::thread::sleep(left.min(LOOK)),
            }
        }
        false
    }

    /// What there is to say to the standby of this number, which is at `to`.
    fn offer(
        &self,
        number: usize,
        to: &Route,
        images: &[Image],
        session: &Session<'_>,
    ) -> Result<Offer, ProtectionError> {
        let core = &self.core;
        let (standbys, here) = self.standbys.tell(number);
        Ok(Offer {
            token: token(),
            keeper: self.guest.keeper.is_some(),
            disks: images
                .iter()
                .map(|image| (image.disk, image.bytes()))
                .collect(),
            shared: core.pair.shared_offers()?,
            term: core.term().0,
            standbys,
            here,
            mode: self.mode,
            modes: Some(core.pair.modes().wish()),
            bases: Some(core.pair.bases()),
            store: core.pair.stored().cloned(),
            paced: true,
            heard: true,
            path: to.second().map(|_| 0),
            sectors: true,
            hello: Hello {
                description: self.guest.description.clone(),
                hardware: session.saving().hardware.clone(),
                company: None,
            },
        })
    }

    fn connect(&self, number: usize, to: &Route) -> Result<Connected<'_>, ProtectionError> {
        let core = &self.core;
        let images = core.pair.images();
        if let Some(image) = images.iter().find(|image| image.bytes() > DISK_MAX) {
            let (disk, bytes) = (image.disk, image.bytes());
            let why = format!(
                "disk {disk} has {bytes} bytes; those of a protected guest have at most {DISK_MAX}"
            );
            return Err(ProtectionError::Disk(why));
        }
        let session = Session::begin(&core.handle)?;
        let mut offer = self.offer(number, to, &images, &session)?;
        let token = offer.token;
        let (way, mut checkpoints) = invite(to, &mut offer)?;
        let told = offer.bases.is_some();
        let told = told.then(|| copying::hear(&mut checkpoints, &images));
        let told = told.transpose()?;
        core.pair.modes().joined(offer.modes.is_some());
        core.pair.set_seed(token as u64);
        let link = inviting::connect(way, token, Purpose::Pairing)?;
        if let Some(keeper) = &self.guest.keeper {
            entrust(&core.pair, keeper, way, token)?;
        }
        let (link, checkpoints, paths) = carry(&core.pair, to, &offer, link, checkpoints)?;
        let share = |link: &Link| {
            link.try_clone()
                .map_err(ProtectionError::host("share a connection"))
        };
        let shared = (share(&link)?, share(&checkpoints)?);
        let flow = offer.paced.then_some(&core.flow);
        let (checkpoints, flowing) = Paced::new(checkpoints, flow);
        let (begin, begins) = channel();
        let talking = Arc::clone(core);
        let thread = std::thread::Builder::new()
            .name("pair".into())
            .spawn(move || {
                if let Ok(link) = begins.recv() {
                    talk(&talking, &link);
                }
                // Nobody says any more what was taken.
                drop(flowing);
            })
            .map_err(ProtectionError::host("start the thread of a link"))?;
        // Nothing fails from here on.
        core.pair.outbox().connect(shared.0, offer.heard);
        *lock(&core.link) = Some(shared.1);
        let (tell, orders) = channel();
        *lock(&core.orders) = Some(tell);
        {
            let mut status = core.pair.lock_status();
            status.peer = Some(to.to_string());
            status.trying = None;
        }
        core.pair.joined();
        core.joined();
        drop(begin.send(link));
        Ok(Connected {
            staged: Staging::new(Arc::clone(&session.saving().memory)),
            encoder: Encoder::default(),
            session,
            checkpoints,
            images,
            token,
            grain: offer.grain(),
            told,
            based: Instant::now(),
            orders,
            thread,
            paths,
        })
    }

    /// Makes checkpoints until the secondary is lost or the guest is to end, and lets go of the secondary.
    fn serve(&self, mut connected: Connected<'_>) {
        // It may have ended while the secondary joined: no orders come then.
        if !self.is_over() {
            self.obey(&mut connected);
        }
        self.core.pair.set_checkpoint_memory(0);
        drop(connected.paths);
        if let Some(link) = lock(&self.core.link).take() {
            link.shut_down();
        }
        if let Some(keeper) = &self.guest.keeper {
            keeper.release();
        }
        *lock(&self.core.orders) = None;
        self.core.pair.permit().wake();
        drop(connected.thread.join());
        self.pay();
    }

    /// Carries out orders, until one says that the guest is alone.
    fn obey(&self, connected: &mut Connected<'_>) {
        let mut last = Instant::now();
        let mut rolled = last;
        loop {
            while self.shared.has_turn() && !self.stopped() {
                self.stand_aside(&mut || connected.let_go(self.guest));
            }
            match connected.orders.recv_timeout(LOOK) {
                Ok(Order::Look) => {}
                Ok(Order::Resync(epoch, cause)) => {
                    if let Err(error) = self.checkpoint(connected, epoch, cause) {
                        let why = causes(&error);
                        tracing::warn!(%epoch, %why, "a checkpoint failed");
                        self.core.pair.lock_status().reason = why;
                        self.core.event(PrimaryEvent::GivenUp);
                    }
                    last = Instant::now();
                    connected.count_memory(&self.core);
                    // Orders may come without a pause.
                    self.look(&mut last);
                }
                Ok(Order::Write) => self.core.pair.write_covered(|| self.may_own()),
                Ok(Order::Alone) | Err(RecvTimeoutError::Disconnected) => break,
                Err(RecvTimeoutError::Timeout) => {
                    self.look(&mut last);
                    if rolled.elapsed() >= ROLLING_INTERVAL {
                        self.roll(connected);
                        connected.count_memory(&self.core);
                        rolled = Instant::now();
                    }
                }
            }
        }
    }

    /// Tries again to write what the guest was told is written, if it is alone and that could not be.
    fn pay(&self) {
        let pair = &self.core.pair;
        if self.core.state() == PrimaryState::Alone && pair.disks_owe() {
            owed::pay(pair, self, || pair.open_outputs());
        }
    }

    /// Whether the guest may be this one's, with a secondary.
    fn may_own(&self) -> bool {
        let over = [
            PrimaryState::Alone,
            PrimaryState::Fenced,
            PrimaryState::Ended,
        ];
        !over.contains(&self.core.state()) && !self.core.has_left()
    }

    /// Copies what the guest wrote since the last checkpoint, if that is much: the next one is short then.
    fn roll(&self, connected: &mut Connected<'_>) {
        // A secondary that only stages would have to keep them until the next one.
        let staged = self.mode == ResyncMode::Stopped;
        if staged || !matches!(self.core.state(), PrimaryState::Protected(_)) {
            return;
        }
        let Connected {
            session,
            checkpoints,
            encoder,
            ..
        } = connected;
        let memory = Arc::clone(&session.saving().memory);
        let mut ahead = Ahead::new(encoder, memory, checkpoints);
        let rolled = match session.pending() {
            Ok(pages) if pages > ROLLING_PAGES => session.copy_pending(&mut ahead).map(drop),
            other => other.map(drop),
        };
        let (pages, bytes) = (ahead.pages, ahead.bytes);
        self.core.pair.lock_status().count_sent(pages, bytes, 0);
        if let Err(error) = rolled {
            // The next checkpoint finds out what it means.
            tracing::debug!(why = %causes(&error), "pages could not be copied ahead");
            encoder.forget();
        }
    }

    /// Gives the secondary what it asks for of the guest, which stands; returns the bytes that were sent.
    fn give(
        &self,
        link: &mut Paced,
        encoder: &mut Encoder,
        memory: &Arc<GuestMemory>,
    ) -> Result<u64, ProtectionError> {
        let waits = || {
            let state = self.core.state();
            // A copy that is to stand may say that it has all before it is heard here that it wants no more.
            let wanted = matches!(
                state,
                PrimaryState::Resyncing(..)
                    | PrimaryState::Deciding(..)
                    | PrimaryState::Protected(_)
            );
            wanted && !self.dismissed()
        };
        give(link, encoder, memory, Instant::now() + LOAD_TIMEOUT, &waits)
    }

    /// Waits until the secondary has loaded the checkpoint that was sent, or is lost.
    fn wait_loaded(&self) {
        let deadline = Instant::now() + LOAD_TIMEOUT;
        let loads = || {
            let state = self.core.state();
            matches!(state, PrimaryState::Joining | PrimaryState::Resyncing(..))
        };
        while loads() && Instant::now() < deadline {
            std::thread::sleep(LOADED_LOOK);
        }
    }

    /// Longest time between checkpoints.
    fn interval_max(&self) -> Duration {
        match self.core.pair.modes().mode() {
            Mode::Lockstep => CHECKPOINT_INTERVAL_MAX,
            Mode::Checkpoint => STANDING_INTERVAL_MAX,
        }
    }

    /// Nothing is to be done for a while.
    fn look(&self, last: &mut Instant) {
        if self.dismissed() {
            self.core.event(PrimaryEvent::GivenUp);
            return;
        }
        let event = match self.core.state() {
            PrimaryState::Protected(_)
                if last.elapsed() >= self.interval_max()
                    || self.core.pair.bytes_written() > WRITTEN_MAX =>
            {
                *last = Instant::now();
                PrimaryEvent::BoundReached
            }
            PrimaryState::Joining | PrimaryState::Resyncing(..)
                if last.elapsed() >= LOAD_TIMEOUT =>
            {
                self.core.pair.lock_status().reason =
                    ProtectionError::Slow(LOAD_TIMEOUT).to_string();
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
            Cause::Join => {
                self.copy_disks(connected)?;
                Copying::All
            }
            _ => Copying::WhileMuch,
        };
        match self.try_checkpoint(connected, epoch, cause, copying) {
            Err(ProtectionError::Snapshot(SnapshotError::Reset)) => {}
            made => {
                if made.is_err() {
                    connected.encoder.forget();
                }
                return made;
            }
        }
        tracing::info!(%epoch, "the guest was reset: all of it is copied");
        let frozen = Box::new(connected.session.begin_again()?);
        connected.encoder.forget();
        connected.staged = Staging::new(Arc::clone(&connected.session.saving().memory));
        self.try_checkpoint(connected, epoch, cause, Copying::Standing(frozen))
    }

    /// Makes the secondary's replicas of disks what the guest's are, but for what it writes meanwhile.
    fn copy_disks(&self, connected: &mut Connected<'_>) -> Result<(), ProtectionError> {
        let Connected {
            checkpoints,
            images,
            token,
            grain,
            told,
            ..
        } = connected;
        self.core.pair.track_disks();
        let plan = copying::begin(
            &self.core.pair,
            checkpoints,
            images,
            *token,
            told.as_deref(),
        )?;
        let mut copied = Copied::new(&self.core.pair, images, &plan);
        for (image, regions) in images.iter().zip(&plan) {
            let mut parts = mirror::parts_of(image, regions).peekable();
            while parts.peek().is_some() {
                if self.stopped() || self.core.state() != PrimaryState::Joining {
                    return Err(ControlError::Gone.into());
                }
                let window = parts.by_ref().take(mirror::WINDOW);
                let alike = (*token as u64, *grain);
                let traffic = mirror::reconcile(checkpoints, images, alike, window, || true)?;
                copied.add(traffic);
            }
        }
        copied.end();
        Ok(())
    }
}

impl Debtor for Driver<'_> {
    fn lives(&self) -> bool {
        !self.shared.stop.load(Ordering::SeqCst)
    }

    fn stand(&self) {
        // It may have ended.
        drop(self.core.handle.halt());
    }

    fn run_on(&self) {
        drop(self.core.handle.resume());
    }
}

/// A number that no other pair of connections has.
fn token() -> u128 {
    u128::from(random()) << 64 | u128::from(random())
}

/// A number for [`Retry::next`].
fn chance() -> u32 {
    random() as u32
}

fn random() -> u64 {
    RandomState::new().build_hasher().finish()
}
