//! The rule, over random schedules.
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use std::collections::BTreeMap;
use std::time::Duration;

use proptest::prelude::*;
use smallvec::smallvec;

use super::guard::Observation;
use super::*;

const SPAN: u64 = 1 << 30;
const SIZE: u16 = 256;

fn pace(text: &str) -> Pace {
    text.parse().unwrap()
}

fn us(us: u64) -> Duration {
    Duration::from_micros(us)
}

fn completion(head: u16, begun: Duration, position: u64) -> Input {
    let position = Some(position);
    Input::Completion(Completion {
        entries: smallvec![(head, 1)],
        work: Work {
            bytes: 4096,
            position,
            begun,
        },
    })
}

fn step(pacer: &mut Pacer, now: Duration, input: Input) -> Vec<(u16, How)> {
    let mut out = Vec::new();
    pacer.step(now, input, &mut out).unwrap();
    out.iter().map(|d| (d.entries[0].0, d.how)).collect()
}

const HALTED: Input = Input::Safepoint(Safepoint::Halted);
const NESTED: Observation = Observation {
    in_service: true,
    unseen: 0,
    progress: true,
};

#[test]
fn what_took_its_nominal_time_is_delivered_at_once() {
    let mut pacer = Pacer::new(pace("custom+latency-us:100"), SPAN, SIZE);
    let late = completion(1, us(0), 0);
    assert_eq!(step(&mut pacer, us(100), late), [(1, How::Immediate)]);
    assert_eq!(pacer.counters().immediate, 1);
}

#[test]
fn what_is_early_waits_for_its_maturity() {
    let mut pacer = Pacer::new(pace("custom+latency-us:100"), SPAN, SIZE);
    assert_eq!(step(&mut pacer, us(10), completion(1, us(5), 0)), []);
    assert_eq!(pacer.next_maturity(), Some(us(105)));
    assert_eq!(step(&mut pacer, us(104), Input::Tick), []);
    assert_eq!(step(&mut pacer, us(105), Input::Tick), [(1, How::Mature)]);
    assert_eq!(step(&mut pacer, us(300), Input::Tick), []);
}

#[test]
fn a_safepoint_delivers_all_that_waits() {
    let mut pacer = Pacer::new(pace("hdd"), SPAN, SIZE);
    for head in 0..3 {
        assert_eq!(step(&mut pacer, us(1), completion(head, us(0), 4096)), []);
    }
    let early = How::Early(Safepoint::Halted);
    let expected = [(0, early), (1, early), (2, early)];
    assert_eq!(step(&mut pacer, us(50), HALTED), expected);
    assert!(pacer.counters().saved > 3 * us(4_000));
    assert_eq!(step(&mut pacer, us(60), HALTED), []);
}

#[test]
fn time_that_was_saved_is_not_asked_for_again() {
    let mut pacer = Pacer::new(pace("custom+completions-per-second:100"), SPAN, SIZE);
    for round in 0..100 {
        let now = us(round * 10);
        step(&mut pacer, now, completion(0, now, 0));
        assert_eq!(pacer.next_maturity(), Some(now + us(10_000)));
        step(&mut pacer, now, HALTED);
    }
}

#[test]
fn kinds_that_are_switched_off_count_for_nothing() {
    let mut pacer = Pacer::new(pace("ssd+safepoints:kick"), SPAN, SIZE);
    step(&mut pacer, us(0), completion(0, us(0), 0));
    assert_eq!(step(&mut pacer, us(1), HALTED), []);
    let kick = Input::Safepoint(Safepoint::Kick);
    let delivered = step(&mut pacer, us(1), kick);
    assert_eq!(delivered, [(0, How::Early(Safepoint::Kick))]);
}

#[test]
fn nothing_is_early_while_the_guard_backs_off() {
    let mut pacer = Pacer::new(pace("hdd"), SPAN, SIZE);
    pacer.observe(us(0), NESTED);
    step(&mut pacer, us(0), completion(0, us(0), 4096));
    assert_eq!(step(&mut pacer, us(1), HALTED), []);
    assert_eq!(pacer.back_offs(), 1);
    assert_eq!(step(&mut pacer, us(20_000), HALTED), [(0, How::Mature)]);
    step(&mut pacer, us(20_000), completion(1, us(20_000), 8192));
    let delivered = step(&mut pacer, us(20_001), HALTED);
    assert_eq!(delivered, [(1, How::Early(Safepoint::Halted))]);
}

