//! Payloads to pages.

use lz4_flex::block::decompress_into;
use tandem_devices::GuestMemory;
use tandem_vmm::dirty::PAGE_SIZE;
use tandem_vmm::migration::MigrationError;
use tandem_vmm::migration::pages::{BATCH_PAGES, PAGE, Page};
use vm_memory::{Bytes, GuestAddress};
use xxhash_rust::xxh3::Xxh3;

use super::{Encoding, HEAD, HEAD_BITS, REMEMBERED, VERSION, runs, varint};

pub(super) fn garbled(what: impl Into<String>) -> MigrationError {
    MigrationError::Garbled { what: what.into() }
}

/// Where pages go.
pub trait Target {
    /// Makes `page` what page `frame` was when it came last.
    ///
    /// # Errors
    /// When that is not known, or the guest has no such page.
    fn last(&mut self, frame: u64, page: &mut Page) -> Result<(), MigrationError>;

    /// Takes page `frame`, which is `remembered` by the other side from now on, or as before.
    ///
    /// # Errors
    /// When the guest has no such page.
    fn put(&mut self, frame: u64, page: &Page, remembered: bool) -> Result<(), MigrationError>;
}

/// Memory in which each page is as it came last.
struct Whole<'a, F> {
    memory: &'a GuestMemory,
    seen: F,
}

impl<F: FnMut(u64)> Target for Whole<'_, F> {
    fn last(&mut self, frame: u64, page: &mut Page) -> Result<(), MigrationError> {
        let read = self.memory.read_slice(page, address(frame)?);
        read.map_err(|_| outside(frame))
    }

    fn put(&mut self, frame: u64, page: &Page, _remembered: bool) -> Result<(), MigrationError> {
        let written = self.memory.write_slice(page, address(frame)?);
        written.map_err(|_| outside(frame))?;
        (self.seen)(frame);
        Ok(())
    }
}

/// Puts the pages of a payload into memory; `seen` is called with each page's frame.
///
/// # Errors
/// As [`take`].
pub fn apply(
    payload: &[u8],
    memory: &GuestMemory,
    seen: impl FnMut(u64),
) -> Result<(), MigrationError> {
    take(payload, &mut Whole { memory, seen })
}

/// Puts the pages of a payload where they are to go.
///
/// # Errors
/// When it is no payload, has pages that the guest does not have, or says what differs from something else
/// than is there. Some pages may be in place then.
pub fn take(payload: &[u8], to: &mut impl Target) -> Result<(), MigrationError> {
    let head = payload.split_first_chunk::<HEAD>();
    let ([version, sum @ ..], rest) = head.ok_or_else(|| garbled("deltas without a beginning"))?;
    if *version != VERSION {
        let what = format!("deltas of version {version}; allowed is {VERSION}");
        return Err(garbled(what));
    }
    let mut decoder = Decoder {
        rest,
        to,
        page: [0; PAGE],
        sum: Xxh3::new(),
    };
    let (mut next, mut count) = (0, 0);
    while !decoder.rest.is_empty() {
        count += 1;
        if count > BATCH_PAGES {
            return Err(garbled(format!("more than {BATCH_PAGES} deltas at once")));
        }
        next = decoder.page(next)? + 1;
    }
    if decoder.sum.digest().to_le_bytes() != *sum {
        return Err(garbled("deltas to other pages than are here"));
    }
    Ok(())
}

struct Decoder<'a, T> {
    rest: &'a [u8],
    to: &'a mut T,
    /// Room for a page.
    page: Page,
    sum: Xxh3,
}

impl<'a, T: Target> Decoder<'a, T> {
    /// Takes the page at or behind frame `next`; which one it is.
    fn page(&mut self, next: u64) -> Result<u64, MigrationError> {
        let head = varint::take(&mut self.rest);
        let head = head.ok_or_else(|| garbled("a delta without a beginning"))?;
        let frame = next.checked_add(head >> HEAD_BITS);
        // There is one behind it, for the next.
        let frame = frame.filter(|frame| *frame < u64::MAX / PAGE_SIZE);
        let frame = frame.ok_or_else(|| garbled("a delta to a page behind all memory"))?;
        match Encoding::of(head) {
            Encoding::Zero => self.page = [0; PAGE],
            Encoding::Whole => {
                let page = self.rest.split_off(..PAGE);
                let page =
                    page.ok_or_else(|| garbled(format!("less than all of page {frame:#x}")))?;
                self.page.copy_from_slice(page);
            }
            Encoding::Packed => self.unpack(frame)?,
            Encoding::Delta => {
                self.change(frame)?;
                self.sum.update(&self.page);
            }
        }
        self.to.put(frame, &self.page, head & REMEMBERED != 0)?;
        Ok(frame)
    }

    /// What an encoding says in a number of bytes of its own.
    fn part(&mut self, frame: u64) -> Result<&'a [u8], MigrationError> {
        let length = varint::take(&mut self.rest).and_then(|length| usize::try_from(length).ok());
        let part = length.and_then(|length| self.rest.split_off(..length));
        part.ok_or_else(|| garbled(format!("less than it said of page {frame:#x}")))
    }

    fn unpack(&mut self, frame: u64) -> Result<(), MigrationError> {
        let packed = self.part(frame)?;
        match decompress_into(packed, &mut self.page) {
            Ok(PAGE) => Ok(()),
            Ok(length) => Err(garbled(format!(
                "page {frame:#x} packed of {length} bytes; allowed is {PAGE}"
            ))),
            Err(error) => Err(garbled(format!("page {frame:#x} packed badly: {error}"))),
        }
    }

    fn change(&mut self, frame: u64) -> Result<(), MigrationError> {
        let mut runs = self.part(frame)?;
        self.to.last(frame, &mut self.page)?;
        let mut end = 0;
        while !runs.is_empty() {
            let run = runs::take(&mut runs, end);
            let run =
                run.ok_or_else(|| garbled(format!("a delta that does not fit page {frame:#x}")))?;
            end = run.offset + run.bytes.len();
            self.page[run.offset..end].copy_from_slice(run.bytes);
        }
        Ok(())
    }
}

fn address(frame: u64) -> Result<GuestAddress, MigrationError> {
    let address = frame.checked_mul(PAGE_SIZE);
    address.map(GuestAddress).ok_or_else(|| outside(frame))
}

fn outside(frame: u64) -> MigrationError {
    garbled(format!("page {frame:#x}, which the guest does not have"))
}
