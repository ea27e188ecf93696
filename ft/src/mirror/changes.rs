//! Keeps the [bitmap](super::bitmap) of an image that a guest or a copy writes to.
//!
//! What a write costs: nothing but a look at memory where its region is marked for all bases already. The first write
//! to a region that is not waits until the mark is durable, one write of some KiB and a flush of the sidecar; all that
//! come meanwhile share the next. A guest that goes on from region to region has [`AHEAD`] of them marked at once. Hot
//! regions stay marked: a new base begins with those that were written since the last one was confirmed. While a guest
//! writes, the time until which it may ([`Moment::Until`]) is put off every few seconds, by one flush more.
//!
//! A host may stop at any moment: a region is marked durably before the first write to it reaches the image, and an image
//! is flushed before a base is added that says that the rest of it is as it was. What is written under a base that is
//! not durable yet is marked in it when it becomes so.
//!
//! Somebody else who changes an image less than [`PERIOD`] after its guest was killed is not found out, nor is who sets
//! the host's clock back. Without a sidecar, as on block devices, images are compared whole.

use std::fs::File;
use std::io;
use std::ops::RangeInclusive;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use roaring::RoaringBitmap;
use vmm_sys_util::eventfd::EventFd;

use super::bitmap::{Base, Bitmap, Look, Moment, Regions};
use super::sidecar::{Said, Sidecar, beside};
use super::{BLOCK, Extent, ReplicaError};

/// Regions after one that is marked that are marked with it, if the one before was marked.
const AHEAD: u32 = 8;
/// For how long a guest may write from when that is kept.
pub(crate) const PERIOD: Duration = Duration::from_secs(5);
/// How long before its end it is kept anew, if the guest wrote since.
const RENEWAL: Duration = Duration::from_secs(3);
/// How long after the last part of a copy it is kept that a replica is whole: another may follow at once.
const SETTLED: Duration = Duration::from_secs(1);

/// Wakes the thread that keeps bitmaps.
#[derive(Debug, Default)]
pub(crate) struct Signal {
    /// Something is to be kept; the thread is to end.
    wanted: Mutex<(bool, bool)>,
    given: Condvar,
}

impl Signal {
    fn lock(&self) -> MutexGuard<'_, (bool, bool)> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn give(&self) {
        self.lock().0 = true;
        self.given.notify_all();
    }

    /// The thread is to end.
    pub(crate) fn end(&self) {
        self.lock().1 = true;
        self.given.notify_all();
    }

    /// Waits until something is wanted, or `patience` is over. False if the thread is to end.
    pub(crate) fn wait(&self, patience: Duration) -> bool {
        let idle = |state: &mut (bool, bool)| !state.0 && !state.1;
        let waited = self.given.wait_timeout_while(self.lock(), patience, idle);
        let mut state = waited.unwrap_or_else(PoisonError::into_inner).0;
        state.0 = false;
        !state.1
    }
}

/// What is known of an image that is open.
#[derive(Debug)]
struct Open {
    image: Arc<File>,
    regions: Regions,
    /// What is to be kept.
    bitmap: Bitmap,
    /// Regions to which a guest may write: they are marked durably for each base.
    marked: RoaringBitmap,
    /// Until when it may, durably.
    until: Option<Instant>,
    /// Whether it wrote since that was kept.
    wrote: bool,
    /// Regions that were written since the last base was confirmed.
    recent: RoaringBitmap,
    /// A base that is one if it is confirmed, and what was written since.
    candidate: Option<(Base, RoaringBitmap)>,
    /// It is confirmed.
    confirmed: bool,
    /// There is something to be kept.
    pending: bool,
    /// Whether the image is known to be whole, durably.
    kept_whole: bool,
    /// When that is to be kept.
    settles: Option<Instant>,
}

impl Open {
    fn mark(&mut self, regions: &RoaringBitmap) {
        self.bitmap.mark(regions);
        self.pending = true;
    }

