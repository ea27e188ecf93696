//! Every order in which a source, its copy and a destination can ask for the guest, die, and be cut off.

use std::collections::HashSet;

use tandem_vmm::migration::protocol::{End, TargetFate, TargetPhase, target_fate};

/// Who may own the guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Who {
    Source,
    Copy,
    Target,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Message {
    State,
    Complete,
    Abort,
    Running,
    Refuse,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
enum Side {
    /// At a step of its part.
    At(u8),
    /// It asks for the term after this one, and stands meanwhile.
    Asks(u8),
    Runs,
    Over,
    Dead,
}

/// The three, what is under way between source and target, and who won the terms after the source's first.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
struct World {
    source: Side,
    copy: Side,
    target: Side,
    /// `None` is the end of a connection.
    to_target: Vec<Option<Message>>,
    to_source: Vec<Option<Message>>,
    cut: bool,
    terms: Vec<Who>,
    deaths: u8,
}

impl World {
    fn new() -> Self {
        Self {
            source: Side::At(0),
            copy: Side::At(0),
            target: Side::At(0),
            to_target: Vec::new(),
            to_source: Vec::new(),
            cut: false,
            terms: Vec::new(),
            deaths: 0,
        }
    }

    fn step(&self, change: impl FnOnce(&mut Self)) -> Self {
        let mut next = self.clone();
        change(&mut next);
        next
    }

    /// Claims the term after `number` others. Whether it is won.
    fn claim(&mut self, who: Who, number: u8) -> bool {
        if self.terms.len() == usize::from(number) {
            self.terms.push(who);
        }
        self.terms.len() == usize::from(number) + 1 && self.terms.last() == Some(&who)
    }

    /// The source hears how the conversation ended: it asks, for the term after that of an heir who is surely dead or
    /// refuses.
    fn source_doubts(&mut self, end: End) {
        let bad_news = matches!(end, End::Closed | End::Refused);
        let heir = bad_news && self.terms == [Who::Target];
        self.to_target.push(Some(Message::Abort));
        self.source = Side::Asks(u8::from(heir));
    }

    /// 0 sends the state, having packed, 1 Complete, 2 waits.
    fn source_steps(&self) -> Vec<Self> {
        let at = match self.source {
            Side::At(at) => at,
            Side::Asks(after) => {
                return vec![self.step(|w| {
                    let won = w.claim(Who::Source, after);
                    w.source = if won { Side::Runs } else { Side::Over };
                })];
            }
            _ => return Vec::new(),
        };
        let mut all = Vec::new();
        if at < 2 {
            let message = [Message::State, Message::Complete][usize::from(at)];
            all.push(self.step(|w| {
                w.to_target.push(Some(message));
                w.source = Side::At(at + 1);
            }));
        }
        match at {
            // Nothing is packed: it goes on as ever, with its copy.
            0 => all.push(self.step(|w| {
                w.to_target.push(Some(Message::Abort));
                w.source = Side::Runs;
            })),
            _ => all.push(self.step(|w| w.source_doubts(End::Silent))),
        }
        if at > 0 && !self.cut && !self.to_source.is_empty() {
            all.push(self.step(|w| match w.to_source.remove(0) {
                Some(Message::Running) => w.source = Side::Over,
                Some(_) => w.source_doubts(End::Refused),
                None => w.source_doubts(End::Closed),
            }));
        }
        all
    }

    /// 0 receives, 1 has the state, 2 has Complete; it asks after that.
    fn target_steps(&self) -> Vec<Self> {
        let at = match self.target {
            Side::At(at) => at,
            Side::Asks(_) => {
                return vec![self.step(|w| {
                    if w.claim(Who::Target, 0) {
                        w.to_source.push(Some(Message::Running));
                        w.target = Side::Runs;
                    } else {
                        w.to_source.push(Some(Message::Refuse));
                        w.target = Side::Over;
                    }
                })];
            }
            _ => return Vec::new(),
        };
        let phases = [
            TargetPhase::Receiving,
            TargetPhase::Whole,
            TargetPhase::Owner,
        ];
        let phase = phases[usize::from(at)];
        let ends = |w: &mut Self, end| match target_fate(phase, end) {
            TargetFate::Run => w.target = Side::Asks(0),
            TargetFate::GiveUp => {
                w.to_source.push(None);
                w.target = Side::Over;
            }
        };
        let mut all = vec![self.step(|w| ends(w, End::Silent))];
        if at < 2 && !self.cut && !self.to_target.is_empty() {
            all.push(self.step(|w| match w.to_target.remove(0) {
                Some(Message::State | Message::Complete) => w.target = Side::At(at + 1),
                Some(_) => ends(w, End::Refused),
                None => ends(w, End::Closed),
            }));
        }
        all
    }

    /// It asks when its primary is gone, or when its lease is over, after which a primary that runs has asked itself.
    fn copy_steps(&self) -> Vec<Self> {
        match self.copy {
            Side::At(_) if matches!(self.source, Side::Dead | Side::Over) => {
                vec![self.step(|w| w.copy = Side::Asks(0))]
            }
            Side::Asks(after) => vec![self.step(|w| {
                let won = w.claim(Who::Copy, after);
                w.copy = if won { Side::Runs } else { Side::Over };
            })],
            _ => Vec::new(),
        }
    }

    fn faults(&self) -> Vec<Self> {
        let mut all = vec![self.step(|w| w.cut = !w.cut)];
        if self.deaths > 0 {
            return all;
        }
        // One of them dies; an heir may when it has won and said nothing.
        all.push(self.step(|w| {
            (w.source, w.deaths) = (Side::Dead, 1);
            w.to_target.push(None);
        }));
        all.push(self.step(|w| (w.copy, w.deaths) = (Side::Dead, 1)));
        all.push(self.step(|w| {
            (w.target, w.deaths) = (Side::Dead, 1);
            w.to_source.push(None);
        }));
        if matches!(self.target, Side::Asks(_)) {
            all.push(self.step(|w| {
                w.claim(Who::Target, 0);
                (w.target, w.deaths) = (Side::Dead, 1);
                w.to_source.push(None);
            }));
        }
        all
    }

    fn running(&self) -> usize {
        let before = self.source == Side::At(0);
        let sides = [self.source, self.copy, self.target];
        usize::from(before) + sides.iter().filter(|side| **side == Side::Runs).count()
    }
}

#[test]
fn never_two_run_and_one_does_whoever_dies() {
    let mut seen = HashSet::from([World::new()]);
    let mut todo = vec![World::new()];
    let (mut by_copy, mut by_target, mut by_source, mut after_heir) = (0, 0, 0, 0);
    while let Some(world) = todo.pop() {
        assert!(world.running() <= 1, "two run: {world:?}");
        let steps = [
            world.source_steps(),
            world.target_steps(),
            world.copy_steps(),
        ]
        .concat();
        if steps.is_empty() {
            // Who dies when it has won the guest has no copy yet; of an heir the source hears in time, unless it was heard
            // before, or cut off.
            let lost = match world.terms.last() {
                Some(Who::Source) => world.source == Side::Dead,
                Some(Who::Copy) => world.copy == Side::Dead,
                Some(Who::Target) => world.target == Side::Dead && world.source == Side::Over,
                None => false,
            };
            assert!(world.running() == 1 || lost, "none runs: {world:?}");
            by_copy += u32::from(world.copy == Side::Runs);
            by_target += u32::from(world.target == Side::Runs);
            by_source += u32::from(world.source == Side::Runs);
            after_heir += u32::from(world.terms == [Who::Target, Who::Source]);
        }
        for next in steps.into_iter().chain(world.faults()) {
            // Cuts may come and go, and nothing is sent for ever.
            if next.to_source.len() + next.to_target.len() < 8 && seen.insert(next.clone()) {
                todo.push(next);
            }
        }
    }
    assert!(
        by_copy > 0 && by_target > 0 && by_source > 0 && after_heir > 0,
        "{by_copy} {by_target} {by_source} {after_heir}"
    );
}
