//! Two sides of a stream, with paths between them that break.

use std::collections::VecDeque;
use std::time::{Duration, Instant};

use proptest::prelude::*;

use super::*;

const TICK: Duration = Duration::from_millis(1);

/// One direction of one path.
#[derive(Default)]
struct Way {
    cut: bool,
    /// Frames on their way.
    frames: VecDeque<Vec<u8>>,
}

struct Side {
    stream: Stream,
    /// What was put, and what came.
    put: Vec<u8>,
    came: Vec<u8>,
}

impl Side {
    fn new(now: Instant) -> Self {
        Self {
            stream: Stream::new(now, 0),
            put: Vec::new(),
            came: Vec::new(),
        }
    }

    fn put(&mut self, bytes: &[u8]) {
        let bytes = &bytes[..bytes.len().min(self.stream.room())];
        self.stream.put(bytes);
        self.put.extend_from_slice(bytes);
    }

    fn take(&mut self) {
        while !self.stream.come().is_empty() {
            let come = self.stream.come().to_vec();
            self.stream.take(come.len());
            self.came.extend(come);
        }
    }
}

struct World {
    now: Instant,
    sides: [Side; 2],
    /// By path, and by the side that sends.
    ways: [[Way; 2]; PATHS],
    switches: usize,
    frames: usize,
}

impl World {
    fn new() -> Self {
        let now = Instant::now();
        let mut world = Self {
            now,
            sides: [Side::new(now), Side::new(now)],
            ways: Default::default(),
            switches: 0,
            frames: 0,
        };
        world.connect(1);
        world.run(2);
        world
    }

    fn connect(&mut self, path: usize) {
        self.ways[path] = Default::default();
        for side in &mut self.sides {
            side.stream.connected(self.now, path);
        }
    }

    /// Ends the connection on `path`, and all that is on its way there.
    fn reset(&mut self, path: usize) {
        self.ways[path] = Default::default();
        for side in &mut self.sides {
            side.stream.gone(path);
        }
    }

    fn cut(&mut self, path: usize, from: usize, cut: bool) {
        self.ways[path][from].cut = cut;
    }

    /// A millisecond passes.
    fn tick(&mut self) {
        self.now += TICK;
        for (number, side) in self.sides.iter_mut().enumerate() {
            for (path, ways) in self.ways.iter_mut().enumerate() {
                let way = &mut ways[1 - number];
                while !way.cut
                    && let Some(bytes) = way.frames.pop_front()
                {
                    let (frame, _) = Frame::take(&bytes).unwrap().unwrap();
                    side.stream.hear(path, &frame).unwrap();
                }
            }
            side.take();
            self.switches += usize::from(side.stream.look(self.now));
            for (path, ways) in self.ways.iter_mut().enumerate() {
                let mut bytes = Vec::new();
                while side.stream.say(self.now, path, &mut bytes) {
                    ways[number].frames.push_back(std::mem::take(&mut bytes));
                    self.frames += 1;
                }
            }
        }
    }

    fn run(&mut self, ticks: usize) {
        (0..ticks).for_each(|_| self.tick());
    }

    /// Ticks until all that `from` said is there.
    fn delay(&mut self, from: usize) -> usize {
        for ticks in 0..10_000 {
            if self.sides[1 - from].came.len() == self.sides[from].put.len() {
                return ticks;
            }
            self.tick();
        }
        panic!("what was said never came");
    }

    fn check(&self) {
        for (side, other) in [(0, 1), (1, 0)] {
            assert!(self.sides[side].put.starts_with(&self.sides[other].came));
        }
    }
}

/// What a path that breaks may cost: the silence until that is known, and the way there.
const LATE: usize = 50;

#[test]
fn what_is_said_comes_at_once() {
    let mut world = World::new();
    for side in [0, 1] {
        world.sides[side].put(b"hello");
        assert!(world.delay(side) <= 2);
    }
    world.check();
}

