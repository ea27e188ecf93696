//! Pages there and back, whatever they were, and bytes that nobody encoded.

use std::sync::Arc;

use proptest::prelude::*;
use tandem_devices::GuestMemory;
use tandem_vmm::memory;
use tandem_vmm::migration::frame::{self, Kind};
use tandem_vmm::migration::pages::{PAGE, Page};
use vm_memory::{Bytes, GuestAddress};

use super::*;

const MEMORY: u64 = 1 << 20;
const FRAMES: u64 = MEMORY / PAGE as u64;

fn guest_memory() -> Arc<GuestMemory> {
    memory::allocate(MEMORY, false).unwrap()
}

fn page(memory: &GuestMemory, frame: u64) -> Page {
    let mut page = [0; PAGE];
    let address = GuestAddress(frame * PAGE as u64);
    memory.read_slice(&mut page, address).unwrap();
    page
}

/// The payloads of what is sent of `pages`; zero pages are said to be.
fn payloads(encoder: &mut Encoder, pages: &[(u64, Page)]) -> Vec<Vec<u8>> {
    let pages = pages
        .iter()
        .map(|(frame, page)| (*frame, (*page != [0; PAGE]).then_some(page)));
    let mut bytes = Vec::new();
    let sent = encoder.send(pages, &mut bytes).unwrap();
    assert_eq!(sent, bytes.len() as u64);
    let mut payloads = Vec::new();
    let mut rest = &bytes[..];
    while !rest.is_empty() {
        let mut payload = Vec::new();
        assert_eq!(
            frame::receive(&mut rest, &mut payload).unwrap(),
            Kind::Deltas
        );
        payloads.push(payload);
    }
    payloads
}

/// How many bytes are sent of one page, after `old` of the same was.
fn size_after(old: &Page, new: &Page) -> usize {
    let mut encoder = Encoder::default();
    payloads(&mut encoder, &[(5, *old)]);
    payloads(&mut encoder, &[(5, *new)])
        .iter()
        .map(Vec::len)
        .sum()
}

/// Bytes without order.
fn noise(seed: u64) -> Page {
    let mut state = seed;
    std::array::from_fn(|_| {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        (state >> 56) as u8
    })
}

/// How a page comes to be another.
#[derive(Clone, Debug)]
enum Change {
    Zero,
    Noise(u64),
    Fill(u8),
    Bytes(Vec<(usize, u8)>),
    Stretch(usize, usize, u8),
}

impl Change {
    fn apply(&self, page: &mut Page) {
        match self {
            Self::Zero => *page = [0; PAGE],
            Self::Noise(seed) => *page = noise(*seed),
            Self::Fill(fill) => *page = [*fill; PAGE],
            Self::Bytes(bytes) => bytes.iter().for_each(|(at, byte)| page[*at] = *byte),
            Self::Stretch(at, length, add) => page[*at..]
                .iter_mut()
                .take(*length)
                .for_each(|byte| *byte = byte.wrapping_add(*add)),
        }
    }
}

fn change() -> impl Strategy<Value = Change> {
    prop_oneof![
        Just(Change::Zero),
        any::<u64>().prop_map(Change::Noise),
        any::<u8>().prop_map(Change::Fill),
        prop::collection::vec((0..PAGE, any::<u8>()), 0..300).prop_map(Change::Bytes),
        (0..PAGE, 0..PAGE, any::<u8>())
            .prop_map(|(at, length, add)| Change::Stretch(at, length, add)),
    ]
}

proptest! {
    #[test]
    fn pages_arrive_whatever_they_were(
        rounds in prop::collection::vec(prop::collection::btree_map(0..12u64, change(), 1..6), 1..6),
    ) {
        let (mut encoder, to) = (Encoder::default(), guest_memory());
        let mut from = vec![[0; PAGE]; 12];
        for round in rounds {
            encoder.begin();
            let mut pages = Vec::new();
            for (frame, change) in round {
                change.apply(&mut from[frame as usize]);
                pages.push((frame, from[frame as usize]));
            }
            for payload in payloads(&mut encoder, &pages) {
                let mut seen = Vec::new();
                apply(&payload, &to, |frame| seen.push(frame)).unwrap();
                prop_assert!(seen.iter().all(|seen| pages.iter().any(|(frame, _)| frame == seen)));
            }
            for (frame, page_sent) in from.iter().enumerate() {
                prop_assert!(*page_sent == page(&to, frame as u64), "page {}", frame);
            }
        }
    }

    #[test]
    fn garbage_is_refused_or_pages(
        garbage in prop::collection::vec(any::<u8>(), 0..600),
        versioned: bool,
    ) {
        let mut garbage = garbage;
        if let Some(first) = garbage.first_mut().filter(|_| versioned) {
            *first = VERSION;
        }
        let refused = apply(&garbage, &guest_memory(), |frame| assert!(frame < FRAMES));
        prop_assert!(refused.is_ok() || garbage.is_empty() || !refused.unwrap_err().to_string().is_empty());
    }

    #[test]
    fn a_changed_byte_is_refused_or_pages(
        changes in prop::collection::vec(change(), 1..4),
        at in any::<prop::sample::Index>(),
        flip in 1..=255u8,
    ) {
        let mut encoder = Encoder::default();
        let to = guest_memory();
        let mut content = noise(1);
        for change in changes {
            for mut payload in payloads(&mut encoder, &[(3, content)]) {
                apply(&payload, &to, |_| {}).unwrap();
                let at = at.index(payload.len());
                payload[at] ^= flip;
                drop(apply(&payload, &guest_memory(), |frame| assert!(frame < FRAMES)));
            }
            change.apply(&mut content);
        }
    }
}

