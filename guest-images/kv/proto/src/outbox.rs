//! Replies of one connection on their way out.

use alloc::collections::VecDeque;
use alloc::rc::Rc;
use alloc::vec::Vec;

use crate::number::Decimal;
use crate::store::{OutOfMemory, SHORT_VALUE_BYTES_MAX, Store, Value};

/// Queued octets at which no further command is run: the client has to read first.
const FULL_BYTES: usize = 64 * 1024;
/// Buffer kept when everything has been sent.
const KEPT_BYTES_MAX: usize = 16 * 1024;

#[derive(Debug)]
enum Piece {
    Copied(Vec<u8>),
    Shared(Rc<Vec<u8>>),
}

impl Piece {
    fn as_bytes(&self) -> &[u8] {
        match self {
            Self::Copied(octets) => octets,
            Self::Shared(octets) => octets,
        }
    }
}

/// A queue of reply octets. Long values are shared with the store rather than copied.
#[derive(Debug, Default)]
pub struct Outbox {
    pieces: VecDeque<Piece>,
    /// Octets of the first piece that are gone already.
    sent: usize,
    queued: usize,
    /// The buffer of the next copied piece.
    spare: Vec<u8>,
    /// What has been taken from the store's budget for the copies that wait.
    charged: usize,
}

impl Outbox {
    /// Octets that wait.
    pub fn len(&self) -> usize {
        self.queued
    }

    /// Whether nothing waits.
    pub fn is_empty(&self) -> bool {
        self.queued == 0
    }

    /// Whether so much waits that no further command may be run.
    pub fn is_full(&self) -> bool {
        self.queued >= FULL_BYTES
    }

    /// Hands the queued octets, in order, to `send`, which tells how many it took; ends when it
    /// takes less than it was given or when nothing is left.
    pub fn drain(&mut self, mut send: impl FnMut(&[u8]) -> usize) {
        while let Some(piece) = self.pieces.front() {
            let rest = &piece.as_bytes()[self.sent..];
            let taken = send(rest).min(rest.len());
            let all = taken == rest.len();
            self.sent += taken;
            self.queued -= taken;
            if !all {
                return;
            }
            self.drop_first();
        }
    }

    /// Takes the room for a reply that copies `octets` from the store's budget.
    pub(crate) fn charge(&mut self, store: &mut Store, octets: usize) -> Result<(), OutOfMemory> {
        store.charge(octets)?;
        self.charged += octets;
        Ok(())
    }

    /// Gives the budget back what nothing waits for any more.
    pub(crate) fn settle(&mut self, store: &mut Store) {
        if self.is_empty() && self.charged > 0 {
            store.release(core::mem::take(&mut self.charged));
        }
    }

    /// Drops everything that waits.
    pub(crate) fn clear(&mut self) {
        self.pieces.clear();
        self.sent = 0;
        self.queued = 0;
    }

    fn drop_first(&mut self) {
        self.sent = 0;
        if let Some(Piece::Copied(mut buffer)) = self.pieces.pop_front()
            && buffer.capacity() <= KEPT_BYTES_MAX
        {
            buffer.clear();
            self.spare = buffer;
        }
    }

    /// Queues `octets` as they are.
    pub(crate) fn push(&mut self, octets: &[u8]) {
        self.queued += octets.len();
        if let Some(Piece::Copied(buffer)) = self.pieces.back_mut() {
            buffer.extend_from_slice(octets);
            return;
        }
        let mut buffer = core::mem::take(&mut self.spare);
        buffer.extend_from_slice(octets);
        self.pieces.push_back(Piece::Copied(buffer));
    }

    /// Queues `+TEXT`.
    pub(crate) fn simple(&mut self, text: &str) {
        self.push(b"+");
        self.push(text.as_bytes());
        self.push(b"\r\n");
    }

    /// Queues `-TEXT`.
    pub(crate) fn error(&mut self, text: &str) {
        self.push(b"-");
        self.push(text.as_bytes());
        self.push(b"\r\n");
    }

    /// Queues `:VALUE`.
    pub(crate) fn integer(&mut self, value: i64) {
        self.numbered(b':', value);
    }

    /// Queues the head of an array of `count` replies.
    pub(crate) fn array(&mut self, count: usize) {
        self.numbered(b'*', count as i64);
    }

    /// Queues a bulk string.
    pub(crate) fn bulk(&mut self, octets: &[u8]) {
        self.numbered(b'$', octets.len() as i64);
        self.push(octets);
        self.push(b"\r\n");
    }

    /// Queues "there is none".
    pub(crate) fn null(&mut self) {
        self.push(b"$-1\r\n");
    }

    /// Queues a value of the store.
    pub(crate) fn value(&mut self, value: &Value) {
        match value {
            Value::Short(octets) => self.bulk(octets),
            Value::Long(octets) => {
                debug_assert!(octets.len() > SHORT_VALUE_BYTES_MAX);
                self.numbered(b'$', octets.len() as i64);
                self.queued += octets.len();
                self.pieces.push_back(Piece::Shared(Rc::clone(octets)));
                self.push(b"\r\n");
            }
        }
    }

    fn numbered(&mut self, kind: u8, value: i64) {
        self.push(&[kind]);
        self.push(Decimal::new(value).as_bytes());
        self.push(b"\r\n");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    fn collect(outbox: &mut Outbox, sizes: &[usize]) -> Vec<u8> {
        let (mut sent, mut turn) = (Vec::new(), 0);
        while !outbox.is_empty() {
            outbox.drain(|octets| {
                let size = sizes[turn % sizes.len()].min(octets.len());
                turn += 1;
                sent.extend_from_slice(&octets[..size]);
                size
            });
        }
        sent
    }

    proptest! {
        #[test]
        fn sends_everything_once_and_in_order(
            lengths in vec(0..10_000usize, 0..20),
            sizes in vec(1..5000usize, 1..5),
        ) {
            let (mut outbox, mut expected) = (Outbox::default(), Vec::new());
            for (index, length) in lengths.iter().enumerate() {
                let octets = vec![index as u8; *length];
                expected.extend(format!("${length}\r\n").bytes());
                expected.extend(&octets);
                expected.extend(b"\r\n");
                if *length > SHORT_VALUE_BYTES_MAX {
                    outbox.value(&Value::Long(Rc::new(octets)));
                } else {
                    outbox.value(&Value::Short(octets));
                }
            }
            prop_assert_eq!(outbox.len(), expected.len());
            prop_assert_eq!(collect(&mut outbox, &sizes), expected);
            prop_assert!(outbox.pieces.is_empty());
        }
    }

    #[test]
    fn says_when_the_client_has_to_read() {
        let mut outbox = Outbox::default();
        outbox.bulk(&[0; FULL_BYTES]);
        assert!(outbox.is_full());
        outbox.drain(|octets| octets.len());
        assert!(!outbox.is_full());
        assert!(outbox.spare.capacity() <= KEPT_BYTES_MAX);
    }
}