#[test]
fn forced_completions_wait_for_nobody() {
    let mut pacer = Pacer::new(pace("hdd+safepoints:force-early"), SPAN, SIZE);
    pacer.observe(us(0), NESTED);
    let forced = How::Early(Safepoint::ForceEarly);
    assert_eq!(
        step(&mut pacer, us(0), completion(3, us(0), 9)),
        [(3, forced)]
    );
}

#[test]
fn no_more_waits_than_the_queue_holds() {
    let mut pacer = Pacer::new(pace("hdd"), SPAN, 2);
    for head in 0..2 {
        step(&mut pacer, us(0), completion(head, us(0), 4096));
    }
    let mut out = Vec::new();
    let full = pacer.step(us(0), completion(2, us(0), 0), &mut out);
    assert_eq!((full, pacer.waiting()), (Err(Full), 2));
}

/// One step of a random schedule.
#[derive(Clone, Copy, Debug)]
enum Act {
    /// The device takes a request for this place.
    Begin(u64),
    /// The real I/O of the oldest, or the newest, request is done.
    Complete(bool),
    Safepoint(Safepoint),
    Tick,
    Interrupt(bool),
    /// The guest is saved and goes on elsewhere, as much later.
    Move(u64),
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (0..SPAN).prop_map(Act::Begin),
        4 => any::<bool>().prop_map(Act::Complete),
        2 => (0_usize..4).prop_map(|kind| Act::Safepoint(Safepoint::ALL[kind])),
        2 => Just(Act::Tick),
        1 => any::<bool>().prop_map(Act::Interrupt),
        1 => (0_u64..100_000).prop_map(Act::Move),
    ]
}

fn paces() -> impl Strategy<Value = Pace> {
    let texts = [
        "hdd",
        "ssd",
        "nvme",
        "nic-1g",
        "none",
        "hdd+safepoints:halted",
        "ssd+safepoints:",
        "custom+latency-us:300+completions-per-second:500",
    ];
    prop::sample::select(texts.map(pace).to_vec())
}

/// A schedule at work: what is where, by the pacer's own account and by the test's.
struct Schedule {
    pace: Pace,
    pacer: Pacer,
    now: Duration,
    /// What the device works on: head, place, when it was begun.
    at_work: Vec<(u16, u64, Duration)>,
    /// Maturities of what waits, by the pacer's account when it came.
    waiting: BTreeMap<u16, Duration>,
    next_head: u16,
    delivered: Vec<u16>,
    last_mature: Duration,
}

impl Schedule {
    fn new(pace: Pace) -> Self {
        Self {
            pace,
            pacer: Pacer::new(pace, SPAN, SIZE),
            now: Duration::ZERO,
            at_work: Vec::new(),
            waiting: BTreeMap::new(),
            next_head: 0,
            delivered: Vec::new(),
            last_mature: Duration::ZERO,
        }
    }

    fn run(&mut self, gap: Duration, act: Act) {
        self.now += gap;
        match act {
            Act::Begin(place) => {
                self.pacer.begin();
                self.at_work.push((self.next_head, place, self.now));
                self.next_head += 1;
            }
            Act::Complete(oldest) => self.complete(oldest),
            Act::Safepoint(kind) => self.step(Input::Safepoint(kind), Some(kind)),
            Act::Tick => self.step(Input::Tick, None),
            Act::Interrupt(in_service) => {
                let seen = Observation {
                    in_service,
                    ..NESTED
                };
                self.pacer.observe(self.now, seen);
            }
            Act::Move(later) => self.go_on_elsewhere(us(later)),
        }
    }

    fn complete(&mut self, oldest: bool) {
        let at = if oldest {
            0
        } else {
            self.at_work.len().saturating_sub(1)
        };
        if at >= self.at_work.len() {
            return;
        }
        let (head, place, begun) = self.at_work.remove(at);
        let before: Vec<u16> = self.waiting.keys().copied().collect();
        self.step(completion(head, begun, place), None);
        if self.pacer.waiting()
            > before
                .iter()
                .filter(|h| self.waiting.contains_key(h))
                .count()
        {
            let maturity = self.maturity_of(head);
            assert!(maturity > self.now, "what waits is not mature");
            assert!(maturity >= begun + self.pace.model.latency);
            self.waiting.insert(head, maturity);
        } else {
            assert!(self.delivered.contains(&head));
        }
    }

