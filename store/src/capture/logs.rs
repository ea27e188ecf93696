//! Redo logs of disks: a layer is closed for each checkpoint, and folded once the checkpoint after it is complete.
//!
//! One thread folds (`store-fold`), so that neither checkpoints nor the guest wait for the image.

use std::cell::RefCell;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;

use tandem_devices::virtio::block::redo::{DiskRecord, Folded, LayerId, Leave, RedoError};
use tandem_ft::arbiter::{Arbiter, Claim};
use tandem_ft::runtime::Pair;
use tandem_vmm::error::causes;

use super::{Captured, Owned, Shared};
use crate::StoreError;
use crate::manifest::Section;
use crate::owner::{SharedArbiter, are_kin};
use crate::redo::{Logged, disks_of, section};

/// Stack of the thread that folds, in bytes.
const THREAD_STACK: usize = 512 << 10;

/// The logs of a guest's disks.
pub(super) struct Logs {
    disks: Vec<Logged>,
    warrant: Warrant,
    pair: Arc<Pair>,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    /// What the disks were when the guest stood last.
    cut: Vec<DiskRecord>,
    /// The newest layers of the last checkpoint that is complete, by disk.
    complete: Newest,
    folder: Option<Folder>,
}

/// The newest layers of disks, by their numbers.
type Newest = Vec<(u8, LayerId)>;

/// The thread that folds up to the layers that it is told. It ends when nobody can tell it any more.
struct Folder {
    wanted: SyncSender<Newest>,
    thread: JoinHandle<()>,
}

impl Logs {
    /// Those of `guest`, which goes on from what it is `owned` with. The calling thread is confined.
    ///
    /// # Errors
    /// When the host has no threads left.
    pub(super) fn start(
        guest: &Captured,
        owned: &Owned,
        shared: &Arc<Shared>,
    ) -> Result<Self, StoreError> {
        let warrant = Warrant {
            arbiter: owned.arbiter.clone(),
            guest: owned.guest.name().to_owned(),
            shared: Arc::clone(shared),
            last: false,
        };
        let base = owned.base.as_ref().map(disks_of).transpose()?;
        let mut state = State {
            complete: newest(&base.unwrap_or_default()),
            ..State::default()
        };
        if !guest.redo.is_empty() {
            state.folder = Some(Folder::start(guest, warrant.clone())?);
        }
        Ok(Self {
            disks: guest.redo.clone(),
            warrant,
            pair: Arc::clone(&guest.pair),
            state: RefCell::new(state),
        })
    }

    /// Makes the layers that come next; the guest runs.
    pub(super) fn prepare(&self) -> Result<(), StoreError> {
        let mut disks = self.disks.iter();
        Ok(disks.try_for_each(|(_, disk)| disk.prepare())?)
    }

    /// The guest stands: its disks are to be those of the checkpoint.
    pub(super) fn cut(&self) -> Result<(), StoreError> {
        let disks = self.disks.iter();
        let cut: Result<Vec<_>, _> = disks.map(|(number, disk)| disk.cut(*number)).collect();
        self.state.borrow_mut().cut = cut?;
        Ok(())
    }

    /// Makes what was cut durable, and says what it is, if there are such disks.
    pub(super) fn seal(&self) -> Result<Option<Section>, StoreError> {
        if self.disks.is_empty() {
            return Ok(None);
        }
        for (_, disk) in &self.disks {
            disk.seal()?;
        }
        Ok(Some(section(self.state.borrow().cut.clone())?))
    }

    /// The checkpoint is complete: what the one before it consists of may be folded.
    pub(super) fn complete(&self) {
        let mut state = self.state.borrow_mut();
        let cut = newest(&state.cut);
        let before = std::mem::replace(&mut state.complete, cut);
        // One that is still at it folds more the next time.
        if let Some(folder) = &state.folder
            && let Err(TrySendError::Disconnected(_)) = folder.wanted.try_send(before)
        {
            tracing::error!("the thread that folds redo logs has ended");
        }
    }

    /// Whether a checkpoint is wanted, so that a log that grows full can be folded.
    pub(super) fn want_checkpoint(&self) -> bool {
        self.disks.iter().any(|(_, disk)| disk.wants_checkpoint())
    }

    /// The guest has ended, and the store knows that nobody goes on with it: all that there is is folded.
    pub(super) fn finish(&self) {
        let folder = self.state.borrow_mut().folder.take();
        if let Some(Folder { wanted, thread }) = folder {
            drop(wanted);
            // It has told why, if it broke down.
            drop(thread.join());
        }
        let mut warrant = Warrant {
            last: true,
            ..self.warrant.clone()
        };
        for (number, disk) in &self.disks {
            let folded = disk.finish(&mut warrant);
            tell(&self.pair, *number, folded);
        }
    }
}

fn newest(disks: &[DiskRecord]) -> Newest {
    let disks = disks.iter();
    disks.map(|disk| (disk.disk, disk.newest())).collect()
}

/// Tells what a fold came to.
fn tell(pair: &Pair, disk: u8, folded: Result<Folded, RedoError>) {
    match folded {
        Ok(folded) => tracing::debug!(disk, ?folded, "a redo log is folded"),
        Err(error) => {
            let why = causes(&error);
            tracing::error!(disk, %why, "a redo log is not folded");
            pair.tell("fold-failed", format!("redo log of disk {disk}: {why}"));
        }
    }
}

impl Folder {
    fn start(guest: &Captured, mut warrant: Warrant) -> Result<Self, StoreError> {
        let (wanted, layers): (_, Receiver<Newest>) = sync_channel(1);
        let (disks, pair) = (guest.redo.clone(), Arc::clone(&guest.pair));
        let work = move || {
            for (number, newest) in layers.into_iter().flatten() {
                let disk = disks.iter().find(|(known, _)| *known == number);
                if let Some((_, disk)) = disk
                    && warrant.goes_on()
                {
                    tell(&pair, number, disk.fold(newest, &mut warrant));
                }
            }
        };
        // It is confined as the calling thread is.
        let thread = std::thread::Builder::new()
            .name("store-fold".into())
            .stack_size(THREAD_STACK)
            .spawn(work);
        let thread = thread.map_err(|error| StoreError::Ended {
            what: format!("it cannot be started: {error}"),
        })?;
        Ok(Self { wanted, thread })
    }
}

/// Leave of the guest's owner, by its term.
#[derive(Clone)]
struct Warrant {
    arbiter: SharedArbiter,
    guest: String,
    shared: Arc<Shared>,
    /// The guest has ended, and this is the last fold.
    last: bool,
}

impl Leave for Warrant {
    fn owns(&mut self) -> bool {
        let tenure = self
            .shared
            .tenure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .clone();
        let Some(own) = tenure else {
            return false;
        };
        // It is won already, or will never be: no cache answers a claim.
        match self.arbiter.claim(&self.guest, own.term, &own.owner) {
            Ok(Claim::Won) => true,
            Ok(Claim::Lost(found)) => are_kin(&found.owner, &own.owner),
            Err(error) => {
                let why = causes(&error);
                tracing::warn!(%why, "the store does not say who owns the guest");
                false
            }
        }
    }

    fn goes_on(&self) -> bool {
        let stops = !self.last && self.shared.stopping.load(Ordering::SeqCst);
        !stops && !self.shared.fenced.load(Ordering::SeqCst)
    }
}