    /// Whether a guest may write to `regions`; if not it may when that is kept.
    fn admit(&mut self, regions: RangeInclusive<u32>, now: Instant) -> bool {
        if let Some((_, written)) = &mut self.candidate {
            written.insert_range(regions.clone());
        }
        if self.bitmap.bases.is_empty() {
            return true;
        }
        self.recent.insert_range(regions.clone());
        self.wrote = true;
        let marked = self.marked.contains_range(regions.clone());
        if !marked {
            let (first, mut last) = (*regions.start(), *regions.end());
            if first
                .checked_sub(1)
                .is_some_and(|p| self.marked.contains(p))
            {
                last = last.saturating_add(AHEAD).min(self.regions.count() - 1);
            }
            self.mark(&(first..=last.max(first)).collect());
        }
        let in_time = self.until.is_some_and(|until| now < until);
        self.pending |= !in_time;
        marked && in_time
    }

    fn regions_of(&self, parts: impl Iterator<Item = Extent>) -> RoaringBitmap {
        let mut regions = RoaringBitmap::new();
        for part in parts {
            let blocks = part.blocks();
            let length = (blocks.end - blocks.start) * BLOCK;
            regions.insert_range(self.regions.range(blocks.start * BLOCK, length));
        }
        regions
    }

    /// What this side writes itself, now, is to be marked. Whether something is to be kept before.
    fn require(&mut self, regions: &RoaringBitmap) -> bool {
        if self.bitmap.bases.is_empty() {
            return false;
        }
        self.wrote = true;
        if !regions.is_subset(&self.marked) {
            self.mark(regions);
        }
        self.pending || self.until.is_none_or(|until| Instant::now() >= until)
    }

    /// A new base: what is not marked for it has to be.
    fn add(&mut self, base: Base, changed: RoaringBitmap) {
        self.marked &= &changed;
        self.bitmap.add(base, changed);
        self.pending = true;
    }

    /// Whether something is to be kept, as of `now`.
    fn is_due(&self, now: Instant) -> bool {
        let renews = |until: Instant| until.saturating_duration_since(now) < RENEWAL;
        let settles = self.settles.is_some_and(|at| now >= at);
        let runs_out = self.wrote && self.until.is_none_or(renews);
        self.pending || settles || runs_out
    }
}

/// The bitmap of an image, which the image's user locks.
#[derive(Debug)]
pub(crate) struct Changes {
    /// The sidecar's.
    path: PathBuf,
    file: File,
    /// Locked before `open`, for as long as something is kept.
    sidecar: Mutex<Option<Sidecar<File>>>,
    open: Mutex<Option<Open>>,
    kept: Condvar,
    /// Told when something was kept.
    event: EventFd,
    signal: Arc<Signal>,
}

impl Changes {
    /// Those of the image at `image`, by its sidecar, which is made if it `makes` it. None if there is none, or cannot
    /// be. Whoever waits is told by `event`.
    pub(crate) fn find(
        image: &Path,
        makes: bool,
        event: EventFd,
        signal: &Arc<Signal>,
    ) -> Option<Arc<Self>> {
        let path = beside(image);
        // The changes of others to a device are not seen.
        let metadata = std::fs::metadata(image).ok()?;
        if !metadata.is_file() {
            return None;
        }
        let options = File::options()
            .read(true)
            .write(true)
            .create(makes)
            .open(&path);
        let file = match options {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound && !makes => return None,
            Err(error) => {
                tracing::warn!(%error, path = %path.display(), "changed blocks of a disk cannot be kept: copies compare all of it");
                return None;
            }
        };
        if makes {
            sync_directory(&path);
        }
        Some(Arc::new(Self {
            path,
            file,
            sidecar: Mutex::new(None),
            open: Mutex::new(None),
            kept: Condvar::new(),
            event,
            signal: Arc::clone(signal),
        }))
    }

    fn lock(&self) -> MutexGuard<'_, Option<Open>> {
        self.open.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lock_sidecar(&self) -> MutexGuard<'_, Option<Sidecar<File>>> {
        self.sidecar.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Does something to what is known of the image, if it is open and its bitmap can be kept.
    fn with<T>(&self, work: impl FnOnce(&mut Open) -> T) -> Option<T> {
        self.lock().as_mut().map(work)
    }

