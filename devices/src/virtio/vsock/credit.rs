//! Flow control of one connection (VIRTIO 1.2, 5.10.6.3).
//!
//! Each side has a buffer of a size that it tells, and counts the bytes it consumed; the other
//! side never sends more than fits. All counts are modulo 2^32.

/// Bytes that the device keeps for one connection when the host program does not read, which is
/// what the guest is told as the size of the buffer.
pub const BUFFER_SIZE: u32 = 128 << 10;

/// The guest is told of room gained when it is this much: rarely, as packets cost interrupts, and
/// early enough for a guest that sends all the time not to run dry.
const UPDATE_STEP: u32 = BUFFER_SIZE / 4;

/// The guest broke flow control.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum CreditError {
    /// It sent more than there was room for.
    Overrun,
    /// It claims to have consumed what it was never sent.
    Unsent,
}

/// Counts of one connection.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Credit {
    received: u32,
    forwarded: u32,
    told: u32,
    sent: u32,
    peer_forwarded: u32,
    peer_buffer: u32,
}

impl Credit {
    /// Nothing sent yet to a guest with a buffer of this size.
    pub(super) fn with_peer_buffer(buf_alloc: u32) -> Self {
        Self {
            peer_buffer: buf_alloc,
            ..Self::default()
        }
    }

    /// Takes what a packet of the guest says about its buffer.
    pub(super) fn update(&mut self, buf_alloc: u32, fwd_cnt: u32) -> Result<(), CreditError> {
        let gained = fwd_cnt.wrapping_sub(self.peer_forwarded);
        if gained <= self.in_flight() {
            self.peer_forwarded = fwd_cnt;
        } else if gained < 1 << 31 {
            return Err(CreditError::Unsent);
        }
        // Else the count is older than one seen before: a driver's threads may overtake each
        // other between taking the count and queueing the packet.
        self.peer_buffer = buf_alloc;
        Ok(())
    }

    /// The guest sent `len` bytes.
    pub(super) fn receive(&mut self, len: u32) -> Result<(), CreditError> {
        let held = self.received.wrapping_sub(self.forwarded);
        if len > BUFFER_SIZE - held {
            return Err(CreditError::Overrun);
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// The host program took `len` of the bytes received, or they were thrown away.
    pub(super) fn forward(&mut self, len: u32) {
        debug_assert!(len <= self.received.wrapping_sub(self.forwarded));
        self.forwarded = self.forwarded.wrapping_add(len);
    }

    /// Whether the guest knows of so little room that it should be told.
    pub(super) fn update_due(&self) -> bool {
        self.forwarded.wrapping_sub(self.told) >= UPDATE_STEP
    }

    /// The count for the next packet; the guest is told by it.
    pub(super) fn tell(&mut self) -> u32 {
        self.told = self.forwarded;
        self.told
    }

    /// Bytes that the guest has room for.
    pub(super) fn room(&self) -> u32 {
        self.peer_buffer.saturating_sub(self.in_flight())
    }

    /// `len` bytes, at most [`Credit::room`], go to the guest.
    pub(super) fn send(&mut self, len: u32) {
        debug_assert!(len <= self.room());
        self.sent = self.sent.wrapping_add(len);
    }

    fn in_flight(&self) -> u32 {
        self.sent.wrapping_sub(self.peer_forwarded)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_buffer_bounds_what_the_guest_may_send() {
        let mut credit = Credit::default();
        assert_eq!(credit.receive(BUFFER_SIZE), Ok(()));
        assert_eq!(credit.receive(1), Err(CreditError::Overrun));
        credit.forward(10);
        assert_eq!(credit.receive(11), Err(CreditError::Overrun));
        assert_eq!(credit.receive(10), Ok(()));
        assert_eq!(credit.receive(u32::MAX), Err(CreditError::Overrun));
    }

    #[test]
    fn updates_come_in_steps() {
        let mut credit = Credit::default();
        assert_eq!(credit.receive(BUFFER_SIZE), Ok(()));
        credit.forward(UPDATE_STEP - 1);
        assert!(!credit.update_due());
        credit.forward(1);
        assert!(credit.update_due());
        assert_eq!(credit.tell(), UPDATE_STEP);
        assert!(!credit.update_due());
    }

    #[test]
    fn the_guest_cannot_consume_what_it_was_not_sent() {
        let mut credit = Credit::default();
        assert_eq!(credit.update(100, 0), Ok(()));
        credit.send(100);
        assert_eq!(credit.room(), 0);
        assert_eq!(credit.update(100, 101), Err(CreditError::Unsent));
        assert_eq!(credit.update(100, 60), Ok(()));
        assert_eq!(credit.room(), 60);
    }

    #[test]
    fn a_count_that_was_overtaken_changes_nothing() {
        let mut credit = Credit::default();
        assert_eq!(credit.update(100, 0), Ok(()));
        credit.send(100);
        assert_eq!(credit.update(100, 60), Ok(()));
        assert_eq!(credit.update(100, 50), Ok(()));
        assert_eq!(credit.room(), 60);
    }

    #[test]
    fn a_buffer_that_shrinks_leaves_no_room() {
        let mut credit = Credit::default();
        assert_eq!(credit.update(100, 0), Ok(()));
        credit.send(80);
        assert_eq!(credit.update(10, 0), Ok(()));
        assert_eq!(credit.room(), 0);
    }

    proptest! {
        /// Two of these facing each other never overrun, and never stand still for good.
        #[test]
        fn two_sides_agree(steps in prop::collection::vec((0u32..200_000, 0u32..200_000), 1..200), start: u32) {
            let begin = Credit { received: start, forwarded: start, told: start,
                sent: start, peer_forwarded: start, peer_buffer: BUFFER_SIZE };
            let (mut guest, mut host) = (begin, begin);
            for (want, take) in steps {
                let len = want.min(guest.room());
                guest.send(len);
                prop_assert_eq!(host.receive(len), Ok(()));
                let held = host.received.wrapping_sub(host.forwarded);
                host.forward(take.min(held));
                if host.update_due() {
                    let count = host.tell();
                    prop_assert_eq!(guest.update(BUFFER_SIZE, count), Ok(()));
                }
                if host.received == host.forwarded {
                    prop_assert!(guest.room() > 0);
                }
            }
        }
    }
}
