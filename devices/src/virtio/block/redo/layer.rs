//! Layers: files that begin with a head, after which come [records](super::record).
//!
//! ```text
//!   0  magic and version (8)   the log's identity (16)
//!  24  the layer: term, number (8 each)   the one before it: term, number (8 each)
//!  56  XXH3 of all before, 64 bits
//! 512  records
//! ```

use std::collections::BTreeSet;
use std::io;
use std::path::Path;
use std::sync::Arc;

use xxhash_rust::xxh3::{xxh3_64, xxh3_64_with_seed};

use super::head::HeadFile;
use super::index::{Index, Place};
use super::record::{HEAD_SIZE, Record, next_digest, u64_at};
use super::{
    Directory, DiskRecord, ID_LENGTH, LAYERS_MAX, LayerId, LayerRecord, Local, RedoError, Storage,
};

const MAGIC: [u8; 8] = *b"TNDMRDL\x01";
const COVERED: usize = 56;
const FIELDS_SIZE: usize = 64;
/// Bytes in front of a layer's first record.
pub(super) const LAYER_HEAD_SIZE: usize = 512;
/// Bytes that are read ahead of records.
const READ_AHEAD: usize = 256 << 10;
/// Why there is no record at the end of a layer.
const ENDS: &str = "it ends here";
/// How often it is looked anew what was folded, while the one who folds removes layers.
const LOOKS_MAX: u32 = 8;

/// The names of a log's files, and its identity.
#[derive(Clone, Debug)]
pub(super) struct Log {
    pub(super) head: String,
    pub(super) id: [u8; ID_LENGTH],
    /// Bytes of the disk.
    pub(super) bytes: u64,
}

impl Log {
    /// Name of the file of a layer.
    pub(super) fn name(&self, layer: LayerId) -> String {
        format!("{}.{}-{}", self.head, layer.term, layer.number)
    }

    /// The layer whose file has this name.
    pub(super) fn parse(&self, name: &str) -> Option<LayerId> {
        let (term, number) = name
            .strip_prefix(&self.head)?
            .strip_prefix('.')?
            .split_once('-')?;
        let layer = LayerId {
            term: term.parse().ok()?,
            number: number.parse().ok()?,
        };
        (self.name(layer) == name).then_some(layer)
    }

    /// All layers that there are, whether they count or not.
    pub(super) fn layers(&self, directory: &dyn Directory) -> Result<BTreeSet<LayerId>, RedoError> {
        let names = directory.names(&format!("{}.", self.head));
        let names = names.map_err(RedoError::file("list", directory.path("")))?;
        Ok(names.iter().filter_map(|name| self.parse(name)).collect())
    }

    /// By what checksums of a layer's records are told from those of others.
    fn seed(&self, layer: LayerId) -> u64 {
        let numbers = [layer.term.to_le_bytes(), layer.number.to_le_bytes()].concat();
        xxh3_64_with_seed(&numbers, xxh3_64(&self.id))
    }

    /// Makes a layer after `before`, durably but for its name.
    pub(super) fn create(
        &self,
        directory: &dyn Directory,
        id: LayerId,
        before: LayerId,
    ) -> Result<Layer, RedoError> {
        let name = self.name(id);
        let made = directory.create(&name).and_then(|file| {
            let mut head = vec![0; LAYER_HEAD_SIZE];
            head[..8].copy_from_slice(&MAGIC);
            head[8..24].copy_from_slice(&self.id);
            let numbers = [id.term, id.number, before.term, before.number];
            for (at, number) in (24..).step_by(8).zip(numbers) {
                head[at..at + 8].copy_from_slice(&number.to_le_bytes());
            }
            let checksum = xxh3_64(&head[..COVERED]);
            head[COVERED..FIELDS_SIZE].copy_from_slice(&checksum.to_le_bytes());
            file.write_at(&head, 0)?;
            file.sync()?;
            Ok(file)
        });
        let file = made.map_err(RedoError::file("make", directory.path(&name)))?;
        Ok(self.layer(id, file))
    }

