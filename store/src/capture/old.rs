//! When checkpoints that are too many are removed.

/// How many are made until then.
const MADE_MAX: u64 = 32;

/// Says when checkpoints that are too many are to be removed.
///
/// A guest that goes on from a checkpoint loads memory from it while it runs. What of that has moved to other objects of the store
/// since is known to newer checkpoints, not to who loads it. So nothing goes before all of memory is there.
#[derive(Debug, Default)]
pub(super) struct Old {
    /// Checkpoints that were made since some were removed.
    made: u64,
}

impl Old {
    /// A checkpoint was made of a guest whose memory `is_loaded`, all of it: whether those that are too many are to go now.
    pub(super) fn are_due(&mut self, is_loaded: bool) -> bool {
        self.made += 1;
        let due = is_loaded && self.made >= MADE_MAX;
        if due {
            self.made = 0;
        }
        due
    }
}

#[cfg(test)]
mod old_tests {
    use super::*;

    #[test]
    fn some_are_removed_after_every_so_many() {
        let mut old = Old::default();
        let due = (1..=3 * MADE_MAX).filter(|_| old.are_due(true)).count();
        assert_eq!(due, 3);
    }

    #[test]
    fn none_goes_from_which_memory_is_loaded_and_the_first_that_can_does() {
        let mut old = Old::default();
        assert!((0..5 * MADE_MAX).all(|_| !old.are_due(false)));
        assert!(old.are_due(true));
        assert!(!old.are_due(true));
    }
}
