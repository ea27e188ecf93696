//! What is shown, and what keys do to it. Pure: time and answers are passed in.

use std::cmp::Ordering;
use std::collections::BTreeMap;
use std::time::Duration;

use super::history::{History, Point};
use super::rates::{Rates, Totals, rates};
use super::sample::Sample;

/// How long a guest that has ended is still listed.
const ENDED_SHOWN: Duration = Duration::from_secs(10);

/// What the user wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Key {
    /// The guest above, or further up on a guest's page.
    Up,
    /// The guest below, or further down.
    Down,
    /// The page of the guest that is chosen.
    Enter,
    /// Back.
    Escape,
    /// Another order of guests.
    Sort,
    /// What the keys do.
    Help,
    /// The end.
    Quit,
}

/// What follows from a key.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Step {
    /// It goes on.
    On,
    /// It is over.
    Over,
}

/// By what guests are ordered.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) enum Order {
    /// Name.
    #[default]
    Name,
    /// Processor time of the vCPUs.
    Cpu,
    /// Exits.
    Exits,
    /// Requests of disks.
    Disk,
    /// Frames of network cards.
    Net,
    /// Memory in RAM.
    Memory,
}

impl Order {
    /// The order that follows.
    fn next(self) -> Self {
        match self {
            Self::Name => Self::Cpu,
            Self::Cpu => Self::Exits,
            Self::Exits => Self::Disk,
            Self::Disk => Self::Net,
            Self::Net => Self::Memory,
            Self::Memory => Self::Name,
        }
    }

    /// Its name.
    pub(crate) fn word(self) -> &'static str {
        match self {
            Self::Name => "name",
            Self::Cpu => "CPU",
            Self::Exits => "exits",
            Self::Disk => "disk requests",
            Self::Net => "frames",
            Self::Memory => "memory",
        }
    }

    /// What the most of comes first; none for names.
    fn weight(self, guest: &Guest) -> Option<f64> {
        let totals = guest.totals();
        match self {
            Self::Name => None,
            Self::Cpu => totals?.cpu,
            Self::Exits => Some(totals?.exits),
            Self::Disk => Some(totals?.disk_ops),
            Self::Net => Some(totals?.net_frames),
            Self::Memory => Some(guest.last.as_ref()?.usage.resident? as f64),
        }
    }
}

/// What is on the screen.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum View {
    /// All guests.
    List,
    /// The one that is chosen, from this line on.
    Page(usize),
}

/// How a guest answers.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Contact {
    /// It has not answered yet.
    Asked,
    /// It answered.
    Answers,
    /// It did not, and why.
    Silent(String),
    /// It ended, and when.
    Ended(Duration),
}

/// What is known of a guest.
#[derive(Clone, Debug)]
pub(crate) struct Guest {
    /// Its name.
    pub(crate) name: String,
    /// How it answers.
    pub(crate) contact: Contact,
    /// What it said last.
    pub(crate) last: Option<Sample>,
    /// What it did between the last two times that it was asked and answered.
    pub(crate) rates: Option<Rates>,
    /// What it did lately.
    pub(crate) history: History,
}

impl Guest {
    fn new(name: &str) -> Self {
        Self {
            name: name.to_owned(),
            contact: Contact::Asked,
            last: None,
            rates: None,
            history: History::default(),
        }
    }

    fn hear(&mut self, sample: Sample) {
        let before = self.last.as_ref();
        self.rates = before.and_then(|before| rates(before, &sample));
        if let Some(rates) = &self.rates {
            self.history.add(Point {
                from: rates.from,
                until: rates.until,
                totals: rates.totals(&sample.devices),
            });
        }
        self.last = Some(sample);
        self.contact = Contact::Answers;
    }

    fn is_over(&self, now: Duration) -> bool {
        match self.contact {
            Contact::Ended(at) => now.saturating_sub(at) >= ENDED_SHOWN,
            _ => false,
        }
    }

    /// What it does in totals, if that is known.
    pub(crate) fn totals(&self) -> Option<Totals> {
        let devices = &self.last.as_ref()?.devices;
        Some(self.rates.as_ref()?.totals(devices))
    }

    /// Its state in a word.
    pub(crate) fn state_word(&self) -> String {
        match (&self.contact, &self.last) {
            (Contact::Ended(_), _) => "ended".into(),
            (Contact::Silent(_), _) => "silent".into(),
            (_, Some(sample)) => sample.state_word(),
            (_, None) => "asked".into(),
        }
    }
}

/// Everything that is shown.
#[derive(Clone, Debug)]
pub(crate) struct Model {
    /// Now, on the clock of the samples.
    pub(crate) now: Duration,
    /// Time between two samples.
    pub(crate) interval: Duration,
    /// By what guests are ordered.
    pub(crate) order: Order,
    /// What is on the screen.
    pub(crate) view: View,
    /// Whether the keys are explained instead.
    pub(crate) help: bool,
    guests: BTreeMap<String, Guest>,
    chosen: Option<String>,
    /// The only guest that is looked at, if only one is.
    only: Option<String>,
}

