//! One connection: requests in, responses out, one at a time and in order.

use alloc::vec::Vec;

use crate::page::Page;
use crate::request::{self, HEAD_BYTES_MAX, Method, Parsed, Request};
use crate::response;

/// Octets that the beginning of a head may take in the session's own buffer: the longest head and
/// the empty lines before it.
const BUFFER_BYTES_MAX: usize = HEAD_BYTES_MAX + 16;

/// Where responses go.
pub trait Sink {
    /// Takes the start of `octets`; gives how many it took.
    fn write(&mut self, octets: &[u8]) -> usize;

    /// Lets `writer` fill some room; it tells how many octets it wrote. Gives that number; 0 if
    /// there was no room.
    fn write_with(&mut self, writer: impl FnOnce(&mut [u8]) -> usize) -> usize;
}

/// The part of a page that has not been sent.
#[derive(Clone, Copy, Debug)]
struct Body {
    page: Page,
    offset: u64,
}

/// One connection's requests and responses.
#[derive(Debug, Default)]
pub struct Session {
    /// The beginning of a head whose end has not arrived.
    buffer: Vec<u8>,
    /// Octets of a request's body that are still to be skipped.
    skip: u64,
    head: Vec<u8>,
    head_sent: usize,
    body: Option<Body>,
    closing: bool,
}

impl Session {
    /// Whether the connection is to be closed once nothing waits to be sent.
    pub fn is_closing(&self) -> bool {
        self.closing
    }

    /// Whether nothing waits to be sent.
    pub fn is_sent(&self) -> bool {
        self.head_sent == self.head.len() && self.body.is_none()
    }

    /// Takes one request, if a response is not under way. Gives how many octets it took; 0 means
    /// that it needs more octets, or has to send first.
    pub fn feed(&mut self, input: &[u8]) -> usize {
        if self.closing || !self.is_sent() || input.is_empty() {
            return 0;
        }
        if self.skip > 0 {
            let skipped = self.skip.min(input.len() as u64);
            self.skip -= skipped;
            return skipped as usize;
        }
        if self.buffer.is_empty() {
            self.take(input)
        } else {
            self.take_buffered(input)
        }
    }

    /// Takes a request from the start of `input`, or keeps all of it.
    fn take(&mut self, input: &[u8]) -> usize {
        match request::parse(input) {
            Ok(Parsed::Ready(request, length)) => {
                self.answer(&request);
                length
            }
            Ok(Parsed::NeedMore) => {
                self.buffer.extend_from_slice(input);
                input.len()
            }
            Err(refusal) => {
                self.begin();
                response::refused(&mut self.head, refusal);
                self.closing = true;
                input.len()
            }
        }
    }

    /// Takes a request whose start has been kept.
    fn take_buffered(&mut self, input: &[u8]) -> usize {
        let kept = self.buffer.len();
        let added = input.len().min(BUFFER_BYTES_MAX - kept);
        let mut whole = core::mem::take(&mut self.buffer);
        whole.extend_from_slice(&input[..added]);
        // What was kept was no whole head, so what is taken now reaches into `input`.
        let taken = self.take(&whole);
        taken.saturating_sub(kept)
    }

    fn answer(&mut self, request: &Request<'_>) {
        self.begin();
        let page = match Page::find(request.path) {
            Some(page) => {
                response::found(&mut self.head, request, page);
                page
            }
            None => {
                response::not_found(&mut self.head, request);
                response::NO_PAGE
            }
        };
        if request.method == Method::Get && !page.is_empty() {
            self.body = Some(Body { page, offset: 0 });
        }
        self.skip = request.body_bytes;
        self.closing = !request.keep_alive;
    }

    fn begin(&mut self) {
        self.head.clear();
        self.head_sent = 0;
    }

    /// Sends as much as `sink` takes.
    pub fn send(&mut self, sink: &mut impl Sink) {
        if self.head_sent < self.head.len() {
            self.head_sent += sink.write(&self.head[self.head_sent..]);
            if self.head_sent < self.head.len() {
                return;
            }
        }
        while let Some(Body { page, offset }) = self.body {
            let sent = sink.write_with(|room| page.read(offset, room)) as u64;
            self.body = (offset + sent < page.len()).then_some(Body {
                page,
                offset: offset + sent,
            });
            if sent == 0 {
                return;
            }
        }
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
