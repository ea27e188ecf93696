//! The guest's console on the host: one primary (terminal, pipe or file) and attached clients.
//!
//! The guest's bytes wait in a bounded buffer per reader until the device loop writes them out.
//! When the primary falls behind, the guest waits: no byte is lost. A client that falls behind is
//! let go, since it must not hold up the guest. The last output is kept for those who attach later.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rustix::event::{PollFd, PollFlags, poll};
use tandem_devices::legacy::serial::SerialOutput;
use vmm_sys_util::eventfd::EventFd;

use crate::config::CPUS_MAX;

/// Recent output that a client gets when it attaches, in bytes.
pub const HISTORY_MAX: usize = 64 << 10;
/// Output that may wait for the primary, in bytes; the guest waits beyond it.
pub const PENDING_MAX: usize = 256 << 10;
/// Output that may wait for a client, in bytes; beyond it the client is let go.
pub const CLIENT_PENDING_MAX: usize = 1 << 20;
/// Most clients at a time.
pub const CLIENTS_MAX: usize = 16;
/// Bytes moved per system call; a pipe that polls writable takes this much without blocking.
const CHUNK: usize = 4096;

/// Where the guest's console goes first.
#[derive(Debug)]
pub enum Primary {
    /// A terminal, pipe or file for output and one for input.
    Stdio {
        /// Where the guest's input comes from.
        input: File,
        /// Where its output goes.
        output: File,
    },
    /// A file for output.
    File(File),
    /// Nothing.
    None,
}

impl Primary {
    fn output(&self) -> Option<&File> {
        match self {
            Self::Stdio { output, .. } | Self::File(output) => Some(output),
            Self::None => None,
        }
    }
}

/// Stands between the guest's console and its readers.
pub trait ConsoleGate: Send + Sync {
    /// Takes output of the guest; false if the console is to put it out as it is. What the gate takes it
    /// hands to [`ConsoleHub::emit`] when it may leave.
    fn output(&self, bytes: &[u8]) -> bool;

    /// Whether it cannot take more output now.
    fn is_full(&self) -> bool;

    /// Input is about to reach the guest; false if it must not.
    fn input(&self, bytes: &[u8]) -> bool;

    /// The first `written` bytes that were ever handed to the readers are at the primary.
    fn written(&self, written: u64);
}

struct Client {
    stream: UnixStream,
    pending: VecDeque<u8>,
}

struct State {
    primary: Primary,
    input_open: bool,
    pending: VecDeque<u8>,
    /// Bytes that were handed to the readers so far.
    emitted: u64,
    history: VecDeque<u8>,
    clients: Vec<Client>,
    /// Input that did not come from readers.
    injected: VecDeque<u8>,
    /// Whether the loop knows that output waits.
    announced: bool,
}

/// The console. Cheap to clone; the devices put bytes in, the device loop moves them.
#[derive(Clone)]
pub struct ConsoleHub {
    state: Arc<Mutex<State>>,
    gate: Arc<OnceLock<Arc<dyn ConsoleGate>>>,
    wake: Arc<EventFd>,
}

impl ConsoleHub {
    /// A console whose device loop is woken by `wake`.
    pub fn new(primary: Primary, wake: Arc<EventFd>) -> Self {
        let input_open = matches!(primary, Primary::Stdio { .. });
        let state = State {
            primary,
            input_open,
            pending: VecDeque::new(),
            emitted: 0,
            history: VecDeque::new(),
            clients: Vec::new(),
            injected: VecDeque::new(),
            announced: false,
        };
        Self {
            state: Arc::new(Mutex::new(state)),
            gate: Arc::default(),
            wake,
        }
    }

    /// Puts `gate` between the guest and the console's readers, for good. There is one at most.
    pub fn guard(&self, gate: Arc<dyn ConsoleGate>) {
        if self.gate.set(gate).is_err() {
            tracing::error!("the console has a gate already");
        }
    }

    /// Takes output of the guest.
    pub fn put(&self, bytes: &[u8]) {
        if !self.gate.get().is_some_and(|gate| gate.output(bytes)) {
            self.emit(bytes);
        }
    }

    /// Gives `bytes` to the guest as if a reader had typed them.
    pub fn inject(&self, bytes: &[u8]) {
        self.lock().injected.extend(bytes);
        if let Err(error) = self.wake.write(1) {
            tracing::error!(%error, "cannot wake the device loop");
        }
    }

    /// Whether there is input that no reader typed.
    pub fn has_injected(&self) -> bool {
        !self.lock().injected.is_empty()
    }

    /// Hands output to the readers, who get it soon. How many bytes they were handed so far.
    pub fn emit(&self, bytes: &[u8]) -> u64 {
        let mut state = self.lock();
        state.take_output(bytes);
        let emitted = state.emitted;
        let known = std::mem::replace(&mut state.announced, true);
        drop(state);
        if !known && let Err(error) = self.wake.write(1) {
            tracing::error!(%error, "cannot wake the device loop");
        }
        emitted
    }

