//! A copy is its guest after each checkpoint, whatever either side wrote, with a second image and without.

use proptest::prelude::*;
use tandem_vmm::memory;
use tandem_vmm::migration::frame::{self, Kind};
use tandem_vmm::snapshot::save::PageSink;

use super::*;
use crate::delta::{Ahead, Encoder, SENT_PAGES_MAX, Staging};

/// Frames that share a place in what the primary remembers, and some that do not.
const FRAMES: [u64; 4] = [1, 2, 1 + SENT_PAGES_MAX as u64, 2 + SENT_PAGES_MAX as u64];

#[derive(Clone, Copy, Debug)]
enum Step {
    Primary {
        page: usize,
        at: u64,
        value: u8,
    },
    Secondary {
        page: usize,
        at: u64,
        value: u8,
    },
    /// What the primary wrote is sent while it runs.
    Ahead,
    /// Nobody knows what the secondary has.
    Forget,
    Checkpoint,
}

fn step() -> impl Strategy<Value = Step> {
    let write = || (0..FRAMES.len(), 0..3u64, 0..3u8);
    prop_oneof![
        4 => write().prop_map(|(page, at, value)| Step::Primary { page, at, value }),
        3 => write().prop_map(|(page, at, value)| Step::Secondary { page, at, value }),
        1 => Just(Step::Ahead),
        1 => Just(Step::Forget),
        2 => Just(Step::Checkpoint),
    ]
}

struct Side {
    memory: Arc<GuestMemory>,
    wrote: PageSet,
}

impl Side {
    fn new() -> Self {
        let memory = memory::allocate((SENT_PAGES_MAX as u64 + 8) * PAGE_SIZE, false).unwrap();
        let wrote = PageSet::covering(&memory);
        Self { memory, wrote }
    }

    fn write(&mut self, page: usize, at: u64, value: u8) {
        let address = GuestAddress(FRAMES[page] * PAGE_SIZE + at);
        self.memory.write_slice(&[value], address).unwrap();
        assert!(self.wrote.insert(FRAMES[page]));
    }

    fn content(&self) -> Vec<u8> {
        let page = |frame: u64| {
            let mut page = vec![0; PAGE_SIZE as usize];
            let address = GuestAddress(frame * PAGE_SIZE);
            self.memory.read_slice(&mut page, address).unwrap();
            page
        };
        FRAMES.into_iter().flat_map(page).collect()
    }
}

fn receive(image: &mut Image, mut bytes: &[u8]) {
    let mut payload = Vec::new();
    while !bytes.is_empty() {
        assert_eq!(
            frame::receive(&mut bytes, &mut payload).unwrap(),
            Kind::Deltas
        );
        image.change(&payload).unwrap();
    }
}

/// What the primary says of pages that its secondary wants.
fn answer(stage: &mut Stage, encoder: &mut Encoder, primary: &Side, own: &PageSet) {
    let mut missing = stage.recall(own).unwrap();
    let mut sent = Vec::new();
    let memory = Arc::clone(&primary.memory);
    Ahead::new(encoder, memory, &mut sent)
        .pages(&missing)
        .unwrap();
    let (mut rest, mut payload) = (&sent[..], Vec::new());
    while !rest.is_empty() {
        frame::receive(&mut rest, &mut payload).unwrap();
        stage.answer(&payload, &mut missing).unwrap();
    }
    assert!(missing.is_empty(), "all that was asked for came");
}

fn run(mode: ResyncMode, steps: Vec<Step>) -> Result<(), TestCaseError> {
    let (mut primary, mut secondary) = (Side::new(), Side::new());
    let mut image = Image::new(mode, &secondary.memory, Side::new().memory);
    image.begin(&secondary.memory).unwrap();
    let mut encoder = Encoder::default();
    let mut staging = Staging::new(Arc::clone(&primary.memory));
    for step in steps.into_iter().chain([Step::Checkpoint]) {
        let mut sent = Vec::new();
        let before = secondary.content();
        match step {
            Step::Primary { page, at, value } => primary.write(page, at, value),
            Step::Secondary { page, at, value } => {
                secondary.write(page, at, value);
                continue;
            }
            Step::Ahead => {
                let memory = Arc::clone(&primary.memory);
                Ahead::new(&mut encoder, memory, &mut sent)
                    .pages(&primary.wrote)
                    .unwrap();
                primary.wrote.clear();
            }
            Step::Forget => encoder.forget(),
            Step::Checkpoint => {
                encoder.begin();
                staging.clear(0);
                staging.pages(&primary.wrote).unwrap();
                primary.wrote.clear();
                encoder.send(staging.batch().pages(), &mut sent).unwrap();
            }
        }
        receive(&mut image, &sent);
        if matches!(step, Step::Checkpoint) {
            if let Image::Staged(stage) = &mut image {
                answer(stage, &mut encoder, &primary, &secondary.wrote);
            }
            prop_assert!(
                secondary.content() == before,
                "changed before all was there"
            );
            image.loader()(&secondary.memory, &secondary.wrote).unwrap();
            image.loaded();
            secondary.wrote.clear();
            prop_assert!(primary.content() == secondary.content());
        }
    }
    Ok(())
}

