//! The primary's threads: one that makes checkpoints, and one that reads what the secondary says.

use std::hash::{BuildHasher, Hasher, RandomState};
use std::io::Write;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tandem_vmm::confinement::Entry;
use tandem_vmm::control::{Handle, StopMode};
use tandem_vmm::migration::frame::{Kind as FrameKind, Purpose};
use tandem_vmm::migration::pages::PageSender;
use tandem_vmm::migration::{Address, Hello, Link};
use tandem_vmm::snapshot::save::Session;

use super::checkpoint::{Greeting, Offer, encode_rest, expect, greet};
use super::link_thread::{Talk, listen};
use super::{Pair, ProtectionError};
use crate::arbiter::{Arbiter, Claim, Owner, Term};
use crate::link::{Kind, Message, MessageError};

/// How long the copy of one side may stay behind the other with an output.
const PATIENCE: Duration = Duration::from_millis(50);
/// How long copying the last pages of the first checkpoint may take while the guest stands.
const FIRST_STAND_BUDGET: Duration = Duration::from_millis(5);
/// Pages that are copied while the guest runs before a checkpoint, if it wrote more than that.
const STAGED_PAGES_MAX: u64 = 16 << 10;
/// Longest time between checkpoints: what a secondary must undo stays little.
const CHECKPOINT_INTERVAL_MAX: Duration = Duration::from_secs(10);
/// How long the secondary may take to load a checkpoint.
const LOAD_TIMEOUT: Duration = Duration::from_secs(10);
/// Pause before a secondary that could not be reached is tried again.
const RETRY: Duration = Duration::from_secs(1);
/// How often a thread that waits looks whether it is to end.
const LOOK: Duration = Duration::from_millis(100);
/// Time between beats.
const BEAT: Duration = Duration::from_millis(10);
/// How long the last outputs may take to be compared when the guest has ended.
const LAST_OUTPUTS: Duration = Duration::from_millis(500);

/// What it takes to protect a guest.
pub struct Protect {
    /// The guest's name.
    pub name: String,
    /// The guest's file, as `tandem run` takes it.
    pub description: String,
    /// Where a standby listens.
    pub to: Address,
    /// Who decides who owns the guest.
    pub arbiter: Box<dyn Arbiter>,
    /// Who claims to own it.
    pub owner: Owner,
    /// Number of this owner.
    pub term: Term,
    /// What the threads may still do.
    pub confinement: Entry,
}

/// What the protecting thread is told.
enum Notice {
    /// The secondary runs on from the checkpoint of this epoch.
    Loaded(u64),
    /// In this epoch something did not match.
    Mismatch(u64, String),
    /// The secondary is gone.
    Lost(String),
}

/// Protects a guest for as long as it lives.
pub struct Protector {
    thread: JoinHandle<()>,
    stop: Arc<AtomicBool>,
    pair: Arc<Pair>,
}

impl Protector {
    /// Begins to protect the guest of `handle`, whose gates are `pair`'s.
    ///
    /// # Errors
    /// When the host has no threads left.
    pub fn start(
        pair: Arc<Pair>,
        handle: Handle,
        options: Protect,
    ) -> Result<Self, ProtectionError> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut driver = Driver {
            pair: Arc::clone(&pair),
            handle,
            options,
            stop: Arc::clone(&stop),
        };
        let thread = std::thread::Builder::new()
            .name("protect".into())
            .spawn(move || driver.run())
            .map_err(ProtectionError::host("start the protecting thread"))?;
        Ok(Self { thread, stop, pair })
    }

    /// The guest has ended: its last outputs are compared, and the secondary is told.
    pub fn finish(self) {
        let deadline = Instant::now() + LAST_OUTPUTS;
        while self.pair.holds() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
        self.stop.store(true, Ordering::SeqCst);
        self.pair.outbox().put(Kind::End, 0, &[]);
        self.pair.outbox().flush();
        // It may be in the middle of a checkpoint of a guest that is gone, and finds out.
        drop(self.thread.join());
    }
}

struct Driver {
    pair: Arc<Pair>,
    handle: Handle,
    options: Protect,
    stop: Arc<AtomicBool>,
}

/// A secondary that is connected.
struct Connected<'a> {
    session: Session<'a>,
    checkpoints: Link,
    notices: Receiver<Notice>,
    link_thread: Option<JoinHandle<()>>,
    link: Link,
}

impl Driver {
    fn run(&mut self) {
        if let Err(error) = self.options.confinement.enter() {
            tracing::error!(%error, "the protecting thread cannot be confined");
            return;
        }
        self.pair.lock_status().term = self.options.term.0;
        while !self.stopped() {
            let error = match self.protect() {
                Ok(()) => continue,
                Err(error) => error,
            };
            if self.stopped() {
                return;
            }
            if !self.go_on_alone(&error) {
                return;
            }
            self.rest();
        }
    }

    fn stopped(&self) -> bool {
        self.stop.load(Ordering::SeqCst)
    }

    fn rest(&self) {
        let until = Instant::now() + RETRY;
        while Instant::now() < until && !self.stopped() {
            std::thread::sleep(LOOK);
        }
    }

