//! What pages were when they were sent last, of some of those that the guest wrote last.
//!
//! A page has one place, by its frame. It leaves it when another one wants it, but not while it is in use: a
//! guest that writes more pages than there are places, again and again, finds some of them here.
//!
//! The primary decides which pages are remembered; a secondary that has to know does as it is told.

use tandem_vmm::migration::pages::Page;

/// Most pages that are remembered: 16 MiB, and 16 bytes for each place once there is one page.
pub const SENT_PAGES_MAX: usize = 4096;
/// Checkpoints for which a page keeps its place without being written.
const LIFETIME: u64 = 2;

struct Sent {
    frame: u64,
    /// The checkpoint that used it last.
    used: u64,
    page: Page,
}

/// Pages as they were sent last.
#[derive(Default)]
pub struct SentPages {
    /// Empty at first.
    places: Vec<Option<Box<Sent>>>,
    /// How many of them are taken.
    taken: usize,
    checkpoint: u64,
}

impl SentPages {
    /// Another checkpoint begins.
    pub(super) fn begin(&mut self) {
        self.checkpoint += 1;
    }

    /// The other side has nothing.
    pub fn forget(&mut self) {
        self.places = Vec::new();
        self.taken = 0;
    }

    /// Bytes of memory that it takes.
    pub fn memory_bytes(&self) -> u64 {
        let places = self.places.capacity() * size_of::<Option<Box<Sent>>>();
        (places + self.taken * size_of::<Sent>()) as u64
    }

    fn place(frame: u64) -> usize {
        (frame % SENT_PAGES_MAX as u64) as usize
    }

    /// What page `frame` was when it was sent last, if it is remembered.
    pub fn get(&mut self, frame: u64) -> Option<&mut Page> {
        let sent = self.places.get_mut(Self::place(frame))?.as_mut()?;
        if sent.frame != frame {
            return None;
        }
        sent.used = self.checkpoint;
        Some(&mut sent.page)
    }

    /// Page `frame`, which is not remembered, is sent; it may be remembered from now on. Whether it is.
    pub(super) fn put(&mut self, frame: u64, page: &Page) -> bool {
        let other = self.places.get(Self::place(frame));
        let in_use = |sent: &Sent| self.checkpoint - sent.used < LIFETIME;
        if other.and_then(Option::as_deref).is_some_and(in_use) {
            return false;
        }
        self.set(frame, page);
        true
    }

    /// Page `frame` is remembered from now on, and not the one that had its place.
    pub fn set(&mut self, frame: u64, page: &Page) {
        self.places.resize_with(SENT_PAGES_MAX, || None);
        let used = self.checkpoint;
        match &mut self.places[Self::place(frame)] {
            Some(sent) => {
                sent.frame = frame;
                sent.used = used;
                sent.page = *page;
            }
            place => {
                let page = *page;
                *place = Some(Box::new(Sent { frame, used, page }));
                self.taken += 1;
            }
        }
    }
}