    /// The image is open and locked, and has `bytes`. What its sidecar says is believed if it may be.
    pub(crate) fn begin(&self, image: Arc<File>, bytes: u64) {
        let mut sidecar = self.lock_sidecar();
        if self.lock().is_some() {
            return;
        }
        match self.read(&image, bytes) {
            Ok((found, bitmap)) => {
                let marked = bitmap.marked();
                *sidecar = Some(found);
                *self.lock() = Some(Open {
                    image,
                    regions: Regions::of(bytes),
                    marked,
                    until: None,
                    wrote: false,
                    recent: RoaringBitmap::new(),
                    candidate: None,
                    confirmed: false,
                    pending: !bitmap.bases.is_empty(),
                    kept_whole: bitmap.whole,
                    settles: None,
                    bitmap,
                });
                self.signal.give();
            }
            Err(error) => {
                tracing::warn!(%error, path = %self.path.display(), "it is not kept which blocks of a disk change");
            }
        }
    }

    /// What the sidecar says, if it is to be believed.
    fn read(&self, image: &File, bytes: u64) -> io::Result<(Sidecar<File>, Bitmap)> {
        let look = look(image, bytes)?;
        let (mut sidecar, said) = Sidecar::open(self.file.try_clone()?)?;
        let path = self.path.display();
        let distrusted = match said {
            Said::Nothing => return Ok((sidecar, Bitmap::new(look))),
            Said::Garbage(why) => why,
            Said::Bitmap(bitmap) => match bitmap.distrust(look) {
                None => return Ok((sidecar, bitmap)),
                Some(why) => why.to_owned(),
            },
        };
        tracing::info!(%path, why = distrusted, "changed blocks of a disk are not known");
        let new = Bitmap::new(look);
        sidecar.store_alone(&new)?;
        Ok((sidecar, new))
    }

    /// The image is not written to any more, and still locked; all requests are done if it is `even`.
    pub(crate) fn end(&self, even: bool) {
        let mut sidecar = self.lock_sidecar();
        let (Some(sidecar), Some(mut open)) = (sidecar.take(), self.lock().take()) else {
            return;
        };
        // Those that wait get nothing.
        self.kept.notify_all();
        if !even || open.bitmap.bases.is_empty() && open.kept_whole {
            return;
        }
        let mut sidecar = sidecar;
        let closed = look(&open.image, open.bitmap.bytes).and_then(|look| {
            open.bitmap.moment = Moment::At(look.changed);
            sidecar.store(&open.bitmap)
        });
        if let Err(error) = closed {
            tracing::warn!(%error, path = %self.path.display(), "the changed blocks of a disk are not closed");
        }
    }

    /// A guest is to write so many bytes at `offset`. False if it has to wait until something is kept.
    pub(crate) fn admit(&self, offset: u64, length: u64) -> bool {
        let admitted = self.with(|open| {
            let regions = open.regions.range(offset, length);
            open.admit(regions, Instant::now())
        });
        let admitted = admitted.unwrap_or(true);
        if !admitted {
            self.signal.give();
        }
        admitted
    }

    /// Waits until something is kept, or for a moment.
    pub(crate) fn wait_kept(&self, patience: Duration) {
        let waited = self.kept.wait_timeout(self.lock(), patience);
        drop(waited.unwrap_or_else(PoisonError::into_inner));
    }

    /// Keeps what is to be kept, durably.
    ///
    /// # Errors
    /// When it cannot be: from then on nothing is known of the image, nor kept.
    pub(crate) fn keep(&self) -> io::Result<()> {
        let mut sidecar = self.lock_sidecar();
        self.flush_confirmed();
        let now = Instant::now();
        let Some((bitmap, marked)) = self.with(|open| {
            open.pending = false;
            open.wrote = false;
            open.settles = None;
            open.bitmap.moment = Moment::Until(since_1970() + PERIOD.as_nanos() as u64);
            (open.bitmap.clone(), open.bitmap.marked())
        }) else {
            return Ok(());
        };
        let Some(file) = sidecar.as_mut() else {
            return Ok(());
        };
        let stored = file.store(&bitmap);
        if let Err(error) = &stored {
            tracing::error!(%error, path = %self.path.display(), "changed blocks of a disk cannot be kept: copies will compare all of it");
            if let Err(error) = file.clear() {
                tracing::error!(%error, path = %self.path.display(), "the file has to be removed");
            }
            *sidecar = None;
            *self.lock() = None;
        } else {
            self.with(|open| {
                // A base may have been added meanwhile.
                open.marked = marked & open.bitmap.marked();
                open.until = Some(now + PERIOD);
                open.kept_whole = bitmap.whole;
            });
        }
        drop(sidecar);
        self.kept.notify_all();
        if let Err(error) = self.event.write(1) {
            tracing::error!(%error, "cannot wake a disk");
        }
        stored
    }

