//! The backend of a disk that has a gate: what is the same whichever gate it is.

use std::collections::VecDeque;
use std::io;

use tandem_devices::event::Poller;
use tandem_devices::virtio::block::{BlockBackend, BlockIo, Operation};
use tandem_vmm::build::borrow;
use vmm_sys_util::eventfd::EventFd;

/// What a gate does with its disk's requests.
pub(super) trait Gating: Send {
    /// By which the device is told to look at its backend.
    fn event(&self) -> &EventFd;

    /// Whether the guest has a copy, or is one: then it does not see what the host fails.
    fn has_copy(&self) -> bool;

    /// Whether one more request can be taken.
    fn has_room(&self, outside: &dyn BlockBackend) -> bool;

    /// Takes a request.
    fn submit(&mut self, outside: &mut dyn BlockBackend, io: BlockIo);

    /// Passes on what waited and need not any more.
    fn advance(&mut self, outside: &mut dyn BlockBackend) -> io::Result<()>;

    /// A request that is done without the outside.
    fn next_done(&mut self) -> Option<usize> {
        None
    }

    /// The outside did a request. Whether the guest gets to see that.
    fn completed(&mut self, token: usize, result: &io::Result<()>) -> bool;

    /// The guest is to be saved: waits until a request completes, or lets the guest see what is `withheld`.
    fn wait(&mut self, outside: &mut dyn BlockBackend, withheld: &mut Withheld) -> io::Result<()>;
}

/// Requests that the host failed, of which the guest does not know; in flight for the device, which bounds them.
#[derive(Debug, Default)]
pub(super) struct Withheld {
    failed: VecDeque<(usize, io::Error)>,
    /// It gets to know.
    tells: bool,
}

impl Withheld {
    /// The guest gets to know of them. Whether there are any.
    pub(super) fn tell(&mut self) -> bool {
        self.tells = !self.failed.is_empty();
        self.tells
    }

    /// One that the guest, which may have a copy, is told of after all.
    fn next_told(&mut self, has_copy: bool) -> Option<(usize, io::Result<()>)> {
        if has_copy && !self.tells {
            return None;
        }
        let (token, error) = self.failed.pop_front()?;
        self.tells &= !self.failed.is_empty();
        Some((token, Err(error)))
    }
}

/// A gate in front of what does its disk's requests. The gate goes first.
pub(crate) struct Front<G> {
    pub(super) gating: G,
    outside: Box<dyn BlockBackend>,
    withheld: Withheld,
}

impl<G> Front<G> {
    pub(super) fn put(gating: G, outside: Box<dyn BlockBackend>) -> Self {
        Self {
            gating,
            outside,
            withheld: Withheld::default(),
        }
    }
}

impl<G: Gating> BlockBackend for Front<G> {
    fn sectors(&self) -> u64 {
        self.outside.sectors()
    }

    fn block_size(&self) -> u32 {
        self.outside.block_size()
    }

    fn is_readonly(&self) -> bool {
        self.outside.is_readonly()
    }

    fn start(&mut self, poller: &mut dyn Poller, token: u32) -> io::Result<()> {
        // The event outlives devices, and one that was let go may have watched it.
        poller.unwatch(borrow(self.gating.event()));
        poller.watch_input(borrow(self.gating.event()), token)?;
        self.outside.start(poller, token)
    }

    fn stop(&mut self, poller: &mut dyn Poller) {
        poller.unwatch(borrow(self.gating.event()));
        self.outside.stop(poller);
    }

    fn has_room(&self) -> bool {
        self.gating.has_room(&*self.outside)
    }

    fn submit(&mut self, io: BlockIo) {
        self.gating.submit(&mut *self.outside, io);
    }

    fn flush_batch(&mut self) -> io::Result<()> {
        self.gating.advance(&mut *self.outside)?;
        self.outside.flush_batch()
    }

    fn next_completed(&mut self) -> Option<(usize, io::Result<()>)> {
        if let Err(error) = self.gating.advance(&mut *self.outside) {
            tracing::error!(%error, "cannot pass on what waited for a disk");
        }
        if let Some(token) = self.gating.next_done() {
            return Some((token, Ok(())));
        }
        if let Some(told) = self.withheld.next_told(self.gating.has_copy()) {
            return Some(told);
        }
        loop {
            let (token, result) = self.outside.next_completed()?;
            match (self.gating.completed(token, &result), result) {
                (false, Err(error)) => self.withheld.failed.push_back((token, error)),
                (_, result) => return Some((token, result)),
            }
        }
    }

    fn wait(&mut self) -> io::Result<()> {
        self.gating.wait(&mut *self.outside, &mut self.withheld)
    }
}

/// Whether a request changes the image.
pub(super) fn writes(operation: Operation) -> bool {
    !matches!(operation, Operation::Read | Operation::Flush)
}
