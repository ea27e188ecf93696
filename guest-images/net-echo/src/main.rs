//! Guest that echoes what it gets at port 7 (RFC 862), over TCP and UDP, and answers pings.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;

use net::{Flow, Service, Stream};

/// The port of the echo protocol.
const PORT: u16 = 7;

rt::entry!(main);

fn main() {
    net::guest::run("net-echo", PORT, true, Echo);
}

/// Sends back what arrives.
struct Echo;

impl Service for Echo {
    /// What arrived and could not be sent back yet.
    type Session = Vec<u8>;

    fn open(&mut self) -> Vec<u8> {
        Vec::new()
    }

    fn serve(&mut self, pending: &mut Vec<u8>, stream: &mut Stream<'_>) -> Flow {
        loop {
            let sent = stream.write(pending);
            pending.drain(..sent);
            if !pending.is_empty() {
                return Flow::Blocked;
            }
            if !stream.is_readable() {
                return if stream.is_ended() {
                    Flow::Close
                } else {
                    Flow::Idle
                };
            }
            // No more than there is room for, so that little is ever pending.
            let room = stream.room();
            if room == 0 {
                return Flow::Blocked;
            }
            stream.read(|octets| {
                let taken = octets.len().min(room);
                pending.extend_from_slice(&octets[..taken]);
                taken
            });
        }
    }
}
