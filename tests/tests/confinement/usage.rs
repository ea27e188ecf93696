//! Which rules were used, and which calls no rule allows.

use std::collections::{BTreeMap, BTreeSet};
use std::str::FromStr;

use syscalls::Sysno;
use tandem_tests::trace::Call;
use tandem_vmm::confinement::tables::MISSING;
use tandem_vmm::confinement::{Rule, ThreadKind};

/// Most forbidden calls that are told; more only repeat them.
const TOLD_MAX: usize = 40;

/// What traces showed.
#[derive(Default)]
pub(crate) struct Usage {
    used: BTreeSet<String>,
    forbidden: BTreeSet<String>,
    kinds: Vec<ThreadKind>,
}

/// A thread as far as it is confined.
#[derive(Clone, Default)]
struct Confined {
    by: Vec<ThreadKind>,
    filters: usize,
}

fn kind_of(name: &str) -> Option<ThreadKind> {
    match name.trim_end_matches(|c: char| c.is_ascii_digit()) {
        "tandem" => Some(ThreadKind::DeviceLoop),
        "vcpu" => Some(ThreadKind::Vcpu),
        "disk" => Some(ThreadKind::BlockWorker),
        "memory-faults" | "memory-ahead" => Some(ThreadKind::MemoryLoader),
        "api" => Some(ThreadKind::Api),
        "protect" | "pair" | "follow" | "late" | "ask" | "changes" | "paths" | "dial"
        | "answer" => Some(ThreadKind::Protection),
        "keeper" => Some(ThreadKind::Keeper),
        "checkpoint" | "store-watch" => Some(ThreadKind::Checkpoints),
        "store-faults" | "store-ahead" => Some(ThreadKind::StoreLoader),
        "bucket" => Some(ThreadKind::Bucket),
        _ => None,
    }
}

fn key(rule: &Rule) -> String {
    format!("{} {:?} ({})", rule.call, rule.when, rule.reason)
}

impl Usage {
    /// Adds what the threads of the guest `guest` did from when they were confined.
    pub(crate) fn add(&mut self, guest: &str, calls: &[Call]) {
        let process = calls.first().map_or(0, |call| call.thread);
        let mut threads: BTreeMap<u32, Confined> = BTreeMap::new();
        for call in calls {
            let confined = threads.entry(call.thread).or_default();
            for kind in &confined.by {
                self.judge(guest, *kind, call, process);
            }
            if call.call == "seccomp" {
                self.confine(confined, &call.name);
            }
            let child = call.result.filter(|_| call.call == "clone");
            if let Some(child) = child.and_then(|child| u32::try_from(child).ok()) {
                let inherited = Confined {
                    by: confined.by.clone(),
                    filters: 0,
                };
                threads.insert(child, inherited);
            }
        }
    }

    /// A thread installs a filter; its confinement begins with the last one for its kind.
    fn confine(&mut self, confined: &mut Confined, name: &str) {
        let kind = kind_of(name).unwrap_or_else(|| panic!("a thread `{name}` confines itself"));
        confined.filters += 1;
        if confined.filters == kind.filters() {
            confined.by.push(kind);
            self.kinds.push(kind);
        }
    }

    fn judge(&mut self, guest: &str, kind: ThreadKind, call: &Call, process: u32) {
        let known = Sysno::from_str(&call.call).ok();
        if known.is_some_and(|call| MISSING.contains(&call)) {
            return;
        }
        let allows = |rule: &&Rule| {
            known.is_some_and(|number| rule.allows(number, &call.arguments, process))
        };
        let rules: Vec<String> = kind.rules().filter(allows).map(key).collect();
        if rules.is_empty() {
            let (name, what, arguments) = (&call.name, &call.call, &call.arguments);
            self.forbidden.insert(format!(
                "{guest}: thread {name} ({}) made {what} {arguments:x?}, which no rule allows",
                kind.name()
            ));
        }
        self.used.extend(rules);
    }

    /// Calls that no rule allows, rules that no guest needed, and kinds that were not there.
    pub(crate) fn complaints(self) -> Vec<String> {
        let kinds = ThreadKind::ALL.into_iter();
        // Not all have a server for buckets.
        let here = |kind: &ThreadKind| self.kinds.contains(kind) || *kind == ThreadKind::Bucket;
        let absent = kinds.filter(|kind| !here(kind));
        let absent = absent.map(|kind| format!("no thread was a {}", kind.name()));
        let mut unused = BTreeSet::new();
        for rule in ThreadKind::ALL.iter().flat_map(|kind| kind.rules()) {
            if rule.rare.is_none() && !self.used.contains(&key(rule)) {
                unused.insert(format!("no guest needs {}", key(rule)));
            }
        }
        let forbidden = self.forbidden.iter().take(TOLD_MAX).cloned();
        forbidden.chain(unused).chain(absent).collect()
    }
}