    /// The guest is not protected. If it was, the arbiter is asked whether it may go on alone; false if not.
    fn go_on_alone(&mut self, why: &ProtectionError) -> bool {
        let why = tandem_vmm::error::causes(why);
        let was = self.pair.lock_status().protected;
        if was {
            tracing::warn!(%why, "the secondary is lost");
            if !self.claim_next_term() {
                return false;
            }
        } else {
            tracing::debug!(%why, "the guest is not protected yet");
        }
        self.pair.open();
        let mut status = self.pair.lock_status();
        status.protected = false;
        status.reason = why;
        status.peer = None;
        true
    }

    /// Asks until there is an answer: outputs are held meanwhile.
    fn claim_next_term(&mut self) -> bool {
        let next = Term(self.options.term.0 + 1);
        loop {
            match self
                .options
                .arbiter
                .claim(&self.options.name, next, &self.options.owner)
            {
                Ok(Claim::Won) => {
                    self.options.term = next;
                    self.pair.lock_status().term = next.0;
                    return true;
                }
                Ok(Claim::Lost(owner)) => {
                    tracing::error!(?owner, "another owns the guest now: it ends here");
                    self.fence();
                    return false;
                }
                Err(error) => {
                    tracing::error!(%error, "the arbiter does not answer: outputs are held");
                    if self.stopped() {
                        return false;
                    }
                    std::thread::sleep(LOOK);
                }
            }
        }
    }

    fn fence(&self) {
        self.pair.lock_status().reason = "another owns the guest now".into();
        // It has ended by itself then.
        drop(self.handle.stop(StopMode::Force));
    }

    /// Protects the guest until something fails or it is to end.
    fn protect(&self) -> Result<(), ProtectionError> {
        let mut connected = self.connect()?;
        let result = self.serve(&mut connected);
        connected.link.shut_down();
        connected.checkpoints.shut_down();
        if let Some(thread) = connected.link_thread.take() {
            drop(thread.join());
        }
        result
    }

    fn connect(&self) -> Result<Connected<'_>, ProtectionError> {
        let mut checkpoints = self.options.to.connect()?;
        let session = Session::begin(&self.handle)?;
        let token = token();
        let offer = Offer {
            token,
            term: self.options.term.0,
            hello: Hello {
                description: self.options.description.clone(),
                hardware: session.saving().hardware.clone(),
            },
        };
        greet(&mut checkpoints, Purpose::Protection, &offer)?;
        expect(&mut checkpoints, FrameKind::Accept)?;
        let mut link = self.options.to.connect()?;
        greet(&mut link, Purpose::Pairing, &Greeting { token })?;
        let (tell, notices) = channel();
        let outbox = link
            .try_clone()
            .map_err(ProtectionError::host("share a connection"))?;
        self.pair.outbox().connect(outbox);
        let heard = link
            .try_clone()
            .map_err(ProtectionError::host("share a connection"))?;
        let pair = Arc::clone(&self.pair);
        let thread = std::thread::Builder::new()
            .name("pair".into())
            .spawn(move || {
                let mut talk = PrimaryTalk::new(Arc::clone(&pair), tell.clone());
                let why = listen(&heard, pair.outbox(), &mut talk);
                // The protecting thread may have ended.
                drop(tell.send(Notice::Lost(why)));
            })
            .map_err(ProtectionError::host("start the thread of a link"))?;
        Ok(Connected {
            session,
            checkpoints,
            notices,
            link_thread: Some(thread),
            link,
        })
    }

    fn serve(&self, connected: &mut Connected<'_>) -> Result<(), ProtectionError> {
        let saving = connected.session.saving().clone();
        let mut sender = PageSender::new(&mut connected.checkpoints, saving);
        connected.session.precopy(&mut sender, FIRST_STAND_BUDGET)?;
        self.checkpoint(connected, None)?;
        {
            let mut status = self.pair.lock_status();
            status.protected = true;
            status.reason = "both copies run".into();
            status.peer = Some(self.options.to.to_string());
        }
        tracing::info!(peer = %self.options.to, "the guest is protected");
        let mut last = Instant::now();
        while !self.stopped() {
            let cause = match connected.notices.recv_timeout(LOOK) {
                Ok(Notice::Mismatch(epoch, cause)) if epoch == self.pair.epoch() => cause,
                Ok(Notice::Mismatch(..) | Notice::Loaded(_)) => continue,
                Ok(Notice::Lost(why)) => return Err(lost(why)),
                Err(RecvTimeoutError::Disconnected) => return Err(lost("the link ended".into())),
                Err(RecvTimeoutError::Timeout) if last.elapsed() >= CHECKPOINT_INTERVAL_MAX => {
                    "time".into()
                }
                Err(RecvTimeoutError::Timeout) => continue,
            };
            self.checkpoint(connected, Some(cause))?;
            last = Instant::now();
        }
        Ok(())
    }

    /// Makes the secondary the same as the primary.
    fn checkpoint(
        &self,
        connected: &mut Connected<'_>,
        cause: Option<String>,
    ) -> Result<(), ProtectionError> {
        let saving = connected.session.saving().clone();
        while cause.is_some() && connected.session.pending()? > STAGED_PAGES_MAX {
            let mut sender = PageSender::new(&mut connected.checkpoints, saving.clone());
            connected.session.copy_pending(&mut sender)?;
        }
        let mut staged = PageSender::new(Vec::new(), saving);
        let stopped = connected.session.freeze(&mut staged)?;
        let epoch = self.pair.epoch() + 1;
        let cut = self.pair.cut(epoch, PATIENCE);
        self.pair.outbox().tell(Kind::Cut, 0, epoch);
        let cut_at = Instant::now();
        let stand = connected.session.thaw()?;
        let pause = stand.until - stand.from;
        let rest = encode_rest(&stopped.frozen.state, &cut)?;
        let staged = staged.into_inner();
        connected
            .checkpoints
            .write_all(&staged)
            .and_then(|()| connected.checkpoints.write_all(&rest))
            .map_err(tandem_vmm::migration::frame::broken)?;
        self.wait_loaded(connected, epoch)?;
        let mut status = self.pair.lock_status();
        if let Some(cause) = cause {
            tracing::debug!(epoch, %cause, ?pause, pages = stopped.pages, "resynchronised");
            status.resyncs += 1;
            status.last_resync = Some(cause);
            status.pauses.add(pause);
            status.resync_times.add(cut_at.elapsed());
            status.resync_pages += stopped.pages;
            status.resync_bytes += (staged.len() + rest.len()) as u64;
        }
        Ok(())
    }

    fn wait_loaded(&self, connected: &Connected<'_>, epoch: u64) -> Result<(), ProtectionError> {
        let deadline = Instant::now() + LOAD_TIMEOUT;
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match connected.notices.recv_timeout(left) {
                Ok(Notice::Loaded(loaded)) if loaded == epoch => return Ok(()),
                // Of the epoch before.
                Ok(Notice::Mismatch(..)) => {}
                Ok(Notice::Loaded(other)) => {
                    let what = format!("that checkpoint {other} is loaded, not {epoch}");
                    return Err(ProtectionError::Garbled(what));
                }
                Ok(Notice::Lost(why)) => return Err(lost(why)),
                Err(_) => return Err(ProtectionError::Slow(LOAD_TIMEOUT.as_secs())),
            }
        }
    }
}

