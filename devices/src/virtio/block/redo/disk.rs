//! A disk whose writes go to a redo log.

use std::collections::BTreeMap;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use rustix::fs::{Advice, FlockOperation, fadvise, flock};
use vmm_sys_util::eventfd::EventFd;

use super::head::{Head, HeadFile};
use super::index::{Index, Place};
use super::layer::{Chain, LAYER_HEAD_SIZE, Layer, Log, name_of};
use super::record::{HEAD_SIZE, put_head};
use super::{
    Directory, DiskRecord, LayerId, LayerRecord, Limits, Local, PAYLOAD_MAX, RedoError, Storage,
};
use crate::virtio::block::threads::Serve;
use crate::virtio::block::{BlockIo, DiskError, Operation, SECTOR};

/// Layers of the disk that are not folded, but for the one that is written to.
#[derive(Debug, Default)]
pub(super) struct State {
    pub(super) closed: BTreeMap<u64, Layer>,
    /// The file that is written to, and its number.
    current: Option<(u64, Arc<dyn Storage>)>,
    pub(super) index: Index,
    /// What the image has.
    pub(super) folded: LayerId,
    /// Bytes of all layers.
    pub(super) bytes: u64,
    /// Those of them that a fold has been asked for.
    pub(super) asked: u64,
}

/// The layer that is written to.
#[derive(Debug)]
pub(super) struct Tail {
    layer: Layer,
    /// A record on its way.
    buffer: Vec<u8>,
    /// The host lost what was to be durable: nothing can be, ever again.
    broken: bool,
}

/// A disk with a redo log: reads look there first, and writes go there alone.
#[derive(Debug)]
pub struct RedoDisk {
    pub(super) log: Log,
    pub(super) head: HeadFile,
    pub(super) directory: Arc<dyn Directory>,
    pub(super) image: Arc<dyn Storage>,
    pub(super) image_path: PathBuf,
    /// The image, which is locked as long as this is open; none in tests.
    lock: Option<File>,
    limits: Limits,
    /// Locked before `state`. None before the log was begun, and after its end.
    pub(super) tail: Mutex<Option<Tail>>,
    /// Locked while somebody flushes: who comes meanwhile has to wait for that too.
    flushing: Mutex<()>,
    pub(super) state: Mutex<State>,
    /// The layer that comes after the one that is written to. Locked while files are made or removed.
    pub(super) prepared: Mutex<Option<Layer>>,
    /// The owner's term.
    pub(super) term: Mutex<u64>,
    /// By which the device is told that there is room again.
    wake: Mutex<Option<EventFd>>,
}

impl Tail {
    /// Number of the layer.
    pub(super) fn number(&self) -> u64 {
        self.layer.record.id.number
    }
}

pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn no_log() -> io::Error {
    io::Error::other("the disk's redo log has not begun, or has ended")
}

impl RedoDisk {
    /// Opens the log with the head `path`, which is made if there is none, of an image that is open. Others may have the
    /// same image open with its log, but nobody without.
    ///
    /// # Errors
    /// When either is used by another, the head is another file, or the host refuses.
    pub fn open(
        path: &Path,
        image: File,
        image_path: &Path,
        bytes: u64,
    ) -> Result<Self, RedoError> {
        // Checkpoints name it for processes elsewhere.
        let absolute = |path: &Path| std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let (path, image_path) = (&absolute(path), &absolute(image_path));
        let failed = || RedoError::file("open", path.to_owned());
        let image_failed = || RedoError::file("open", image_path.to_owned());
        let lock = image.try_clone().map_err(image_failed())?;
        if flock(&lock, FlockOperation::NonBlockingLockShared).is_err() {
            return Err(RedoError::Image {
                path: image_path.to_owned(),
                what: "is locked: another guest uses it without its redo log".to_owned(),
            });
        }
        let mut options = File::options();
        let options = options.read(true).write(true).create(true).truncate(false);
        let file = options.open(path).map_err(failed())?;
        let locked = file.try_clone().map_err(failed())?;
        let directory = Local::of(path, locked).map_err(failed())?;
        let disk = Self::on(
            Arc::new(directory),
            (Arc::new(file), name_of(path)?),
            (Arc::new(image), image_path.to_owned()),
            bytes,
            Limits::default(),
        )?;
        Ok(Self {
            lock: Some(lock),
            ..disk
        })
    }

