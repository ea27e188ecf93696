//! What goes over the link, and what does not.

use std::os::unix::net::UnixStream;
use std::sync::Arc;

use proptest::prelude::*;
use tandem_devices::GuestMemory;
use vm_memory::{Bytes, GuestAddress};

use super::frame::{self, Hello, Kind, PAYLOAD_MAX};
use super::pages::{self, BATCH_PAGES, Batch};
use super::target::Offer;
use super::{Link, MigrationError, VERSION};
use crate::memory;
use crate::snapshot::HardwareState;

const MEMORY: u64 = 4 << 20;

fn hello() -> Hello {
    Hello {
        description: "kernel = '/k'\n".into(),
        hardware: HardwareState {
            tandem: "0".into(),
            name: "web".into(),
            cpus: 1,
            memory: MEMORY,
            devices: Vec::new(),
        },
        company: None,
    }
}

fn guest_memory() -> Arc<GuestMemory> {
    memory::allocate(MEMORY, false).unwrap()
}

fn sent(kind: Kind, payload: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    frame::send(&mut bytes, kind, payload).unwrap();
    bytes
}

fn received(bytes: &[u8]) -> Result<(Kind, Vec<u8>), MigrationError> {
    let mut payload = Vec::new();
    let mut from = bytes;
    Ok((frame::receive(&mut from, &mut payload)?, payload))
}

proptest! {
    #[test]
    fn frames_come_as_they_were_sent_or_not_at_all(
        payload in prop::collection::vec(any::<u8>(), 0..2000),
        flip in any::<prop::sample::Index>(),
        bit in 0..8u32,
        cut in any::<prop::sample::Index>(),
    ) {
        let bytes = sent(Kind::State, &payload);
        prop_assert_eq!(received(&bytes).unwrap(), (Kind::State, payload));
        let mut changed = bytes.clone();
        changed[flip.index(bytes.len())] ^= 1 << bit;
        prop_assert!(received(&changed).is_err());
        prop_assert!(received(&bytes[..cut.index(bytes.len())]).is_err());
    }

    #[test]
    fn pages_arrive(
        pages in prop::collection::btree_map(0..MEMORY / 4096, any::<u8>(), 0..300),
        garbage in prop::collection::vec(any::<u8>(), 0..9000),
    ) {
        let (from, to) = (guest_memory(), guest_memory());
        let (mut batch, mut bytes) = (Batch::default(), Vec::new());
        for (frame, fill) in &pages {
            from.write_slice(&[*fill; 4096], GuestAddress(frame * 4096)).unwrap();
            to.write_slice(&[7; 4096], GuestAddress(frame * 4096)).unwrap();
        }
        for frame in pages.keys() {
            batch.add(&from, *frame, true).unwrap();
            if batch.is_full() {
                batch.take(&mut bytes);
                pages::apply(&bytes, &to, |_| {}).unwrap();
            }
        }
        batch.take(&mut bytes);
        pages::apply(&bytes, &to, |_| {}).unwrap();
        let whole = |memory: &GuestMemory| {
            let mut bytes = vec![0; MEMORY as usize];
            memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
            bytes
        };
        prop_assert!(whole(&from) == whole(&to));
        // Whatever a peer sends, it is an error or pages.
        drop(pages::apply(&garbage, &to, |_| {}));
        drop(received(&garbage));
    }
}

#[test]
fn pages_that_the_guest_does_not_have_are_refused() {
    let memory = guest_memory();
    for frame in [MEMORY / 4096, u64::MAX >> 1, 1 << 62] {
        let mut bytes = 1u32.to_le_bytes().to_vec();
        bytes.extend(frame.to_le_bytes());
        bytes.extend([1; 4096]);
        assert!(pages::apply(&bytes, &memory, |_| {}).is_err(), "{frame:#x}");
    }
    let many = (BATCH_PAGES as u32 + 1).to_le_bytes();
    assert!(pages::apply(&[&many[..], &[0; 1 << 16]].concat(), &memory, |_| {}).is_err());
}

#[test]
fn frames_are_bounded() {
    let mut header = (Kind::State as u32).to_le_bytes().to_vec();
    header.extend((PAYLOAD_MAX as u32 + 1).to_le_bytes());
    header.extend([0; 8]);
    let refused = received(&header).unwrap_err().to_string();
    assert!(refused.contains("a frame of kind 4"), "{refused}");
}

fn links() -> (UnixStream, Link) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    (ours, Link::Unix(theirs))
}

#[test]
fn a_source_of_another_version_is_told() {
    use std::io::Write;
    let (mut source, link) = links();
    source.write_all(b"TANDEM\x1a\x02").unwrap();
    source.write_all(&(VERSION + 1).to_le_bytes()).unwrap();
    let refused = Offer::hear(link).unwrap_err();
    assert!(matches!(refused, MigrationError::Version { found } if found == VERSION + 1));
    let told = frame::receive(&mut source, &mut Vec::new()).unwrap_err();
    assert_eq!(
        told.to_string(),
        "the other side refuses: the other side speaks version 3 of the protocol; allowed is 2"
    );
}

#[test]
fn what_is_no_source_is_refused() {
    use std::io::Write;
    let (mut source, link) = links();
    source.write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    let refused = Offer::hear(link).unwrap_err().to_string();
    assert!(refused.contains("no migration"), "{refused}");
}

/// A guest that is not whole never runs at the target, however the source ends.
#[test]
fn a_source_that_ends_early_leaves_nothing_to_run() {
    for frames in 0..3 {
        let (mut source, link) = links();
        frame::send_preface(&mut source, frame::Purpose::Migration).unwrap();
        frame::send(&mut source, Kind::Hello, &hello().encode().unwrap()).unwrap();
        let offer = Offer::hear(link).unwrap();
        assert_eq!(offer.hello, hello());
        let mut batch = Batch::default();
        let from = guest_memory();
        for frame in 0..frames {
            let mut bytes = Vec::new();
            batch.add(&from, frame, true).unwrap();
            batch.take(&mut bytes);
            frame::send(&mut source, Kind::Pages, &bytes).unwrap();
        }
        drop(source);
        assert!(offer.accept(&guest_memory()).is_err());
    }
}

#[test]
fn frames_at_the_wrong_time_are_refused() {
    for kind in [Kind::Complete, Kind::Running, Kind::Accept, Kind::Hello] {
        let (mut source, link) = links();
        frame::send_preface(&mut source, frame::Purpose::Migration).unwrap();
        frame::send(&mut source, Kind::Hello, &hello().encode().unwrap()).unwrap();
        let offer = Offer::hear(link).unwrap();
        frame::send(&mut source, kind, &[]).unwrap();
        let refused = offer.accept(&guest_memory()).unwrap_err().to_string();
        assert!(refused.contains("at the wrong time"), "{refused}");
    }
}
