//! Folding layers into the image.

use super::disk::{RedoDisk, lock};
use super::index::Index;
use super::layer::Layer;
use super::{LayerId, LayerRecord, PAYLOAD_MAX, RedoError};

/// Leave to fold, of whoever knows who owns the guest.
pub trait Leave {
    /// Whether the guest is still this owner's: asked once the log is locked, and before the head says that more is
    /// folded.
    fn owns(&mut self) -> bool;

    /// Whether to go on: asked before each part.
    fn goes_on(&self) -> bool;
}

/// What a fold came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Folded {
    /// Bytes that were written to the image, or zeroed in it.
    pub bytes: u64,
    /// Files that were removed.
    pub removed: u64,
}

/// The log is locked for as long as this lives.
struct Locked<'a>(&'a RedoDisk);

impl Drop for Locked<'_> {
    fn drop(&mut self) {
        if let Err(error) = self.0.directory.unlock() {
            tracing::error!(%error, "a redo log cannot be unlocked");
        }
    }
}

impl RedoDisk {
    /// Folds all closed layers up to `newest` into the image, and removes the files of those that were folded before. The guest may
    /// run.
    ///
    /// # Errors
    /// When another folds, has the guest, a layer is damaged, or the host refuses. What was done of it does no harm.
    pub fn fold(&self, newest: LayerId, leave: &mut dyn Leave) -> Result<Folded, RedoError> {
        let layers = self.closed_up_to(newest.number);
        lock(&self.state).asked = layers.iter().map(|layer| layer.bytes).sum();
        let locked = self.lock_log(leave)?;
        let mut folded = Folded {
            removed: self.remove_folded()?,
            ..Folded::default()
        };
        let Some(last) = layers.last().map(|layer| layer.id) else {
            return Ok(folded);
        };
        folded.bytes = self.write_to_image(&layers, leave)?;
        let synced = self.image.sync();
        synced.map_err(RedoError::file("write", self.image_path.clone()))?;
        if !leave.owns() {
            return Err(self.taken("is another's by now"));
        }
        self.tell_folded(last)?;
        drop(locked);
        self.forget(last);
        self.wake();
        Ok(folded)
    }

    /// Folds all that there is, once the guest has ended and nobody goes on with it: the image is its disk then. Nothing
    /// but the head is left of the log.
    ///
    /// # Errors
    /// As [`RedoDisk::fold`].
    pub fn finish(&self, leave: &mut dyn Leave) -> Result<Folded, RedoError> {
        self.end();
        let newest = LayerId {
            number: u64::MAX,
            ..LayerId::default()
        };
        let folded = self.fold(newest, leave)?;
        *lock(&self.prepared) = None;
        let locked = self.lock_log(leave)?;
        let removed = folded.removed + self.remove_folded()?;
        drop(locked);
        Ok(Folded { removed, ..folded })
    }

    fn taken(&self, what: &'static str) -> RedoError {
        RedoError::Taken {
            path: self.path(),
            what,
        }
    }

