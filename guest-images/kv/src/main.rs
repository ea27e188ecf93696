//! Guest that serves keys and values to Redis clients at port 6379.
//!
//! `maxmemory=` on the command line bounds what the store may take, in octets; without it, five
//! eighths of the machine's free memory. A quarter is for the connections, and the rest for what
//! neither of them counts.
//!
//! With `clock` it answers `TIME`, by which copies of the guest differ.
#![no_std]
#![no_main]

use kv_proto::{Session, Store};
use net::{Flow, Service, Stream};

/// The port that Redis clients expect.
const PORT: u16 = 6379;

rt::entry!(main);

fn main() {
    let limit = rt::args().get("maxmemory", rt::heap::bytes() / 8 * 5);
    let service = Database {
        store: Store::new(limit),
        tells_time: rt::args().flag("clock"),
    };
    net::guest::run("kv", PORT, false, service);
}

/// The store behind all connections.
struct Database {
    store: Store,
    tells_time: bool,
}

/// One connection.
#[derive(Default)]
struct Connection {
    session: Session,
    /// Whether no more commands are taken.
    closing: bool,
}

impl Connection {
    /// Runs commands that arrived; gives how many octets they took.
    fn feed(&mut self, store: &mut Store, stream: &mut Stream<'_>) -> usize {
        let mut feed = |octets: &[u8]| {
            let fed = self.session.feed(store, octets);
            self.closing |= fed.close;
            fed.consumed
        };
        if stream.is_readable() {
            stream.read(feed)
        } else {
            feed(&[])
        }
    }
}

impl Service for Database {
    type Session = Connection;

    fn open(&mut self) -> Connection {
        Connection::default()
    }

    fn serve(&mut self, connection: &mut Connection, stream: &mut Stream<'_>) -> Flow {
        if self.tells_time {
            self.store.set_time(rt::clock::now());
        }
        loop {
            connection
                .session
                .outbox()
                .drain(|octets| stream.write(octets));
            if !connection.session.outbox().is_empty() {
                return Flow::Blocked;
            }
            if connection.closing {
                return Flow::Close;
            }
            let consumed = connection.feed(&mut self.store, stream);
            if consumed == 0 && connection.session.outbox().is_empty() && !connection.closing {
                return if stream.is_ended() {
                    Flow::Close
                } else {
                    Flow::Idle
                };
            }
        }
    }

    fn close(&mut self, mut connection: Connection) {
        connection.session.end(&mut self.store);
    }
}