#[test]
fn little_is_sent_of_little() {
    let old = noise(7);
    let mut new = old;
    new[2000..2008].copy_from_slice(&[0xaa; 8]);
    assert!(size_after(&old, &new) <= 64, "{}", size_after(&old, &new));
    // Nothing of nothing, or of as much as there was.
    assert_eq!(size_after(&old, &old), 0);
    assert_eq!(size_after(&[0; PAGE], &[0; PAGE]), HEAD + 1);
    // Zeros are said, whatever was there.
    assert!(size_after(&old, &[0; PAGE]) <= 16);
    // What has no order is sent as it is.
    let whole = size_after(&old, &noise(8));
    assert!((PAGE..PAGE + 16).contains(&whole), "{whole}");
    // What has some is packed.
    let text = std::array::from_fn(|at| b"Tandem is a small virtual machine monitor. "[at % 43]);
    assert!(size_after(&old, &text) < 256);
}

/// A page that became zero and then another is not changed from what it was before.
#[test]
fn zero_pages_are_remembered_like_others() {
    let (mut encoder, to) = (Encoder::default(), guest_memory());
    let (old, mut new) = (noise(2), [0; PAGE]);
    new[9] = 9;
    for content in [old, [0; PAGE], new, [0; PAGE], old] {
        for payload in payloads(&mut encoder, &[(1, content)]) {
            apply(&payload, &to, |_| {}).unwrap();
        }
        assert!(page(&to, 1) == content);
    }
}

#[test]
fn a_delta_to_another_page_is_refused() {
    let mut encoder = Encoder::default();
    let mut content = noise(3);
    payloads(&mut encoder, &[(1, content)]);
    content[0] ^= 1;
    let deltas = payloads(&mut encoder, &[(1, content)]);
    let refused = apply(&deltas[0], &guest_memory(), |_| {}).unwrap_err();
    let refused = refused.to_string();
    assert!(refused.contains("deltas to other pages"), "{refused}");
}

#[test]
fn what_was_forgotten_is_sent_whole() {
    let mut encoder = Encoder::default();
    payloads(&mut encoder, &[(1, noise(3))]);
    encoder.forget();
    let to = guest_memory();
    for payload in payloads(&mut encoder, &[(1, noise(3))]) {
        apply(&payload, &to, |_| {}).unwrap();
    }
    assert!(page(&to, 1) == noise(3));
}

struct Broken;

impl std::io::Write for Broken {
    fn write(&mut self, _bytes: &[u8]) -> std::io::Result<usize> {
        Err(std::io::ErrorKind::BrokenPipe.into())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

/// A new secondary does not have what the one before did not get.
#[test]
fn what_did_not_leave_is_not_remembered() {
    let mut encoder = Encoder::default();
    let content = noise(4);
    let pages = || [(1, Some(&content)), (2, None)].into_iter();
    assert!(encoder.send(pages(), &mut Broken).is_err());
    let to = guest_memory();
    for payload in payloads(&mut encoder, &[(1, content)]) {
        apply(&payload, &to, |_| {}).unwrap();
    }
    assert!(page(&to, 1) == content);
}

#[test]
fn pages_that_want_the_place_of_others_are_sent() {
    let (mut encoder, far) = (Encoder::default(), SENT_PAGES_MAX as u64 + 1);
    let to = memory::allocate((far + 1) * PAGE as u64, false).unwrap();
    for round in 0..12u8 {
        encoder.begin();
        // By turns for a while, so that each takes the other's place once.
        let frame = if round / 4 % 2 == 0 { 1 } else { far };
        let mut content = noise(frame);
        content[3] = round;
        for payload in payloads(&mut encoder, &[(frame, content)]) {
            apply(&payload, &to, |_| {}).unwrap();
        }
        assert!(page(&to, frame) == content, "round {round}");
    }
}

#[test]
fn payloads_say_what_is_wrong_with_them() {
    let head = |version: u8| [&[version][..], &[0; 8]].concat();
    let pages = |bytes: &[u8]| [&head(VERSION)[..], bytes].concat();
    let beyond = {
        let mut bytes = Vec::new();
        varint::put(&mut bytes, FRAMES << HEAD_BITS | 3);
        [&bytes[..], &[0]].concat()
    };
    for (payload, said) in [
        (vec![], "without a beginning"),
        (head(VERSION + 1), "version 3; allowed is 2"),
        (pages(&[0; 257]), "more than 256"),
        (pages(&[0x80]), "without a beginning"),
        (pages(&[1, 1, 2]), "less than all of page 0x0"),
        (pages(&[2, 9, 1]), "less than it said of page 0x0"),
        (
            pages(&[2, 2, 0x10, 1]),
            "packed of 1 bytes; allowed is 4096",
        ),
        (pages(&[2, 1, 0xff]), "packed badly"),
        (pages(&[3, 2, 0, 0]), "does not fit page 0x0"),
        (pages(&[3, 4, 0xff, 0x1f, 2, 1]), "does not fit page 0x0"),
        (pages(&beyond), "which the guest does not have"),
        (pages(&[0xff; 10]), "without a beginning"),
    ] {
        let refused = apply(&payload, &guest_memory(), |_| {})
            .unwrap_err()
            .to_string();
        assert!(refused.contains(said), "{refused}: {said}");
    }
}
