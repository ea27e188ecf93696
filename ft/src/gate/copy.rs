//! What the gate of a copy's network device keeps.

use std::collections::VecDeque;
use std::time::Instant;

/// Inputs that wait for a secondary's guest, at most, in bytes. More than the primary may be ahead.
const INBOX_MAX: usize = 64 << 20;
/// What a frame costs besides its bytes: empty ones are not free.
const FRAME_COST: usize = 64;
/// Inputs that are kept for a guest that stands until it takes over, at most, in bytes; further ones are lost, as in
/// any network.
const STANDING_INBOX_MAX: usize = 16 << 20;
/// Frames from the outside that a secondary keeps for the moment in which the primary is lost, at most.
pub(super) const OVERHEARD_MAX: usize = 1024;

fn cost(frame: &[u8]) -> usize {
    frame.len() + FRAME_COST
}

/// A secondary's side.
#[derive(Debug, Default)]
pub(super) struct Secondary {
    /// Frames for the guest.
    pub(super) inbox: VecDeque<Vec<u8>>,
    /// Bytes of memory that they take.
    inbox_bytes: usize,
    /// Frames in front of the inbox that the checkpoint under way has seen.
    before_cut: Option<usize>,
    /// Frames of the guest that may not be out, and the number of the first of them since the checkpoint.
    pub(super) kept: VecDeque<Vec<u8>>,
    pub(super) settled: u64,
    /// Frames that the last checkpoint explains, and that may not be out.
    pub(super) covered: Vec<Vec<u8>>,
    /// Frames to the guest's own address that the outside sent here, and when: a network that lost its way to the
    /// primary sends them everywhere.
    pub(super) overheard: VecDeque<(Instant, Vec<u8>)>,
    /// The guest stands until it takes over, or the next checkpoint lets it run.
    pub(super) stands: bool,
}

impl Secondary {
    /// Takes a frame for the guest. True if the device, which goes on until there is none, is to be told.
    pub(super) fn take_in(&mut self, frame: &[u8]) -> bool {
        if self.stands && self.inbox_bytes >= STANDING_INBOX_MAX {
            return false;
        }
        let first = self.inbox.is_empty();
        self.inbox_bytes += cost(frame);
        self.inbox.push_back(frame.to_vec());
        first
    }

    /// The next frame for the guest.
    pub(super) fn next_input(&mut self) -> Option<Vec<u8>> {
        let frame = self.inbox.pop_front()?;
        self.inbox_bytes -= cost(&frame);
        self.before_cut = self.before_cut.map(|n| n.saturating_sub(1));
        Some(frame)
    }

    /// Whether not too many frames for the guest wait.
    pub(super) fn has_room(&self) -> bool {
        self.inbox_bytes <= INBOX_MAX
    }

    /// What came so far, the checkpoint under way has seen.
    pub(super) fn mark_cut(&mut self) {
        self.before_cut = Some(self.inbox.len());
    }

    /// The guest goes on from the checkpoint, which explains `covered`, or `stands` with it.
    pub(super) fn loaded(&mut self, covered: Vec<Vec<u8>>, stands: bool) {
        let seen = self.before_cut.take().unwrap_or(0);
        let seen = seen.min(self.inbox.len());
        self.inbox.drain(..seen);
        self.inbox_bytes = self.inbox.iter().map(|frame| cost(frame)).sum();
        self.kept.clear();
        self.settled = 0;
        self.covered = covered;
        self.stands = stands;
    }

    pub(super) fn memory_bytes(&self) -> usize {
        let kept = self.kept.iter().chain(&self.covered);
        let overheard = self.overheard.iter().map(|(_, frame)| frame);
        let frames: usize = kept.chain(overheard).map(Vec::len).sum();
        self.inbox_bytes + frames
    }

    pub(super) fn overhear(&mut self, frame: &[u8]) {
        if self.overheard.len() >= OVERHEARD_MAX {
            self.overheard.pop_front();
        }
        self.overheard.push_back((Instant::now(), frame.to_vec()));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_without_a_byte_are_too_many_as_well() {
        let mut copy = Secondary::default();
        let most = INBOX_MAX / FRAME_COST;
        (0..most).for_each(|_| {
            copy.take_in(&[]);
        });
        assert!(copy.has_room());
        copy.take_in(&[]);
        assert!(!copy.has_room());
        while copy.next_input().is_some() {}
        assert_eq!(copy.memory_bytes(), 0);
    }

    #[test]
    fn a_guest_that_stands_loses_what_is_too_much_and_keeps_what_its_checkpoint_has_not_seen() {
        let mut copy = Secondary::default();
        copy.loaded(Vec::new(), true);
        let frame = vec![7; 1 << 20];
        (0..40).for_each(|_| {
            copy.take_in(&frame);
        });
        assert_eq!(copy.inbox.len(), STANDING_INBOX_MAX / frame.len());
        assert!(copy.has_room());
        copy.mark_cut();
        copy.loaded(Vec::new(), true);
        assert!(copy.inbox.is_empty());
        copy.take_in(&[1]);
        copy.mark_cut();
        copy.take_in(&[2]);
        copy.loaded(Vec::new(), false);
        assert_eq!(copy.next_input(), Some(vec![2]));
        // One that runs takes them as they come.
        (0..40).for_each(|_| {
            copy.take_in(&frame);
        });
        assert_eq!(copy.inbox.len(), 40);
    }
}
