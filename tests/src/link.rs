//! The network between a primary and its standby: a proxy that can be slow, and cut in either direction.
//!
//! ```text
//!   primary  >  near  >  [ pipe ]  >  far  >  standby
//!            <  near  <  [ pipe ]  <  far  <
//! ```
//!
//! One that is slow has a queue in each direction, which all connections share: what comes later waits for all that came
//! before, whichever connection that is of.
//!
//! What a pipe that is cut took in it keeps, and delivers when it is whole again, as TCP does. A pipe that
//! is cut does not deliver the end of a connection either: a host that is not reached says nothing.

use std::collections::VecDeque;
use std::io::{ErrorKind, Read, Write};
use std::net::Shutdown;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};

/// Bytes that are on their way in one direction, at most.
const ON_THE_WAY_MAX: usize = 4 << 20;
/// Bytes that are moved at a time.
const PART: usize = 256 << 10;
/// Bytes that are moved at a time by a network of a rate.
const SLOW_PART: usize = 16 << 10;

/// A direction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Direction {
    /// From the primary to the standby.
    ToStandby,
    /// From the standby to the primary.
    ToPrimary,
}

impl Direction {
    /// Both.
    pub const BOTH: [Self; 2] = [Self::ToStandby, Self::ToPrimary];

    fn back(self) -> Self {
        match self {
            Self::ToStandby => Self::ToPrimary,
            Self::ToPrimary => Self::ToStandby,
        }
    }
}

/// What is wrong with the network.
#[derive(Debug, Default)]
struct Condition {
    /// By direction.
    cut: [bool; 2],
    delay: Duration,
    /// Bytes per second in each direction, unless that does not matter.
    rate: Option<f64>,
    reset: bool,
    over: bool,
    /// Ways over it that are new.
    lanes: Vec<Lane>,
}

/// A way over the network: who connects to the listener is led on to the socket `far`.
#[derive(Debug)]
struct Lane {
    listener: UnixListener,
    far: PathBuf,
    /// Where that is.
    direction: Direction,
}

impl Lane {
    fn new(near: &Path, far: &Path, direction: Direction) -> Self {
        Self {
            listener: UnixListener::bind(near).expect("the path is free"),
            far: far.to_owned(),
            direction,
        }
    }
}

/// The network between both; it is gone when dropped.
pub struct Link {
    condition: Arc<Mutex<Condition>>,
    wake: UnixStream,
    thread: Option<JoinHandle<()>>,
}

impl Link {
    /// Leads who connects to the socket `near` on to the socket `far`.
    pub fn new(near: &Path, far: &Path) -> Self {
        let link = Self::unused();
        link.lead(near, far, Direction::ToStandby);
        link
    }

    /// One that nobody uses yet.
    pub fn unused() -> Self {
        let (wake, woken) = UnixStream::pair().expect("sockets are to be had");
        for socket in [&wake, &woken] {
            socket.set_nonblocking(true).expect("sockets have that");
        }
        let condition = Arc::<Mutex<Condition>>::default();
        let carrier = Carrier {
            condition: Arc::clone(&condition),
            lanes: Vec::new(),
            woken,
            pipes: Vec::new(),
            free: [Instant::now(); 2],
        };
        let thread = std::thread::Builder::new().name("link".into());
        let thread = thread.spawn(move || carrier.run());
        Self {
            condition,
            wake,
            thread: Some(thread.expect("threads are to be had")),
        }
    }

    /// Leads who connects to `near` on to `far` as well, which is in this direction: what goes there shares the rate
    /// with all else that does.
    pub fn lead(&self, near: &Path, far: &Path, direction: Direction) {
        let lane = Lane::new(near, far, direction);
        self.change(|condition| condition.lanes.push(lane));
    }

    fn change(&self, act: impl FnOnce(&mut Condition)) {
        act(&mut lock(&self.condition));
        // A full socket wakes as well.
        drop((&self.wake).write(&[1]));
    }

    /// Lets nothing through in these directions any more.
    pub fn cut(&self, directions: &[Direction]) {
        self.change(|condition| {
            for direction in directions {
                condition.cut[*direction as usize] = true;
            }
        });
    }

    /// Lets everything through again, and what was kept first.
    pub fn mend(&self) {
        self.change(|condition| condition.cut = [false; 2]);
    }

    /// Lets everything take so long, in each direction.
    pub fn delay(&self, delay: Duration) {
        self.change(|condition| condition.delay = delay);
    }

    /// Lets no more through than so many bytes per second, in each direction.
    pub fn limit(&self, rate: u64) {
        self.change(|condition| condition.rate = Some(rate as f64));
    }

    /// Ends all connections, for both sides at once.
    pub fn reset(&self) {
        self.change(|condition| condition.reset = true);
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.change(|condition| condition.over = true);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

fn lock(condition: &Mutex<Condition>) -> MutexGuard<'_, Condition> {
    condition.lock().expect("nobody panics with it")
}

/// One direction of one connection.
struct Pipe {
    direction: Direction,
    from: UnixStream,
    to: UnixStream,
    parts: VecDeque<(Instant, Vec<u8>)>,
    bytes: usize,
    /// Who is to take it has no room.
    blocked: bool,
    /// Nothing more comes.
    ended: bool,
    /// Nothing more goes.
    over: bool,
}

impl Pipe {
    fn new(direction: Direction, from: &UnixStream, to: &UnixStream) -> Self {
        Self {
            direction,
            from: from.try_clone().expect("descriptors are to be had"),
            to: to.try_clone().expect("descriptors are to be had"),
            parts: VecDeque::new(),
            bytes: 0,
            blocked: false,
            ended: false,
            over: false,
        }
    }

