//! Batches of pages of guest memory.
//!
//! ```text
//!   count, 4 | count x frame number, 8, highest bit: the page is zero | contents of the others, 4,096 each
//! ```

use std::io::Write;

use tandem_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::MigrationError;
use super::frame::{self, Kind};
use crate::control::Saving;
use crate::dirty::{PAGE_SIZE, PageSet};
use crate::memory_image::touched_frames;
use crate::snapshot::SnapshotError;
use crate::snapshot::save::PageSink;

/// Pages in a batch that is sent, at most.
pub const BATCH_PAGES: usize = 256;
/// Bytes of a page.
pub const PAGE: usize = PAGE_SIZE as usize;
/// What is in a page.
pub type Page = [u8; PAGE];
const ZERO: u64 = 1 << 63;

/// Pages copied out of guest memory.
#[derive(Default)]
pub struct Batch {
    numbers: Vec<u64>,
    contents: Vec<u8>,
}

impl Batch {
    /// Whether it is as large as what is sent at once.
    pub fn is_full(&self) -> bool {
        self.numbers.len() >= BATCH_PAGES
    }

    /// Whether it has no pages.
    pub fn is_empty(&self) -> bool {
        self.numbers.is_empty()
    }

    /// Its pages by frame, in the order in which they were added; without content if they are zero.
    pub fn pages(&self) -> impl Iterator<Item = (u64, Option<&Page>)> {
        let (mut contents, _) = self.contents.as_chunks::<PAGE>();
        self.numbers.iter().map(move |number| {
            if number & ZERO != 0 {
                return (number & !ZERO, None);
            }
            let page = contents.split_off_first();
            debug_assert!(page.is_some(), "every other page has its content");
            (*number, page)
        })
    }

    /// Bytes of its pages that are not zero.
    pub fn bytes(&self) -> u64 {
        self.contents.len() as u64
    }

    /// Bytes of memory that it takes.
    pub fn memory_bytes(&self) -> u64 {
        (self.numbers.capacity() * size_of::<u64>() + self.contents.capacity()) as u64
    }

    /// Forgets its pages, and keeps room for `bytes` bytes of pages.
    pub fn clear(&mut self, bytes: usize) {
        self.numbers.clear();
        self.contents.clear();
        self.numbers.shrink_to(bytes / PAGE);
        self.contents.shrink_to(bytes);
    }

    /// Adds page `frame`; a zero page only if `zeros`.
    ///
    /// # Errors
    /// When the guest has no such page.
    pub fn add(
        &mut self,
        memory: &GuestMemory,
        frame: u64,
        zeros: bool,
    ) -> Result<(), MigrationError> {
        let at = self.contents.len();
        self.contents.resize(at + PAGE, 0);
        memory
            .read_slice(&mut self.contents[at..], GuestAddress(frame * PAGE_SIZE))
            .map_err(|_| outside(frame))?;
        if is_zero(&self.contents[at..]) {
            self.contents.truncate(at);
            if zeros {
                self.numbers.push(frame | ZERO);
            }
        } else {
            self.numbers.push(frame);
        }
        Ok(())
    }

    /// Adds page `frame`, which is zero.
    pub fn add_zero(&mut self, frame: u64) {
        self.numbers.push(frame | ZERO);
    }

    /// Adds page `number` of something else than guest memory.
    pub fn add_page(&mut self, number: u64, page: &Page) {
        if is_zero(page) {
            return self.add_zero(number);
        }
        self.numbers.push(number);
        self.contents.extend_from_slice(page);
    }

    /// The bytes of the batch, which is empty afterwards.
    pub(super) fn take(&mut self, bytes: &mut Vec<u8>) {
        bytes.clear();
        bytes.extend((self.numbers.len() as u32).to_le_bytes());
        for number in self.numbers.drain(..) {
            bytes.extend(number.to_le_bytes());
        }
        bytes.append(&mut self.contents);
    }
}

fn is_zero(page: &[u8]) -> bool {
    page.chunks_exact(16)
        .all(|part| part.iter().fold(0, |all, byte| all | byte) == 0)
}

fn outside(frame: u64) -> MigrationError {
    MigrationError::Garbled {
        what: format!("page {frame:#x}, which the guest does not have"),
    }
}

/// Puts a batch into guest memory; `seen` is called with each page's frame.
///
/// # Errors
/// When it is no batch, or has pages that the guest does not have. Some pages may be in place then.
pub fn apply(
    bytes: &[u8],
    memory: &GuestMemory,
    mut seen: impl FnMut(u64),
) -> Result<(), MigrationError> {
    let garbled = || MigrationError::Garbled {
        what: "pages whose number does not fit their bytes".into(),
    };
    let (count, rest) = bytes.split_first_chunk::<4>().ok_or_else(garbled)?;
    let count = u32::from_le_bytes(*count) as usize;
    if count > BATCH_PAGES || rest.len() < count * 8 {
        return Err(garbled());
    }
    let (numbers, mut contents) = rest.split_at(count * 8);
    for number in numbers.chunks_exact(8) {
        let mut word = [0; 8];
        word.copy_from_slice(number);
        let number = u64::from_le_bytes(word);
        let frame = number & !ZERO;
        let page = if number & ZERO != 0 {
            &[0; PAGE]
        } else {
            let (page, more) = contents.split_first_chunk::<PAGE>().ok_or_else(garbled)?;
            contents = more;
            page
        };
        let address = frame.checked_mul(PAGE_SIZE).ok_or_else(|| outside(frame))?;
        memory
            .write_slice(page, GuestAddress(address))
            .map_err(|_| outside(frame))?;
        seen(frame);
    }
    if contents.is_empty() {
        Ok(())
    } else {
        Err(garbled())
    }
}

/// Sends pages of a guest, as frames.
pub struct PageSender<W> {
    to: W,
    saving: Saving,
    batch: Batch,
    bytes: Vec<u8>,
}

impl<W: Write> PageSender<W> {
    /// Sends pages of what is saved by `saving` to `to`.
    pub fn new(to: W, saving: Saving) -> Self {
        Self {
            to,
            saving,
            batch: Batch::default(),
            bytes: Vec::new(),
        }
    }

    /// Where they were sent to.
    pub fn sink(&mut self) -> &mut W {
        &mut self.to
    }

    /// Sends pages; zero pages only if `zeros`.
    fn send(
        &mut self,
        frames: impl Iterator<Item = u64>,
        zeros: bool,
    ) -> Result<u64, SnapshotError> {
        let mut sent = 0;
        for frame in frames {
            self.batch
                .add(&self.saving.memory, frame, zeros)
                .map_err(link_error)?;
            if self.batch.is_full() {
                sent += self.flush()?;
            }
        }
        Ok(sent + self.flush()?)
    }

    fn flush(&mut self) -> Result<u64, SnapshotError> {
        if self.batch.is_empty() {
            return Ok(0);
        }
        self.batch.take(&mut self.bytes);
        frame::send(&mut self.to, Kind::Pages, &self.bytes).map_err(link_error)?;
        Ok(self.bytes.len() as u64)
    }
}

fn link_error(error: MigrationError) -> SnapshotError {
    SnapshotError::Copy(Box::new(error))
}

impl<W: Write> PageSink for PageSender<W> {
    fn all(&mut self) -> Result<u64, SnapshotError> {
        let frames = touched_frames(&self.saving.memory)?;
        // Memory at the other side is new.
        self.send(frames.into_iter().flatten(), false)
    }

    fn pages(&mut self, pages: &PageSet) -> Result<u64, SnapshotError> {
        self.send(pages.iter(), true)
    }
}