    /// Locks the log, of a guest that is still this owner's.
    fn lock_log(&self, leave: &mut dyn Leave) -> Result<Locked<'_>, RedoError> {
        let path = self.path();
        let locked = self.directory.try_lock();
        if !locked.map_err(RedoError::file("lock", path))? {
            return Err(self.taken("is locked: another host folds it, or was stopped in the midst"));
        }
        let locked = Locked(self);
        // After the lock: whoever has the guest by now finds the log locked, and folds after this.
        match leave.owns() {
            true => Ok(locked),
            false => Err(self.taken("is another's by now")),
        }
    }

    /// Removes files of layers that nobody needs: those that are folded, and late ones of owners before this one. The
    /// log is locked.
    fn remove_folded(&self) -> Result<u64, RedoError> {
        let mut removed = 0;
        for id in self.unneeded()? {
            let name = self.log.name(id);
            match self.directory.remove(&name) {
                Ok(()) => removed += 1,
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                Err(error) => {
                    return Err(RedoError::file("remove", self.directory.path(&name))(error));
                }
            }
        }
        if removed > 0 {
            let shown = self.directory.show();
            shown.map_err(RedoError::file("show others the directory of", self.path()))?;
        }
        Ok(removed)
    }

    /// Layers that nobody needs. The guest must not stand for as long as they are removed, so that is done without a lock:
    /// what is made meanwhile is none of them.
    fn unneeded(&self) -> Result<Vec<LayerId>, RedoError> {
        let all = self.log.layers(self.directory.as_ref())?;
        let term = *lock(&self.term);
        // One that is just being made is known by then.
        let prepared = lock(&self.prepared);
        let tail = lock(&self.tail);
        let current = tail.as_ref().map(|tail| tail.number());
        let prepared = prepared.as_ref().map(|layer| layer.record.id.number);
        let unneeded = all.into_iter().filter(|id| {
            let own = id.term == term && [current, prepared].contains(&Some(id.number));
            !own && id.term <= term && !self.needs(*id)
        });
        Ok(unneeded.collect())
    }

    fn needs(&self, id: LayerId) -> bool {
        let state = lock(&self.state);
        let layer = state.closed.get(&id.number);
        layer.is_some_and(|layer| layer.record.id == id)
    }

    /// Writes what `layers` have to the image, the newest of each part, in the order of the disk.
    fn write_to_image(&self, layers: &[LayerRecord], leave: &dyn Leave) -> Result<u64, RedoError> {
        let mut index = Index::default();
        let mut open: Vec<Layer> = Vec::new();
        for layer in layers {
            // Each record is looked at again: what was damaged meanwhile stays out of the image.
            open.push(self.log.load(self.directory.as_ref(), layer, &mut index)?);
        }
        let mut buffer = Vec::new();
        let mut written = 0;
        let failed = || RedoError::file("write", self.image_path.clone());
        for (range, place) in index.all() {
            if !leave.goes_on() {
                return Err(self.taken("is not folded any further: its guest ends here"));
            }
            let len = range.end - range.start;
            let file = open
                .iter()
                .find(|layer| layer.record.id.number == place.layer);
            match (place.position, file) {
                (Some(at), Some(layer)) => {
                    // A part is one of a record at most.
                    buffer.resize((len as usize).min(PAYLOAD_MAX), 0);
                    let read = layer.file.read_at(&mut buffer, at);
                    let name = || self.directory.path(&self.log.name(layer.record.id));
                    let read = read.map_err(RedoError::file("read", name()))?;
                    if read < buffer.len() {
                        return Err(RedoError::Damaged {
                            path: name(),
                            offset: at,
                            what: "it ends in the midst of a record".to_owned(),
                        });
                    }
                    self.image
                        .write_at(&buffer, range.start)
                        .map_err(failed())?;
                }
                _ => self.image.zero(range.start, len).map_err(failed())?,
            }
            written += len;
        }
        Ok(written)
    }

    fn tell_folded(&self, last: LayerId) -> Result<(), RedoError> {
        let path = || self.path();
        let head = self.head.read(self.directory.as_ref())?;
        let head = head.filter(|head| head.id == self.log.id);
        let head = head.ok_or_else(|| RedoError::Foreign {
            path: path(),
            what: "it is another one by now".to_owned(),
        })?;
        let told = self.head.fold(head, last);
        told.map_err(RedoError::file("write", path()))
    }

    /// Reads look for what is folded in the image from now on.
    fn forget(&self, last: LayerId) {
        let mut at = Some(0);
        while let Some(from) = at {
            at = lock(&self.state).index.forget_some(from, last.number);
        }
        let mut state = lock(&self.state);
        let kept = state.closed.split_off(&(last.number + 1));
        let gone = std::mem::replace(&mut state.closed, kept);
        let bytes: u64 = gone.values().map(|layer| layer.record.bytes).sum();
        state.bytes = state.bytes.saturating_sub(bytes);
        state.folded = last;
        state.asked = 0;
        drop(state);
        // Their files are closed without the lock.
        drop(gone);
    }
}