    /// Takes in what came, which is through the network's queue at the end of `free` and of what it takes by `rate`.
    fn take_in(&mut self, now: Instant, rate: Option<f64>, free: &mut Instant) {
        let mut part = vec![0; rate.map_or(PART, |_| SLOW_PART)];
        match self.from.read(&mut part) {
            Ok(0) => self.ended = true,
            Ok(length) => {
                part.truncate(length);
                self.bytes += length;
                let took = rate.map_or(0.0, |rate| length as f64 / rate);
                *free = now.max(*free) + Duration::from_secs_f64(took);
                self.parts.push_back((*free, part));
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {}
            Err(_) => self.ended = true,
        }
    }

    /// Delivers what is due. When to come back, if that is known.
    fn deliver(&mut self, now: Instant, delay: Duration) -> Option<Instant> {
        self.blocked = false;
        while let Some((since, part)) = self.parts.front_mut() {
            let due = *since + delay;
            if due > now {
                return Some(due);
            }
            match self.to.write(part) {
                Ok(length) => {
                    self.bytes -= length;
                    part.drain(..length);
                    if part.is_empty() {
                        self.parts.pop_front();
                    }
                }
                Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => {
                    self.blocked = true;
                    return None;
                }
                Err(_) => {
                    self.over = true;
                    return None;
                }
            }
        }
        if self.ended && !self.over {
            self.over = true;
            // The other side may be gone.
            drop(self.to.shutdown(Shutdown::Write));
        }
        None
    }
}

/// The thread that moves bytes.
struct Carrier {
    condition: Arc<Mutex<Condition>>,
    lanes: Vec<Lane>,
    woken: UnixStream,
    pipes: Vec<Pipe>,
    /// When the queues of a network with a rate are empty, by direction.
    free: [Instant; 2],
}

impl Carrier {
    fn run(mut self) {
        loop {
            let (cut, delay, rate) = {
                let mut condition = lock(&self.condition);
                if condition.over {
                    return;
                }
                if std::mem::take(&mut condition.reset) {
                    self.pipes.clear();
                }
                self.lanes.append(&mut condition.lanes);
                (condition.cut, condition.delay, condition.rate)
            };
            let now = Instant::now();
            let mut due: Option<Instant> = None;
            for pipe in &mut self.pipes {
                if !cut[pipe.direction as usize] {
                    due = [due, pipe.deliver(now, delay)].into_iter().flatten().min();
                }
            }
            self.pipes.retain(|pipe| !pipe.over);
            self.wait(cut, rate, due);
        }
    }

    /// Waits until something can be done, and takes in what came.
    fn wait(&mut self, cut: [bool; 2], rate: Option<f64>, due: Option<Instant>) {
        // Nobody is reached through a network that is cut.
        let accepts = cut == [false; 2];
        let reads = |pipe: &Pipe| !pipe.ended && pipe.bytes < ON_THE_WAY_MAX;
        let mut fds = vec![PollFd::new(&self.woken, PollFlags::IN)];
        let lanes = self.lanes.iter().filter(|_| accepts);
        fds.extend(lanes.map(|lane| PollFd::new(&lane.listener, PollFlags::IN)));
        let first = fds.len();
        let readers = self.pipes.iter().filter(|pipe| reads(pipe));
        fds.extend(readers.map(|pipe| PollFd::new(&pipe.from, PollFlags::IN)));
        let blocked = |pipe: &&Pipe| pipe.blocked && !cut[pipe.direction as usize];
        let writers = self.pipes.iter().filter(blocked);
        fds.extend(writers.map(|pipe| PollFd::new(&pipe.to, PollFlags::OUT)));
        let sleep = due.map(|due| due.saturating_duration_since(Instant::now()));
        let timeout = sleep.map(|sleep| Timespec::try_from(sleep).expect("it is short"));
        poll(&mut fds, timeout.as_ref()).expect("descriptors are polled");
        let came: Vec<bool> = fds.iter().map(|fd| !fd.revents().is_empty()).collect();
        drop(fds);
        if came[0] {
            // None may have come.
            drop((&self.woken).read(&mut [0; 64]));
        }
        let now = Instant::now();
        let readers = self.pipes.iter_mut().filter(|pipe| reads(pipe));
        for (pipe, came) in readers.zip(&came[first..]) {
            if *came {
                let free = &mut self.free[pipe.direction as usize];
                pipe.take_in(now, rate, free);
            }
        }
        let lanes = self.lanes.iter().zip(&came[1..first]);
        let called = lanes.filter(|(_, came)| **came);
        let pipes: Vec<_> = called.flat_map(|(lane, _)| lane.accept()).collect();
        self.pipes.extend(pipes.into_iter().flatten());
    }
}

impl Lane {
    /// Both directions of the connection that somebody makes.
    fn accept(&self) -> Option<[Pipe; 2]> {
        let (near, _) = self.listener.accept().ok()?;
        // A standby that is gone: the connection ends at once.
        let far = UnixStream::connect(&self.far).ok()?;
        for socket in [&near, &far] {
            socket.set_nonblocking(true).expect("sockets have that");
        }
        let there = Pipe::new(self.direction, &near, &far);
        Some([there, Pipe::new(self.direction.back(), &far, &near)])
    }
}
