//! The file beside an image that keeps its [`Bitmap`], durably.
//!
//! ```text
//!   +----------------------- slot 0 -----------------------+--- slot 1 ---+
//!   | magic 8 | version 4 | length 4 | sequence 8 | sum 16 | bitmap | ... |
//!   +------------------------------------------------------+--------------+
//! ```
//!
//! Integers are little-endian; the sum is XXH3 (128 bits) of all but itself. Bitmaps are written to both slots in turn,
//! and each is durable before anything depends on it: so one of them is whole whenever the host stops, and the one with
//! the higher sequence counts. What is neither, or of another version, says nothing.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use xxhash_rust::xxh3::Xxh3;

use super::bitmap::{Bitmap, Regions};

/// What the name of an image's sidecar has besides the image's.
const SUFFIX: &str = ".tandem";
const MAGIC: [u8; 8] = *b"TNDMBMP\x1a";
const VERSION: u32 = 1;
/// Bytes before the sum.
const FRONT: usize = 24;
/// Bytes before a bitmap.
const HEAD: usize = FRONT + 16;
/// Slots are whole sectors of any disk.
const ALIGN: usize = 4096;
/// Bytes of a sidecar, at most.
const BYTES_MAX: u64 = 4 << 20;

/// Where the sidecar of the image at `path` is.
pub(crate) fn beside(path: &Path) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(SUFFIX);
    name.into()
}

/// Where a sidecar's bytes are.
pub(crate) trait Storage {
    fn length(&self) -> io::Result<u64>;
    fn set_length(&self, length: u64) -> io::Result<()>;
    fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()>;
    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()>;
    fn sync(&self) -> io::Result<()>;
}

impl Storage for File {
    fn length(&self) -> io::Result<u64> {
        Ok(self.metadata()?.len())
    }

    fn set_length(&self, length: u64) -> io::Result<()> {
        self.set_len(length)
    }

    fn read(&self, at: u64, bytes: &mut [u8]) -> io::Result<()> {
        self.read_exact_at(bytes, at)
    }

    fn write(&self, at: u64, bytes: &[u8]) -> io::Result<()> {
        self.write_all_at(bytes, at)
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_data()
    }
}

/// What a sidecar says.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum Said {
    /// It is new.
    Nothing,
    /// It cannot be understood: why.
    Garbage(String),
    /// A bitmap.
    Bitmap(Bitmap),
}

/// The sidecar of an image.
#[derive(Debug)]
pub(crate) struct Sidecar<S> {
    storage: S,
    /// Of the last bitmap.
    sequence: u64,
    /// Bytes of a slot; 0 if there are none that can be used.
    slot: usize,
}

impl<S: Storage> Sidecar<S> {
    /// Opens one, and says what it says.
    ///
    /// # Errors
    /// When it cannot be read.
    pub(crate) fn open(storage: S) -> io::Result<(Self, Said)> {
        let length = storage.length()?;
        let mut sidecar = Self {
            storage,
            sequence: 0,
            slot: 0,
        };
        if length == 0 {
            return Ok((sidecar, Said::Nothing));
        }
        if length > BYTES_MAX || !length.is_multiple_of(2 * ALIGN as u64) {
            return Ok((sidecar, Said::Garbage(format!("it has {length} bytes"))));
        }
        let mut bytes = vec![0; length as usize];
        sidecar.storage.read(0, &mut bytes)?;
        let slot = bytes.len() / 2;
        let found = bytes.chunks(slot).map(parse);
        let said = found.reduce(newer).unwrap_or(Ok((0, None)));
        Ok(match said {
            Ok((sequence, Some(bitmap))) => {
                (sidecar.sequence, sidecar.slot) = (sequence, slot);
                (sidecar, Said::Bitmap(bitmap))
            }
            Ok((_, None)) => (sidecar, Said::Nothing),
            Err(why) => (sidecar, Said::Garbage(why)),
        })
    }

