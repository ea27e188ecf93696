//! One split virtqueue (VIRTIO 1.2, 2.7), seen from the device.
//!
//! Cost: a request costs one parse of its descriptors and one used entry; kicks and interrupts are
//! suppressed by event index (2.7.7, 2.7.10), since each costs the guest an exit.

use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use virtio_queue::{Queue, QueueOwnedT, QueueT};
use vm_memory::{Address, Bytes, GuestAddress};

use super::chain::Chain;
use crate::GuestMemory;
use crate::state::QueueState;

/// What can be wrong with a queue.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum QueueError {
    /// The rings are not all in guest memory, or misaligned, or the size is not allowed.
    #[error("rings or size are not valid")]
    Invalid,
    /// The available index runs ahead by more than the queue holds.
    #[error("available index runs ahead of the queue")]
    IndexAhead,
    /// A request that was available is not any more.
    #[error("available index went back")]
    IndexBack,
    /// The chain has more descriptors than the queue.
    #[error("chain {head} is longer than the queue")]
    ChainTooLong {
        /// First descriptor.
        head: u16,
    },
    /// A link of the chain leads nowhere or round in a loop.
    #[error("chain {head} does not end")]
    BrokenChain {
        /// First descriptor.
        head: u16,
    },
    /// A device-readable descriptor follows a device-writable one.
    #[error("chain {head} has a readable descriptor after a writable one")]
    ReadableAfterWritable {
        /// First descriptor.
        head: u16,
    },
    /// A descriptor is outside guest memory.
    #[error("chain {head}: {len} bytes at {addr:#x} are not guest memory")]
    NotMemory {
        /// First descriptor.
        head: u16,
        /// Guest physical address.
        addr: u64,
        /// Length in bytes.
        len: u32,
    },
}

/// What a driver sets that the standard restricts (2.7).
#[derive(Clone, Copy, Debug)]
#[repr(u8)]
pub(super) enum Setting {
    Size = 1,
    Descriptors = 2,
    Available = 4,
    Used = 8,
}

impl Setting {
    /// The bits of all of them.
    const ALL: u8 = 15;
}

/// A queue of a device.
#[derive(Debug)]
pub struct VirtQueue {
    queue: Queue,
    /// [`Setting`]s whose last value is not allowed. The ring kept the value before, which the
    /// driver did not mean: such a queue must not start.
    refused: u8,
    /// A request was seen to wait when kicks were asked for: there is one until it is taken.
    waiting: bool,
    completed: bool,
    /// Used index when the driver was last considered for an interrupt.
    announced: u16,
    /// The `used_event` that the last interrupt answered. Not saved: without it the driver counts as
    /// one that keeps up.
    answered: Option<u16>,
}

impl VirtQueue {
    /// A queue at power-on. `max_size` is a power of two, checked by the transport's caller.
    pub fn new(max_size: u16) -> Self {
        let queue = Queue::new(max_size).expect("queue sizes are powers of two by contract");
        Self {
            queue,
            refused: 0,
            waiting: false,
            completed: false,
            announced: 0,
            answered: None,
        }
    }

    /// The ring state, for the transport.
    pub(super) fn ring(&mut self) -> &mut Queue {
        &mut self.queue
    }

    /// Whether the driver may choose this size: a power of two that is not above what was offered.
    pub(super) fn allows_size(&self, size: u32) -> bool {
        size.is_power_of_two() && size <= u32::from(self.queue.max_size())
    }

    /// Notes whether the last value of a setting is allowed.
    pub(super) fn note(&mut self, setting: Setting, allowed: bool) {
        let bit = setting as u8;
        self.refused = self.refused & !bit | if allowed { 0 } else { bit };
    }

    /// Whether the driver enabled it.
    pub fn is_ready(&self) -> bool {
        self.queue.ready()
    }

    /// Size in use.
    pub fn size(&self) -> u16 {
        self.queue.size()
    }