#[test]
fn a_path_that_breaks_costs_a_moment_in_whichever_direction() {
    for directions in [&[0][..], &[1], &[0, 1]] {
        let mut world = World::new();
        world.run(100);
        directions.iter().for_each(|from| world.cut(0, *from, true));
        for side in [0, 1] {
            world.sides[side].put(&[7; 100_000]);
            assert!(world.delay(side) <= LATE, "{directions:?} {side}");
        }
        for side in &world.sides {
            let states = [0, 1].map(|path| side.stream.state(path));
            assert_eq!(states, [PathState::Silent, PathState::Used]);
        }
        // From then on nothing is late.
        world.sides[0].put(&[8; 100]);
        assert!(world.delay(0) <= 2);
        world.check();
    }
}

#[test]
fn a_connection_that_ends_costs_nothing() {
    let mut world = World::new();
    world.sides[0].put(&[7; 100_000]);
    world.tick();
    world.reset(0);
    assert!(world.delay(0) <= 3);
    world.check();
    assert!(!world.sides[0].stream.is_cut_off());
    world.reset(1);
    assert!(world.sides[0].stream.is_cut_off());
}

#[test]
fn a_path_that_is_not_used_breaks_unseen() {
    let mut world = World::new();
    world.cut(1, 0, true);
    world.cut(1, 1, true);
    for _ in 0..1_000 {
        world.sides[0].put(b"x");
        assert!(world.delay(0) <= 2);
        world.run(1);
    }
    assert_eq!(world.switches, 0);
    assert!(world.sides[0].stream.is_dead(1));
    assert!(!world.sides[0].stream.is_dead(0));
}

#[test]
fn the_first_path_is_used_again_once_it_works_for_a_while_and_ever_longer() {
    let mut world = World::new();
    let mut hold = RETURN;
    for _ in 0..3 {
        world.cut(0, 0, true);
        world.run(LATE);
        assert_eq!(world.sides[0].stream.state(1), PathState::Used);
        world.cut(0, 0, false);
        let held = hold.as_millis() as usize;
        world.run(held - 10);
        assert_eq!(world.sides[0].stream.state(1), PathState::Used);
        world.run(20);
        assert_eq!(world.sides[0].stream.state(0), PathState::Used);
        hold *= 2;
    }
    world.check();
}

#[test]
fn who_hears_nothing_at_all_goes_on_as_it_was() {
    let mut world = World::new();
    for (path, from) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
        world.cut(path, from, true);
    }
    world.sides[0].put(b"late");
    world.run(1_000);
    assert_eq!(world.switches, 0);
    world.cut(0, 0, false);
    world.cut(0, 1, false);
    assert!(world.delay(0) <= LATE);
    world.check();
}

#[test]
fn no_more_is_kept_than_a_window_and_who_takes_nothing_does_not_stop_the_other_direction() {
    let mut world = World::new();
    let mut put = 0;
    while world.sides[0].stream.room() > 0 {
        world.sides[0].put(&[7; 60_000]);
        put = world.sides[0].put.len();
        assert!(put <= WINDOW);
        // Nothing is taken of it.
        let mut bytes = Vec::new();
        while world.sides[0].stream.say(world.now, 0, &mut bytes) {
            let (frame, _) = Frame::take(&bytes).unwrap().unwrap();
            world.sides[1].stream.hear(0, &frame).unwrap();
            bytes.clear();
        }
    }
    assert_eq!(put, WINDOW);
    assert!(world.sides[1].stream.come().len() <= WINDOW);
    let (mut bytes, now) = (Vec::new(), world.now);
    world.sides[1].stream.put(b"still");
    assert!(world.sides[1].stream.say(now, 0, &mut bytes));
    let (frame, _) = Frame::take(&bytes).unwrap().unwrap();
    world.sides[0].stream.hear(0, &frame).unwrap();
    assert_eq!(world.sides[0].stream.come(), b"still");
    world.sides[1].take();
    world.run(5);
    assert!(world.sides[0].stream.room() > WINDOW / 2);
}

#[test]
fn the_end_comes_after_all_that_was_said() {
    let mut world = World::new();
    world.sides[0].put(&[7; 200_000]);
    world.sides[0].stream.end();
    world.cut(0, 0, true);
    for _ in 0..LATE {
        world.tick();
        let all = world.sides[1].came.len() == 200_000;
        assert!(all || !world.sides[1].stream.is_taken());
    }
    assert!(world.sides[1].stream.is_taken() && world.sides[0].stream.is_said());
    assert_eq!(world.sides[0].stream.room(), 0);
    assert!(!world.sides[0].stream.is_taken());
    world.check();
}

