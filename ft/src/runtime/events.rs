//! What happened to a protected guest, for people and programs: the last events, numbered.

use std::collections::VecDeque;
use std::time::{SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};

use crate::pair::{Cause, Ending, Loss, Notice};

/// Events that are kept; older ones go.
pub const EVENTS_MAX: usize = 1024;

/// Something that happened to a protected guest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Its number; they begin with 1 and have no gaps.
    pub number: u64,
    /// When, in microseconds since 1970 by this host's clock.
    pub time_us: u64,
    /// What, in a word.
    pub event: String,
    /// What, in a sentence.
    pub text: String,
}

/// The last events of a guest.
#[derive(Clone, Debug, Default)]
pub(super) struct Events {
    last: VecDeque<Event>,
    number: u64,
}

impl Events {
    pub(super) fn add(&mut self, event: &str, text: String) {
        tracing::info!(event, "{text}");
        self.number += 1;
        if self.last.len() >= EVENTS_MAX {
            self.last.pop_front();
        }
        let time = SystemTime::now().duration_since(UNIX_EPOCH);
        self.last.push_back(Event {
            number: self.number,
            time_us: time.map_or(0, |time| time.as_micros() as u64),
            event: event.to_owned(),
            text,
        });
    }

    /// Those after number `since`.
    pub(super) fn after(&self, since: u64) -> Vec<Event> {
        let newer = self.last.iter().filter(|event| event.number > since);
        newer.cloned().collect()
    }
}

fn loss(loss: Loss) -> &'static str {
    match loss {
        Loss::Closed => "its process ended",
        Loss::Broken => "the link failed",
        Loss::Silent => "it is silent",
        Loss::GivenUp => "it was given up",
    }
}

fn cause(cause: Cause) -> &'static str {
    match cause {
        Cause::Join => "it is new",
        Cause::Mismatch => "outputs differ",
        Cause::Bound => "it is time",
        Cause::Demand => "somebody asked for it",
        Cause::Outputs => "outputs wait for it",
        Cause::Mode => "another mode is to hold",
        Cause::Store => "the store is to get one",
    }
}

fn ending(ending: &Ending) -> String {
    match ending {
        Ending::Fenced(tenure) => format!("another owns the guest: {tenure}"),
        Ending::Dismissed => "the primary does without it".into(),
        Ending::NothingLoaded(why) => format!("it had nothing to go on from: {}", loss(*why)),
        Ending::Failed => "its state cannot be restored".into(),
        Ending::GuestEnded => "the guest ended".into(),
    }
}

/// A notice as an event's word and sentence.
pub(super) fn describe(notice: &Notice) -> (&'static str, String) {
    match notice {
        Notice::Joining(epoch) => ("joining", format!("a secondary gets checkpoint {epoch}")),
        Notice::Protected(epoch) => ("protected", format!("both copies have checkpoint {epoch}")),
        Notice::Resyncing(epoch, why) => {
            ("resyncing", format!("checkpoint {epoch}: {}", cause(*why)))
        }
        Notice::Deciding(term, why) => (
            "suspected",
            format!(
                "the other side is lost, {}: term {term} is asked for",
                loss(*why)
            ),
        ),
        Notice::HeardAgain => ("heard", "the other side is heard again".into()),
        Notice::ArbiterSilent(term) => (
            "arbiter-silent",
            format!("the arbiter does not answer for term {term}"),
        ),
        Notice::Suspended => ("suspended", "the guest stands: its lease ends".into()),
        Notice::Resumed => ("resumed", "the guest runs again".into()),
        Notice::Alone(term) => ("alone", format!("the guest runs alone under term {term}")),
        Notice::Live(term, epoch) => (
            "live",
            format!("took over under term {term}, from checkpoint {epoch}"),
        ),
        Notice::Ended(how) => ("ended", ending(how)),
    }
}