    /// Largest size that the device offers.
    pub fn max_size(&self) -> u16 {
        self.queue.max_size()
    }

    /// Whether entries were used since the driver was last considered for an interrupt.
    pub(super) fn has_unannounced(&self) -> bool {
        self.completed
    }

    /// Whether all rings are in guest memory, aligned, and of an allowed size.
    pub fn is_valid(&self, mem: &GuestMemory) -> bool {
        self.refused == 0 && self.queue.is_valid(mem)
    }

    /// Back to power-on.
    pub fn reset(&mut self) {
        self.queue.reset();
        self.refused = 0;
        self.waiting = false;
        self.completed = false;
        self.announced = 0;
        self.answered = None;
    }

    /// Takes the next request.
    ///
    /// # Errors
    /// When ring or chain are malformed; nothing is taken then. That includes a request that
    /// [`VirtQueue::want_kicks`] saw and that is gone: whoever looked again because of it would do
    /// so without end, if the rings overlap and asking for kicks is what makes the request appear.
    pub fn pop(&mut self, mem: &Arc<GuestMemory>) -> Result<Option<Chain>, QueueError> {
        if !self.queue.ready() {
            return Ok(None);
        }
        let size = self.queue.size();
        let chain = self
            .queue
            .iter(mem.as_ref())
            .map_err(|e| match e {
                virtio_queue::Error::InvalidAvailRingIndex => QueueError::IndexAhead,
                _ => QueueError::Invalid,
            })?
            .next();
        if std::mem::take(&mut self.waiting) && chain.is_none() {
            return Err(QueueError::IndexBack);
        }
        chain
            .map(|descriptors| Chain::parse(mem, descriptors, size))
            .transpose()
    }

    /// Puts the request taken last back, to be taken again.
    pub fn undo_pop(&mut self) {
        self.queue.go_to_previous_position();
    }

    /// Whether requests wait.
    ///
    /// # Errors
    /// When the ring cannot be read.
    pub fn has_requests(&self, mem: &GuestMemory) -> Result<bool, QueueError> {
        if !self.queue.ready() {
            return Ok(false);
        }
        let avail = self
            .queue
            .avail_idx(mem, Ordering::Acquire)
            .map_err(|_| QueueError::Invalid)?;
        Ok(avail.0 != self.queue.next_avail())
    }

    /// Returns request `head` to the driver with `written` bytes in its writable part.
    ///
    /// # Errors
    /// When the used ring cannot be written.
    pub fn complete(
        &mut self,
        mem: &GuestMemory,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        self.queue
            .add_used(mem, head, written)
            .map_err(|_| QueueError::Invalid)?;
        self.completed = true;
        Ok(())
    }

    /// Returns several requests (head, bytes written) so that the driver sees all of them or none.
    ///
    /// # Errors
    /// When the used ring cannot be written.
    pub fn complete_together(
        &mut self,
        mem: &GuestMemory,
        requests: &[(u16, u32)],
    ) -> Result<(), QueueError> {
        let Some(((last, written), others)) = requests.split_last() else {
            return Ok(());
        };
        let first = self.queue.next_used();
        for (nth, (head, written)) in (0u16..).zip(others) {
            self.write_used(mem, first.wrapping_add(nth), *head, *written)?;
        }
        // The used index moves once, with the last entry.
        self.queue
            .set_next_used(first.wrapping_add(others.len() as u16));
        self.complete(mem, *last, *written)
    }

    /// Writes used entry number `index` (2.7.8) without publishing it.
    fn write_used(
        &self,
        mem: &GuestMemory,
        index: u16,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        let slot = u64::from(index % self.queue.size());
        let at = GuestAddress(self.queue.used_ring())
            .checked_add(4 + slot * 8)
            .ok_or(QueueError::Invalid)?;
        mem.write_obj([u32::from(head).to_le(), written.to_le()], at)
            .map_err(|_| QueueError::Invalid)
    }