    fn layer(&self, id: LayerId, file: Arc<dyn Storage>) -> Layer {
        Layer {
            file,
            seed: self.seed(id),
            record: LayerRecord {
                id,
                bytes: LAYER_HEAD_SIZE as u64,
                records: 0,
                digest: 0,
            },
            durable: true,
        }
    }

    /// Opens a layer, of which the one before is returned too.
    fn open(
        &self,
        directory: &dyn Directory,
        id: LayerId,
    ) -> Result<(Arc<dyn Storage>, LayerId), RedoError> {
        let path = directory.path(&self.name(id));
        let file = directory.open(&self.name(id));
        let file = file.map_err(RedoError::file("open", path.clone()))?;
        let mut head = [0; FIELDS_SIZE];
        let read = file.read_at(&mut head, 0);
        let read = read.map_err(RedoError::file("read", path.clone()))?;
        let numbers = [24, 32, 40, 48].map(|at| u64_at(&head, at));
        let [term, number, term_before, number_before] = numbers;
        let sound = read == FIELDS_SIZE
            && head.starts_with(&MAGIC)
            && u64_at(&head, COVERED) == xxh3_64(&head[..COVERED]);
        if !sound || head[8..24] != self.id || (LayerId { term, number }) != id {
            return Err(RedoError::Damaged {
                path,
                offset: 0,
                what: "it does not begin as that layer of this log".to_owned(),
            });
        }
        let before = LayerId {
            term: term_before,
            number: number_before,
        };
        Ok((file, before))
    }

    /// Reads a layer that a checkpoint names into `index`.
    ///
    /// # Errors
    /// When it is not what was written.
    pub(super) fn load(
        &self,
        directory: &dyn Directory,
        named: &LayerRecord,
        index: &mut Index,
    ) -> Result<Layer, RedoError> {
        let (file, _) = self.open(directory, named.id)?;
        let mut layer = self.layer(named.id, file);
        let why = self.scan(directory, &mut layer, named.bytes, index)?;
        if layer.record == *named {
            return Ok(layer);
        }
        Err(RedoError::Damaged {
            path: directory.path(&self.name(named.id)),
            offset: layer.record.bytes,
            what: why
                .unwrap_or("its records are not those of the checkpoint")
                .to_owned(),
        })
    }

    /// Reads the records of a layer, up to `end`, into `index`. Why it ends before that, if it does.
    fn scan(
        &self,
        directory: &dyn Directory,
        layer: &mut Layer,
        end: u64,
        index: &mut Index,
    ) -> Result<Option<&'static str>, RedoError> {
        let id = layer.record.id;
        let path = || directory.path(&self.name(id));
        let file = Arc::clone(&layer.file);
        let mut window = Window::of(file.as_ref());
        while layer.record.bytes < end {
            let at = layer.record.bytes;
            let record = next_record(&mut window, at, layer.seed, self.bytes);
            let record = match record.map_err(RedoError::file("read", path()))? {
                Ok(record) => record,
                Err(why) => return Ok(Some(why)),
            };
            let place = Place {
                layer: id.number,
                position: (!record.zeros).then_some(at + HEAD_SIZE as u64),
            };
            index.insert(record.offset..record.offset + record.len, place);
            layer.record.took(&record);
        }
        Ok(None)
    }
}

/// The record at `at`, or why there is none.
fn next_record(
    window: &mut Window<'_>,
    at: u64,
    seed: u64,
    disk_bytes: u64,
) -> io::Result<Result<Record, &'static str>> {
    let Some(head) = window.get(at, HEAD_SIZE)?.and_then(<[u8]>::first_chunk) else {
        return Ok(Err(ENDS));
    };
    let head = *head;
    let Some(record) = Record::parse(&head, disk_bytes) else {
        return Ok(Err("there is no record"));
    };
    let content = window.get(at + HEAD_SIZE as u64, record.payload())?;
    Ok(match content {
        None => Err("a record goes on past its end"),
        Some(content) if !record.is_sound(&head, content, seed, at) => {
            Err("the checksum of a record does not fit")
        }
        Some(_) => Ok(record),
    })
}

