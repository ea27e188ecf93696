//! Paced disks of guests and their copies: each has a pacer of its own, and a clock. They are made the same, are lost and
//! taken over from, at random.
//!
//! Whatever happens, a guest gets each completion that it waits for once, none before the nominal time of its disk
//! but at a safepoint, and none before the I/O is done on its own host.

use std::collections::BTreeMap;
use std::time::Duration;

use smallvec::smallvec;
use tandem_devices::pace::guard::Observation;
use tandem_devices::pace::{
    Completion, How, Input, Pace, PaceState, PacedQueueState, Pacer, Safepoint, Work,
};

use super::chance::Chance;

/// Bytes of the disk, and entries of its queue.
const SPAN: u64 = 1 << 30;
const SIZE: u16 = 64;
/// What happens in a run, and how much time may pass in between, in microseconds.
const STEPS: u32 = 400;
const GAP: u64 = 3_000;
/// Time after which everything has matured.
const ENOUGH: Duration = Duration::from_secs(3600);
const PACES: [&str; 6] = [
    "hdd",
    "ssd",
    "nvme",
    "hdd+safepoints:halted",
    "ssd+safepoints:",
    "custom+latency-us:300+completions-per-second:500",
];

/// What came of a run.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Summary {
    pub(super) delivered: u64,
    pub(super) early: u64,
    pub(super) takeovers: u32,
    pub(super) resyncs: u32,
}

/// A request that its driver waits for.
#[derive(Clone, Copy, Debug)]
enum Request {
    /// The host works on it: where on the disk, and since when.
    AtWork(u64, Duration),
    /// It is done, and is not to be seen before this but at a safepoint.
    Done(Duration),
}

/// A guest, or its copy, on one host. Times are those of its pacer.
struct Copy {
    pace: Pace,
    pacer: Pacer,
    now: Duration,
    /// What the driver waits for.
    requests: BTreeMap<u16, Request>,
    next: u16,
    delivered: u64,
    early: u64,
}

/// A guest as a checkpoint has it.
struct Saved {
    state: PaceState,
    /// What the driver waits for, and how long it has to.
    requests: BTreeMap<u16, Duration>,
    next: u16,
}

impl Copy {
    fn new(pace: Pace, chance: &mut Chance) -> Self {
        Self {
            pace,
            pacer: Pacer::new(pace, SPAN, SIZE),
            now: Duration::from_micros(chance.within(0..1_000_000)),
            requests: BTreeMap::new(),
            next: 0,
            delivered: 0,
            early: 0,
        }
    }

    /// The guest asks its disk for something, if there is room.
    fn begin(&mut self, place: u64) {
        if self.requests.len() >= usize::from(SIZE) {
            return;
        }
        while self.requests.contains_key(&self.next) {
            self.next = (self.next + 1) % SIZE;
        }
        self.pacer.begin();
        let request = Request::AtWork(place, self.now);
        self.requests.insert(self.next, request);
        self.next = (self.next + 1) % SIZE;
    }

    fn at_work(&self) -> Vec<u16> {
        let works = |(head, request): (&u16, &Request)| {
            matches!(request, Request::AtWork(..)).then_some(*head)
        };
        self.requests.iter().filter_map(works).collect()
    }

    /// The host is done with a request.
    fn complete(&mut self, head: u16) {
        let Some(Request::AtWork(place, begun)) = self.requests.get(&head).copied() else {
            panic!("the host does not work on {head}");
        };
        let nominal = begun + self.pace.model.latency;
        self.requests.insert(head, Request::Done(nominal));
        let work = Work {
            bytes: 4096,
            position: Some(place),
            begun,
        };
        let entries = smallvec![(head, 4097)];
        self.step(Input::Completion(Completion { entries, work }));
    }

    fn step(&mut self, input: Input) {
        let reached = match &input {
            Input::Safepoint(kind) => Some(*kind),
            _ => None,
        };
        let mut out = Vec::new();
        let stepped = self.pacer.step(self.now, input, &mut out);
        stepped.expect("no more waits than the queue holds");
        for delivery in out {
            for (head, _) in &delivery.entries {
                let Some(Request::Done(nominal)) = self.requests.remove(head) else {
                    panic!("{head} is given to who does not wait for it, or before it is done");
                };
                match delivery.how {
                    How::Immediate | How::Mature => {
                        assert!(nominal <= self.now, "{head} comes before its nominal time");
                    }
                    How::Early(kind) => {
                        assert_eq!(Some(kind), reached, "early at no safepoint");
                        assert!(self.pace.safepoints.contains(kind), "{kind:?} is off");
                        self.early += 1;
                    }
                }
                self.delivered += 1;
            }
        }
    }

