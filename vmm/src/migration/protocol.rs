//! Who runs a guest that is being migrated, decided from what each side saw last.
//!
//! Both sides speak over one ordered connection. A side that lives says how it decided before it
//! closes the connection: [`End::Closed`] without a word is the other side's death. Silence says
//! nothing, for it may be the link's.
//!
//! | | source before Complete | source after Complete |
//! |---|---|---|
//! | target refuses, or is closed | goes on | goes on |
//! | silence, or the link fails | goes on | in doubt |
//! | target runs | cannot be | leaves |
//!
//! | | target without all state | with all state, before Complete | after Complete |
//! |---|---|---|---|
//! | source aborts, or the link fails, or silence | gives up | gives up | runs |
//! | source is closed | gives up | runs: the source is dead | runs |

/// How what a side waited for ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum End {
    /// The other side said that it will not, and why.
    Refused,
    /// The target said that the guest runs there.
    Running,
    /// The other side's process closed the connection without a word: it is dead.
    Closed,
    /// Nothing came in time, or the link failed.
    Silent,
}

/// How far a source is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SourcePhase {
    /// It has the guest.
    Owner,
    /// It sent Complete.
    HandedOver,
}

/// What becomes of the guest at the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SourceFate {
    /// It goes on here.
    GoOn,
    /// It runs at the target.
    Leave,
    /// Nobody here can know: it stands.
    InDoubt,
}

/// What a source does in `phase` when it sees `end`.
pub fn source_fate(phase: SourcePhase, end: End) -> SourceFate {
    match (phase, end) {
        (_, End::Refused | End::Closed) | (SourcePhase::Owner, End::Silent) => SourceFate::GoOn,
        (SourcePhase::HandedOver, End::Running) => SourceFate::Leave,
        (SourcePhase::HandedOver, End::Silent) => SourceFate::InDoubt,
        // A target cannot run what it does not have: it lies, and is not believed.
        (SourcePhase::Owner, End::Running) => SourceFate::GoOn,
    }
}

/// How far a target is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum TargetPhase {
    /// Something of the guest is missing.
    Receiving,
    /// It has all of the guest.
    Whole,
    /// It has Complete.
    Owner,
}

/// What becomes of the guest at the target.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TargetFate {
    /// It does not run here.
    GiveUp,
    /// It runs here.
    Run,
}