/// Part of a file, which is read from its beginning to its end.
struct Window<'a> {
    file: &'a dyn Storage,
    from: u64,
    bytes: Vec<u8>,
}

impl<'a> Window<'a> {
    fn of(file: &'a dyn Storage) -> Self {
        Self {
            file,
            from: 0,
            bytes: Vec::new(),
        }
    }

    /// Bytes of the file; nothing if it does not have them.
    fn get(&mut self, at: u64, len: usize) -> io::Result<Option<&[u8]>> {
        let inside = |window: &Self| {
            let skip = at.checked_sub(window.from)? as usize;
            let end = skip.checked_add(len)?;
            (end <= window.bytes.len()).then_some(skip..end)
        };
        if inside(self).is_none() {
            self.bytes.resize(len.max(READ_AHEAD), 0);
            self.from = at;
            let read = self.file.read_at(&mut self.bytes, at)?;
            self.bytes.truncate(read);
        }
        Ok(inside(self).map(|range| &self.bytes[range]))
    }
}

impl LayerRecord {
    /// One more record is in it.
    pub(super) fn took(&mut self, record: &Record) {
        self.added(record.payload(), record.checksum);
    }

    /// As that, with so many bytes of content.
    pub(super) fn added(&mut self, payload: usize, checksum: u64) {
        self.bytes += (HEAD_SIZE + payload) as u64;
        self.records += 1;
        self.digest = next_digest(self.digest, checksum);
    }
}

/// A layer that is open.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    pub(super) file: Arc<dyn Storage>,
    pub(super) seed: u64,
    pub(super) record: LayerRecord,
    /// Whether all of it is.
    pub(super) durable: bool,
}

/// Layers of a disk that are not folded, and where in them what is.
#[derive(Debug, Default)]
pub struct Chain {
    pub(super) folded: LayerId,
    pub(super) layers: Vec<Layer>,
    pub(super) index: Index,
}

impl Chain {
    /// The newest layer of the disk.
    pub(super) fn newest(&self) -> LayerId {
        self.layers
            .last()
            .map_or(self.folded, |layer| layer.record.id)
    }

    /// That of a checkpoint.
    ///
    /// # Errors
    /// When the image has other layers than were before its own, or one of them is damaged.
    pub(super) fn of(
        log: &Log,
        head: &HeadFile,
        directory: &dyn Directory,
        disk: &DiskRecord,
    ) -> Result<Self, RedoError> {
        for _ in 0..LOOKS_MAX {
            let found = head.read(directory)?.map(|head| (head.id, head.folded));
            let Some((_, folded)) = found.filter(|(id, _)| *id == disk.id && *id == log.id) else {
                return Err(RedoError::Foreign {
                    path: directory.path(&head.name),
                    what: "it has another identity than the checkpoint says".to_owned(),
                });
            };
            match Self::after(log, directory, disk, folded) {
                // Who folds may have removed it since.
                Err(RedoError::File { source, .. })
                    if source.kind() == io::ErrorKind::NotFound
                        && head.read(directory)?.map(|head| head.folded) != Some(folded) => {}
                chain => return chain,
            }
        }
        Err(RedoError::Taken {
            path: directory.path(&head.name),
            what: "is being folded by another, again and again",
        })
    }

    fn after(
        log: &Log,
        directory: &dyn Directory,
        disk: &DiskRecord,
        folded: LayerId,
    ) -> Result<Self, RedoError> {
        let needed = needed(disk, folded).map_err(|what| RedoError::Image {
            path: disk.image.clone(),
            what: format!("{what}: {}", told(folded, disk)),
        })?;
        let mut chain = Self {
            folded,
            ..Self::default()
        };
        for named in needed {
            let layer = log.load(directory, named, &mut chain.index)?;
            chain.layers.push(layer);
        }
        Ok(chain)
    }

