//! What happened in a soak, as lines while it runs and as a table at its end.

use std::collections::BTreeMap;
use std::time::{Duration, Instant};

use super::fault::Fault;
use super::fleet::Member;
use super::resources::Ledger;

/// A fault, and what came of it.
pub(crate) struct Event {
    pub(crate) fault: Fault,
    /// The guest, or all of them.
    pub(crate) whom: &'static str,
    /// Host and term of its owner before.
    pub(crate) owner: usize,
    pub(crate) term: u64,
    /// How long it lasted.
    pub(crate) happened: Duration,
    /// From its begin until all were protected and served.
    pub(crate) took: Duration,
    /// For how long the guest was silent, or the one that was silent for longest, and which that is.
    pub(crate) silence: (Duration, &'static str),
    /// Load of the machine when it began.
    pub(crate) load: f64,
    /// Why it did not happen.
    pub(crate) refused: Option<String>,
}

/// What there is to say of a guest.
struct Page {
    name: &'static str,
    /// Terms that were won, and those for which there was no reason.
    terms: u64,
    unasked: u64,
    /// The longest silence, and what went before.
    silence: Duration,
    during: Option<Fault>,
}

/// All that happened.
pub(crate) struct Book {
    began: Instant,
    faults: BTreeMap<Fault, Vec<(Duration, Duration)>>,
    refused: BTreeMap<Fault, usize>,
    pages: Vec<Page>,
    violations: usize,
    /// Guests that were lost on a machine that was overloaded.
    excused: usize,
    /// Operations that had an order.
    operations: usize,
}

impl Book {
    pub(crate) fn new(members: &[Member]) -> Self {
        let pages = members.iter().map(|member| Page {
            name: member.name,
            terms: 0,
            unasked: 0,
            silence: Duration::ZERO,
            during: None,
        });
        Self {
            began: Instant::now(),
            faults: BTreeMap::new(),
            refused: BTreeMap::new(),
            pages: pages.collect(),
            violations: 0,
            excused: 0,
            operations: 0,
        }
    }

    fn at(&self) -> String {
        format!("{:8.1} s", self.began.elapsed().as_secs_f64())
    }

    /// Says something.
    pub(crate) fn say(&self, what: &str) {
        println!("{} {what}", self.at());
    }

    pub(crate) fn event(&mut self, event: &Event) {
        println!(
            "{} {:11} {:8} owner {} term {:3}: {:4} ms, silent {:5} ms ({}), all protected and served after {:6} ms, load {:.1}{}",
            self.at(),
            format!("{:?}", event.fault),
            event.whom,
            event.owner,
            event.term,
            event.happened.as_millis(),
            event.silence.0.as_millis(),
            event.silence.1,
            event.took.as_millis(),
            event.load,
            event
                .refused
                .as_ref()
                .map_or(String::new(), |why| format!(": REFUSED {why}")),
        );
        match event.refused {
            Some(_) => *self.refused.entry(event.fault).or_default() += 1,
            None => {
                let all = self.faults.entry(event.fault).or_default();
                all.push((event.silence.0, event.took));
            }
        }
    }

    /// A guest won so many terms. If there was no reason for it, `why` is what its owner says.
    pub(crate) fn terms(&mut self, guest: usize, terms: u64, why: Option<&str>) {
        let page = &mut self.pages[guest];
        page.terms += terms;
        if let Some(why) = why {
            page.unasked += terms;
            let name = page.name;
            println!(
                "{} {name} went on under another term unasked: {why}",
                self.at()
            );
        }
    }

    /// A guest was silent for so long.
    pub(crate) fn silence(&mut self, guest: usize, silence: Duration, during: Option<Fault>) {
        let page = &mut self.pages[guest];
        if silence > page.silence {
            (page.silence, page.during) = (silence, during);
        }
    }

    /// Operations had an order.
    pub(crate) fn checked(&mut self, operations: usize) {
        self.operations += operations;
    }

    /// Something is wrong, unless the machine is overloaded.
    pub(crate) fn violation(&mut self, why: &str, excused: bool) {
        let word = if excused { "excused" } else { "VIOLATION" };
        println!("{} {word}: {why}", self.at());
        match excused {
            true => self.excused += 1,
            false => self.violations += 1,
        }
    }

    pub(crate) fn violations(&self) -> usize {
        self.violations
    }

    /// Prints all of it.
    pub(crate) fn print(&mut self, ledger: &Ledger) {
        println!("{} faults:", self.at());
        for (fault, all) in &mut self.faults {
            let row = |mut times: Vec<Duration>| {
                times.sort();
                let at = |part: usize| times[(times.len() - 1) * part / 100].as_millis();
                format!("{:6} {:6}", at(50), at(100))
            };
            println!(
                "  {:12} n={:4}  silent p50, max {} ms; all protected and served {} ms; refused {}",
                format!("{fault:?}"),
                all.len(),
                row(all.iter().map(|(silence, _)| *silence).collect()),
                row(all.iter().map(|(_, took)| *took).collect()),
                self.refused.get(fault).unwrap_or(&0),
            );
        }
        println!("guests:");
        for page in &self.pages {
            println!(
                "  {:8} terms {:4}, unasked {:3}, silent {:6} ms at most ({:?})",
                page.name,
                page.terms,
                page.unasked,
                page.silence.as_millis(),
                page.during
            );
        }
        println!("processes:");
        for row in ledger.table() {
            println!("  {row}");
        }
        self.print_sums();
    }

    /// Prints how much of it was right.
    pub(crate) fn print_sums(&self) {
        println!(
            "{} operations in order; {} violations, {} lost on an overloaded machine",
            self.operations, self.violations, self.excused
        );
    }
}