impl Model {
    /// Nothing is known yet. Of one guest, its page is shown.
    pub(crate) fn new(interval: Duration, only: Option<String>) -> Self {
        Self {
            now: Duration::ZERO,
            interval,
            order: Order::default(),
            view: only.as_ref().map_or(View::List, |_| View::Page(0)),
            help: false,
            guests: BTreeMap::new(),
            chosen: only.clone(),
            only,
        }
    }

    /// These guests run now.
    pub(crate) fn found(&mut self, now: Duration, names: &[String]) {
        self.now = now;
        for name in names {
            let guest = self.guests.entry(name.clone());
            let guest = guest.or_insert_with(|| Guest::new(name));
            if matches!(guest.contact, Contact::Ended(_)) {
                guest.contact = Contact::Asked;
            }
        }
        for guest in self.guests.values_mut() {
            let ended = matches!(guest.contact, Contact::Ended(_));
            if !ended && !names.contains(&guest.name) {
                guest.contact = Contact::Ended(now);
                guest.rates = None;
            }
        }
        self.forget();
    }

    /// Forgets guests that ended a while ago, but the one whose page is shown.
    fn forget(&mut self) {
        let (now, only) = (self.now, self.only.clone());
        let page = match self.view {
            View::Page(_) => self.chosen.clone(),
            View::List => None,
        };
        let at = self.position();
        self.guests.retain(|name, guest| {
            !guest.is_over(now) || page.as_ref() == Some(name) || only.as_ref() == Some(name)
        });
        if !self
            .chosen
            .as_ref()
            .is_some_and(|name| self.guests.contains_key(name))
        {
            self.choose(at.unwrap_or(0));
        }
    }

    /// A guest answered, or did not, and why.
    pub(crate) fn heard(&mut self, name: &str, answer: Result<Sample, String>) {
        let Some(guest) = self.guests.get_mut(name) else {
            return;
        };
        match answer {
            // It ended while it was asked.
            _ if matches!(guest.contact, Contact::Ended(_)) => {}
            Ok(sample) => {
                self.now = self.now.max(sample.at);
                guest.hear(sample);
            }
            Err(reason) => {
                guest.contact = Contact::Silent(reason);
                guest.rates = None;
            }
        }
    }

    /// What the user wants is done.
    pub(crate) fn press(&mut self, key: Key) -> Step {
        match (key, self.view) {
            (Key::Quit, _) => return Step::Over,
            (Key::Help, _) => self.help = !self.help,
            // What is behind the explanation does not change.
            (Key::Escape | Key::Enter, _) if self.help => self.help = false,
            _ if self.help => {}
            (Key::Escape, _) => self.view = View::List,
            (Key::Enter, View::List) if self.chosen().is_some() => self.view = View::Page(0),
            (Key::Enter, _) => {}
            (Key::Sort, View::List) => self.order = self.order.next(),
            (Key::Sort, View::Page(_)) => {}
            (Key::Up, View::Page(line)) => self.view = View::Page(line.saturating_sub(1)),
            (Key::Down, View::Page(line)) => self.view = View::Page(line.saturating_add(1)),
            (Key::Up, View::List) => self.choose(self.position().unwrap_or(0).saturating_sub(1)),
            (Key::Down, View::List) => self.choose(self.position().map_or(0, |at| at + 1)),
        }
        Step::On
    }

    /// A page has no more than this to scroll.
    pub(crate) fn limit_scroll(&mut self, line_max: usize) {
        if let View::Page(line) = &mut self.view {
            *line = line_max.min(*line);
        }
    }

    fn choose(&mut self, at: usize) {
        let guests = self.guests();
        let guest = guests.get(at).or(guests.last());
        self.chosen = guest.map(|guest| guest.name.clone()).or(self.only.clone());
    }

    /// The guests in their order.
    pub(crate) fn guests(&self) -> Vec<&Guest> {
        let mut guests: Vec<&Guest> = self.guests.values().collect();
        // A stable sort: those of the same weight stay in the order of their names.
        guests.sort_by(|a, b| {
            let (a, b) = (self.order.weight(a), self.order.weight(b));
            b.partial_cmp(&a).unwrap_or(Ordering::Equal)
        });
        guests
    }

    /// The guest that is chosen.
    pub(crate) fn chosen(&self) -> Option<&Guest> {
        self.guests.get(self.chosen.as_ref()?)
    }

    /// Where the guest that is chosen is in the order.
    pub(crate) fn position(&self) -> Option<usize> {
        let name = self.chosen.as_ref()?;
        self.guests().iter().position(|guest| guest.name == *name)
    }
}

#[cfg(test)]
#[path = "model_tests.rs"]
mod tests;
