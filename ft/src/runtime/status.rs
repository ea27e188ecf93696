//! How the protection of a guest stands, for people and programs.

use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};

use super::modes::Modes;
use super::paths::PathStatus;
use super::stored::Budget;
use crate::gate::NetFigures;
use crate::mode::cost::Costs;
use crate::mode::{Choice, Mode};
pub use crate::percentiles::Percentiles;
use crate::percentiles::Samples;

/// What a copy of the guest is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Role {
    /// The guest that the outside talks to.
    Primary,
    /// The copy.
    Secondary,
}

/// How the protection of a guest stands.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Status {
    /// The guest.
    pub name: String,
    /// What this copy is.
    pub role: Role,
    /// Whether a second copy could go on now.
    pub protected: bool,
    /// Why it is protected or not.
    pub reason: String,
    /// The mode in which it is protected.
    pub mode: Mode,
    /// The mode that was asked for.
    pub mode_asked: Choice,
    /// Why it is in its mode.
    pub mode_reason: String,
    /// How often another mode took effect.
    pub mode_switches: u64,
    /// What either mode costs now, as far as that is known.
    pub mode_costs: Costs,
    /// How long an output may wait for a checkpoint, in microseconds.
    pub latency_budget_us: u64,
    /// What of a resync the guest waits for: `running` or `stopped` (see
    /// [`ResyncMode`](super::ResyncMode)).
    pub resync: String,
    /// Number of the owner.
    pub term: u64,
    /// Number of the last checkpoint.
    pub epoch: u64,
    /// Where the other side is.
    pub peer: Option<String>,
    /// Where a standby is looked for; none while there is a secondary, or nobody looks.
    pub looking_at: Option<String>,
    /// How soon it is, in milliseconds; 0 while it is tried.
    pub next_try_ms: Option<u64>,
    /// Frames that were compared and left.
    pub matched_outputs: u64,
    /// Checkpoints after the first of a protection.
    pub resyncs: u64,
    /// Why the last of them was made.
    pub last_resync: Option<String>,
    /// What of both copies' outputs differed last: where, and what each said.
    pub last_difference: Option<String>,
    /// How long outputs of the last ones that left had been held.
    pub added_latency_us: Percentiles,
    /// How much later than the guest the secondary said the same, of those that it said.
    pub secondary_lag_us: Percentiles,
    /// How long outputs may leave from now on if the secondary is not heard again, in milliseconds; none for
    /// a guest that nobody else may own.
    pub lease_ms: Option<u64>,
    /// How long the guest stood for them.
    pub pause_us: Percentiles,
    /// From the cut until the secondary ran on.
    pub resync_us: Percentiles,
    /// Pages that the guest wrote before them, and were looked at.
    pub resync_pages: u64,
    /// Bytes sent for them: pages, and the guest's state.
    pub resync_bytes: u64,
    /// Bytes sent for a page that the guest wrote, on average.
    pub bytes_per_dirty_page: u64,
    /// Bytes of this host's memory that protection costs besides the guest's own.
    pub protection_memory_bytes: u64,
    /// How the first and the second path to the other side stand, if there are two.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub paths: Vec<PathStatus>,
    /// Numbers of disks whose images both hosts reach; all others that the guest may write to have replicas.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub shared_disks: Vec<u8>,
    /// How its disks are made the same as its secondary's replicas, if they are.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mirror: Option<Mirror>,
    /// How its checkpoints in a store stand, if it has any.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub checkpoints: Option<Checkpoints>,
    /// Where a standby is looked for, and when next.
    #[serde(skip)]
    pub(super) trying: Option<(String, Instant)>,
    /// Bytes sent for pages.
    #[serde(skip)]
    pub(super) page_bytes: u64,
    #[serde(skip)]
    pub(super) pauses: Samples,
    #[serde(skip)]
    pub(super) resync_times: Samples,
    /// When the resync under way began.
    #[serde(skip)]
    pub(super) resync_began: Option<Instant>,
}

/// How the disks of a guest are made the same as its secondary's replicas.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Mirror {
    /// Bytes of the disks.
    pub bytes: u64,
    /// Of these, bytes of regions that may differ: all, or those that either side changed since both were equal.
    pub differing_bytes: u64,
    /// Of these, bytes that the first copy has compared so far.
    pub compared_bytes: u64,
    /// Of these, bytes that it sent, since they differed.
    pub sent_bytes: u64,
    /// Bytes that the guest wrote between the beginning of the first copy and the last checkpoint.
    pub written_bytes: u64,
    /// Bytes on the link for what it wrote, at checkpoints: digests, wishes and content.
    pub wire_bytes: u64,
}

