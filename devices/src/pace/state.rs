//! Saved state of paced queues.

use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::model::NominalModel;
use super::setting::{Pace, Safepoint, Safepoints};

/// How a device is paced, and what waits. Durations are what was left when it was saved: the time that the
/// guest stood does not count.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PaceState {
    /// Latency of the nominal device in nanoseconds.
    pub latency_ns: u64,
    /// Its rate in bytes per second, 0 without a limit.
    pub bytes_per_second: u64,
    /// Its completions per second, 0 without a limit.
    pub completions_per_second: u64,
    /// Shortest seek in nanoseconds.
    pub seek_min_ns: u64,
    /// Longest seek in nanoseconds.
    pub seek_max_ns: u64,
    /// Half a rotation in nanoseconds.
    pub rotation_ns: u64,
    /// Whether interrupts may be fewer than deliveries.
    pub coalesce: bool,
    /// Names of the kinds of safepoints that count.
    pub safepoints: Vec<String>,
    /// The queues that are paced.
    pub queues: Vec<PacedQueueState>,
}

/// What waits in one queue.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PacedQueueState {
    /// Number of the queue.
    pub queue: u32,
    /// How long the nominal device is busy with what came so far, in nanoseconds.
    pub busy_ns: u64,
    /// Where its head stands, in bytes.
    pub head: u64,
    /// Completions, in the order of maturity.
    pub waiting: Vec<WaitingState>,
}

/// One completion that waits.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WaitingState {
    /// Time to its maturity in nanoseconds.
    pub remaining_ns: u64,
    /// Used entries that the driver sees together: head, bytes written.
    pub entries: Vec<(u16, u32)>,
}

impl PaceState {
    /// Version of the type, of [`PacedQueueState`] and of [`WaitingState`].
    pub const VERSION: u32 = 1;

    /// The state of a device that is paced like `pace`, with what waits in its `queues`.
    pub fn new(pace: Pace, queues: Vec<PacedQueueState>) -> Self {
        let nanos = |time: Duration| time.as_nanos().min(u64::MAX.into()) as u64;
        let model = pace.model;
        Self {
            latency_ns: nanos(model.latency),
            bytes_per_second: model.bytes_per_second,
            completions_per_second: model.completions_per_second,
            seek_min_ns: nanos(model.seek_min),
            seek_max_ns: nanos(model.seek_max),
            rotation_ns: nanos(model.rotation),
            coalesce: model.coalesce,
            safepoints: pace.safepoints.names().map(str::to_owned).collect(),
            queues,
        }
    }

    /// How the device is paced; none if a kind of safepoint is not known here.
    pub fn pace(&self) -> Option<Pace> {
        let kinds = self
            .safepoints
            .iter()
            .map(|name| Safepoint::from_name(name));
        let safepoints = kinds.collect::<Option<Vec<_>>>()?;
        Some(Pace {
            model: NominalModel {
                latency: Duration::from_nanos(self.latency_ns),
                bytes_per_second: self.bytes_per_second,
                completions_per_second: self.completions_per_second,
                seek_min: Duration::from_nanos(self.seek_min_ns),
                seek_max: Duration::from_nanos(self.seek_max_ns),
                rotation: Duration::from_nanos(self.rotation_ns),
                coalesce: self.coalesce,
            },
            safepoints: safepoints.into_iter().collect::<Safepoints>(),
        })
    }
}
