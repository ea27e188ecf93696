//! How far the outputs of the secondary have been released.

use std::collections::VecDeque;

/// Counts frames of the secondary that it may forget, as the primary's frames leave.
#[derive(Debug, Default)]
pub(super) struct Settlement {
    /// Frames of the secondary since the commit.
    pub(super) received: u64,
    /// How many frames must have left, and how many of the secondary are settled then. Both grow.
    pending: VecDeque<(u64, u64)>,
    settled: u64,
}

impl Settlement {
    /// The first `leading` frames of the secondary are settled as soon as `frames` have left.
    pub(super) fn settle(&mut self, leading: u64, frames: u64) {
        match self.pending.back_mut() {
            Some((_, last)) if *last >= leading => {}
            Some((when, last)) if *when == frames => *last = leading,
            None if self.settled >= leading => {}
            _ => self.pending.push_back((frames, leading)),
        }
    }

    /// So many frames have left.
    pub(super) fn left(&mut self, frames: u64) {
        while let Some(&(when, leading)) = self.pending.front()
            && when <= frames
        {
            self.settled = leading;
            self.pending.pop_front();
        }
    }

    pub(super) fn settled(&self) -> u64 {
        self.settled
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn frames_are_settled_when_others_have_left() {
        let mut settlement = Settlement::default();
        settlement.settle(1, 2);
        settlement.settle(2, 2);
        settlement.settle(2, 3);
        settlement.settle(5, 4);
        assert_eq!(settlement.pending.len(), 2);
        settlement.left(1);
        assert_eq!(settlement.settled(), 0);
        settlement.left(2);
        assert_eq!(settlement.settled(), 2);
        settlement.left(9);
        assert_eq!(settlement.settled(), 5);
        settlement.settle(4, 10);
        assert!(settlement.pending.is_empty());
    }
}