    /// Whether the primary is so far behind that the guest has to wait.
    pub fn is_full(&self) -> bool {
        self.gate.get().is_some_and(|gate| gate.is_full())
            || self.lock().pending.len() + usize::from(CPUS_MAX) >= PENDING_MAX
    }

    /// Whether output waits.
    pub fn has_output(&self) -> bool {
        self.lock().announced
    }

    /// Writes out what waits, without blocking. True if some of it has to wait on.
    pub fn flush(&self) -> bool {
        let mut state = self.lock();
        state.flush_primary();
        state.flush_clients();
        let more = !state.is_flushed();
        state.announced = more;
        let written = state.emitted - state.pending.len() as u64;
        drop(state);
        if let Some(gate) = self.gate.get() {
            gate.written(written);
        }
        more
    }

    /// Writes out what waits for the primary, waiting at most `patience`. At the end of a run.
    pub fn drain(&self, patience: std::time::Duration) {
        let deadline = std::time::Instant::now() + patience;
        while self.flush() && std::time::Instant::now() < deadline {
            std::thread::sleep(std::time::Duration::from_millis(1));
        }
    }

    /// Adds a client: it gets the recent output, then all further output.
    ///
    /// # Errors
    /// When there are too many.
    pub fn attach(&self, stream: UnixStream) -> io::Result<()> {
        stream.set_nonblocking(true)?;
        let mut state = self.lock();
        if state.clients.len() >= CLIENTS_MAX {
            return Err(io::Error::other(format!(
                "the console has {CLIENTS_MAX} clients already"
            )));
        }
        let pending = state.history.clone();
        state.clients.push(Client { stream, pending });
        state.announced = true;
        Ok(())
    }

    /// Reads input of the primary and of all clients without blocking, at most `room` bytes.
    pub fn read_input(&self, room: usize) -> Vec<u8> {
        let mut state = self.lock();
        let injected = room.min(state.injected.len());
        let mut input: Vec<u8> = state.injected.drain(..injected).collect();
        let mut typed = Vec::new();
        state.read_primary(&mut typed, room - injected);
        state
            .clients
            .retain_mut(|client| read_client(client, &mut typed, room - injected));
        drop(state);
        let gate = self.gate.get().filter(|_| !typed.is_empty());
        if gate.is_none_or(|gate| gate.input(&typed)) {
            input.append(&mut typed);
        }
        input
    }

