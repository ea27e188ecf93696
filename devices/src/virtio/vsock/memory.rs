//! A host side in memory, for tests of the device.
#![allow(
    missing_docs,
    clippy::unwrap_used,
    reason = "test code fails by panicking"
)]

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Instant;

use rustix::event::{EventfdFlags, eventfd};

use super::backend::{Connect, Direction, HostEvent, Ready, StreamId, VsockBackend};
use crate::virtio::buffers::Buffers;

/// One stream as its host program sees it.
#[derive(Debug, Default)]
pub struct HostStream {
    /// What the guest sent and the program has yet to read.
    pub to_host: VecDeque<u8>,
    /// What the program sent and the device has yet to read.
    pub from_host: VecDeque<u8>,
    /// The host port told with the acceptance.
    pub accepted: Option<u32>,
    /// The guest sends no more.
    pub ended_by_guest: bool,
    /// The guest receives no more.
    pub refused_by_guest: bool,
    /// The device closed the stream.
    pub closed_by_device: bool,
    ended_by_host: bool,
    closed_by_host: bool,
    device_waits: bool,
}

#[derive(Debug)]
struct State {
    streams: BTreeMap<StreamId, HostStream>,
    listening: BTreeSet<u32>,
    slow: BTreeSet<u32>,
    pending: BTreeSet<StreamId>,
    events: VecDeque<HostEvent>,
    capacity: usize,
    next: u64,
}

/// Host programs of a test.
#[derive(Clone, Debug)]
pub struct MemoryHost(Arc<Mutex<State>>);

/// The backend that connects the device to them.
#[derive(Debug)]
pub struct MemoryBackend {
    host: MemoryHost,
    descriptor: std::os::fd::OwnedFd,
}

impl MemoryHost {
    /// Host programs behind pipes of `capacity` bytes each.
    pub fn new(capacity: usize) -> Self {
        Self(Arc::new(Mutex::new(State {
            streams: BTreeMap::new(),
            listening: BTreeSet::new(),
            slow: BTreeSet::new(),
            pending: BTreeSet::new(),
            events: VecDeque::new(),
            capacity,
            next: 1,
        })))
    }

    pub fn backend(&self) -> Box<MemoryBackend> {
        let descriptor = eventfd(0, EventfdFlags::CLOEXEC).unwrap();
        let host = self.clone();
        Box::new(MemoryBackend { host, descriptor })
    }

    /// A program listens at this port of the host.
    pub fn listen(&self, port: u32) {
        self.state().listening.insert(port);
    }

    /// A program listens at this port, and accepts only by [`MemoryHost::finish_connect`].
    pub fn listen_slowly(&self, port: u32) {
        self.state().slow.insert(port);
    }

    /// The streams that wait for [`MemoryHost::finish_connect`].
    pub fn pending(&self) -> Vec<StreamId> {
        self.state().pending.iter().copied().collect()
    }

    pub fn finish_connect(&self, stream: StreamId, accept: bool) {
        self.state().pending.remove(&stream);
        let event = match accept {
            true => HostEvent::Connected(stream),
            false => {
                self.state().streams.remove(&stream);
                HostEvent::Refused(stream)
            }
        };
        self.state().events.push_back(event);
    }

    /// A program asks for the guest's `port`.
    pub fn connect(&self, port: u32) -> StreamId {
        let mut state = self.state();
        let stream = state.add();
        let event = HostEvent::Incoming { stream, port };
        state.events.push_back(event);
        stream
    }

    pub fn send(&self, stream: StreamId, bytes: &[u8]) {
        let mut state = self.state();
        state.stream(stream).from_host.extend(bytes);
        state.tell(stream);
    }

    /// The program sends no more.
    pub fn finish(&self, stream: StreamId) {
        let mut state = self.state();
        state.stream(stream).ended_by_host = true;
        state.tell(stream);
    }

    /// The program closes the stream.
    pub fn close(&self, stream: StreamId) {
        let mut state = self.state();
        state.stream(stream).ended_by_host = true;
        state.stream(stream).closed_by_host = true;
        state.tell(stream);
    }

    /// The program reads `max` bytes at most.
    pub fn read(&self, stream: StreamId, max: usize) -> Vec<u8> {
        let mut state = self.state();
        let pipe = state.stream(stream);
        let len = pipe.to_host.len().min(max);
        let bytes = pipe.to_host.drain(..len).collect();
        if len > 0 && std::mem::take(&mut pipe.device_waits) {
            let ready = Ready {
                writable: true,
                ..Ready::default()
            };
            state.events.push_back(HostEvent::Ready(stream, ready));
        }
        bytes
    }