    /// Asks the driver not to kick.
    ///
    /// # Errors
    /// When the ring cannot be written.
    pub fn stop_kicks(&mut self, mem: &GuestMemory) -> Result<(), QueueError> {
        if !self.queue.ready() {
            return Ok(());
        }
        self.queue
            .disable_notification(mem)
            .map_err(|_| QueueError::Invalid)
    }

    /// Asks for a kick at the next request; true if one waits already.
    ///
    /// # Errors
    /// When the ring cannot be read or written.
    pub fn want_kicks(&mut self, mem: &GuestMemory) -> Result<bool, QueueError> {
        if !self.queue.ready() {
            return Ok(false);
        }
        self.waiting = self
            .queue
            .enable_notification(mem)
            .map_err(|_| QueueError::Invalid)?;
        Ok(self.waiting)
    }

    /// Whether the driver wants an interrupt for what was completed since the last call.
    ///
    /// # Errors
    /// When the ring cannot be read.
    pub(super) fn take_interrupt(&mut self, mem: &GuestMemory) -> Result<bool, QueueError> {
        if !std::mem::take(&mut self.completed) {
            return Ok(false);
        }
        let used = self.queue.next_used();
        let announced = std::mem::replace(&mut self.announced, used);
        // The used index is written before the driver's wish is read: a driver that states its
        // wish and then looks at the ring sees either the interrupt or the entry.
        fence(Ordering::SeqCst);
        if !self.queue.event_idx_enabled() {
            return Ok(!self.interrupts_unwanted(mem)?);
        }
        let event = self.used_event(mem)?;
        let wanted = used.wrapping_sub(event).wrapping_sub(1) < used.wrapping_sub(announced);
        if wanted {
            self.answered = Some(event);
        }
        Ok(wanted)
    }

    /// Whether the driver was interrupted and has not looked at the used ring since: it is busy,
    /// and completing more would tell it nothing yet. A driver that looks moves `used_event`, and
    /// one that was given a whole ring must have looked. Without event index nobody can say.
    ///
    /// # Errors
    /// When the ring cannot be read.
    pub fn driver_is_behind(&self, mem: &GuestMemory) -> Result<bool, QueueError> {
        let Some(answered) = self.answered.filter(|_| self.queue.event_idx_enabled()) else {
            return Ok(false);
        };
        let unseen = self.queue.next_used().wrapping_sub(answered);
        Ok(unseen <= self.queue.size() && self.used_event(mem)? == answered)
    }

    /// Whether the driver would want an interrupt for `count` more completions.
    ///
    /// # Errors
    /// When the ring cannot be read.
    pub(super) fn would_interrupt(
        &self,
        mem: &GuestMemory,
        count: u16,
    ) -> Result<bool, QueueError> {
        if !self.queue.event_idx_enabled() {
            return Ok(!self.interrupts_unwanted(mem)?);
        }
        let away = self.used_event(mem)?.wrapping_sub(self.announced);
        Ok(away
            < self
                .queue
                .next_used()
                .wrapping_sub(self.announced)
                .wrapping_add(count))
    }

    /// What the driver shows of what it did: its available index, and the used event if it states one.
    ///
    /// # Errors
    /// When the ring cannot be read.
    pub(super) fn driver_shows(&self, mem: &GuestMemory) -> Result<(u16, Option<u16>), QueueError> {
        let available = self.queue.avail_idx(mem, Ordering::Acquire);
        let available = available.map_err(|_| QueueError::Invalid)?.0;
        let states = self.queue.event_idx_enabled();
        let event = states.then(|| self.used_event(mem)).transpose()?;
        Ok((available, event))
    }

    /// The used index after which the driver wants an interrupt, `used_event` (2.7.10).
    fn used_event(&self, mem: &GuestMemory) -> Result<u16, QueueError> {
        let at = GuestAddress(self.queue.avail_ring())
            .checked_add(4 + u64::from(self.queue.size()) * 2)
            .ok_or(QueueError::Invalid)?;
        mem.load(at, Ordering::Acquire)
            .map(u16::from_le)
            .map_err(|_| QueueError::Invalid)
    }