/// What a target does in `phase` when it sees `end`; once it has Complete it does not wait.
pub fn target_fate(phase: TargetPhase, end: End) -> TargetFate {
    match (phase, end) {
        (TargetPhase::Owner, _) | (TargetPhase::Whole, End::Closed) => TargetFate::Run,
        _ => TargetFate::GiveUp,
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
    enum Message {
        State,
        Complete,
        Abort,
        Refuse,
        Running,
    }

    #[derive(Clone, Debug, PartialEq, Eq, Hash)]
    enum Side {
        /// At a step of its part.
        At(u8),
        /// The guest runs here, after what was said.
        Runs,
        /// It will not run here, and says so or ended well.
        Over,
        InDoubt,
        Dead,
    }

    /// Both sides, what is under way, and whether the link works. `None` in a channel is its end.
    #[derive(Clone, Debug, PartialEq, Eq, Hash)]
    struct World {
        source: Side,
        target: Side,
        to_target: Vec<Option<Message>>,
        to_source: Vec<Option<Message>>,
        cut: bool,
    }

    impl World {
        fn step(&self, change: impl FnOnce(&mut Self)) -> Self {
            let mut next = self.clone();
            change(&mut next);
            next
        }

        fn take(&mut self, to_target: bool) -> Option<Message> {
            if to_target {
                self.to_target.remove(0)
            } else {
                self.to_source.remove(0)
            }
        }

        fn source_ends(&mut self, phase: SourcePhase, end: End) {
            self.source = match source_fate(phase, end) {
                SourceFate::GoOn => {
                    if phase == SourcePhase::Owner {
                        self.to_target.push(Some(Message::Abort));
                    }
                    Side::Runs
                }
                SourceFate::Leave => Side::Over,
                SourceFate::InDoubt => Side::InDoubt,
            };
        }

        fn target_ends(&mut self, phase: TargetPhase, end: End) {
            match target_fate(phase, end) {
                TargetFate::Run => {
                    self.to_source.push(Some(Message::Running));
                    self.target = Side::Runs;
                }
                TargetFate::GiveUp => {
                    self.to_source.push(None);
                    self.target = Side::Over;
                }
            }
        }

        /// The source: 0 sends the state, 1 Complete, 2 waits.
        fn source_steps(&self) -> Vec<Self> {
            let Side::At(at) = self.source else {
                return Vec::new();
            };
            let phase = [
                SourcePhase::Owner,
                SourcePhase::Owner,
                SourcePhase::HandedOver,
            ];
            let phase = phase[usize::from(at)];
            let mut all = vec![self.step(|w| w.source_ends(phase, End::Silent))];
            if at < 2 {
                let message = [Message::State, Message::Complete][usize::from(at)];
                all.push(self.step(|w| {
                    w.to_target.push(Some(message));
                    w.source = Side::At(at + 1);
                }));
                // Something fails at the source itself.
                all.push(self.step(|w| w.source_ends(phase, End::Refused)));
            }
            if !self.cut && !self.to_source.is_empty() {
                all.push(self.step(|w| {
                    let end = match w.take(false) {
                        None => End::Closed,
                        Some(Message::Running) => End::Running,
                        Some(_) => End::Refused,
                    };
                    w.source_ends(phase, end);
                }));
            }
            all
        }

        /// The target: 0 receives, 1 has the state, 2 has Complete.
        fn target_steps(&self) -> Vec<Self> {
            let Side::At(at) = self.target else {
                return Vec::new();
            };
            let phase = [
                TargetPhase::Receiving,
                TargetPhase::Whole,
                TargetPhase::Owner,
            ];
            let phase = phase[usize::from(at)];
            let mut all = Vec::new();
            if at == 2 {
                all.push(self.step(|w| w.target_ends(phase, End::Silent)));
                all.push(self.step(|w| {
                    w.to_source.push(Some(Message::Refuse));
                    w.target = Side::Over;
                }));
                return all;
            }
            all.push(self.step(|w| w.target_ends(phase, End::Silent)));
            if !self.cut && !self.to_target.is_empty() {
                all.push(self.step(|w| match w.take(true) {
                    Some(Message::State | Message::Complete) => w.target = Side::At(at + 1),
                    Some(_) => w.target_ends(phase, End::Refused),
                    None => w.target_ends(phase, End::Closed),
                }));
            }
            all
        }

        fn faults(&self) -> Vec<Self> {
            let mut all = Vec::new();
            if !self.cut {
                all.push(self.step(|w| w.cut = true));
            } else {
                all.push(self.step(|w| w.cut = false));
            }
            if self.source != Side::Dead {
                all.push(self.step(|w| {
                    w.source = Side::Dead;
                    w.to_target.push(None);
                }));
            }
            if self.target != Side::Dead {
                all.push(self.step(|w| {
                    w.target = Side::Dead;
                    w.to_source.push(None);
                }));
            }
            all
        }
    }

    /// Every order of steps, deaths and cuts that there is.
    #[test]
    fn never_two_run_and_none_only_where_a_side_died_or_says_so() {
        let start = World {
            source: Side::At(0),
            target: Side::At(0),
            to_target: Vec::new(),
            to_source: Vec::new(),
            cut: false,
        };
        let mut seen = HashSet::from([start.clone()]);
        let mut todo = vec![start];
        let (mut ends, mut doubts, mut taken_over) = (0, 0, 0);
        while let Some(world) = todo.pop() {
            let both = world.source == Side::Runs && world.target == Side::Runs;
            assert!(!both, "two run: {world:?}");
            let steps = [world.source_steps(), world.target_steps()].concat();
            if steps.is_empty() {
                ends += 1;
                let runs = world.source == Side::Runs || world.target == Side::Runs;
                let died = world.source == Side::Dead || world.target == Side::Dead;
                let doubt = world.source == Side::InDoubt;
                assert!(runs || died || doubt, "none runs: {world:?}");
                doubts += u32::from(doubt && !runs);
                taken_over += u32::from(world.source == Side::Dead && runs);
            }
            for next in steps.into_iter().chain(world.faults()) {
                // Cuts may come and go, and nothing is sent for ever.
                if next.to_source.len() + next.to_target.len() < 8 && seen.insert(next.clone()) {
                    todo.push(next);
                }
            }
        }
        assert!(
            ends > 20 && doubts > 0 && taken_over > 0,
            "{ends} {doubts} {taken_over}"
        );
    }
}
