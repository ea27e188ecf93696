//! Checkpoints of a guest that runs, one after the other, into a store.
//!
//! ```text
//!   guest     runs ............................ stands | runs ..................................
//!   capture   pages that were written, in rounds | rest | hands over the rest   waits   | rests
//!   upload    ---- packs ----------------------- packs ------------- table, manifest ---|
//!   outputs   leave at once; with `commit`: wait ........................................| leave
//! ```
//!
//! One thread captures (`checkpoint`), one uploads (`store-upload`). Writes of the guest are followed for as long as
//! there are checkpoints, so each hands over what was written since the last one that is complete. The guest
//! stands as long as for a resync: for its state, and the few pages that are left. What is on its way is bounded,
//! and whoever waits for the store is the thread that captures: a slow store makes checkpoints rarer.
//!
//! One that fails is made again, with all of its pages, less often the longer that lasts; the guest runs on. Who is
//! told that another owns the guest ends it here: two live copies would be worse than one.

mod attempt;
mod cadence;
mod captor;
pub mod disks;
mod logs;
mod old;
mod sink;
mod stream;
mod tally;
mod thread;
mod watch;

pub use cadence::{AUTO_MAX, AUTO_MIN, Every};

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tandem_ft::arbiter::{Owner, Tenure};
use tandem_ft::runtime::{Budget, Pair};
use tandem_vmm::confinement::Entry;
use tandem_vmm::control::{Handle, Outcome};

use crate::manifest::Manifest;
use crate::owner::SharedArbiter;
use crate::redo::Logged;
use crate::{Guest, Store, StoreError};

/// How often checkpoints are made, where nothing else is said.
pub const INTERVAL_DEFAULT: Duration = Duration::from_secs(1);
/// Shortest interval.
pub const INTERVAL_MIN: Duration = Duration::from_millis(10);
/// Longest interval.
pub const INTERVAL_MAX: Duration = Duration::from_secs(24 * 3600);
/// Name of the section that says what becomes of outputs that a checkpoint explains.
pub const OUTPUTS: &str = "outputs";
/// Name of the section that says how checkpoints are made.
pub const PLAN: &str = "plan";
/// Name of the section that says which addresses the guest was seen to use.
pub const ADDRESSES: &str = "addresses";
/// Version of these sections.
const SECTION_VERSION: u32 = 1;
/// How long the last operations of the store may take when the guest has ended.
const FINISH_TIMEOUT: Duration = Duration::from_secs(10);
/// How long the last outputs may take then to be written.
const LAST_OUTPUTS_PATIENCE: Duration = Duration::from_secs(1);
/// Pages that are left to be copied while the guest stands, if it does not write too fast for that.
const LEFT_PAGES_MAX: u64 = 512;
/// Rounds of copying while it runs, before it stands: it may write faster than is copied.
const ROUNDS_MAX: u32 = 8;
/// How often it is looked whether the guest has ended, or is another's, while something is waited for.
const LOOK: Duration = Duration::from_millis(100);
/// Stack of the thread that captures, in bytes.
const THREAD_STACK: usize = 1 << 20;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How checkpoints are made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// How often.
    pub interval: Duration,
    /// Outputs wait until a checkpoint that explains them is complete.
    pub commit: bool,
    /// What they may cost, if how often is chosen by that; the interval is the first one then.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
}

impl Default for Plan {
    fn default() -> Self {
        Self {
            interval: INTERVAL_DEFAULT,
            commit: false,
            budget: None,
        }
    }
}

impl Plan {
    /// So often, with outputs that wait if it is to `commit`.
    pub fn new(every: Every, commit: bool) -> Self {
        let (interval, budget) = match every {
            Every::Fixed(interval) => (interval, None),
            Every::Auto(budget) => (INTERVAL_DEFAULT, Some(budget)),
        };
        Self {
            interval,
            commit,
            budget,
        }
    }

    /// How often.
    pub fn every(&self) -> Every {
        self.budget.map_or(Every::Fixed(self.interval), Every::Auto)
    }

    /// How those of a guest were made, as its checkpoint says; the default if it does not.
    pub fn of(manifest: &Manifest) -> Self {
        let bytes = bytes_of(manifest, PLAN);
        let plan = bytes.and_then(|bytes| rmp_serde::from_slice::<Self>(bytes).ok());
        plan.filter(|plan| (INTERVAL_MIN..=INTERVAL_MAX).contains(&plan.interval))
            .unwrap_or_default()
    }
}

/// What a checkpoint says of outputs that may not be out, if it was made with [`Plan::commit`].
pub fn outputs_of(manifest: &Manifest) -> Option<&[u8]> {
    bytes_of(manifest, OUTPUTS)
}

/// What a checkpoint says of the guest's addresses; those of earlier versions say nothing.
pub fn addresses_of(manifest: &Manifest) -> Option<&[u8]> {
    bytes_of(manifest, ADDRESSES)
}