    fn maturity_of(&self, head: u16) -> Duration {
        let state = self.pacer.save(0, self.now);
        let own = state.waiting.iter().find(|w| w.entries[0].0 == head);
        self.now + Duration::from_nanos(own.unwrap().remaining_ns)
    }

    fn step(&mut self, input: Input, safepoint: Option<Safepoint>) {
        for (head, how) in step(&mut self.pacer, self.now, input) {
            assert!(!self.delivered.contains(&head), "{head} is delivered twice");
            assert!(
                self.at_work.iter().all(|(other, ..)| *other != head),
                "its I/O is not done"
            );
            let maturity = self.waiting.remove(&head);
            match how {
                How::Immediate => assert_eq!(maturity, None),
                How::Mature => {
                    let maturity = maturity.unwrap();
                    assert!(maturity <= self.now && maturity >= self.last_mature);
                }
                How::Early(kind) => {
                    assert!(maturity.unwrap() > self.now);
                    assert_eq!(Some(kind), safepoint, "early at no safepoint");
                    assert!(self.pace.safepoints.contains(kind));
                }
            }
            self.delivered.push(head);
        }
        let first = self.waiting.values().min().copied();
        assert!(
            first.is_none_or(|at| at > self.now),
            "something mature was left"
        );
    }

    fn go_on_elsewhere(&mut self, later: Duration) {
        // A guest is saved when its real I/O is done.
        while !self.at_work.is_empty() {
            self.complete(true);
        }
        let state = self.pacer.save(0, self.now);
        self.pacer = Pacer::new(self.pace, SPAN, SIZE);
        self.pacer.restore(&state, self.now + later).unwrap();
        self.now += later;
        self.waiting.values_mut().for_each(|at| *at += later);
    }
}

proptest! {
    #[test]
    fn the_rule_holds_on_every_schedule(
        pace in paces(),
        acts in prop::collection::vec((0_u64..3_000, act()), 0..200),
    ) {
        let mut schedule = Schedule::new(pace);
        for (gap, act) in acts {
            schedule.run(us(gap), act);
            prop_assert_eq!(schedule.pacer.waiting(), schedule.waiting.len());
        }
        while !schedule.at_work.is_empty() {
            schedule.complete(true);
        }
        schedule.run(Duration::from_secs(3600), Act::Tick);
        prop_assert_eq!(schedule.delivered.len(), usize::from(schedule.next_head));
        let counters = schedule.pacer.counters();
        prop_assert!(counters.early[Safepoint::ForceEarly as usize] == 0);
    }

    #[test]
    fn a_device_that_is_never_early_keeps_its_nominal_rate(
        gaps in prop::collection::vec(0_u64..2_000, 1..100),
    ) {
        let mut pacer = Pacer::new(pace("custom+completions-per-second:1000+safepoints:"), SPAN, SIZE);
        let (mut now, mut times) = (us(0), Vec::new());
        for (head, gap) in (0..).zip(gaps) {
            now += us(gap);
            step(&mut pacer, now, completion(head, now, 0));
        }
        while let Some(at) = pacer.next_maturity() {
            times.push(at);
            step(&mut pacer, at, Input::Tick);
        }
        prop_assert!(times.windows(2).all(|two| two[1] - two[0] >= us(1_000)), "{times:?}");
    }

    #[test]
    fn frames_keep_their_order(gaps in prop::collection::vec((0_u64..40, any::<bool>()), 1..200)) {
        let mut pacer = Pacer::new(pace("nic-1g"), SPAN, SIZE);
        let (mut now, mut heads) = (us(0), Vec::new());
        for (head, (gap, halted)) in (0..).zip(gaps) {
            now += us(gap);
            let mut work = Work { bytes: 1_500, position: None, begun: now };
            if head % 3 == 0 {
                work.bytes = 60;
            }
            let frame = Completion { entries: smallvec![(head, 0)], work };
            heads.extend(step(&mut pacer, now, Input::Completion(frame)));
            let next = if halted { HALTED } else { Input::Tick };
            heads.extend(step(&mut pacer, now, next));
        }
        prop_assert!(heads.is_sorted_by_key(|(head, _)| *head));
    }
}
