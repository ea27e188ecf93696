//! How the protection of a guest stands, for people and programs.

use std::time::Instant;

use serde::{Deserialize, Serialize};

use crate::gate::NetFigures;
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
    /// What of a resync the guest waits for: `running` or `stopped` (see
    /// [`ResyncMode`](super::ResyncMode)).
    pub mode: String,
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

/// Why a guest is protected.
pub(super) const BOTH_RUN: &str = "both copies run";

impl Status {
    /// A second copy could go on from now on.
    pub(super) fn both_run(&mut self) {
        self.protected = true;
        self.reason = BOTH_RUN.into();
    }

    /// Of a guest whose protection nobody asked for.
    pub fn unprotected(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            role: Role::Primary,
            protected: false,
            reason: "protection was not asked for".into(),
            mode: "running".into(),
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
            page_bytes: 0,
            pauses: Samples::default(),
            resync_times: Samples::default(),
            resync_began: None,
        }
    }

    /// Says where a standby is looked for, as of `now`.
    pub(super) fn tell_trying(&mut self, now: Instant) {
        let trying = self.trying.as_ref();
        let left = trying.map(|(_, at)| at.saturating_duration_since(now));
        self.next_try_ms = left.map(|left| left.as_millis() as u64);
        self.looking_at = trying.map(|(place, _)| place.clone());
    }

    /// A resync was sent: so many pages in so many bytes, and the rest.
    pub(super) fn count_sent(&mut self, pages: u64, page_bytes: u64, rest_bytes: u64) {
        self.resync_pages += pages;
        self.resync_bytes += page_bytes + rest_bytes;
        self.page_bytes += page_bytes;
        self.bytes_per_dirty_page = self.page_bytes.div_ceil(self.resync_pages.max(1));
    }

    /// The resync under way is done.
    pub(super) fn count_resync(&mut self) {
        if let Some(began) = self.resync_began.take() {
            self.resync_times.add(began.elapsed());
        }
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