    /// Keeps a bitmap: it is durable after that.
    ///
    /// # Errors
    /// When it cannot be written. The one before counts then, or this one.
    pub(crate) fn store(&mut self, bitmap: &Bitmap) -> io::Result<()> {
        let slot = slot_size(bitmap);
        if self.slot != slot {
            // What it said was of another image, or nothing.
            self.slot = 0;
            self.storage.set_length(0)?;
            self.storage.set_length(2 * slot as u64)?;
        }
        let sequence = self.sequence + 1;
        let bytes = to_slot(sequence, bitmap);
        assert!(bytes.len() <= slot, "slots have room for any bitmap");
        let at = (sequence % 2) * slot as u64;
        self.storage.write(at, &bytes)?;
        self.storage.sync()?;
        (self.sequence, self.slot) = (sequence, slot);
        Ok(())
    }

    /// Keeps a bitmap and none before it.
    ///
    /// # Errors
    /// As [`Sidecar::store`].
    pub(crate) fn store_alone(&mut self, bitmap: &Bitmap) -> io::Result<()> {
        self.store(bitmap)?;
        self.store(bitmap)
    }

    /// Makes it one that says nothing.
    ///
    /// # Errors
    /// When it cannot be written.
    pub(crate) fn clear(&mut self) -> io::Result<()> {
        self.slot = 0;
        self.storage.set_length(0)?;
        self.storage.sync()
    }
}

fn slot_size(bitmap: &Bitmap) -> usize {
    let regions = Regions::of(bitmap.bytes).count();
    (HEAD + Bitmap::bytes_max(regions)).next_multiple_of(ALIGN)
}

fn sum(front: &[u8], body: &[u8]) -> [u8; 16] {
    let mut sum = Xxh3::new();
    sum.update(front);
    sum.update(body);
    sum.digest128().to_le_bytes()
}

fn to_slot(sequence: u64, bitmap: &Bitmap) -> Vec<u8> {
    let body = bitmap.to_bytes();
    let mut bytes = MAGIC.to_vec();
    bytes.extend(VERSION.to_le_bytes());
    bytes.extend((body.len() as u32).to_le_bytes());
    bytes.extend(sequence.to_le_bytes());
    let sum = sum(&bytes, &body);
    bytes.extend(sum);
    bytes.extend(body);
    bytes
}

/// What a slot has: the sequence and the bitmap, nothing, or why it cannot be understood.
type Slot = Result<(u64, Option<Bitmap>), String>;

fn parse(slot: &[u8]) -> Slot {
    let (front, rest) = slot.split_at(FRONT);
    if front.iter().all(|byte| *byte == 0) {
        return Ok((0, None));
    }
    let torn = || "it is damaged".to_owned();
    let number = |at: usize| front[at..].first_chunk().copied().map(u32::from_le_bytes);
    if front[..8] != MAGIC {
        return Err("it is something else".into());
    }
    let version = number(8).ok_or_else(torn)?;
    if version != VERSION {
        return Err(format!("it has version {version}: {VERSION} is known"));
    }
    let length = number(12).ok_or_else(torn)? as usize;
    let (told, rest) = rest.split_first_chunk::<16>().ok_or_else(torn)?;
    let body = rest.get(..length).ok_or_else(torn)?;
    if sum(front, body) != *told {
        return Err(torn());
    }
    let sequence = front[16..].first_chunk().copied().map(u64::from_le_bytes);
    let bitmap = Bitmap::from_bytes(body).ok_or_else(torn)?;
    Ok((sequence.ok_or_else(torn)?, Some(bitmap)))
}

/// The one of two slots that counts. One that is being written when the host stops is damaged, and does not.
fn newer(one: Slot, other: Slot) -> Slot {
    match (one, other) {
        (Ok(one), Ok(other)) => Ok(if one.0 > other.0 { one } else { other }),
        (Ok(found @ (_, Some(_))), Err(why)) | (Err(why), Ok(found @ (_, Some(_)))) => {
            // A later version's is no half of ours.
            if why.contains("version") {
                Err(why)
            } else {
                Ok(found)
            }
        }
        (Err(why), _) | (_, Err(why)) => Err(why),
    }
}