    /// What was proposed becomes a base if it is confirmed, once the image has durably all that was written before.
    /// The guest does not wait for that.
    fn flush_confirmed(&self) {
        let confirmed = self.with(|open| {
            let (base, _) = open.candidate.as_ref().filter(|_| open.confirmed)?;
            Some((*base, Arc::clone(&open.image)))
        });
        let Some((base, image)) = confirmed.flatten() else {
            return;
        };
        if let Err(error) = image.sync_data() {
            tracing::error!(%error, path = %self.path.display(), "a disk cannot be flushed");
            return;
        }
        self.with(|open| match open.candidate.take() {
            Some((proposed, changed)) if proposed == base => {
                open.confirmed = false;
                open.recent.clear();
                open.add(base, changed);
            }
            other => open.candidate = other,
        });
    }

    /// Keeps what is due.
    pub(crate) fn look_after(&self) {
        let due = self.with(|open| open.is_due(Instant::now()));
        if due == Some(true) {
            // It told what failed, and what follows from it.
            drop(self.keep());
        }
    }

    // Either side.

    /// The bases that the image has.
    pub(crate) fn bases(&self) -> Vec<Base> {
        let bases = self.with(|open| open.bitmap.bases.iter().map(|(base, _)| *base).collect());
        bases.unwrap_or_default()
    }

    /// What may have changed since `base`; none if that is not known.
    pub(crate) fn since(&self, base: Base) -> Option<RoaringBitmap> {
        self.with(|open| open.bitmap.since(base).cloned()).flatten()
    }

    /// From now on the image may be that of `base`, but for `written`, which may not be in it yet, and all that is
    /// written later.
    pub(crate) fn propose(&self, base: Base, written: impl Iterator<Item = RangeInclusive<u64>>) {
        self.with(|open| {
            let mut changed = open.recent.clone();
            for bytes in written {
                let length = bytes.end() - bytes.start() + 1;
                changed.insert_range(open.regions.range(*bytes.start(), length));
            }
            (open.candidate, open.confirmed) = (Some((base, changed)), false);
        });
    }

    // A primary.

    /// Whether another base would say that less has changed, and none is proposed.
    pub(crate) fn may_propose(&self) -> bool {
        let may = self.with(|open| {
            let marked = open.bitmap.bases.last().map_or(0, |(_, c)| c.len());
            open.candidate.is_none() && marked > open.recent.len()
        });
        may.unwrap_or(false)
    }

    /// The image is that of what was proposed as checkpoint `number`: that is kept soon.
    pub(crate) fn confirm_soon(&self, number: u64) {
        let confirmed = self.with(|open| {
            let proposed = open.candidate.as_ref();
            open.confirmed = proposed.is_some_and(|(base, _)| base.number == number);
            open.pending |= open.confirmed;
            open.confirmed
        });
        if confirmed == Some(true) {
            self.signal.give();
        }
    }

    /// What was proposed is a base, durably.
    ///
    /// # Errors
    /// As [`Changes::keep`].
    pub(crate) fn confirm(&self) -> io::Result<()> {
        self.with(|open| open.confirmed = open.candidate.is_some());
        self.keep()
    }

    // A secondary.

    /// The image is a replica that is made that of a primary: `base` is where both began, and `differ` what may differ
    /// then. Until it is whole nobody is to run a guest from it. Durable after this.
    ///
    /// # Errors
    /// As [`Changes::keep`].
    pub(crate) fn begin_copy(&self, base: Option<Base>, differ: &RoaringBitmap) -> io::Result<()> {
        self.with(|open| {
            open.mark(differ);
            open.bitmap.whole = false;
            if let Some(base) = base {
                open.add(base, differ.clone());
            }
        });
        self.keep()
    }

    /// `regions` are as they were at the primary when it told of them: its own bitmap has what it wrote there since.
    ///
    /// # Errors
    /// When the image cannot be flushed, or as [`Changes::keep`].
    pub(crate) fn copied(&self, base: Base, regions: &RoaringBitmap) -> io::Result<()> {
        let Some(image) = self.with(|open| Arc::clone(&open.image)) else {
            return Ok(());
        };
        image.sync_data()?;
        self.with(|open| {
            if let Some(differ) = open.bitmap.since_mut(base) {
                *differ -= regions;
                open.marked -= regions;
            }
        });
        self.keep()
    }