fn lost(why: String) -> ProtectionError {
    ProtectionError::Host {
        action: "hear the secondary",
        source: std::io::Error::other(why),
    }
}

/// What the primary does with what the secondary says.
struct PrimaryTalk {
    pair: Arc<Pair>,
    tell: Sender<Notice>,
    /// The epoch whose mismatch was told.
    told: Option<u64>,
    beat: u64,
    next_beat: Instant,
}

impl PrimaryTalk {
    fn new(pair: Arc<Pair>, tell: Sender<Notice>) -> Self {
        Self {
            pair,
            tell,
            told: None,
            beat: 0,
            next_beat: Instant::now(),
        }
    }

    fn notice(&self, notice: Notice) -> Result<(), String> {
        self.tell
            .send(notice)
            .map_err(|_| "the guest is not protected any more".into())
    }

    fn differs(&mut self, cause: Option<String>) -> Result<(), String> {
        let epoch = self.pair.epoch();
        match cause.filter(|_| self.told != Some(epoch)) {
            Some(cause) => {
                self.told = Some(epoch);
                self.notice(Notice::Mismatch(epoch, cause))
            }
            None => Ok(()),
        }
    }
}

impl Talk for PrimaryTalk {
    type End = String;

    fn hear(&mut self, now: Instant, message: Message<'_>) -> Result<(), String> {
        let number = || message.number().map_err(|e| e.to_string());
        match message.kind {
            Kind::Output => {
                let cause = self
                    .pair
                    .secondary_output(now, message.device, message.payload);
                self.differs(cause)
            }
            Kind::ConsoleOutput => {
                let cause = self.pair.secondary_console(now, message.payload);
                self.differs(cause)
            }
            Kind::Loaded => {
                // Before anything that the secondary says next, which is of the new epoch.
                let epoch = number()?;
                self.pair.commit(epoch)?;
                self.notice(Notice::Loaded(epoch))
            }
            Kind::Answer => Ok(()),
            kind => Err(format!("the secondary said {kind:?}")),
        }
    }

    fn tick(&mut self, now: Instant) -> Result<Option<Instant>, String> {
        if now >= self.next_beat {
            self.beat += 1;
            self.next_beat = now + BEAT;
            self.pair
                .outbox()
                .put(Kind::Beat, 0, &self.beat.to_le_bytes());
        }
        let due = self.pair.deadline();
        if due.is_some_and(|due| now >= due) {
            let cause = self.pair.expire(now);
            self.differs(cause)?;
        }
        Ok(Some(
            due.map_or(self.next_beat, |due| due.min(self.next_beat)),
        ))
    }

    fn lost(&mut self, error: MessageError) -> String {
        error.to_string()
    }
}

/// A number that no other pair of connections has.
fn token() -> u128 {
    let part = || u128::from(RandomState::new().build_hasher().finish());
    part() << 64 | part()
}
