//! Guest that serves pages at port 80: `/` and, for any N up to 16 MiB, `/size/N`.
#![no_std]
#![no_main]

use http_proto::{Session, Sink};
use net::{Flow, Service, Stream};

/// The port of HTTP.
const PORT: u16 = 80;

rt::entry!(main);

fn main() {
    net::guest::run("http", PORT, false, Pages);
}

/// Serves the pages.
struct Pages;

/// A connection's way out.
struct Outgoing<'a, 'b>(&'a mut Stream<'b>);

impl Sink for Outgoing<'_, '_> {
    fn write(&mut self, octets: &[u8]) -> usize {
        self.0.write(octets)
    }

    fn write_with(&mut self, writer: impl FnOnce(&mut [u8]) -> usize) -> usize {
        self.0.write_with(writer)
    }
}

impl Service for Pages {
    type Session = Session;

    fn open(&mut self) -> Session {
        Session::default()
    }

    fn serve(&mut self, session: &mut Session, stream: &mut Stream<'_>) -> Flow {
        loop {
            session.send(&mut Outgoing(stream));
            if !session.is_sent() {
                return Flow::Blocked;
            }
            if session.is_closing() {
                return Flow::Close;
            }
            if stream.read(|octets| session.feed(octets)) == 0 && session.is_sent() {
                return if stream.is_ended() {
                    Flow::Close
                } else {
                    Flow::Idle
                };
            }
        }
    }
}