    /// What `look` sees of a stream.
    pub fn look<R>(&self, stream: StreamId, look: impl FnOnce(&HostStream) -> R) -> R {
        look(self.state().stream(stream))
    }

    /// All streams there ever were, oldest first.
    pub fn streams(&self) -> Vec<StreamId> {
        self.state().streams.keys().copied().collect()
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }
}

impl State {
    fn add(&mut self) -> StreamId {
        let stream = StreamId(self.next);
        self.next += 1;
        self.streams.insert(stream, HostStream::default());
        stream
    }

    fn stream(&mut self, stream: StreamId) -> &mut HostStream {
        self.streams.get_mut(&stream).unwrap()
    }

    fn tell(&mut self, stream: StreamId) {
        let pipe = self.stream(stream);
        if pipe.closed_by_device {
            return;
        }
        let ready = Ready {
            readable: true,
            writable: false,
            half_closed: pipe.ended_by_host,
            closed: pipe.closed_by_host,
        };
        self.events.push_back(HostEvent::Ready(stream, ready));
    }

    fn take(&mut self, stream: StreamId, data: &[u8]) -> io::Result<usize> {
        let capacity = self.capacity;
        let pipe = self.stream(stream);
        assert!(
            !pipe.closed_by_device && !pipe.ended_by_guest,
            "sent after the end"
        );
        if pipe.closed_by_host {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        let len = data.len().min(capacity - pipe.to_host.len());
        pipe.to_host.extend(&data[..len]);
        pipe.device_waits |= len < data.len();
        match len {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(len),
        }
    }
}

impl VsockBackend for MemoryBackend {
    fn descriptor(&self) -> BorrowedFd<'_> {
        assert!(self.descriptor.as_raw_fd() >= 0);
        std::os::fd::AsFd::as_fd(&self.descriptor)
    }

    fn poll(&mut self, _now: Instant, events: &mut Vec<HostEvent>) -> io::Result<bool> {
        events.extend(self.host.state().events.drain(..));
        Ok(false)
    }

    fn connect(&mut self, port: u32) -> Connect {
        let mut state = self.host.state();
        if state.slow.contains(&port) {
            let stream = state.add();
            state.pending.insert(stream);
            Connect::Pending(stream)
        } else if state.listening.contains(&port) {
            Connect::Connected(state.add())
        } else {
            Connect::Refused
        }
    }

    fn accept(&mut self, stream: StreamId, host_port: u32) -> io::Result<()> {
        let mut state = self.host.state();
        let pipe = state.stream(stream);
        if pipe.closed_by_host {
            return Err(io::ErrorKind::BrokenPipe.into());
        }
        assert_eq!(pipe.accepted.replace(host_port), None, "accepted twice");
        Ok(())
    }

    fn send(&mut self, stream: StreamId, data: &Buffers) -> io::Result<usize> {
        self.host.state().take(stream, &data.to_vec())
    }

    fn send_bytes(&mut self, stream: StreamId, data: &[u8]) -> io::Result<usize> {
        self.host.state().take(stream, data)
    }

    fn receive(&mut self, stream: StreamId, into: &Buffers) -> io::Result<usize> {
        let mut state = self.host.state();
        let pipe = state.stream(stream);
        assert!(!pipe.closed_by_device, "received after the end");
        let len = pipe.from_host.len().min(into.len());
        let bytes: Vec<u8> = pipe.from_host.drain(..len).collect();
        into.write_at(0, &bytes);
        match len {
            0 if !pipe.ended_by_host => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(len),
        }
    }

    fn shutdown(&mut self, stream: StreamId, direction: Direction) {
        let mut state = self.host.state();
        let pipe = state.stream(stream);
        assert!(!pipe.closed_by_device, "shut down after the end");
        match direction {
            Direction::ToHost => pipe.ended_by_guest = true,
            Direction::FromHost => pipe.refused_by_guest = true,
        }
    }

    fn close(&mut self, stream: StreamId) {
        let mut state = self.host.state();
        let pipe = state.stream(stream);
        assert!(!pipe.closed_by_device, "closed twice");
        pipe.closed_by_device = true;
        state.pending.remove(&stream);
    }

    fn close_all(&mut self) {
        let mut state = self.host.state();
        for pipe in state.streams.values_mut() {
            pipe.closed_by_device = true;
        }
        state.pending.clear();
        state.events.clear();
    }
}
