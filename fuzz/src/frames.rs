//! A migration's or a protection's frames from a hostile source, each taken by who takes its kind.
//!
//! Checksums find damage, not forgery, so every input is tried twice: as it is, and with lengths and
//! checksums set right.

use std::sync::Arc;

use tandem_devices::GuestMemory;
use tandem_ft::delta;
use tandem_vmm::dirty::PageSet;
use tandem_vmm::memory;
use tandem_vmm::migration::frame::{self, HEADER_SIZE, Hello, Kind, Purpose};
use tandem_vmm::migration::pages;
use tandem_vmm::snapshot::GuestState;
use xxhash_rust::xxh3::Xxh3;

/// Bytes of guest memory.
pub(crate) const MEMORY: u64 = 64 << 10;
/// Bytes of a header that its checksum covers.
const SUMMED: usize = 8;
/// Kinds that there are, and one more.
const KINDS: u32 = 16;

pub(crate) fn run(data: &[u8]) {
    for purpose in [Purpose::Migration, Purpose::Protection, Purpose::Pairing] {
        let mut preface = data;
        if let Err(error) = frame::receive_preface(&mut preface, purpose) {
            assert!(!error.to_string().is_empty());
        }
    }
    let memory = memory::allocate(MEMORY, false).expect("memory");
    receive(data, &memory);
    receive(&sealed(data), &memory);
}

fn receive(mut link: &[u8], memory: &Arc<GuestMemory>) {
    let mut payload = Vec::new();
    loop {
        match frame::receive(&mut link, &mut payload) {
            Ok(kind) => take(kind, &payload, memory),
            Err(error) => return assert!(!error.to_string().is_empty()),
        }
    }
}

fn take(kind: Kind, payload: &[u8], memory: &GuestMemory) {
    let known = |frame: u64| assert!(frame < MEMORY / 4096, "{frame:#x} is not the guest's");
    let taken = match kind {
        Kind::Hello => return understand(payload),
        Kind::Pages => pages::apply(payload, memory, known),
        Kind::Deltas => delta::apply(payload, memory, known),
        Kind::Wanted => delta::wanted::decode(payload, &mut PageSet::all_of(memory))
            .map(|wanted| wanted.iter().for_each(known)),
        Kind::State => GuestState::from_bytes(payload)
            .map(drop)
            .map_err(Into::into),
        _ => Ok(()),
    };
    if let Err(error) = taken {
        assert!(!error.to_string().is_empty());
    }
}

/// What a source says of its guest is said again as it was understood.
fn understand(payload: &[u8]) {
    if let Ok(hello) = Hello::decode(payload) {
        let again = Hello::decode(&hello.encode().expect("it was understood"));
        assert_eq!(again.expect("it is what it was"), hello);
    }
}

/// The same frames with kinds, lengths and checksums that are right.
pub(crate) fn sealed(data: &[u8]) -> Vec<u8> {
    let mut sealed = Vec::new();
    let mut rest = data;
    while let Some((header, after)) = rest.split_first_chunk::<HEADER_SIZE>() {
        let word = |at: usize| u32::from_le_bytes([0, 1, 2, 3].map(|byte| header[at + byte]));
        let (kind, length) = (word(0) % KINDS, after.len().min(word(4) as usize));
        let (payload, after) = after.split_at(length);
        let header = [kind.to_le_bytes(), (length as u32).to_le_bytes()].concat();
        debug_assert_eq!(header.len(), SUMMED);
        let mut sum = Xxh3::new();
        sum.update(&header);
        sum.update(payload);
        sealed.extend(header);
        sealed.extend(sum.digest().to_le_bytes());
        sealed.extend(payload);
        rest = after;
    }
    sealed
}