    /// Calls `watch` with every descriptor that has input.
    pub fn for_each_input(&self, mut watch: impl FnMut(BorrowedFd<'_>)) {
        let state = self.lock();
        if let (true, Primary::Stdio { input, .. }) = (state.input_open, &state.primary) {
            watch(input.as_fd());
        }
        state.clients.iter().for_each(|c| watch(c.stream.as_fd()));
    }

    /// The recent output.
    pub fn history(&self) -> Vec<u8> {
        self.lock().history.iter().copied().collect()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn is_flushed(&self) -> bool {
        self.pending.is_empty() && self.clients.iter().all(|c| c.pending.is_empty())
    }

    fn take_output(&mut self, bytes: &[u8]) {
        if self.primary.output().is_some() {
            self.pending.extend(bytes);
        }
        self.emitted += bytes.len() as u64;
        self.history.extend(bytes);
        let excess = self.history.len().saturating_sub(HISTORY_MAX);
        self.history.drain(..excess);
        self.clients.retain_mut(|client| {
            client.pending.extend(bytes);
            client.pending.len() <= CLIENT_PENDING_MAX
        });
    }

    fn flush_primary(&mut self) {
        let Some(output) = self.primary.output() else {
            return;
        };
        while !self.pending.is_empty() && is_ready(output, PollFlags::OUT) {
            let (front, _) = self.pending.as_slices();
            match (&mut &*output).write(&front[..front.len().min(CHUNK)]) {
                Ok(written) => drop(self.pending.drain(..written)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(error) => {
                    tracing::warn!(%error, "the console's output is gone; its bytes are dropped");
                    self.pending.clear();
                    self.primary = Primary::None;
                    self.input_open = false;
                    return;
                }
            }
        }
    }

    fn flush_clients(&mut self) {
        self.clients.retain_mut(|client| {
            while !client.pending.is_empty() {
                let (front, _) = client.pending.as_slices();
                match client.stream.write(front) {
                    Ok(0) => return false,
                    Ok(written) => drop(client.pending.drain(..written)),
                    Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
                    Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                    Err(_) => return false,
                }
            }
            true
        });
    }

    fn read_primary(&mut self, into: &mut Vec<u8>, room: usize) {
        let Primary::Stdio { input, .. } = &self.primary else {
            return;
        };
        let mut chunk = [0; CHUNK];
        while self.input_open && into.len() < room && is_ready(input, PollFlags::IN) {
            let len = chunk.len().min(room - into.len());
            match (&mut &*input).read(&mut chunk[..len]) {
                Ok(0) => self.input_open = false,
                Ok(read) => into.extend_from_slice(&chunk[..read]),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return,
                Err(_) => self.input_open = false,
            }
        }
    }
}

/// Reads what a client sent; false when it is gone.
fn read_client(client: &mut Client, into: &mut Vec<u8>, room: usize) -> bool {
    let mut chunk = [0; CHUNK];
    while into.len() < room {
        let len = chunk.len().min(room - into.len());
        match client.stream.read(&mut chunk[..len]) {
            // A client that only closed its sending side still gets output.
            Ok(0) => return !is_hung_up(&client.stream),
            Ok(read) => into.extend_from_slice(&chunk[..read]),
            Err(e) if e.kind() == io::ErrorKind::WouldBlock => return true,
            Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
            Err(_) => return false,
        }
    }
    true
}

fn is_ready(file: &File, flags: PollFlags) -> bool {
    let mut fds = [PollFd::new(file, flags)];
    let no_wait = rustix::time::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(poll(&mut fds, Some(&no_wait)), Ok(1))
}

fn is_hung_up(stream: &UnixStream) -> bool {
    let mut fds = [PollFd::new(stream, PollFlags::OUT)];
    let no_wait = rustix::time::Timespec {
        tv_sec: 0,
        tv_nsec: 0,
    };
    matches!(poll(&mut fds, Some(&no_wait)), Ok(1)) && fds[0].revents().contains(PollFlags::HUP)
}

impl SerialOutput for ConsoleHub {
    fn put(&mut self, byte: u8) {
        Self::put(self, &[byte]);
    }

    fn is_full(&self) -> bool {
        Self::is_full(self)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hub(primary: Primary) -> ConsoleHub {
        ConsoleHub::new(primary, Arc::new(EventFd::new(libc::EFD_NONBLOCK).unwrap()))
    }

    #[test]
    fn the_guest_waits_for_a_pipe_that_nobody_reads_and_nothing_is_lost() {
        let (mut reader, writer) = std::io::pipe().unwrap();
        let input = File::open("/dev/null").unwrap();
        let hub = hub(Primary::Stdio {
            input,
            output: File::from(std::os::fd::OwnedFd::from(writer)),
        });
        let mut sent = Vec::new();
        while !hub.is_full() {
            let line = format!("line {}\n", sent.len());
            hub.put(line.as_bytes());
            sent.extend_from_slice(line.as_bytes());
        }
        assert!(hub.flush(), "a pipe holds less than the pending bytes");
        let reader = std::thread::spawn(move || {
            let mut got = Vec::new();
            reader.read_to_end(&mut got).unwrap();
            got
        });
        hub.drain(std::time::Duration::from_secs(10));
        drop(hub);
        assert_eq!(reader.join().unwrap(), sent);
    }

    #[test]
    fn a_client_gets_history_then_output_and_its_input_is_read() {
        let hub = hub(Primary::None);
        hub.put(b"before ");
        let (ours, theirs) = UnixStream::pair().unwrap();
        hub.attach(theirs).unwrap();
        hub.put(b"after");
        hub.flush();
        let mut got = [0; 12];
        (&ours).read_exact(&mut got).unwrap();
        assert_eq!(&got, b"before after");
        (&ours).write_all(b"input").unwrap();
        assert_eq!(hub.read_input(3), b"inp");
        assert_eq!(hub.read_input(64), b"ut");
    }

    #[test]
    fn a_client_that_does_not_read_is_let_go_and_history_is_bounded() {
        let hub = hub(Primary::None);
        let (_ours, theirs) = UnixStream::pair().unwrap();
        hub.attach(theirs).unwrap();
        for _ in 0..40 {
            hub.put(&[b'x'; 64 << 10]);
            hub.flush();
        }
        assert_eq!(hub.lock().clients.len(), 0);
        assert_eq!(hub.history().len(), HISTORY_MAX);
    }

    #[test]
    fn clients_are_bounded() {
        let hub = hub(Primary::None);
        let pairs: Vec<_> = (0..=CLIENTS_MAX)
            .map(|_| UnixStream::pair().unwrap())
            .collect();
        let mut results = pairs
            .iter()
            .map(|(_, theirs)| hub.attach(theirs.try_clone().unwrap()));
        assert!(results.by_ref().take(CLIENTS_MAX).all(|r| r.is_ok()));
        assert!(results.next().unwrap().is_err());
    }
}