    /// As [`RedoDisk::open`], of files wherever they are.
    pub(super) fn on(
        directory: Arc<dyn Directory>,
        (file, name): (Arc<dyn Storage>, String),
        (image, image_path): (Arc<dyn Storage>, PathBuf),
        bytes: u64,
        limits: Limits,
    ) -> Result<Self, RedoError> {
        let head = HeadFile {
            file,
            name: name.clone(),
        };
        let Head { id, .. } = head.open(directory.as_ref(), bytes)?;
        Ok(Self {
            log: Log {
                head: name,
                id,
                bytes,
            },
            head,
            directory,
            image,
            image_path,
            lock: None,
            limits,
            tail: Mutex::default(),
            flushing: Mutex::default(),
            state: Mutex::default(),
            prepared: Mutex::default(),
            term: Mutex::default(),
            wake: Mutex::default(),
        })
    }

    /// Path of the image.
    pub fn image_path(&self) -> &Path {
        &self.image_path
    }

    /// Path of the log's head.
    pub fn path(&self) -> PathBuf {
        self.directory.path(&self.log.head)
    }

    /// Whether `disk` is of this log and its image.
    ///
    /// # Errors
    /// When it is not.
    pub fn expect(&self, disk: &DiskRecord) -> Result<(), RedoError> {
        let what = match (disk.id == self.log.id, disk.bytes == self.log.bytes) {
            (true, true) => return Ok(()),
            (false, _) => format!(
                "the checkpoint's is `{}`, and another one",
                disk.log.display()
            ),
            (true, false) => format!(
                "the checkpoint's disk has {} bytes, and the image {}",
                disk.bytes, self.log.bytes
            ),
        };
        let path = self.path();
        Err(RedoError::Foreign { path, what })
    }

    /// The layers of a checkpoint's disk, each of which is read and checked.
    ///
    /// # Errors
    /// When the image is not what they are for, or one of them is missing or damaged.
    pub fn chain_of(&self, disk: &DiskRecord) -> Result<Chain, RedoError> {
        self.forget_cached();
        self.expect(disk)?;
        Chain::of(&self.log, &self.head, self.directory.as_ref(), disk)
    }

    /// All layers that there are of a guest that begins anew: what was written last, of what can be read. Nobody else
    /// may have the image open.
    ///
    /// # Errors
    /// When somebody has, or the log cannot be read.
    pub fn recover(&self) -> Result<Chain, RedoError> {
        self.expect_alone()?;
        self.forget_cached();
        let head = self.head.open(self.directory.as_ref(), self.log.bytes)?;
        Chain::recover(&self.log, self.directory.as_ref(), head.folded)
    }

    /// Fails if anybody else has the image open.
    ///
    /// # Errors
    /// When somebody has.
    pub fn expect_alone(&self) -> Result<(), RedoError> {
        let Some(lock) = &self.lock else {
            return Ok(());
        };
        let alone = flock(lock, FlockOperation::NonBlockingLockExclusive);
        // Whatever became of it: who resumes this guest is not kept away.
        let shared = flock(lock, FlockOperation::NonBlockingLockShared);
        match alone.and(shared) {
            Ok(()) => Ok(()),
            Err(_) => Err(DiskError::Locked {
                path: self.image_path.clone(),
                readonly: false,
            }
            .into()),
        }
    }

    /// What another host wrote to the image is read from where it is.
    fn forget_cached(&self) {
        if let Some(image) = &self.lock {
            // It only says what is not needed.
            let _ = fadvise(image, 0, None, Advice::DontNeed);
        }
    }

