//! Where a console's bytes go and come from.

use std::io;

use crate::event::Poller;
use crate::virtio::buffers::Buffers;

/// The size of the window in characters (5.3.4).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WindowSize {
    /// Characters in a line.
    pub columns: u16,
    /// Lines.
    pub rows: u16,
}

/// The other end of a console.
///
/// A backend that fails takes all output and has no input: a guest does not stop because nobody
/// watches it.
pub trait ConsoleBackend: Send {
    /// The driver is ready. The backend watches its descriptors under `token` from here on.
    ///
    /// # Errors
    /// When the host cannot watch.
    fn start(&mut self, poller: &mut dyn Poller, token: u32) -> io::Result<()>;

    /// The driver is gone: stops watching. Bytes taken before are still output.
    fn stop(&mut self, poller: &mut dyn Poller);

    /// Takes output; returns how many bytes it took, from the first on. The rest is offered again
    /// after the backend's next event.
    fn write(&mut self, bytes: &Buffers) -> usize;

    /// Puts input into `into`, marks the pages, and returns how many bytes. None at all means
    /// that there is nothing before the backend's next event.
    fn read(&mut self, into: &Buffers) -> usize;

    /// The window's size, if there is a window. May change with the backend's events.
    fn window(&self) -> Option<WindowSize> {
        None
    }
}
