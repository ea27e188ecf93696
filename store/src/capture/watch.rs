//! Looks, between checkpoints too, whether somebody else has taken the guest.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::time::Duration;

use tandem_ft::arbiter::{Arbiter, Claim, Owner};
use tandem_vmm::error::causes;

use super::{Captured, Owned, Shared};
use crate::StoreError;
use crate::owner::{SharedArbiter, are_kin};

/// How often it is looked: a guest that was taken ends here so long after that, and what a look takes, at the latest.
pub(super) const LOOK_INTERVAL: Duration = Duration::from_secs(1);
/// Stack of the thread, in bytes.
const THREAD_STACK: usize = 256 << 10;

struct Watch {
    guest: Arc<Captured>,
    arbiter: SharedArbiter,
    name: String,
    shared: Arc<Shared>,
}

/// Starts the thread; it ends when what is returned is dropped.
///
/// # Errors
/// When the host has no threads left.
pub(super) fn start(
    guest: &Arc<Captured>,
    owned: &Owned,
    shared: &Arc<Shared>,
) -> Result<SyncSender<()>, StoreError> {
    let (stop, stopped) = sync_channel(1);
    let watch = Watch {
        guest: Arc::clone(guest),
        arbiter: owned.arbiter.clone(),
        name: owned.guest.name().to_owned(),
        shared: Arc::clone(shared),
    };
    let thread = std::thread::Builder::new()
        .name("store-watch".into())
        .stack_size(THREAD_STACK)
        .spawn(move || watch.run(&stopped));
    match thread {
        Ok(_) => Ok(stop),
        Err(error) => Err(StoreError::Ended {
            what: format!("it cannot be started: {error}"),
        }),
    }
}

impl Watch {
    fn run(&self, stopped: &Receiver<()>) {
        if let Err(error) = self.guest.confinement.enter() {
            tracing::error!(%error, "the thread that looks for other owners cannot be confined");
            return;
        }
        while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(LOOK_INTERVAL) {
            if let Some(other) = self.look() {
                let guest = self.name.clone();
                let error = StoreError::Overtaken {
                    guest,
                    owner: other,
                };
                return fence(&self.guest, &self.shared, &error);
            }
        }
    }

    /// Who has taken the guest, if somebody has. A store that does not answer says nothing of that.
    fn look(&self) -> Option<tandem_ft::arbiter::Tenure> {
        // A copy that makes no checkpoints yet has its primary, which looks.
        let own = super::lock(&self.shared.tenure).clone()?;
        // It is won already, or will never be: no cache answers a claim.
        match self.arbiter.claim(&self.name, own.term, &own.owner) {
            Ok(Claim::Lost(found)) if !are_kin(&found.owner, &own.owner) => Some(found),
            Ok(_) => None,
            Err(error) => {
                let why = causes(&error);
                tracing::debug!(%why, "the store does not say who owns the guest");
                None
            }
        }
    }
}

/// Ends the guest here, once: another has it, or may.
pub(super) fn fence(guest: &Captured, shared: &Shared, error: &StoreError) {
    if shared.fenced.swap(true, Ordering::SeqCst) {
        return;
    }
    let why = causes(error);
    tracing::warn!(%why, "the guest ends here");
    guest.pair.tell("fenced", why);
    // It may have ended by itself.
    drop(guest.handle.give_up());
}

/// Whether `error` says that another has the guest, who does not have it together with `owner`.
pub(super) fn is_foreign(error: &StoreError, owner: &Owner) -> bool {
    other_in(error).is_some_and(|other| !are_kin(other, owner))
}

/// Whether `error` says that another makes checkpoints, who has the guest together with `owner`.
pub(super) fn is_kins(error: &StoreError, owner: &Owner) -> bool {
    other_in(error).is_some_and(|other| are_kin(other, owner))
}

fn other_in(error: &StoreError) -> Option<&Owner> {
    match error {
        StoreError::Overtaken { owner, .. } | StoreError::Lost { owner, .. } => Some(&owner.owner),
        _ => None,
    }
}