    /// Goes on after `chain`, in the term that the guest's owner has: the guest may read and write from now on.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn begin(&self, chain: Chain, term: u64) -> Result<(), RedoError> {
        let newest = chain.newest();
        let first = self.create(term, newest)?;
        let mut tail = lock(&self.tail);
        let mut state = lock(&self.state);
        state.folded = chain.folded;
        state.index = chain.index;
        let layers = chain.layers.into_iter();
        state.closed = layers
            .map(|layer| (layer.record.id.number, layer))
            .collect();
        let bytes = state.closed.values().map(|layer| layer.record.bytes);
        state.bytes = bytes.sum::<u64>() + LAYER_HEAD_SIZE as u64;
        state.current = Some((first.record.id.number, Arc::clone(&first.file)));
        *lock(&self.term) = term;
        *tail = Some(Tail {
            layer: first,
            buffer: Vec::new(),
            broken: false,
        });
        Ok(())
    }

    /// Makes the layer after `before`, durably.
    fn create(&self, term: u64, before: LayerId) -> Result<Layer, RedoError> {
        let number = before.number + 1;
        let directory = self.directory.as_ref();
        let layer = self
            .log
            .create(directory, LayerId { term, number }, before)?;
        let named = directory.sync();
        named.map_err(RedoError::file("write", directory.path("")))?;
        Ok(layer)
    }

    /// Makes the layer that is to be the next one, if there is none yet; the guest may run.
    ///
    /// # Errors
    /// When the host refuses.
    pub fn prepare(&self) -> Result<(), RedoError> {
        let mut prepared = lock(&self.prepared);
        if prepared.is_none() {
            let current = lock(&self.tail).as_ref().map(|tail| tail.layer.record.id);
            let current = current.ok_or_else(|| self.ended())?;
            *prepared = Some(self.create(current.term, current)?);
        }
        Ok(())
    }

    fn ended(&self) -> RedoError {
        let path = self.path();
        RedoError::file("write to", path)(no_log())
    }

    /// Closes the layer that is written to, if there is anything in it, and begins the one that was prepared. The guest
    /// stands, and has no request in flight. What its disk is then.
    ///
    /// # Errors
    /// When no layer was prepared.
    pub fn cut(&self, disk: u8) -> Result<DiskRecord, RedoError> {
        let mut prepared = lock(&self.prepared);
        let mut tail = lock(&self.tail);
        let mut state = lock(&self.state);
        let tail = tail.as_mut().ok_or_else(|| self.ended())?;
        if tail.layer.record.records > 0 {
            let next = prepared.take().ok_or_else(|| self.ended())?;
            state.current = Some((next.record.id.number, Arc::clone(&next.file)));
            state.bytes += LAYER_HEAD_SIZE as u64;
            let closed = std::mem::replace(&mut tail.layer, next);
            state.closed.insert(closed.record.id.number, closed);
        }
        Ok(DiskRecord {
            disk,
            image: self.image_path.clone(),
            log: self.path(),
            id: self.log.id,
            bytes: self.log.bytes,
            folded: state.folded,
            layers: state.closed.values().map(|layer| layer.record).collect(),
        })
    }

    /// Makes all closed layers durable.
    ///
    /// # Errors
    /// When the host does not, or did not before.
    pub fn seal(&self) -> Result<(), RedoError> {
        let sealed = self.sync_closed();
        sealed.map_err(RedoError::file("make durable", self.path()))
    }

    fn sync_closed(&self) -> io::Result<()> {
        self.expect_unbroken()?;
        let open: Vec<(u64, Arc<dyn Storage>)> = lock(&self.state)
            .closed
            .iter()
            .filter(|(_, layer)| !layer.durable)
            .map(|(number, layer)| (*number, Arc::clone(&layer.file)))
            .collect();
        for (number, file) in open {
            self.sync_file(file.as_ref())?;
            if let Some(layer) = lock(&self.state).closed.get_mut(&number) {
                layer.durable = true;
            }
        }
        Ok(())
    }

    /// Makes a file durable. What the host could not once is lost: it may say that it can the next time.
    fn sync_file(&self, file: &dyn Storage) -> io::Result<()> {
        self.expect_unbroken()?;
        file.sync().inspect_err(|error| {
            let path = self.path();
            tracing::error!(%error, path = %path.display(), "a redo log is not durable: there are no more checkpoints");
            if let Some(tail) = lock(&self.tail).as_mut() {
                tail.broken = true;
            }
        })
    }

    fn expect_unbroken(&self) -> io::Result<()> {
        match lock(&self.tail).as_ref().is_some_and(|tail| tail.broken) {
            true => Err(io::Error::other(
                "the host failed to make the redo log durable before",
            )),
            false => Ok(()),
        }
    }

    fn flush(&self) -> io::Result<()> {
        let _alone = lock(&self.flushing);
        let current = {
            let mut tail = lock(&self.tail);
            let tail = tail.as_mut().ok_or_else(no_log)?;
            // What is written from now on is not.
            let dirty = !std::mem::replace(&mut tail.layer.durable, true);
            dirty.then(|| Arc::clone(&tail.layer.file))
        };
        self.sync_closed()?;
        current.map_or(Ok(()), |file| self.sync_file(file.as_ref()))
    }

    fn read(&self, io: &BlockIo) -> io::Result<()> {
        let mut buffer = vec![0; PAYLOAD_MAX.min(io.len as usize)];
        for range in pieces(io.offset, io.len) {
            let content = &mut buffer[..(range.end - range.start) as usize];
            self.read_range(content, range.start)?;
            io.buffers
                .write_at((range.start - io.offset) as usize, content);
        }
        Ok(())
    }

    /// Reads what the disk has at `offset`.
    pub(super) fn read_range(&self, into: &mut [u8], offset: u64) -> io::Result<()> {
        let range = offset..offset + into.len() as u64;
        for (part, source) in self.sources(range)? {
            let content = &mut into[(part.start - offset) as usize..(part.end - offset) as usize];
            match source {
                Source::Zeros => content.fill(0),
                Source::File(file, at) => {
                    let read = file.read_at(content, at)?;
                    if read < content.len() {
                        return Err(self.shrunk());
                    }
                }
            }
        }
        Ok(())
    }

    fn shrunk(&self) -> io::Error {
        let path = self.image_path.display();
        let reason = format!("disk {path} or its redo log is shorter than it was");
        io::Error::new(io::ErrorKind::UnexpectedEof, reason)
    }

    fn sources(&self, range: Range<u64>) -> io::Result<Vec<(Range<u64>, Source)>> {
        let state = lock(&self.state);
        let (current, file) = state.current.as_ref().ok_or_else(no_log)?;
        let source = |start: u64, place: Option<Place>| match place {
            None => Ok::<_, io::Error>(Source::File(Arc::clone(&self.image), start)),
            Some(Place { position: None, .. }) => Ok(Source::Zeros),
            Some(Place { layer, position }) => {
                let file = match layer == *current {
                    true => Some(file),
                    false => state.closed.get(&layer).map(|layer| &layer.file),
                };
                let file = file.ok_or_else(|| io::Error::other("a layer of the log is missing"))?;
                Ok(Source::File(Arc::clone(file), position.unwrap_or(0)))
            }
        };
        let parts = state.index.parts(range).into_iter();
        parts
            .map(|(part, place)| Ok((part.clone(), source(part.start, place)?)))
            .collect()
    }

    fn write(&self, io: &BlockIo) -> io::Result<()> {
        for range in pieces(io.offset, io.len) {
            let skip = (range.start - io.offset) as usize;
            self.append(range, false, |content| {
                io.buffers.read_at(skip, content);
            })?;
        }
        Ok(())
    }

    /// Writes a record of what `fill` puts into it, or of zeros.
    pub(super) fn append(
        &self,
        range: Range<u64>,
        zeros: bool,
        fill: impl FnOnce(&mut [u8]),
    ) -> io::Result<()> {
        let len = range.end - range.start;
        let payload = if zeros { 0 } else { len as usize };
        let mut tail = lock(&self.tail);
        let Tail { layer, buffer, .. } = tail.as_mut().ok_or_else(no_log)?;
        buffer.resize(HEAD_SIZE + payload, 0);
        fill(&mut buffer[HEAD_SIZE..]);
        let at = layer.record.bytes;
        let checksum = put_head(buffer, (range.start, len), zeros, layer.seed, at);
        layer.durable = false;
        layer.file.write_at(buffer, at)?;
        layer.record.added(payload, checksum);
        let place = Place {
            layer: layer.record.id.number,
            position: (!zeros).then_some(at + HEAD_SIZE as u64),
        };
        let mut state = lock(&self.state);
        state.index.insert(range, place);
        state.bytes += buffer.len() as u64;
        Ok(())
    }

    /// Whether a checkpoint is wanted early, so that what is in the log can be folded before writes have to wait.
    pub fn wants_checkpoint(&self) -> bool {
        let state = lock(&self.state);
        let bytes = state.bytes.saturating_sub(state.asked);
        let Limits {
            bytes: bytes_max,
            extents,
            layers,
        } = self.limits;
        // What a fold was asked for is not helped by another checkpoint.
        let alone = state.asked == 0;
        bytes > bytes_max / 2
            || alone && (state.index.len() > extents / 2 || state.closed.len() > layers / 2)
    }

    /// Whether the log takes more.
    fn has_space(&self) -> bool {
        let state = lock(&self.state);
        let Limits {
            bytes,
            extents,
            layers,
        } = self.limits;
        state.bytes < bytes && state.index.len() < extents && state.closed.len() < layers
    }

    /// Lets the device look whether there is room.
    pub(super) fn wake(&self) {
        if let Some(event) = lock(&self.wake).as_ref()
            && let Err(error) = event.write(1)
        {
            tracing::error!(%error, "cannot wake a disk");
        }
    }

    /// Bytes of layers that are not folded.
    pub fn log_bytes(&self) -> u64 {
        lock(&self.state).bytes
    }

    /// What closed layers have, for a fold up to the one with this number.
    pub(super) fn closed_up_to(&self, number: u64) -> Vec<LayerRecord> {
        let state = lock(&self.state);
        let closed = state.closed.range(..=number);
        closed.map(|(_, layer)| layer.record).collect()
    }

    /// Nothing is written any more, and no request is in flight: the last layer is closed too.
    pub(super) fn end(&self) {
        let mut tail = lock(&self.tail);
        let mut state = lock(&self.state);
        if let Some(tail) = tail.take()
            && tail.layer.record.records > 0
        {
            let number = tail.layer.record.id.number;
            state.closed.insert(number, tail.layer);
        }
    }
}

