//! What pages were when they were sent last, of some of those that the guest wrote last.
//!
//! A page has one place, by its frame. It leaves it when another one wants it, but not while it is in use: a
//! guest that writes more pages than there are places, again and again, finds some of them here.

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
pub(super) struct SentPages {
    /// Empty at first.
    places: Vec<Option<Box<Sent>>>,
    checkpoint: u64,
}

impl SentPages {
    /// Another checkpoint begins.
    pub(super) fn begin(&mut self) {
        self.checkpoint += 1;
    }

    /// The other side has nothing.
    pub(super) fn forget(&mut self) {
        self.places = Vec::new();
    }

    fn place(frame: u64) -> usize {
        (frame % SENT_PAGES_MAX as u64) as usize
    }

    /// What page `frame` was when it was sent last, if it is remembered.
    pub(super) fn get(&mut self, frame: u64) -> Option<&mut Page> {
        let sent = self.places.get_mut(Self::place(frame))?.as_mut()?;
        if sent.frame != frame {
            return None;
        }
        sent.used = self.checkpoint;
        Some(&mut sent.page)
    }

    /// Page `frame`, which is not remembered, is sent; it may be remembered from now on.
    pub(super) fn put(&mut self, frame: u64, page: &Page) {
        self.places.resize_with(SENT_PAGES_MAX, || None);
        let used = self.checkpoint;
        match &mut self.places[Self::place(frame)] {
            Some(sent) if used - sent.used < LIFETIME => {}
            Some(sent) => {
                sent.frame = frame;
                sent.used = used;
                sent.page = *page;
            }
            place => {
                let page = *page;
                *place = Some(Box::new(Sent { frame, used, page }));
            }
        }
    }
}
