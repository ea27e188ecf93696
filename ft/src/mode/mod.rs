//! The modes in which a guest is protected, and which of them is the cheaper one for a guest.
//!
//! - **Lockstep**: both copies run. An output leaves when both produced it, or when a checkpoint covers it. A guest
//!   whose copies say the same pays some hundred microseconds per output, and the other host's CPU.
//! - **Checkpoint**: the secondary holds the last checkpoint and does not run. Outputs wait for the next checkpoint,
//!   which is made when they have waited for as long as the latency budget allows, or the guest falls silent
//!   ([`interval`]). What the copies would say does not matter.
//!
//! Each checkpoint says in which mode the time after it is protected, so a switch is part of one: until the
//! secondary has it, the mode before holds on both sides, and there is no moment without protection. By the choice
//! [`Choice::Auto`] the mode is found by what both cost ([`cost`], [`policy`]).

pub mod cost;
pub mod interval;
pub mod policy;

use std::time::Duration;

use serde::{Deserialize, Serialize};

/// How long outputs may wait for a checkpoint, if nobody says otherwise.
pub const LATENCY_BUDGET: Duration = Duration::from_millis(10);
/// Shortest budget that can be asked for.
pub const LATENCY_BUDGET_MIN: Duration = Duration::from_millis(1);
/// Longest budget that can be asked for: clients take longer silences for failures.
pub const LATENCY_BUDGET_MAX: Duration = Duration::from_secs(1);

/// How a guest is protected from one checkpoint to the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mode {
    /// Both copies run, and what they say is compared.
    #[default]
    Lockstep,
    /// Outputs wait for the next checkpoint; the secondary does not run.
    Checkpoint,
}

impl Mode {
    /// Both.
    pub const ALL: [Self; 2] = [Self::Lockstep, Self::Checkpoint];

    /// The mode in a word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Lockstep => "lockstep",
            Self::Checkpoint => "checkpoint",
        }
    }

    /// The other one.
    pub const fn other(self) -> Self {
        match self {
            Self::Lockstep => Self::Checkpoint,
            Self::Checkpoint => Self::Lockstep,
        }
    }
}

/// The mode that was asked for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Choice {
    /// Whichever costs less.
    #[default]
    Auto,
    /// Always [`Mode::Lockstep`].
    Lockstep,
    /// Always [`Mode::Checkpoint`].
    Checkpoint,
}

impl Choice {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Auto, Self::Lockstep, Self::Checkpoint];

    /// The choice in a word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Auto => "auto",
            Self::Lockstep => "lockstep",
            Self::Checkpoint => "checkpoint",
        }
    }

    /// The mode that it leaves no choice about.
    pub const fn fixed(self) -> Option<Mode> {
        match self {
            Self::Auto => None,
            Self::Lockstep => Some(Mode::Lockstep),
            Self::Checkpoint => Some(Mode::Checkpoint),
        }
    }
}

/// What was asked of a guest's protection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Wish {
    /// The mode.
    pub mode: Choice,
    /// How long an output may wait for a checkpoint, in microseconds.
    pub latency_budget_us: u64,
}

impl Wish {
    /// The mode `mode` with the usual budget.
    pub const fn of(mode: Choice) -> Self {
        Self {
            mode,
            latency_budget_us: LATENCY_BUDGET.as_micros() as u64,
        }
    }

    /// How long an output may wait for a checkpoint, within what can be asked for.
    pub fn budget(self) -> Duration {
        let asked = Duration::from_micros(self.latency_budget_us);
        asked.clamp(LATENCY_BUDGET_MIN, LATENCY_BUDGET_MAX)
    }
}

impl Default for Wish {
    fn default() -> Self {
        Self::of(Choice::default())
    }
}
