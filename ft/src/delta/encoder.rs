//! Pages to payloads.

use std::io::Write;

use lz4_flex::block::{CompressTable, compress_into_with_table, get_maximum_output_size};
use tandem_vmm::migration::MigrationError;
use tandem_vmm::migration::frame::{self, Kind};
use tandem_vmm::migration::pages::{BATCH_PAGES, PAGE, Page};
use xxhash_rust::xxh3::Xxh3;

use super::sent::SentPages;
use super::{Encoding, HEAD, HEAD_BITS, REMEMBERED, VERSION, runs, varint};

/// A delta of at most as many bytes is sent without a look at how small LZ4 makes the page: it takes longer
/// than that saves.
const DELTA_GOOD: usize = 512;

/// Puts payloads together, and remembers what was sent.
pub struct Encoder {
    sent: SentPages,
    table: CompressTable,
    /// Room for a packed page.
    packed: Vec<u8>,
    /// Room for runs.
    runs: Vec<u8>,
    payload: Vec<u8>,
    pages: usize,
    /// The frame behind the last one.
    next: u64,
    sum: Xxh3,
}

impl Default for Encoder {
    fn default() -> Self {
        Self {
            sent: SentPages::default(),
            table: CompressTable::small(),
            packed: vec![0; get_maximum_output_size(PAGE)],
            runs: Vec::new(),
            payload: Vec::new(),
            pages: 0,
            next: 0,
            sum: Xxh3::new(),
        }
    }
}

impl Encoder {
    /// Another checkpoint begins.
    pub fn begin(&mut self) {
        self.sent.begin();
    }

    /// The other side has nothing, or nobody knows what.
    pub fn forget(&mut self) {
        self.sent.forget();
        self.clear();
    }

    /// Bytes of memory that it takes.
    pub fn memory_bytes(&self) -> u64 {
        let rooms = [&self.packed, &self.runs, &self.payload];
        let rooms: usize = rooms.into_iter().map(Vec::capacity).sum();
        self.sent.memory_bytes() + rooms as u64
    }

    /// Sends pages, by frame and without content if they are zero; returns the bytes that were sent.
    ///
    /// # Errors
    /// When the link is broken. What the other side has is not known then.
    pub fn send<'a>(
        &mut self,
        pages: impl Iterator<Item = (u64, Option<&'a Page>)>,
        to: &mut impl Write,
    ) -> Result<u64, MigrationError> {
        let mut sent = 0;
        for (frame, page) in pages {
            if self.pages >= BATCH_PAGES || frame < self.next {
                sent += self.flush(to)?;
            }
            self.add(frame, page);
        }
        Ok(sent + self.flush(to)?)
    }

    fn flush(&mut self, to: &mut impl Write) -> Result<u64, MigrationError> {
        if self.pages == 0 {
            return Ok(0);
        }
        self.payload[1..HEAD].copy_from_slice(&self.sum.digest().to_le_bytes());
        let sent = frame::send(to, Kind::Deltas, &self.payload);
        let bytes = (frame::HEADER_SIZE + self.payload.len()) as u64;
        match &sent {
            Ok(()) => self.clear(),
            Err(_) => self.forget(),
        }
        sent.map(|()| bytes)
    }

    fn clear(&mut self) {
        self.payload.clear();
        self.pages = 0;
        self.next = 0;
        self.sum.reset();
    }

    fn add(&mut self, frame: u64, page: Option<&Page>) {
        let Some(page) = page else {
            return self.add_zero(frame);
        };
        let Some(old) = self.sent.get(frame) else {
            let remembered = self.sent.put(frame, page);
            return self.add_alone(frame, page, remembered);
        };
        if old == page {
            return;
        }
        self.runs.clear();
        let fits = runs::put(old, page, &mut self.runs, PAGE);
        *old = *page;
        if !fits {
            self.add_alone(frame, page, false);
        } else if self.runs.len() <= DELTA_GOOD
            || !self.add_packed(frame, page, self.runs.len(), false)
        {
            self.add_delta(frame, page);
        }
    }

    fn add_zero(&mut self, frame: u64) {
        match self.sent.get(frame) {
            Some(old) if *old == [0; PAGE] => return,
            Some(old) => *old = [0; PAGE],
            None => {}
        }
        self.head(frame, Encoding::Zero, false);
    }

    fn add_delta(&mut self, frame: u64, page: &Page) {
        self.head(frame, Encoding::Delta, false);
        varint::put(&mut self.payload, self.runs.len() as u64);
        self.payload.extend_from_slice(&self.runs);
        self.sum.update(page);
    }

    fn add_alone(&mut self, frame: u64, page: &Page, remembered: bool) {
        if !self.add_packed(frame, page, PAGE, remembered) {
            self.head(frame, Encoding::Whole, remembered);
            self.payload.extend_from_slice(page);
        }
    }

    /// Adds a page packed, if it has less than `max` bytes then.
    fn add_packed(&mut self, frame: u64, page: &Page, max: usize, remembered: bool) -> bool {
        let packed = compress_into_with_table(page, &mut self.packed, &mut self.table);
        let Ok(length) = packed.inspect_err(|e| tracing::debug!(%e, "a page cannot be packed"))
        else {
            return false;
        };
        if length >= max {
            return false;
        }
        self.head(frame, Encoding::Packed, remembered);
        varint::put(&mut self.payload, length as u64);
        self.payload.extend_from_slice(&self.packed[..length]);
        true
    }

    fn head(&mut self, frame: u64, encoding: Encoding, remembered: bool) {
        if self.pages == 0 {
            self.payload.push(VERSION);
            self.payload.resize(HEAD, 0);
        }
        let left_out = frame - self.next;
        let remembered = if remembered { REMEMBERED } else { 0 };
        let head = left_out << HEAD_BITS | remembered | encoding as u64;
        varint::put(&mut self.payload, head);
        self.next = frame + 1;
        self.pages += 1;
    }
}
