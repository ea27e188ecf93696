//! Pages of a checkpoint from a hostile primary, taken into memory that was in use, and then pages from a
//! good one.
//!
//! Every input is tried twice: as it is, and as one of this version. The checksum of deltas is looked at last,
//! so that it keeps nothing away.

use std::sync::Arc;

use tandem_devices::GuestMemory;
use tandem_ft::delta::{Encoder, VERSION, apply};
use tandem_vmm::memory;
use tandem_vmm::migration::frame;
use tandem_vmm::migration::pages::{PAGE, Page};
use vm_memory::{Bytes, GuestAddress};

/// Pages of guest memory.
const PAGES: u64 = 32;
/// What fills pages that were in use.
const FILL: u8 = 0x5a;

pub(crate) fn run(data: &[u8]) {
    let memory = used_memory();
    take(data, &memory);
    let mut versioned = data.to_vec();
    versioned.splice(..data.len().min(1), [VERSION]);
    take(&versioned, &memory);
    survives(&memory);
}

/// Memory of which every other page was used.
fn used_memory() -> Arc<GuestMemory> {
    let memory = memory::allocate(PAGES * PAGE as u64, false).expect("memory");
    for frame in (0..PAGES).step_by(2) {
        put(&memory, frame, &[FILL; PAGE]);
    }
    memory
}

fn put(memory: &GuestMemory, frame: u64, page: &Page) {
    let address = GuestAddress(frame * PAGE as u64);
    memory.write_slice(page, address).expect("a page");
}

fn page(memory: &GuestMemory, frame: u64) -> Page {
    let mut page = [0; PAGE];
    let address = GuestAddress(frame * PAGE as u64);
    memory.read_slice(&mut page, address).expect("a page");
    page
}

/// Takes a payload: pages that are not named stay what they were.
fn take(payload: &[u8], memory: &GuestMemory) {
    let before: Vec<Page> = (0..PAGES).map(|frame| page(memory, frame)).collect();
    let mut named = Vec::new();
    if let Err(error) = apply(payload, memory, |frame| named.push(frame)) {
        assert!(!error.to_string().is_empty());
    }
    assert!(
        named.is_sorted_by(|a, b| a < b) && named.iter().all(|frame| *frame < PAGES),
        "frames grow and are the guest's: {named:?}"
    );
    for frame in (0..PAGES).filter(|frame| !named.contains(frame)) {
        assert!(page(memory, frame) == before[frame as usize], "{frame:#x}");
    }
}

/// What the input made of memory comes over whole, at once and after changes of it.
fn survives(memory: &GuestMemory) {
    let other = memory::allocate(PAGES * PAGE as u64, false).expect("memory");
    let mut encoder = Encoder::default();
    for round in 0..3 {
        encoder.begin();
        let pages: Vec<Page> = (0..PAGES).map(|frame| page(memory, frame)).collect();
        let numbered = (0..).zip(&pages);
        let said = numbered.map(|(frame, page)| (frame, (*page != [0; PAGE]).then_some(page)));
        let (mut bytes, mut payload) = (Vec::new(), Vec::new());
        encoder.send(said, &mut bytes).expect("room");
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            frame::receive(&mut rest, &mut payload).expect("a frame");
            apply(&payload, &other, |_| {}).expect("what was encoded is taken");
        }
        for (frame, sent) in (0..).zip(&pages) {
            assert!(
                *sent == page(&other, frame),
                "round {round}, page {frame:#x}"
            );
        }
        // Each page goes on with a part of the one before it.
        for frame in 1..PAGES {
            let mut changed = pages[frame as usize];
            let from = &pages[frame as usize - 1];
            changed[..PAGE / 4].copy_from_slice(&from[..PAGE / 4]);
            put(memory, frame, &changed);
        }
    }
}
