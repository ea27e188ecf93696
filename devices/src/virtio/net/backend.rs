//! Where frames go and come from.

use std::io;
use std::os::fd::BorrowedFd;

use crate::event::Poller;
use crate::virtio::buffers::Buffers;

bitflags::bitflags! {
    /// Work that a frame may leave to whoever gets it, in either direction.
    #[derive(Clone, Copy, Debug, PartialEq, Eq)]
    pub struct Offloads: u32 {
        /// The checksum is not filled in yet, or not verified.
        const CHECKSUM = 1;
        /// TCP over IPv4 larger than the MTU.
        const TSO4 = 1 << 1;
        /// TCP over IPv6 larger than the MTU.
        const TSO6 = 1 << 2;
        /// Large TCP with congestion notification.
        const ECN = 1 << 3;
    }
}

/// What became of a frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Transmit {
    /// It is out, or copied; the driver gets its buffers back.
    Sent,
    /// The backend keeps it and reports it by [`NetBackend::next_sent`].
    Pending,
    /// There is no room. The same frame is offered again after the backend's next event.
    Full,
    /// It can never be sent: malformed, or the link is down.
    Refused,
}

/// The other end of a network device.
///
/// Frames in both directions begin with a header of [`HEADER_SIZE`](super::HEADER_SIZE) bytes
/// (VIRTIO 1.2, 5.1.6). A backend that fails takes the link down, refuses frames and has nothing
/// to receive; the guest lives on.
pub trait NetBackend: Send {
    /// What a frame given to it may leave undone, and what it may leave undone in frames that it
    /// hands out if the driver agrees.
    fn offloads(&self) -> Offloads;

    /// The driver is ready and takes frames with `receive` left undone. The backend watches its
    /// descriptors under `token` from here on.
    ///
    /// # Errors
    /// When the host refuses the offloads or cannot watch.
    fn start(&mut self, receive: Offloads, poller: &mut dyn Poller, token: u32) -> io::Result<()>;

    /// The driver is gone: forgets frames in both directions and stops watching. Nothing touches
    /// guest memory afterwards.
    fn stop(&mut self, poller: &mut dyn Poller);

    /// A watched descriptor changed. Frames are sent and received after this.
    fn ready(&mut self, poller: &mut dyn Poller) {
        let _ = poller;
    }

    /// Sends a frame: a header and at most [`FRAME_MAX`](super::FRAME_MAX) bytes. A backend that
    /// answers [`Transmit::Pending`] keeps a clone of `frame` and reports `head` later.
    fn transmit(&mut self, head: u16, frame: &Buffers) -> Transmit;

    /// Sends a frame that is not in guest memory, as [`NetBackend::transmit`] would. It is never kept:
    /// the answer is not [`Transmit::Pending`].
    fn send(&mut self, frame: &[u8]) -> Transmit;

    /// A frame found no room: [`NetBackend::ready`] has to follow once there is some, under `token`.
    ///
    /// # Errors
    /// When the host cannot watch.
    fn wait_for_room(&mut self, poller: &mut dyn Poller, token: u32) -> io::Result<()> {
        let _ = (poller, token);
        Ok(())
    }

    /// Ends a batch of frames in either direction: what was only gathered goes out.
    fn flush(&mut self) {}

    /// The next frame that was pending and is sent now.
    fn next_sent(&mut self) -> Option<u16> {
        None
    }

    /// Takes its own copies of all pending frames, so that nothing refers to guest memory.
    fn settle(&mut self) {}

    /// Room, with the header, that the next received frame may need; none if nothing waits.
    fn next_room(&mut self) -> Option<usize>;

    /// Puts the next received frame into `into`, marks the pages, and says how long it is with
    /// its header. A frame longer than `into` is lost. None if nothing waits. The header's
    /// `num_buffers` is the device's business.
    fn receive(&mut self, into: &Buffers) -> Option<usize>;

    /// As [`NetBackend::receive`], into memory that is not the guest's. There must be as much room as
    /// [`NetBackend::next_room`] said.
    fn take(&mut self, into: &mut [u8]) -> Option<usize>;

    /// Whether frames can pass.
    fn link_up(&self) -> bool;

    /// What frames are read from, one at a time and with their headers, if another process can do that.
    fn descriptor(&self) -> Option<BorrowedFd<'_>> {
        None
    }
}