    /// All that was written and can be read, of a guest of which nothing else is left. What follows on something that is
    /// torn is not.
    pub(super) fn recover(
        log: &Log,
        directory: &dyn Directory,
        folded: LayerId,
    ) -> Result<Self, RedoError> {
        let mut chain = Self {
            folded,
            ..Self::default()
        };
        let all = log.layers(directory)?;
        // The newest owner's last one, or who was before it if that wrote nothing at all.
        let line = all
            .iter()
            .rev()
            .find_map(|newest| lineage(log, directory, *newest, folded));
        for id in line.unwrap_or_default() {
            let (file, _) = log.open(directory, id)?;
            let mut layer = log.layer(id, file);
            let why = log.scan(directory, &mut layer, u64::MAX, &mut chain.index)?;
            // What is read may be in memory only.
            layer.durable = false;
            let (at, records) = (layer.record.bytes, layer.record.records);
            if records > 0 {
                chain.layers.push(layer);
            }
            if let Some(why) = why.filter(|why| *why != ENDS) {
                let path = directory.path(&log.name(id));
                tracing::warn!(path = %path.display(), at, why, "the rest of a redo log is torn, and left out");
                break;
            }
        }
        Ok(chain)
    }
}

/// The layers from the one after `folded` to `newest`, each of which says which was before it. Nothing if they do not
/// lead there.
fn lineage(
    log: &Log,
    directory: &dyn Directory,
    newest: LayerId,
    folded: LayerId,
) -> Option<Vec<LayerId>> {
    let mut line = Vec::new();
    let mut at = newest;
    while at != folded {
        if line.len() > LAYERS_MAX || at.number <= folded.number {
            return None;
        }
        line.push(at);
        let (_, before) = log.open(directory, at).ok()?;
        at = before;
    }
    line.reverse();
    Some(line)
}

/// Layers of `disk` that an image does not have which has all up to `folded`; or why there is no saying.
pub(super) fn needed(disk: &DiskRecord, folded: LayerId) -> Result<&[LayerRecord], &'static str> {
    if folded == disk.folded {
        return Ok(&disk.layers);
    }
    let at = disk.layers.iter().position(|layer| layer.id == folded);
    match at {
        Some(at) => Ok(&disk.layers[at + 1..]),
        None if folded.number < disk.folded.number => {
            Err("is older than the checkpoint's disk was")
        }
        None => Err("is newer than the checkpoint's disk was"),
    }
}

fn told(folded: LayerId, disk: &DiskRecord) -> String {
    let newest = disk.newest();
    format!(
        "layer {}-{} was folded into it, and the checkpoint ends with {}-{}",
        folded.term, folded.number, newest.term, newest.number
    )
}

/// Reads all that the disk of a checkpoint needs of its log, as its files are now. Returns its bytes.
///
/// # Errors
/// When something is missing, not what was written, or cannot be read.
pub fn verify(disk: &DiskRecord) -> Result<u64, RedoError> {
    let (.., chain) = read_chain(disk)?;
    Ok(chain.layers.iter().map(|layer| layer.record.bytes).sum())
}

/// The layers of a checkpoint's disk, each of which is read and checked, and where they are: nothing is locked or made.
pub(super) fn read_chain(disk: &DiskRecord) -> Result<(Local, HeadFile, Chain), RedoError> {
    let (directory, head) = open_to_read(&disk.log)?;
    let log = Log {
        head: head.name.clone(),
        id: disk.id,
        bytes: disk.bytes,
    };
    let chain = Chain::of(&log, &head, &directory, disk)?;
    Ok((directory, head, chain))
}

fn open_to_read(path: &Path) -> Result<(Local, HeadFile), RedoError> {
    let opened = std::fs::File::open(path).and_then(|file| {
        let directory = Local::of(path, file.try_clone()?)?;
        Ok((directory, file))
    });
    let (directory, file) = opened.map_err(RedoError::file("open", path.to_owned()))?;
    Ok((
        directory,
        HeadFile {
            file: Arc::new(file),
            name: name_of(path)?,
        },
    ))
}

/// The name of a head, of which those of layers are made.
pub(super) fn name_of(path: &Path) -> Result<String, RedoError> {
    let name = path.file_name().and_then(|name| name.to_str());
    name.map(str::to_owned).ok_or_else(|| RedoError::Foreign {
        path: path.to_owned(),
        what: "its name must be that of a file, in UTF-8".to_owned(),
    })
}