/// How checkpoints of a guest in a store stand.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Checkpoints {
    /// Where the store is.
    pub store: String,
    /// How often one is wanted, in milliseconds.
    pub every_ms: u64,
    /// What they may cost, if how often is chosen by that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub budget: Option<Budget>,
    /// What the last one cost, of the time since the one before it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub spent: Option<Budget>,
    /// Whether outputs wait until a checkpoint that explains them is complete.
    pub commit: bool,
    /// Number of the owner in the store.
    pub term: u64,
    /// The last one that is complete: term and number.
    pub last: Option<String>,
    /// How long ago the guest stood for it, in milliseconds: what is lost if the guest is lost now.
    pub age_ms: Option<u64>,
    /// Why there is none newer, while making them fails.
    pub failing: Option<String>,
    /// Those that were completed.
    pub completed: u64,
    /// Those that failed.
    pub failed: u64,
    /// How long the guest stood for the last ones.
    pub pause_us: Percentiles,
    /// From when the guest stood until they were complete.
    pub complete_us: Percentiles,
    /// Pages that were handed to the store.
    pub pages: u64,
    /// Bytes that the store took for them.
    pub stored_bytes: u64,
    /// When the guest stood for the last one that is complete.
    #[serde(skip)]
    pub stood: Option<Instant>,
}

/// Why a guest is protected.
pub(super) const BOTH_RUN: &str = "both copies run";
/// The same of one whose copy stands.
pub(super) const COPY_STANDS: &str = "its copy has the last checkpoint";

impl Status {
    /// A second copy could go on from now on.
    pub(super) fn protected_in(&mut self, mode: Mode) {
        self.protected = true;
        let reason = match mode {
            Mode::Lockstep => BOTH_RUN,
            Mode::Checkpoint => COPY_STANDS,
        };
        if self.reason != reason {
            self.reason = reason.into();
        }
    }

    /// Of a guest whose protection nobody asked for.
    pub fn unprotected(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            role: Role::Primary,
            protected: false,
            reason: "protection was not asked for".into(),
            mode: Mode::default(),
            mode_asked: Choice::default(),
            mode_reason: String::new(),
            mode_switches: 0,
            mode_costs: Costs::default(),
            latency_budget_us: 0,
            resync: "running".into(),
            term: 0,
            epoch: 0,
            peer: None,
            looking_at: None,
            next_try_ms: None,
            trying: None,
            matched_outputs: 0,
            resyncs: 0,
            last_resync: None,
            last_difference: None,
            added_latency_us: Percentiles::default(),
            secondary_lag_us: Percentiles::default(),
            lease_ms: None,
            pause_us: Percentiles::default(),
            resync_us: Percentiles::default(),
            resync_pages: 0,
            resync_bytes: 0,
            bytes_per_dirty_page: 0,
            protection_memory_bytes: 0,
            paths: Vec::new(),
            shared_disks: Vec::new(),
            mirror: None,
            checkpoints: None,
            page_bytes: 0,
            pauses: Samples::default(),
            resync_times: Samples::default(),
            resync_began: None,
        }
    }

    /// Says in which mode the guest is, and why.
    pub(super) fn tell_modes(&mut self, modes: &Modes) {
        let wish = modes.wish();
        self.mode_asked = wish.mode;
        self.latency_budget_us = wish.budget().as_micros() as u64;
        let (mode, reason, switches, costs) = modes.told();
        self.mode = mode;
        self.mode_reason = reason;
        self.mode_switches = switches;
        self.mode_costs = costs.rounded();
    }

    /// Says where a standby is looked for, as of `now`.
    pub(super) fn tell_trying(&mut self, now: Instant) {
        let trying = self.trying.as_ref();
        let left = trying.map(|(_, at)| at.saturating_duration_since(now));
        self.next_try_ms = left.map(|left| left.as_millis() as u64);
        self.looking_at = trying.map(|(place, _)| place.clone());
    }

    /// Says how old the last checkpoint in a store is, as of `now`.
    pub(super) fn tell_age(&mut self, now: Instant) {
        if let Some(checkpoints) = &mut self.checkpoints {
            let age = checkpoints
                .stood
                .map(|at| now.saturating_duration_since(at));
            checkpoints.age_ms = age.map(|age| age.as_millis() as u64);
        }
    }

    /// A resync was sent: so many pages in so many bytes, and the rest.
    pub(super) fn count_sent(&mut self, pages: u64, page_bytes: u64, rest_bytes: u64) {
        self.resync_pages += pages;
        self.resync_bytes += page_bytes + rest_bytes;
        self.page_bytes += page_bytes;
        self.bytes_per_dirty_page = self.page_bytes.div_ceil(self.resync_pages.max(1));
    }

    /// The resync under way is done: how long it took.
    pub(super) fn count_resync(&mut self) -> Option<Duration> {
        let took = self.resync_began.take()?.elapsed();
        self.resync_times.add(took);
        Some(took)
    }

    /// Counts the figures of a network device in.
    pub(super) fn add(&mut self, figures: &NetFigures) {
        self.matched_outputs += figures.released;
    }

    /// What was measured so far, in figures.
    pub(super) fn summarize(&mut self) {
        self.pause_us = self.pauses.percentiles();
        self.resync_us = self.resync_times.percentiles();
    }
}
