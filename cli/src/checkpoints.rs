//! Checkpoints of a guest in a store: `tandem run --checkpoint`, and what `tandem resume` has in common with it.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use tandem_ft::arbiter::Owner;
use tandem_ft::runtime::{Pair, ProtectionError, Stored};
use tandem_store::backend::Backend;
use tandem_store::capture::{Begin, Capture, Captured, INTERVAL_MAX, INTERVAL_MIN, Owned, Plan};
use tandem_store::guest::{Tenancy, Whole};
use tandem_store::owner::{SharedArbiter, kin_of, this_host, this_host_of};
use tandem_store::seal::Key;
use tandem_store::{Options, Place, Store, StoreError};
use tandem_vmm::confinement::{Confinement, ThreadKind};
use tandem_vmm::machine::Machine;

use crate::bucket::{self, Bounds};
use crate::failure::Failure;
use crate::output;
use crate::run::Beside;
use crate::settings::Checkpoints;

/// A guest in a store that is open.
pub(crate) struct Opened {
    place: String,
    pub(crate) guest: tandem_store::Guest,
    arbiter: SharedArbiter,
    unraced: Option<Store>,
}

impl Opened {
    /// Opens the store of `checkpoints`, and guest `name` in it, whose VMM will be within `bounds`.
    ///
    /// # Errors
    /// When it cannot be a store, or its key does not fit.
    pub(crate) fn open(
        checkpoints: &Checkpoints,
        name: &str,
        bounds: Bounds,
    ) -> Result<Self, Failure> {
        let store = reach(checkpoints, bounds, Store::open_at, Store::open_on)?;
        Self::of(&store, name)
    }

    /// As [`Opened::open`], to go on with a guest at once: there is a store, and its storage races when the guest runs.
    ///
    /// # Errors
    /// As that, and when there is none.
    pub(crate) fn find(
        checkpoints: &Checkpoints,
        name: &str,
        bounds: Bounds,
    ) -> Result<Self, Failure> {
        let store = reach(checkpoints, bounds, Store::open_unraced, Store::read_on)?;
        let opened = Self::of(&store, name)?;
        Ok(Self {
            unraced: Some(store),
            ..opened
        })
    }

    fn of(store: &Store, name: &str) -> Result<Self, Failure> {
        Ok(Self {
            place: store.place(),
            guest: store.guest(name)?,
            arbiter: SharedArbiter::new(store.arbiter()?),
            unraced: None,
        })
    }

    /// The newest checkpoint from which the guest could go on. Tells of those that are passed over.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn newest(&self) -> Result<Whole, Failure> {
        let newest = self.guest.newest_whole()?;
        let none = || StoreError::NoCheckpoint {
            guest: self.guest.name().to_owned(),
            damaged: Vec::new(),
        };
        Ok(newest.ok_or_else(none)?)
    }

    /// Takes the guest, which begins anew. Checkpoints that it has count no longer, which has to be `allowed`.
    ///
    /// # Errors
    /// When it has some and that is not allowed, another is faster, or the storage fails.
    pub(crate) fn begin_anew(self, allowed: bool) -> Result<Owned, Failure> {
        if !allowed && let Some(newest) = self.guest.checkpoints()?.first() {
            return Err(Failure::HasCheckpoints {
                name: self.guest.name().to_owned(),
                newest: newest.to_string(),
                place: self.place,
            });
        }
        let owner = this_host()?;
        let tenancy = self.guest.begin_anew(&self.arbiter, &owner)?;
        Ok(self.owned(owner, Some(tenancy)))
    }

    /// Takes the guest, which goes on from the newest checkpoint that is whole, as far as can be seen and as `check`
    /// finds.
    ///
    /// # Errors
    /// When there is none, another is faster, or the storage fails.
    pub(crate) fn go_on(
        self,
        check: &mut dyn FnMut(&tandem_store::manifest::Manifest) -> Result<(), StoreError>,
    ) -> Result<Owned, Failure> {
        let owner = this_host()?;
        let tenancy = self.guest.resume_checked(&self.arbiter, &owner, check)?;
        Ok(self.owned(owner, Some(tenancy)))
    }

    /// Takes nothing: this host is to have a copy of the guest of `kin`, and makes checkpoints once it is told to.
    ///
    /// # Errors
    /// When the host has no random bytes.
    pub(crate) fn follow(self, kin: u64) -> Result<Owned, Failure> {
        let owner = this_host_of(kin)?;
        Ok(self.owned(owner, None))
    }

    fn owned(self, owner: Owner, tenancy: Option<Tenancy>) -> Owned {
        let (tenure, from) = match tenancy {
            Some(Tenancy { tenure, from }) => (Some(tenure), from),
            None => (None, None),
        };
        for passed_over in from.iter().flat_map(|whole| &whole.passed_over) {
            output::tell(&format!(
                "tandem: passed over, as it is damaged: {passed_over}"
            ));
        }
        Owned {
            place: self.place,
            guest: self.guest,
            arbiter: self.arbiter,
            owner,
            tenure,
            base: from.map(|whole| whole.manifest),
            unraced: self.unraced,
        }
    }
}