proptest! {
    /// A page is not sent that is what was sent last: the copy has it all the same.
    #[test]
    fn the_copy_is_the_guest_after_each_checkpoint(
        steps in prop::collection::vec(step(), 1..80),
    ) {
        run(ResyncMode::Running, steps)?;
    }

    #[test]
    fn the_copy_is_the_guest_without_a_second_image(
        steps in prop::collection::vec(step(), 1..80),
    ) {
        run(ResyncMode::Stopped, steps)?;
    }
}

fn deltas(encoder: &mut Encoder, frame: u64, fill: u8) -> Vec<u8> {
    let mut sent = Vec::new();
    let page = [fill; PAGE_SIZE as usize];
    let pages = std::iter::once((frame, Some(&page)));
    encoder.send(pages, &mut sent).unwrap();
    sent
}

#[test]
fn what_was_loaded_is_given_back() {
    const PAGES: u64 = 4 << 10;
    let guest = memory::allocate(PAGES * PAGE_SIZE, false).unwrap();
    let beside = memory::allocate(PAGES * PAGE_SIZE, false).unwrap();
    let mut image = Image::new(ResyncMode::Stopped, &guest, beside);
    let mut encoder = Encoder::default();
    // The first checkpoint goes where it belongs.
    receive(&mut image, &deltas(&mut encoder, 9, 1));
    assert_eq!(
        guest.read_obj::<u8>(GuestAddress(9 * PAGE_SIZE)).unwrap(),
        1
    );
    image.begin(&guest).unwrap();
    encoder.forget();
    for frame in 0..PAGES {
        receive(&mut image, &deltas(&mut encoder, frame, 7));
    }
    assert_eq!(
        guest.read_obj::<u8>(GuestAddress(9 * PAGE_SIZE)).unwrap(),
        1
    );
    let full = image.memory_bytes();
    image.loader()(&guest, &PageSet::covering(&guest)).unwrap();
    image.loaded();
    assert!(full - image.memory_bytes() >= PAGES * PAGE_SIZE, "{full}");
    assert_eq!(
        guest.read_obj::<u8>(GuestAddress(9 * PAGE_SIZE)).unwrap(),
        7
    );
}

#[test]
fn a_copy_is_not_loaded_without_all_that_it_wrote() {
    let guest = memory::allocate(8 * PAGE_SIZE, false).unwrap();
    let beside = memory::allocate(8 * PAGE_SIZE, false).unwrap();
    let mut image = Image::new(ResyncMode::Stopped, &guest, beside);
    image.begin(&guest).unwrap();
    receive(&mut image, &deltas(&mut Encoder::default(), 2, 1));
    let mut own = PageSet::covering(&guest);
    assert!(own.insert(2) && own.insert(3));
    assert!(image.loader()(&guest, &own).is_err());
    assert_eq!(
        guest.read_obj::<u8>(GuestAddress(2 * PAGE_SIZE)).unwrap(),
        0
    );
}

#[test]
fn a_delta_to_a_page_that_is_not_remembered_is_refused() {
    let guest = memory::allocate(8 * PAGE_SIZE, false).unwrap();
    let beside = memory::allocate(8 * PAGE_SIZE, false).unwrap();
    let mut image = Image::new(ResyncMode::Stopped, &guest, beside);
    let mut encoder = Encoder::default();
    deltas(&mut encoder, 2, 1);
    let mut page = [1; PAGE_SIZE as usize];
    page[7] = 9;
    let mut sent = Vec::new();
    encoder
        .send(std::iter::once((2, Some(&page))), &mut sent)
        .unwrap();
    let (mut rest, mut payload) = (&sent[..], Vec::new());
    frame::receive(&mut rest, &mut payload).unwrap();
    assert!(image.change(&payload).is_err());
}