/// Where a part of the disk is.
enum Source {
    Zeros,
    File(Arc<dyn Storage>, u64),
}

/// A range in pieces that fit into a record.
pub(super) fn pieces(offset: u64, len: u64) -> impl Iterator<Item = Range<u64>> {
    let end = offset + len;
    let starts = (offset..end).step_by(PAYLOAD_MAX);
    starts.map(move |start| start..end.min(start + PAYLOAD_MAX as u64))
}

impl Serve for RedoDisk {
    fn sectors(&self) -> u64 {
        self.log.bytes / SECTOR
    }

    fn block_size(&self) -> u32 {
        SECTOR as u32
    }

    fn is_readonly(&self) -> bool {
        false
    }

    fn has_room(&self) -> bool {
        self.has_space()
    }

    fn woken_by(&self, event: EventFd) {
        *lock(&self.wake) = Some(event);
    }

    fn figures(&self) -> Vec<(&'static str, u64)> {
        let (bytes, layers) = {
            let state = lock(&self.state);
            (state.bytes, state.closed.len() as u64)
        };
        vec![
            ("redo_bytes", bytes),
            ("redo_layers", layers),
            ("redo_full", u64::from(!self.has_space())),
        ]
    }

    fn execute(&self, io: BlockIo) -> io::Result<()> {
        match io.operation {
            Operation::Read => self.read(&io),
            Operation::Write { durable } => {
                self.write(&io)?;
                if durable { self.flush() } else { Ok(()) }
            }
            Operation::Flush => self.flush(),
            Operation::Discard | Operation::WriteZeroes { .. } => {
                self.append(io.offset..io.offset + io.len, true, |_| {})
            }
        }
    }
}

impl From<DiskError> for RedoError {
    fn from(error: DiskError) -> Self {
        let path = match &error {
            DiskError::Open { path, .. }
            | DiskError::Kind { path, .. }
            | DiskError::Empty { path, .. }
            | DiskError::Locked { path, .. }
            | DiskError::Engine { path, .. } => path.clone(),
        };
        Self::File {
            action: "use",
            path,
            source: io::Error::other(error),
        }
    }
}