/// Sees that nobody else uses an image with a redo log of a guest that begins anew.
///
/// # Errors
/// When somebody does.
pub(crate) fn expect_alone(machine: &Machine) -> Result<(), Failure> {
    let mut disks = machine.redo_disks().iter();
    let alone = disks.try_for_each(|(_, disk)| disk.expect_alone());
    Ok(alone.map_err(StoreError::from)?)
}

/// Begins the redo logs of a guest that begins anew, with all that was written to its disks before.
///
/// # Errors
/// When another has an image open, or a log cannot be read.
pub(crate) fn begin_logs(machine: &Machine, owned: &Owned) -> Result<(), Failure> {
    let term = owned.tenure.as_ref().map_or(0, |tenure| tenure.term.0);
    for (_, disk) in machine.redo_disks() {
        let chain = disk.recover().map_err(StoreError::from)?;
        disk.begin(chain, term).map_err(StoreError::from)?;
    }
    Ok(())
}

/// Sees to it that copies of the guest of `pair` are told of its store, unless it can have none.
pub(crate) fn tell_copies(pair: &Pair, checkpoints: &Checkpoints, owned: &Owned) {
    let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
    let Checkpoints { store, key, plan } = checkpoints;
    if plan.commit {
        return;
    }
    let place = match store.directory() {
        Some(directory) => Place::Directory(absolute(directory)),
        None => store.clone(),
    };
    pair.set_stored(Stored {
        place: place.to_string(),
        key: key.as_deref().map(absolute),
        kin: kin_of(&owned.owner),
        every_ms: plan.interval.as_millis() as u64,
        budget: plan.budget,
    });
}

/// What a primary said of the store of its guest, as settings of its copy.
///
/// # Errors
/// When that cannot be.
pub(crate) fn told(stored: &Stored) -> Result<Checkpoints, Failure> {
    let garbled = |what: String| Failure::from(ProtectionError::Garbled(what));
    let place: Result<Place, _> = stored.place.parse();
    let interval = Duration::from_millis(stored.every_ms);
    if !(INTERVAL_MIN..=INTERVAL_MAX).contains(&interval) {
        return Err(garbled(format!("checkpoints every {interval:?}")));
    }
    Ok(Checkpoints {
        store: place.map_err(|error| garbled(format!("a store whose address {error}")))?,
        key: stored.key.clone(),
        plan: Plan {
            interval,
            commit: false,
            budget: stored.budget,
        },
    })
}

/// The store of `checkpoints`: `open` takes one in a directory, `open_on` one in a bucket, which is reached by a process
/// within `bounds`.
fn reach(
    checkpoints: &Checkpoints,
    bounds: Bounds,
    open: impl FnOnce(&Place, Options) -> Result<Store, StoreError>,
    open_on: impl FnOnce(Arc<dyn Backend>, Options) -> Result<Store, StoreError>,
) -> Result<Store, Failure> {
    let (place, options) = (&checkpoints.store, options(checkpoints)?);
    Ok(match place.directory() {
        Some(_) => open(place, options)?,
        None => open_on(bucket::start(place, bounds)?, options)?,
    })
}

fn options(checkpoints: &Checkpoints) -> Result<Options, Failure> {
    let key = checkpoints.key.as_deref().map(Key::read).transpose()?;
    Ok(Options { key })
}

/// What goes on beside `machine`, with checkpoints of its guest that begin as it does.
pub(crate) fn beside(
    beside: Beside,
    machine: &Machine,
    description: String,
    confinement: &Confinement,
    owned: Owned,
    (plan, begin): (Plan, Begin),
) -> Beside {
    let captured = Captured {
        pair: beside.pair.clone(),
        handle: machine.handle(),
        description,
        redo: machine.redo_disks().to_vec(),
        confinement: confinement.entry(ThreadKind::Checkpoints),
    };
    let others = beside.begin;
    Beside {
        begin: Box::new(move || {
            let finish = others();
            match Capture::start(captured, owned, plan, begin) {
                Ok(capture) => Box::new(move |outcome| {
                    capture.finish(outcome);
                    finish(outcome);
                }),
                Err(error) => {
                    let failure = Failure::from(error);
                    output::tell(&failure.report());
                    finish
                }
            }
        }),
        ..beside
    }
}