fn bytes_of<'a>(manifest: &'a Manifest, name: &str) -> Option<&'a [u8]> {
    let section = manifest.section(name)?;
    (section.version == SECTION_VERSION).then_some(section.bytes.as_slice())
}

/// A guest of which checkpoints are made.
pub struct Captured {
    /// Its gates.
    pub pair: Arc<Pair>,
    /// It itself.
    pub handle: Handle,
    /// Its file, as `tandem run` takes it.
    pub description: String,
    /// Its disks that have redo logs.
    pub redo: Vec<Logged>,
    /// What the threads that make checkpoints may still do.
    pub confinement: Entry,
}

/// The guest in the store, which is this process's.
pub struct Owned {
    /// Where the store is, for messages.
    pub place: String,
    /// The guest.
    pub guest: Guest,
    /// Who decides who owns it.
    pub arbiter: SharedArbiter,
    /// Who this process is there.
    pub owner: Owner,
    /// In which term it is this process's; nothing while this is a copy that has yet to be told to make checkpoints.
    pub tenure: Option<Tenure>,
    /// From which checkpoint it goes on.
    pub base: Option<Manifest>,
    /// The store, if its storage has yet to race.
    pub unraced: Option<Store>,
}

/// What the guest does when its writes are followed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Begin {
    /// It runs already.
    Runs,
    /// It stands until then, so that nothing is missed that it writes, and is let run.
    LetRun,
    /// It stands until its user lets it run.
    Stands,
    /// It is a copy, which others let run and stand.
    Follows,
}

/// Makes checkpoints of a guest for as long as it lives.
pub struct Capture {
    thread: JoinHandle<()>,
    /// Ends who looks for other owners when it goes.
    watch: SyncSender<()>,
    pair: Arc<Pair>,
    shared: Arc<Shared>,
    stop: SyncSender<()>,
    ended: Receiver<()>,
}

/// What the thread and the end of the guest share.
#[derive(Default)]
struct Shared {
    stopping: AtomicBool,
    /// The guest has ended by itself: nobody is to go on with it.
    over: AtomicBool,
    /// The store knows that.
    settled: AtomicBool,
    /// Another has the guest, and it ends here.
    fenced: AtomicBool,
    /// The guest has ended, and its redo logs are folded, however long that takes.
    folding: AtomicBool,
    /// The term in which this process makes checkpoints, or did last.
    tenure: Mutex<Option<Tenure>>,
}

impl Capture {
    /// Holds the guest's outputs if they are to wait, and begins with checkpoints once the guest answers.
    ///
    /// # Errors
    /// When the host has no threads left.
    pub fn start(
        guest: Captured,
        owned: Owned,
        plan: Plan,
        begin: Begin,
    ) -> Result<Self, StoreError> {
        if plan.commit {
            guest.pair.hold_outputs();
        }
        if begin != Begin::Follows {
            guest.pair.follow_disks();
        }
        let guest = Arc::new(guest);
        let pair = Arc::clone(&guest.pair);
        let shared = Arc::<Shared>::default();
        let watch = watch::start(&guest, &owned, &shared)?;
        let (stop, stopped) = sync_channel(1);
        let (tell, ended) = sync_channel(1);
        let told = Arc::clone(&shared);
        let work = move || {
            thread::run(&guest, owned, plan, begin, &told, &stopped);
            // Nobody may wait any more.
            let _ = tell.send(());
        };
        let thread = std::thread::Builder::new()
            .name("checkpoint".into())
            .stack_size(THREAD_STACK)
            .spawn(work);
        let thread = thread.map_err(|error| StoreError::Ended {
            what: format!("it cannot be started: {error}"),
        })?;
        Ok(Self {
            thread,
            watch,
            pair,
            shared,
            stop,
            ended,
        })
    }

    /// The guest has ended, as `outcome` says; nothing if it did not end well. One that ended by itself has nothing to
    /// go on from any more, and its last outputs leave once the store knows that.
    pub fn finish(self, outcome: Option<Outcome>) {
        let over = matches!(outcome, Some(Outcome::PowerOff | Outcome::Reset));
        self.shared.over.store(over, Ordering::SeqCst);
        self.shared.stopping.store(true, Ordering::SeqCst);
        // It may wait for the store, and does no harm.
        drop(self.watch);
        // It may have ended.
        let _ = self.stop.try_send(());
        let mut ended = self.ended.recv_timeout(FINISH_TIMEOUT);
        while ended == Err(RecvTimeoutError::Timeout) && self.shared.folding.load(Ordering::SeqCst)
        {
            ended = self.ended.recv_timeout(LOOK);
        }
        match ended {
            // The end of the process is the end of it.
            Err(RecvTimeoutError::Timeout) => {
                tracing::warn!("the store does not answer: it is not waited for any longer");
            }
            _ => drop(self.thread.join()),
        }
        if self.shared.settled.load(Ordering::SeqCst) {
            self.pair.let_outputs_go(LAST_OUTPUTS_PATIENCE);
        }
    }
}
