//! What goes wrong in a run, and when; decided by its seed before the run begins.

use super::chance::Chance;
use super::world::{Micros, ms};
use crate::detector::Scheduling;
use crate::mode::Mode;

/// First and last moment at which something goes wrong.
const FAULTS_FROM: Micros = ms(300);
const FAULTS_UNTIL: Micros = ms(2_300);
/// After this everything is whole again, but the dead stay dead.
pub(super) const HEALED: Micros = ms(3_200);
/// Longest fault that ends by itself.
const DURATION_MAX: Micros = ms(900);
/// Most faults of a run.
const FAULTS_MAX: u64 = 6;

/// Something that goes wrong. Hosts are 0 and 1.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Fault {
    /// The process ends; its host closes its links.
    Kill(usize),
    /// The host loses its power, and comes back without processes.
    Crash(usize),
    /// The process is stopped, and goes on.
    Stop(usize),
    /// What these hosts send to the other does not arrive until it ends.
    Cut([bool; 2]),
    /// Everything between the hosts takes so much longer.
    Delay(Micros),
    /// These hosts do not reach the arbiter.
    ArbiterGone([bool; 2]),
    /// The arbiter takes so much longer, each way.
    ArbiterSlow(Micros),
    /// The link between the processes is reset.
    Reset,
    /// The process's runtime gives the pair up.
    GiveUp(usize),
}

/// A fault with its time.
#[derive(Clone, Copy, Debug)]
pub(super) struct Planned {
    pub(super) fault: Fault,
    pub(super) begins: Micros,
    pub(super) ends: Micros,
}

/// All of a run that is decided beforehand.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) faults: Vec<Planned>,
    /// How wrong each host's clock is, in parts per million.
    pub(super) drift_ppm: [i64; 2],
    /// A copy chooses differently once in so many requests; never if 0.
    pub(super) divergence: u64,
    /// Somebody demands a resync this often.
    pub(super) demand_every: Micros,
    pub(super) scheduling: Scheduling,
    /// Threads stand still for up to this at a time; never if 0.
    pub(super) stall_max: Micros,
    /// Another mode is chosen this often; none ever if 0.
    pub(super) switch_every: Micros,
    /// The mode in which it begins.
    pub(super) mode: Mode,
    /// How long freezing, sending and restoring takes at most.
    pub(super) resync_time: Micros,
}

impl Plan {
    pub(super) fn draw(chance: &mut Chance) -> Self {
        let count = match chance.within(0..10) {
            0..4 => 1,
            _ => chance.within(2..FAULTS_MAX + 1),
        };
        let mut drift = || chance.within(0..9_800) as i64 - 4_900;
        Self {
            drift_ppm: [drift(), drift()],
            faults: (0..count).map(|_| planned(chance)).collect(),
            scheduling: Scheduling::Realtime,
            stall_max: chance.one_of(&[0, 0, ms(3), ms(12)]),
            divergence: chance.one_of(&[0, 0, 5, 30, 200]),
            demand_every: ms(chance.one_of(&[40, 300, 100_000])),
            resync_time: ms(chance.one_of(&[2, 20, 120])),
            mode: chance.one_of(&Mode::ALL),
            switch_every: ms(chance.one_of(&[0, 15, 150])),
        }
    }
}

impl Plan {
    /// Whether all that goes wrong is that one process ends.
    pub(super) fn is_kill(&self) -> bool {
        matches!(
            self.faults[..],
            [Planned {
                fault: Fault::Kill(_),
                ..
            }]
        )
    }
}

fn planned(chance: &mut Chance) -> Planned {
    let begins = chance.within(FAULTS_FROM..FAULTS_UNTIL);
    let duration = match chance.within(0..3) {
        0 => chance.within(1..ms(90)),
        1 => chance.within(ms(90)..ms(300)),
        _ => chance.within(ms(300)..DURATION_MAX),
    };
    let fault = fault(chance);
    // Faults that meet are the ones that hurt.
    let begins = if chance.once_in(2) {
        begins / ms(400) * ms(400) + ms(300)
    } else {
        begins
    };
    let ends = begins + duration;
    Planned {
        fault,
        begins,
        ends,
    }
}

fn fault(chance: &mut Chance) -> Fault {
    let host = chance.within(0..2) as usize;
    let some = [[true, true], [true, false], [false, true]];
    match chance.within(0..14) {
        0..3 => Fault::Kill(host),
        3 => Fault::Crash(host),
        4..6 => Fault::Stop(host),
        6..9 => Fault::Cut(chance.one_of(&some)),
        9 => Fault::Delay(chance.within(ms(1)..ms(250))),
        10 => Fault::ArbiterGone(chance.one_of(&some)),
        11 => Fault::ArbiterSlow(chance.within(ms(1)..ms(400))),
        12 => Fault::Reset,
        _ => Fault::GiveUp(host),
    }
}
