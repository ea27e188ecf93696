//! One connection: octets in, replies out.

use alloc::vec::Vec;

use crate::command::{self, Verdict};
use crate::outbox::Outbox;
use crate::parser::{Parser, Progress, ProtocolError};
use crate::store::Store;

/// Octets that are taken into the buffer at a time.
const CHUNK_BYTES: usize = 64 * 1024;
/// Buffer kept between commands, and not charged.
const KEPT_BYTES_MAX: usize = 16 * 1024;

/// What [`Session::feed`] did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Fed {
    /// Octets of the input that are dealt with; the others have to be given again.
    pub consumed: usize,
    /// Whether the connection is to be closed once the outbox is empty.
    pub close: bool,
}

/// How a run over octets ended.
struct Run {
    used: usize,
    starved: bool,
    close: bool,
}

/// One connection's requests and replies.
///
/// A command that arrived whole is run from the caller's octets. Only the beginning of a command
/// whose end has not arrived is copied into the session's own buffer.
#[derive(Debug, Default)]
pub struct Session {
    parser: Parser,
    /// Starts where a command starts; empty if the last octet seen ended one.
    buffer: Vec<u8>,
    /// What has been taken from the store's budget for the buffer.
    charged: usize,
    outbox: Outbox,
}

impl Session {
    /// The replies that wait to be sent.
    pub fn outbox(&mut self) -> &mut Outbox {
        &mut self.outbox
    }

    /// Runs the commands that `input` completes, as long as the outbox is not full. With a full
    /// outbox nothing happens: drain it and call again, with an empty input if there is no other.
    pub fn feed(&mut self, store: &mut Store, input: &[u8]) -> Fed {
        if self.outbox.is_full() {
            return Fed {
                consumed: 0,
                close: false,
            };
        }
        self.outbox.settle(store);
        if self.buffer.is_empty() {
            self.feed_directly(store, input)
        } else {
            self.feed_buffer(store, input)
        }
    }

    /// Gives the memory of the connection back to the store's budget.
    pub fn end(&mut self, store: &mut Store) {
        self.buffer = Vec::new();
        self.settle(store);
        self.outbox.clear();
        self.outbox.settle(store);
    }

    fn feed_directly(&mut self, store: &mut Store, input: &[u8]) -> Fed {
        let run = run(&mut self.parser, &mut self.outbox, store, input);
        let (rest, mut fed) = (
            &input[run.used..],
            Fed {
                consumed: run.used,
                close: run.close,
            },
        );
        if run.starved && !rest.is_empty() && !run.close {
            match self.keep(store, rest) {
                Ok(taken) => fed.consumed += taken,
                Err(error) => fed.close = self.refuse(error),
            }
        }
        fed
    }

    fn feed_buffer(&mut self, store: &mut Store, input: &[u8]) -> Fed {
        let taken = match self.keep(store, input) {
            Ok(taken) => taken,
            Err(error) => {
                return Fed {
                    consumed: 0,
                    close: self.refuse(error),
                };
            }
        };
        let run = run(&mut self.parser, &mut self.outbox, store, &self.buffer);
        self.buffer.drain(..run.used);
        if self.buffer.is_empty() && self.buffer.capacity() > KEPT_BYTES_MAX {
            self.buffer = Vec::new();
        }
        self.settle(store);
        Fed {
            consumed: taken,
            close: run.close,
        }
    }

    /// Appends the start of `input` to the buffer; gives how much.
    fn keep(&mut self, store: &mut Store, input: &[u8]) -> Result<usize, ProtocolError> {
        let taken = input.len().min(CHUNK_BYTES);
        let wanted = self.parser.wanted().max(self.buffer.len() + taken);
        if wanted > self.buffer.capacity() {
            let added = wanted.saturating_sub(KEPT_BYTES_MAX + self.charged);
            store.charge(added).map_err(|_| ProtocolError::NoMemory)?;
            self.charged += added;
            let missing = wanted - self.buffer.len();
            self.buffer
                .try_reserve_exact(missing)
                .map_err(|_| ProtocolError::NoMemory)?;
        }
        self.buffer.extend_from_slice(&input[..taken]);
        Ok(taken)
    }

    /// Makes the charge agree with the buffer.
    fn settle(&mut self, store: &mut Store) {
        let due = self.buffer.capacity().saturating_sub(KEPT_BYTES_MAX);
        if self.charged > due {
            store.release(self.charged - due);
            self.charged = due;
        }
    }

    /// Tells the client why the connection ends.
    fn refuse(&mut self, error: ProtocolError) -> bool {
        report(&mut self.outbox, error);
        true
    }
}

/// Runs the commands that are complete at the start of `input`.
fn run(parser: &mut Parser, outbox: &mut Outbox, store: &mut Store, input: &[u8]) -> Run {
    let mut used = 0;
    while !outbox.is_full() {
        let rest = &input[used..];
        match parser.step(rest) {
            Ok(Progress::NeedMore) => {
                return Run {
                    used,
                    starved: true,
                    close: false,
                };
            }
            Ok(Progress::Ready(length)) => {
                let verdict = command::run(parser.arguments(rest), store, outbox);
                parser.restart();
                used += length;
                if verdict == Verdict::Close {
                    return Run {
                        used,
                        starved: false,
                        close: true,
                    };
                }
            }
            Err(error) => {
                report(outbox, error);
                return Run {
                    used: input.len(),
                    starved: false,
                    close: true,
                };
            }
        }
    }
    Run {
        used,
        starved: false,
        close: false,
    }
}

fn report(outbox: &mut Outbox, error: ProtocolError) {
    match error {
        ProtocolError::NoMemory => outbox.error(command::FULL),
        _ => outbox.error(&alloc::format!("ERR Protocol error: {error}")),
    }
}

#[cfg(test)]
#[path = "session_tests.rs"]
mod tests;
