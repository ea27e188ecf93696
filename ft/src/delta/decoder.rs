//! Payloads to pages.

use lz4_flex::block::decompress_into;
use tandem_devices::GuestMemory;
use tandem_vmm::dirty::PAGE_SIZE;
use tandem_vmm::migration::MigrationError;
use tandem_vmm::migration::pages::{BATCH_PAGES, PAGE, Page};
use vm_memory::{Bytes, GuestAddress};
use xxhash_rust::xxh3::Xxh3;

use super::{ENCODING_BITS, Encoding, HEAD, VERSION, runs, varint};

fn garbled(what: impl Into<String>) -> MigrationError {
    MigrationError::Garbled { what: what.into() }
}

/// Puts the pages of a payload into memory; `seen` is called with each page's frame.
///
/// # Errors
/// When it is no payload, has pages that the guest does not have, or says what differs from something else
/// than is there. Some pages may be in place then.
pub fn apply(
    payload: &[u8],
    memory: &GuestMemory,
    mut seen: impl FnMut(u64),
) -> Result<(), MigrationError> {
    let head = payload.split_first_chunk::<HEAD>();
    let ([version, sum @ ..], rest) = head.ok_or_else(|| garbled("deltas without a beginning"))?;
    if *version != VERSION {
        let what = format!("deltas of version {version}; allowed is {VERSION}");
        return Err(garbled(what));
    }
    let mut decoder = Decoder {
        rest,
        memory,
        page: [0; PAGE],
        sum: Xxh3::new(),
    };
    let (mut next, mut count) = (0, 0);
    while !decoder.rest.is_empty() {
        count += 1;
        if count > BATCH_PAGES {
            return Err(garbled(format!("more than {BATCH_PAGES} deltas at once")));
        }
        let frame = decoder.page(next)?;
        seen(frame);
        next = frame + 1;
    }
    if decoder.sum.digest().to_le_bytes() != *sum {
        return Err(garbled("deltas to other pages than are here"));
    }
    Ok(())
}

struct Decoder<'a> {
    rest: &'a [u8],
    memory: &'a GuestMemory,
    /// Room for a page.
    page: Page,
    sum: Xxh3,
}

impl<'a> Decoder<'a> {
    /// Takes the page at or behind frame `next`; which one it is.
    fn page(&mut self, next: u64) -> Result<u64, MigrationError> {
        let head = varint::take(&mut self.rest);
        let head = head.ok_or_else(|| garbled("a delta without a beginning"))?;
        let frame = next.checked_add(head >> ENCODING_BITS);
        let address = frame.and_then(|frame| frame.checked_mul(PAGE_SIZE));
        let (Some(frame), Some(address)) = (frame, address) else {
            return Err(garbled("a delta to a page behind all memory"));
        };
        let address = GuestAddress(address);
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
                self.change(frame, address)?;
                self.sum.update(&self.page);
            }
        }
        let written = self.memory.write_slice(&self.page, address);
        written.map_err(|_| outside(frame))?;
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

    fn change(&mut self, frame: u64, address: GuestAddress) -> Result<(), MigrationError> {
        let mut runs = self.part(frame)?;
        let read = self.memory.read_slice(&mut self.page, address);
        read.map_err(|_| outside(frame))?;
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

fn outside(frame: u64) -> MigrationError {
    garbled(format!("page {frame:#x}, which the guest does not have"))
}
