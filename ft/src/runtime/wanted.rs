//! Pages that a secondary without a second image wants of its primary, which stands meanwhile.
//!
//! ```text
//!   primary                                     secondary
//!   pages, state, outputs, Complete  -------->  its guest stands, and says what it wrote
//!                                    <--------  Wanted: what of that did not come and is not remembered
//!   Deltas: just those               -------->
//!                                    <--------  Wanted, again, until it has all; then one without pages
//! ```
//!
//! A request costs a trip over the link, and there is one for [`RUNS_MAX`] runs of pages.

use std::io::Write;
use std::sync::Arc;
use std::time::Instant;

use tandem_devices::GuestMemory;
use tandem_vmm::dirty::PageSet;
use tandem_vmm::migration::Link;
use tandem_vmm::migration::frame::{self, Kind};
use tandem_vmm::snapshot::save::PageSink;

use super::ProtectionError;
use super::awaited::Awaited;
use super::checkpoint::{Part, Receiver};
use super::image::Stage;
use crate::delta::wanted::{self, RUNS_MAX};
use crate::delta::{Ahead, Encoder};

/// Asks for `missing` pages and stages them; then says that nothing more is wanted. Ends early when it is
/// `over`.
///
/// # Errors
/// When something else comes, or nothing more.
pub(super) fn want(
    receiver: &mut Receiver,
    stage: &mut Stage,
    mut missing: PageSet,
    over: &dyn Fn() -> bool,
) -> Result<(), ProtectionError> {
    let runs: Vec<_> = missing.runs().collect();
    for runs in runs.chunks(RUNS_MAX) {
        frame::send(receiver.link(), Kind::Wanted, &wanted::encode(runs))?;
        let mut left: u64 = runs.iter().map(|run| run.end - run.start).sum();
        while left > 0 {
            let Part::Deltas(deltas) = receiver.next(over)? else {
                return Err(ProtectionError::Garbled("no pages that were wanted".into()));
            };
            let came = stage.answer(deltas, &mut missing)?;
            left = left
                .checked_sub(came)
                .ok_or_else(|| ProtectionError::Garbled("more pages than were wanted".into()))?;
        }
    }
    if !missing.is_empty() {
        return Err(ProtectionError::Garbled("others than were wanted".into()));
    }
    Ok(frame::send(receiver.link(), Kind::Wanted, &[])?)
}