    /// Stands for a checkpoint: its I/O is done, what waits is saved.
    fn save(&mut self) -> Saved {
        for head in self.at_work() {
            self.complete(head);
        }
        let left = |request: &Request| match request {
            Request::Done(nominal) => nominal.saturating_sub(self.now),
            Request::AtWork(..) => unreachable!("all of it is done"),
        };
        let queue = self.pacer.save(0, self.now);
        Saved {
            state: PaceState::new(self.pace, vec![queue]),
            requests: self.requests.iter().map(|(h, r)| (*h, left(r))).collect(),
            next: self.next,
        }
    }

    /// Goes on where `saved` was, on this host and by its clock.
    fn load(&mut self, saved: &Saved) {
        let pace = saved.state.pace().expect("its safepoints are known");
        assert_eq!(pace, self.pace, "it is paced as before");
        let queue: &PacedQueueState = &saved.state.queues[0];
        let restored = self.pacer.restore(queue, self.now);
        restored.expect("no more waits than the queue holds");
        let left = saved.requests.iter();
        self.requests = left
            .map(|(head, left)| (*head, Request::Done(self.now + *left)))
            .collect();
        self.next = saved.next;
    }

    /// Something happens.
    fn live(&mut self, chance: &mut Chance) {
        self.now += Duration::from_micros(chance.within(0..GAP));
        match chance.within(0..10) {
            0..3 => self.begin(chance.within(0..SPAN)),
            3..6 => {
                let at_work = self.at_work();
                if !at_work.is_empty() {
                    self.complete(chance.one_of(&at_work));
                }
            }
            6..8 => self.step(Input::Safepoint(chance.one_of(&Safepoint::ALL[..4]))),
            8 => self.step(Input::Tick),
            _ => self.pacer.observe(
                self.now,
                Observation {
                    in_service: chance.once_in(3),
                    unseen: chance.within(0..4) as u16,
                    progress: !chance.once_in(3),
                },
            ),
        }
    }

    /// Nothing more is asked for, and there is time enough.
    fn finish(&mut self) {
        for head in self.at_work() {
            self.complete(head);
        }
        self.now += ENOUGH;
        self.step(Input::Tick);
        let left = &self.requests;
        assert!(left.is_empty(), "the guest waits for ever: {left:?}");
    }
}

/// Runs one seed.
///
/// # Panics
/// When a promise is broken.
pub(super) fn run(seed: u64) -> Summary {
    let mut chance = Chance::new(seed);
    let pace: Pace = chance.one_of(&PACES).parse().expect("a pace");
    let mut guest = Copy::new(pace, &mut chance);
    let mut copy = Copy::new(pace, &mut chance);
    // It runs from here, or stands there.
    let mut checkpoint = guest.save();
    copy.load(&checkpoint);
    let mut summary = Summary::default();
    for _ in 0..STEPS {
        guest.live(&mut chance);
        copy.live(&mut chance);
        match chance.within(0..40) {
            0 => {
                checkpoint = guest.save();
                copy.load(&checkpoint);
                summary.resyncs += 1;
            }
            1 => {
                // The guest is lost. Its copy goes on as it is, or from the checkpoint that it was loading.
                if chance.once_in(2) {
                    copy.load(&checkpoint);
                }
                summary.count(&guest);
                guest = std::mem::replace(&mut copy, Copy::new(pace, &mut chance));
                checkpoint = guest.save();
                copy.load(&checkpoint);
                summary.takeovers += 1;
            }
            _ => {}
        }
    }
    for mut one in [guest, copy] {
        one.finish();
        summary.count(&one);
    }
    summary
}

impl Summary {
    fn count(&mut self, copy: &Copy) {
        self.delivered += copy.delivered;
        self.early += copy.early;
    }
}
