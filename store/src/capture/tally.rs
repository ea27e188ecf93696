//! What checkpoints came to, for `tandem status` and for its events.

use std::sync::Arc;
use std::time::{Duration, Instant};

use tandem_ft::arbiter::Tenure;
use tandem_ft::percentiles::Samples;
use tandem_ft::runtime::Pair;
use tandem_ft::runtime::status::Checkpoints;
use tandem_vmm::error::causes;

use super::cadence::spent;
use super::{Owned, Plan};
use crate::write::Committed;
use crate::{CheckpointId, StoreError};

/// A checkpoint that is complete.
pub(super) struct Made {
    pub(super) committed: Committed,
    /// When the guest began to stand for it.
    pub(super) stood: Instant,
    /// How long it stood for that; nothing if it stood for its copy.
    pub(super) pause: Option<Duration>,
    /// Pages that were copied meanwhile.
    pub(super) left: u64,
}

/// What checkpoints came to.
pub(super) struct Tally {
    pair: Arc<Pair>,
    told: Checkpoints,
    pauses: Samples,
    times: Samples,
}

impl Tally {
    pub(super) fn new(pair: &Arc<Pair>, owned: &Owned, plan: &Plan) -> Self {
        let base = owned.base.as_ref();
        let told = Checkpoints {
            store: owned.place.clone(),
            every_ms: plan.interval.as_millis() as u64,
            budget: plan.budget,
            commit: plan.commit,
            term: owned.tenure.as_ref().map_or(0, |tenure| tenure.term.0),
            last: base.map(|base| base.id.to_string()),
            ..Checkpoints::default()
        };
        let tally = Self {
            pair: Arc::clone(pair),
            told,
            pauses: Samples::default(),
            times: Samples::default(),
        };
        tally.tell();
        tally
    }

    fn tell(&self) {
        let mut told = self.told.clone();
        told.pause_us = self.pauses.percentiles();
        told.complete_us = self.times.percentiles();
        self.pair.tell_checkpoints(told);
    }

    /// A checkpoint is complete, and the next one is wanted after `interval`.
    pub(super) fn made(&mut self, made: &Made, interval: Duration) {
        let (id, counts) = (made.committed.id, made.committed.counts);
        if let Some(pause) = made.pause {
            self.pauses.add(pause);
        }
        self.times.add(made.stood.elapsed());
        self.told.every_ms = interval.as_millis() as u64;
        self.told.spent = self.told.stood.map(|before| {
            let since = made.stood.saturating_duration_since(before);
            spent(made.pause, counts.stored_bytes, since)
        });
        self.told.stood = Some(made.stood);
        self.told.last = Some(id.to_string());
        self.told.completed += 1;
        self.told.pages += counts.pages;
        self.told.stored_bytes += counts.stored_bytes;
        let failed = self.told.failing.take();
        if failed.is_some() || self.told.completed == 1 {
            let text = format!("checkpoint {id} is complete in {}", self.told.store);
            self.pair.tell("checkpoint", text);
        }
        tracing::debug!(
            %id, pause = ?made.pause, left = made.left, ?counts, "a checkpoint is complete"
        );
        self.tell();
    }

    /// This host makes them, in this term of the store.
    pub(super) fn took(&mut self, tenure: &Tenure, base: Option<CheckpointId>) {
        self.told.term = tenure.term.0;
        self.told.last = base.map(|id| id.to_string()).or(self.told.last.take());
        self.tell();
    }

    /// The guest's copy makes them from now on, or somebody who has the guest with this host.
    pub(super) fn left(&mut self) {
        let text = "the guest's copy makes its checkpoints from now on";
        self.pair.tell("checkpoint", text.to_owned());
        // How old the newest is is known there.
        self.told.stood = None;
        self.told.failing = None;
        self.tell();
    }

    /// One failed, and is to be made again after `pause`.
    pub(super) fn failed(&mut self, error: &StoreError, pause: Duration) {
        let why = causes(error);
        tracing::warn!(%why, "a checkpoint failed");
        self.told.failed += 1;
        if self.told.failing.is_none() {
            let text = format!("{why}; it is tried again in {pause:?}");
            self.pair.tell("checkpoint-failed", text);
        }
        self.told.failing = Some(why);
        self.tell();
    }

    /// There will be no more.
    pub(super) fn ended(&mut self, event: &str, why: String) {
        self.pair.tell(event, why.clone());
        self.told.failing = Some(why);
        self.tell();
    }
}