    /// Parts are to be written to a replica that is not whole. Durable after this.
    ///
    /// # Errors
    /// As [`Changes::keep`].
    pub(crate) fn mark_parts(&self, parts: impl Iterator<Item = Extent>) -> io::Result<()> {
        let keeps = self.with(|open| {
            let regions = open.regions_of(parts);
            open.require(&regions)
        });
        if keeps == Some(true) {
            self.keep()
        } else {
            Ok(())
        }
    }

    /// Parts of a checkpoint are to be written, and the image is not whole meanwhile. Durable after this.
    ///
    /// # Errors
    /// As [`Changes::keep`].
    pub(crate) fn begin_parts(&self, parts: impl Iterator<Item = Extent>) -> io::Result<()> {
        let keeps = self.with(|open| {
            let regions = open.regions_of(parts);
            open.recent |= &regions;
            (open.bitmap.whole, open.settles) = (false, None);
            open.require(&regions) || open.kept_whole
        });
        if keeps == Some(true) {
            self.keep()
        } else {
            Ok(())
        }
    }

    /// They are written: the image is whole again, which is kept soon.
    pub(crate) fn end_parts(&self) {
        self.with(|open| {
            open.bitmap.whole = true;
            open.settles = Some(Instant::now() + SETTLED);
        });
    }

    /// The guest of the image is the only one: what is true of it is kept at once.
    pub(crate) fn settle(&self) {
        self.with(|open| open.settles = open.settles.map(|_| Instant::now()));
        self.signal.give();
    }

    /// The image is whole, and that of `base`, durably.
    ///
    /// # Errors
    /// When the image cannot be flushed, or as [`Changes::keep`].
    pub(crate) fn equal(&self, base: Option<Base>) -> io::Result<()> {
        let Some(image) = self.with(|open| Arc::clone(&open.image)) else {
            return Ok(());
        };
        image.sync_data()?;
        self.with(|open| {
            open.bitmap.whole = true;
            if let Some(base) = base {
                let recent = std::mem::take(&mut open.recent);
                open.add(base, recent);
            }
        });
        self.keep()
    }
}

fn since_1970() -> u64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0, |now| now.as_nanos() as u64)
}

/// What is seen of an image that has so many bytes.
fn look(image: &File, bytes: u64) -> io::Result<Look> {
    let metadata = image.metadata()?;
    let seconds = u64::try_from(metadata.ctime()).unwrap_or(0);
    Ok(Look {
        bytes,
        inode: metadata.ino(),
        changed: seconds * 1_000_000_000 + metadata.ctime_nsec() as u64,
    })
}

/// The name of a new file is durable too.
fn sync_directory(path: &Path) {
    let parent = path.parent().filter(|path| !path.as_os_str().is_empty());
    let synced = File::open(parent.unwrap_or(Path::new("."))).and_then(|parent| parent.sync_all());
    if let Err(error) = synced {
        tracing::debug!(%error, path = %path.display(), "its directory is not flushed");
    }
}

/// Sees that the image at `path` holds a disk, and no part of a copy.
///
/// # Errors
/// When it does not, or that cannot be told.
pub fn expect_whole(path: &Path) -> Result<(), ReplicaError> {
    let sidecar = beside(path);
    let why = match File::open(&sidecar).and_then(Sidecar::open) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => error.to_string(),
        Ok((_, Said::Garbage(why))) => why,
        Ok((_, Said::Nothing)) => return Ok(()),
        Ok((_, Said::Bitmap(bitmap))) if bitmap.whole => return Ok(()),
        Ok((_, Said::Bitmap(_))) => "a copy to it has begun and did not end".into(),
    };
    Err(ReplicaError::Incomplete {
        path: path.to_owned(),
        sidecar,
        why,
    })
}

/// Forgets what is known of the image at `path`: it is changed otherwise, or taken as it is.
///
/// # Errors
/// When the file beside it cannot be removed.
pub fn forget(path: &Path) -> Result<(), ReplicaError> {
    match std::fs::remove_file(beside(path)) {
        Err(source) if source.kind() != io::ErrorKind::NotFound => Err(ReplicaError::Forget {
            path: beside(path),
            source,
        }),
        _ => Ok(()),
    }
}