    /// VIRTQ_AVAIL_F_NO_INTERRUPT (2.7.7), which counts where event index was not negotiated.
    fn interrupts_unwanted(&self, mem: &GuestMemory) -> Result<bool, QueueError> {
        let flags: u16 = mem
            .load(GuestAddress(self.queue.avail_ring()), Ordering::Acquire)
            .map_err(|_| QueueError::Invalid)?;
        Ok(u16::from_le(flags) & 1 != 0)
    }
}

/// Saving and restoring.
impl VirtQueue {
    /// Where the queue is.
    pub(super) fn save(&self) -> QueueState {
        let ring = self.queue.state();
        QueueState {
            max_size: ring.max_size,
            size: ring.size,
            ready: ring.ready,
            descriptors: ring.desc_table,
            available: ring.avail_ring,
            used: ring.used_ring,
            next_available: ring.next_avail,
            next_used: ring.next_used,
            refused: self.refused,
            unannounced: self.completed,
            announced: self.announced,
        }
    }

    /// Goes on where a queue of the same largest size was. `event_idx` says whether event index
    /// was negotiated and is in use.
    ///
    /// # Errors
    /// When a setting is one that a driver could not have made; the queue has to be reset then.
    pub(super) fn restore(
        &mut self,
        state: &QueueState,
        event_idx: bool,
    ) -> Result<(), QueueError> {
        let invalid = |_| QueueError::Invalid;
        if state.max_size != self.queue.max_size() || state.refused > Setting::ALL {
            return Err(QueueError::Invalid);
        }
        let ring = &mut self.queue;
        ring.try_set_size(state.size).map_err(invalid)?;
        ring.try_set_desc_table_address(GuestAddress(state.descriptors))
            .map_err(invalid)?;
        ring.try_set_avail_ring_address(GuestAddress(state.available))
            .map_err(invalid)?;
        ring.try_set_used_ring_address(GuestAddress(state.used))
            .map_err(invalid)?;
        ring.set_next_avail(state.next_available);
        ring.set_next_used(state.next_used);
        ring.set_event_idx(event_idx);
        ring.set_ready(state.ready);
        self.refused = state.refused;
        self.waiting = false;
        self.completed = state.unannounced;
        self.announced = state.announced;
        self.answered = None;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

    use proptest::prelude::{any, prop_assert, prop_assert_eq, proptest};

    use super::*;
    use crate::virtio::testing::memory;

    const SIZE: u16 = 8;
    const DESC: u64 = 0x1000;
    const AVAIL: u64 = 0x2000;
    const USED: u64 = 0x3000;

    /// A ready queue with event index whose used index is `used`, interrupts decided up to there.
    fn queue_at(used: u16) -> (Arc<GuestMemory>, VirtQueue) {
        let mem = memory();
        let mut queue = VirtQueue::new(SIZE);
        let ring = queue.ring();
        ring.set_size(SIZE);
        ring.set_desc_table_address(Some(DESC as u32), None);
        ring.set_avail_ring_address(Some(AVAIL as u32), None);
        ring.set_used_ring_address(Some(USED as u32), None);
        ring.set_event_idx(true);
        ring.set_ready(true);
        ring.set_next_used(used);
        queue.announced = used;
        assert!(queue.is_valid(&mem));
        (mem, queue)
    }

    fn want_interrupt_after(mem: &GuestMemory, used: u16) {
        let at = GuestAddress(AVAIL + 4 + u64::from(SIZE) * 2);
        mem.write_obj(used.to_le(), at).unwrap();
    }

    fn used_index(mem: &GuestMemory) -> u16 {
        u16::from_le(mem.read_obj(GuestAddress(USED + 2)).unwrap())
    }

    fn used_entry(mem: &GuestMemory, index: u16) -> [u32; 2] {
        let slot = u64::from(index % SIZE);
        mem.read_obj::<[u32; 2]>(GuestAddress(USED + 4 + slot * 8))
            .unwrap()
            .map(u32::from_le)
    }

    /// Without event index, asking for kicks is a flag in the used ring. Where that flag lies on
    /// the available index, the device's own wish takes back the request that it makes appear.
    #[test]
    fn a_request_that_goes_when_it_is_looked_for_ends_the_search() {
        let (mem, mut queue) = queue_at(0);
        let ring = queue.ring();
        ring.set_event_idx(false);
        ring.set_used_ring_address(Some(AVAIL as u32 + 4), None);
        ring.set_avail_ring_address(Some(AVAIL as u32 + 2), None);
        ring.set_next_avail(1);
        assert!(queue.is_valid(&mem));
        queue.stop_kicks(&mem).unwrap();
        assert!(queue.pop(&mem).unwrap().is_none());
        assert!(queue.want_kicks(&mem).unwrap());
        queue.stop_kicks(&mem).unwrap();
        assert_eq!(queue.pop(&mem).unwrap_err(), QueueError::IndexBack);
    }

    #[test]
    fn nothing_completed_is_nothing_to_tell() {
        let (mem, mut queue) = queue_at(5);
        want_interrupt_after(&mem, 5);
        queue.complete_together(&mem, &[]).unwrap();
        assert!(!queue.take_interrupt(&mem).unwrap());
    }

    #[test]
    fn a_driver_is_behind_from_its_interrupt_until_it_looks() {
        let (mem, mut queue) = queue_at(5);
        want_interrupt_after(&mem, 6);
        for interrupted in [false, true, true] {
            queue.complete(&mem, 0, 0).unwrap();
            queue.take_interrupt(&mem).unwrap();
            assert_eq!(queue.driver_is_behind(&mem), Ok(interrupted));
        }
        want_interrupt_after(&mem, 8);
        assert_eq!(queue.driver_is_behind(&mem), Ok(false));
    }

    #[test]
    fn a_driver_that_was_given_a_whole_ring_must_have_looked() {
        let (mem, mut queue) = queue_at(0);
        want_interrupt_after(&mem, 0);
        for given in 1..=SIZE + 1 {
            queue.complete(&mem, 0, 0).unwrap();
            queue.take_interrupt(&mem).unwrap();
            let behind = queue.driver_is_behind(&mem);
            assert_eq!(behind, Ok(given <= SIZE), "{given}");
        }
    }

    proptest! {
        #[test]
        fn requests_completed_together_are_all_there(start in any::<u16>(), count in 1u16..=SIZE) {
            let (mem, mut queue) = queue_at(start);
            let requests = (0..count).map(|i| (i, u32::from(i) * 3)).collect::<Vec<_>>();
            queue.complete_together(&mem, &requests).unwrap();
            prop_assert_eq!(used_index(&mem), start.wrapping_add(count));
            for (nth, (head, written)) in (0u16..).zip(requests) {
                let entry = used_entry(&mem, start.wrapping_add(nth));
                prop_assert_eq!(entry, [u32::from(head), written]);
            }
        }

        /// The driver is interrupted exactly when the entry it waits for was added since the last
        /// decision, however the entries were grouped.
        #[test]
        fn interrupts_come_for_the_entry_waited_for(
            start in any::<u16>(),
            groups in proptest::collection::vec(1u16..=SIZE, 1..4),
            waited in 0u16..40,
        ) {
            let (mem, mut queue) = queue_at(start);
            want_interrupt_after(&mem, start.wrapping_add(waited));
            for group in &groups {
                let requests = (0..*group).map(|head| (head, 0)).collect::<Vec<_>>();
                queue.complete_together(&mem, &requests).unwrap();
            }
            let added: u16 = groups.iter().sum();
            prop_assert_eq!(queue.take_interrupt(&mem).unwrap(), waited < added);
            prop_assert!(!queue.take_interrupt(&mem).unwrap(), "told once");
        }
    }
}