#[test]
fn what_cannot_be_said_is_refused() {
    let ping = Frame {
        kind: Kind::Ping,
        hears: 3,
        offset: 0,
        taken: 0,
        payload: &[],
    };
    let now = Instant::now();
    let hear = |frame| Stream::new(now, 0).hear(0, &frame);
    assert_eq!(hear(ping), Ok(()));
    let taken = Frame { taken: 1, ..ping };
    let wrong = StreamError::Taken { taken: 1, sent: 0 };
    assert_eq!(hear(taken), Err(wrong));
    let data = Frame {
        kind: Kind::Data,
        offset: 1,
        payload: &[7],
        ..ping
    };
    let gap = StreamError::Gap { offset: 1, come: 0 };
    assert_eq!(hear(data), Err(gap));
    let end = Frame {
        kind: Kind::End,
        offset: 1,
        ..ping
    };
    assert_eq!(hear(end), Err(gap));
    let mut stream = Stream::new(now, 0);
    assert_eq!(stream.hear(0, &Frame { offset: 0, ..data }), Ok(()));
    assert_eq!(stream.hear(0, &end), Ok(()));
    let wrong = StreamError::End { end: 1, offset: 2 };
    assert_eq!(stream.hear(0, &data), Err(wrong));
    let payload = [7; PAYLOAD_MAX];
    let mut stream = Stream::new(now, 0);
    let many = (0..=WINDOW / PAYLOAD_MAX).map(|number| Frame {
        kind: Kind::Data,
        offset: (number * PAYLOAD_MAX) as u64,
        payload: &payload,
        ..ping
    });
    let heard: Vec<_> = many.map(|frame| stream.hear(0, &frame)).collect();
    assert_eq!(heard.last(), Some(&Err(StreamError::TooMuch)));
    assert!(heard[..heard.len() - 1].iter().all(Result::is_ok));
}

/// What goes wrong with a path.
#[derive(Clone, Copy, Debug)]
enum Fault {
    Cut(usize),
    CutBoth,
    Reset,
}

fn fault() -> impl Strategy<Value = Fault> {
    prop_oneof![
        (0_usize..2).prop_map(Fault::Cut),
        Just(Fault::CutBoth),
        Just(Fault::Reset),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// As long as one path works, all comes, as it was said, and nothing is late by more than a broken path costs.
    #[test]
    fn all_that_is_said_comes_while_one_path_works(
        faults in proptest::collection::vec((0..PATHS, fault(), 1_usize..200, 60_usize..200), 1..8),
        sizes in proptest::collection::vec((0_usize..2, 1_usize..9_000), 1..40),
    ) {
        let mut world = World::new();
        let mut sizes = sizes.iter().cycle().enumerate();
        let mut says = |world: &mut World| {
            let (number, (side, size)) = sizes.next().unwrap();
            world.sides[*side].put(&vec![number as u8; *size]);
        };
        for (path, fault, lasts, rests) in faults {
            match fault {
                Fault::Cut(from) => world.cut(path, from, true),
                Fault::CutBoth => [0, 1].iter().for_each(|from| world.cut(path, *from, true)),
                Fault::Reset => world.reset(path),
            }
            for _ in 0..lasts {
                says(&mut world);
                world.tick();
            }
            for side in [0, 1] {
                let delay = world.delay(side);
                prop_assert!(delay <= LATE + 40, "{} ms after {:?}", delay, fault);
            }
            match fault {
                Fault::Cut(_) | Fault::CutBoth => {
                    [0, 1].iter().for_each(|from| world.cut(path, *from, false));
                }
                Fault::Reset => world.connect(path),
            }
            for _ in 0..rests {
                says(&mut world);
                world.tick();
            }
        }
        for side in [0, 1] {
            prop_assert!(world.delay(side) <= LATE);
        }
        world.check();
    }
}