/// Gives the other side the pages of `memory` that it wants, each once, until it wants no more; returns the
/// bytes that were sent. It has until `deadline`, while `waits` says that it is waited for.
///
/// # Errors
/// When it says something else, or nothing in time.
pub(super) fn give(
    link: &mut (impl AsRef<Link> + Write),
    encoder: &mut Encoder,
    memory: &Arc<GuestMemory>,
    deadline: Instant,
    waits: &dyn Fn() -> bool,
) -> Result<u64, ProtectionError> {
    let mut left = PageSet::all_of(memory);
    let mut payload = Vec::new();
    let mut bytes = 0;
    let mut link = Awaited {
        link,
        deadline,
        waits,
    };
    loop {
        match frame::receive(&mut link, &mut payload)? {
            Kind::Wanted => {}
            kind => {
                let what = format!("{kind:?} instead of what it wants");
                return Err(ProtectionError::Garbled(what));
            }
        }
        if payload.is_empty() {
            return Ok(bytes);
        }
        let wanted = wanted::decode(&payload, &mut left)?;
        let mut ahead = Ahead::new(encoder, Arc::clone(memory), &mut link);
        ahead.pages(&wanted)?;
        bytes += ahead.bytes;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;
    use std::slice;
    use std::thread;
    use std::time::Duration;

    use tandem_vmm::dirty::PAGE_SIZE;
    use tandem_vmm::memory;
    use vm_memory::{Bytes, GuestAddress};

    use super::super::ResyncMode;
    use super::super::image::Image;
    use super::*;

    const PAGES: u64 = 3 * RUNS_MAX as u64;

    fn links() -> (Link, Link) {
        let (near, far) = UnixStream::pair().unwrap();
        (Link::Unix(near), Link::Unix(far))
    }

    fn guest(fill: u8) -> Arc<GuestMemory> {
        let memory = memory::allocate(PAGES * PAGE_SIZE, false).unwrap();
        for frame in 0..PAGES {
            let page = [fill.wrapping_mul(frame as u8); PAGE_SIZE as usize];
            memory
                .write_slice(&page, GuestAddress(frame * PAGE_SIZE))
                .unwrap();
        }
        memory
    }

    fn stage(guest: &Arc<GuestMemory>) -> Image {
        let beside = memory::allocate(PAGES * PAGE_SIZE, false).unwrap();
        let mut image = Image::new(ResyncMode::Stopped, guest, beside);
        image.begin(guest).unwrap();
        image
    }

    fn soon() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    fn set(frames: impl Iterator<Item = u64>) -> PageSet {
        let mut set = PageSet::new(PAGES);
        frames.for_each(|frame| assert!(set.insert(frame)));
        set
    }

    #[test]
    fn more_pages_than_a_request_has_room_for_come_and_no_others_change() {
        let (mut near, far) = links();
        let (primary, secondary) = (guest(7), guest(1));
        let before = guest(1);
        let wants = set((0..PAGES).step_by(2));
        let asked = wants.clone();
        let other = thread::spawn(move || {
            let mut image = stage(&secondary);
            let Image::Staged(stage) = &mut image else {
                unreachable!("it was made so");
            };
            let mut receiver = Receiver::new(far, None);
            let missing = stage.recall(&asked).unwrap();
            want(&mut receiver, stage, missing, &|| false).unwrap();
            // Nothing of the guest has changed until it is loaded.
            assert!(same(&secondary, &before, &PageSet::all_of(&before)));
            image.loader()(&secondary, &asked).unwrap();
            image.loaded();
            assert!(image.memory_bytes() < PAGES * PAGE_SIZE);
            (secondary, before)
        });
        let sent = give(
            &mut near,
            &mut Encoder::default(),
            &primary,
            soon(),
            &|| true,
        );
        assert!(sent.unwrap() > 0);
        let (secondary, before) = other.join().unwrap();
        assert!(same(&secondary, &primary, &wants));
        let others = set((0..PAGES).filter(|frame| frame % 2 == 1));
        assert!(same(&secondary, &before, &others));
    }

    fn same(one: &GuestMemory, other: &GuestMemory, pages: &PageSet) -> bool {
        let page = |memory: &GuestMemory, frame: u64| {
            let mut page = [0; PAGE_SIZE as usize];
            memory
                .read_slice(&mut page, GuestAddress(frame * PAGE_SIZE))
                .unwrap();
            page
        };
        pages
            .iter()
            .all(|frame| page(one, frame) == page(other, frame))
    }

    /// What a primary says to what a secondary wrote.
    fn answer_to(bytes: &[u8]) -> Result<u64, ProtectionError> {
        let (mut near, mut far) = links();
        far.write_all(bytes).unwrap();
        let guest = guest(1);
        let deadline = Instant::now() + Duration::from_secs(1);
        give(
            &mut near,
            &mut Encoder::default(),
            &guest,
            deadline,
            &|| true,
        )
    }

    fn said(kind: Kind, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        frame::send(&mut bytes, kind, payload).unwrap();
        bytes
    }

    #[test]
    fn a_primary_gives_nothing_twice_and_waits_for_nobody_forever() {
        let asked = |run| said(Kind::Wanted, &wanted::encode(slice::from_ref(&run)));
        let once = asked(3..4);
        let end = said(Kind::Wanted, &[]);
        assert!(answer_to(&[once.clone(), end.clone()].concat()).is_ok());
        assert!(answer_to(&[once.clone(), once.clone(), end].concat()).is_err());
        assert!(answer_to(&asked(0..PAGES + 1)).is_err());
        assert!(answer_to(&said(Kind::Complete, &[])).is_err());
        let begun = Instant::now();
        assert!(answer_to(&once).is_err());
        assert!(answer_to(&once[..9]).is_err());
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    #[test]
    fn a_primary_does_not_wait_for_a_secondary_that_is_lost() {
        let (mut near, _far) = links();
        let begun = Instant::now();
        let lost = || begun.elapsed() < Duration::from_millis(30);
        let given = give(&mut near, &mut Encoder::default(), &guest(1), soon(), &lost);
        assert!(given.is_err());
        assert!(begun.elapsed() < Duration::from_secs(10));
    }

    /// What a secondary, which wants page 5, makes of what a primary says.
    fn heard(bytes: &[u8]) -> Result<(), ProtectionError> {
        let (mut near, far) = links();
        near.write_all(bytes).unwrap();
        let guest = guest(1);
        let Image::Staged(mut stage) = stage(&guest) else {
            unreachable!("it was made so");
        };
        want(
            &mut Receiver::new(far, None),
            &mut stage,
            set(5..6),
            &|| false,
        )
    }

    #[test]
    fn a_secondary_takes_no_page_that_it_did_not_ask_for() {
        let page = [9; PAGE_SIZE as usize];
        let pages = |frames: &[u64]| {
            let mut bytes = Vec::new();
            let pages = frames.iter().map(|frame| (*frame, Some(&page)));
            Encoder::default().send(pages, &mut bytes).unwrap();
            bytes
        };
        for wrong in [
            pages(&[4]),
            pages(&[5, 6]),
            pages(&[PAGES]),
            said(Kind::Complete, &[]),
        ] {
            assert!(heard(&wrong).is_err());
        }
        heard(&pages(&[5])).unwrap();
    }
}
