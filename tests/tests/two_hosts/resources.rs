//! What the processes of both hosts take, and what is left in directories: it must not grow.

use std::collections::BTreeMap;
use std::fs;
use std::time::{Duration, Instant};

use rustix::process::Pid;

use super::fleet::Member;
use super::sites::{HOSTS, Sites};

/// Samples of a process that are enough to see whether it grows.
const SAMPLES_MIN: usize = 12;
/// How much a process may have more of in the last third of its samples than in the first one.
const GROWTH_MAX: Sample = Sample {
    threads: 1,
    descriptors: 3,
    resident: 24 << 20,
    share: 24 << 20,
};
/// What a process may have at most.
const MOST: Sample = Sample {
    threads: 40,
    descriptors: 160,
    resident: 320 << 20,
    share: 320 << 20,
};
/// What a process that only listens may have, beside the descriptors by which it knows each guest's process.
const PARENT_MOST: Sample = Sample {
    threads: 1,
    descriptors: 20,
    resident: 32 << 20,
    share: 16 << 20,
};
const DESCRIPTORS_OF_GUEST: u64 = 2;
/// What keepers are called.
const KEEPER: &str = "keeper";
/// Files in a guest's runtime directory: `ENTRIES` of the runtime directory.
const GUEST_FILES_MAX: usize = 7;
/// Files of a guest's terms: those of the last minutes, and records that claimants left that were killed.
const TERM_FILES_MAX: usize = 128;

/// What a process has.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Sample {
    threads: u64,
    descriptors: u64,
    /// Bytes of memory (proc_pid_status(5), `VmRSS`).
    resident: u64,
    /// Its share of memory, in bytes (proc_pid_smaps_rollup(5), `Pss`).
    share: u64,
}

impl Sample {
    /// Of a process; nothing if it is gone.
    fn of(pid: Pid) -> Option<Self> {
        let directory = format!("/proc/{}", pid.as_raw_nonzero());
        let status = fs::read_to_string(format!("{directory}/status")).ok()?;
        let rollup = fs::read_to_string(format!("{directory}/smaps_rollup")).ok()?;
        Some(Self {
            threads: field(&status, "Threads:")?,
            descriptors: fs::read_dir(format!("{directory}/fd")).ok()?.count() as u64,
            resident: field(&status, "VmRSS:")? << 10,
            share: field(&rollup, "Pss:")? << 10,
        })
    }

    /// By field, for comparisons.
    fn fields(self) -> [(&'static str, u64); 4] {
        [
            ("threads", self.threads),
            ("descriptors", self.descriptors),
            ("resident bytes", self.resident),
            ("bytes of its share", self.share),
        ]
    }

    /// The middle of each figure.
    fn median(samples: &[Self]) -> Self {
        let middle = |figure: fn(&Self) -> u64| {
            let mut figures: Vec<_> = samples.iter().map(figure).collect();
            figures.sort_unstable();
            figures[figures.len() / 2]
        };
        Self {
            threads: middle(|sample| sample.threads),
            descriptors: middle(|sample| sample.descriptors),
            resident: middle(|sample| sample.resident),
            share: middle(|sample| sample.share),
        }
    }

    /// As a cell of a table.
    pub(crate) fn text(self) -> String {
        let mib = |bytes: u64| bytes as f64 / f64::from(1 << 20);
        format!(
            "{:2} threads {:3} descriptors {:6.1} MiB resident {:6.1} MiB share",
            self.threads,
            self.descriptors,
            mib(self.resident),
            mib(self.share)
        )
    }
}

/// How many processes it started.
fn children(pid: Pid) -> u64 {
    let pid = pid.as_raw_nonzero();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children"));
    children.unwrap_or_default().split_whitespace().count() as u64
}

fn field(text: &str, name: &str) -> Option<u64> {
    let value = text.lines().find_map(|line| line.strip_prefix(name))?;
    value.trim().trim_end_matches(" kB").parse().ok()
}

/// A process in what it does: its label, host and number.
type Key = (String, usize, i32);

/// What processes had, over time.
#[derive(Default)]
pub(crate) struct Ledger {
    samples: BTreeMap<Key, Vec<(Instant, Sample)>>,
    /// Processes that were there when it was looked first: how many.
    first: Option<BTreeMap<String, usize>>,
}

impl Ledger {
    /// Looks at all processes, when each guest has a copy. An error is what is too much.
    pub(crate) fn look(&mut self, sites: &Sites, roles: &[(&Member, usize)]) -> Result<(), String> {
        let mut wrong = Vec::new();
        for (label, host, pid) in labels(sites, roles) {
            let Some(mut sample) = Sample::of(pid) else {
                continue;
            };
            let listens = label.starts_with("standby");
            if listens {
                // A guest that joined is no growth.
                let known = DESCRIPTORS_OF_GUEST * children(pid);
                sample.descriptors = sample.descriptors.saturating_sub(known);
            }
            let most = if listens { PARENT_MOST } else { MOST };
            for ((what, has), (_, most)) in sample.fields().into_iter().zip(most.fields()) {
                if has > most {
                    wrong.push(format!("{label} on host {host} has {has} {what}"));
                }
            }
            let key = (label, host, pid.as_raw_nonzero().get());
            let samples = self.samples.entry(key).or_default();
            samples.push((Instant::now(), sample));
        }
        all_right(&wrong)
    }

    /// What has grown.
    pub(crate) fn check(&self) -> Result<(), String> {
        let enough = self.samples.iter();
        let enough = enough.filter(|(_, samples)| samples.len() >= SAMPLES_MIN);
        let wrong = enough.flat_map(|((label, host, pid), samples)| {
            let (first, last) = ends(samples);
            let growth = first.fields().into_iter().zip(last.fields());
            let most = GROWTH_MAX.fields().into_iter();
            growth.zip(most).filter_map(move |((from, to), (_, most))| {
                let grew = to.1.saturating_sub(from.1);
                (grew > most).then(|| {
                    let (what, count, age) = (from.0, samples.len(), age(samples));
                    format!("{label} on host {host} (pid {pid}) has {grew} {what} more after {age:?}, {count} samples")
                })
            })
        });
        all_right(&wrong.collect::<Vec<_>>())
    }

    /// By label: the oldest process's figures in its first and last third, and what the first and the last process of that
    /// label had.
    pub(crate) fn table(&self) -> Vec<String> {
        let mut by_label: BTreeMap<&str, Vec<&Vec<(Instant, Sample)>>> = BTreeMap::new();
        for ((label, _, _), samples) in &self.samples {
            by_label.entry(label).or_default().push(samples);
        }
        let rows = by_label.into_iter().map(|(label, mut processes)| {
            processes.sort_by_key(|samples| samples[0].0);
            let (first, last) = (processes[0], processes[processes.len() - 1]);
            let oldest = processes.iter().max_by_key(|samples| age(samples));
            let oldest = oldest.expect("there is one");
            let (from, to) = ends(oldest);
            format!(
                "{label:16} {} processes\n    first       {}\n    last        {}\n    oldest      {} samples in {:?}\n                {}\n                {}",
                processes.len(),
                ends(first).0.text(),
                ends(last).1.text(),
                oldest.len(),
                age(oldest),
                from.text(),
                to.text(),
            )
        });
        rows.collect()
    }

    /// Looks whether there are more processes than at first, but for `keepers`, or more files than there may be.
    pub(crate) fn look_at_leftovers(
        &mut self,
        sites: &Sites,
        members: &[Member],
        keepers: usize,
    ) -> Result<(), String> {
        let mut wrong = files(sites, members);
        let now = counts(sites);
        let first = self.first.get_or_insert_with(|| now.clone());
        let most = |name: &str| {
            let more = if name == KEEPER { keepers } else { 0 };
            first.get(name).map_or(0, |count| count + more)
        };
        if now.iter().any(|(name, count)| *count > most(name)) {
            wrong.push(format!("there are {now:?}, and were {first:?} at first"));
        }
        all_right(&wrong)
    }
}

fn all_right(wrong: &[String]) -> Result<(), String> {
    match wrong.is_empty() {
        true => Ok(()),
        false => Err(wrong.join("; ")),
    }
}

fn age(samples: &[(Instant, Sample)]) -> Duration {
    samples[samples.len() - 1].0 - samples[0].0
}

/// The middle of the first third of samples, and that of the last.
fn ends(samples: &[(Instant, Sample)]) -> (Sample, Sample) {
    let all: Vec<_> = samples.iter().map(|(_, sample)| *sample).collect();
    let third = all.len().div_ceil(3);
    (
        Sample::median(&all[..third]),
        Sample::median(&all[all.len() - third..]),
    )
}

/// What each process is that lasts, with its host.
fn labels(sites: &Sites, roles: &[(&Member, usize)]) -> Vec<(String, usize, Pid)> {
    let parents = HOSTS.into_iter().flat_map(|host| {
        let names = ["standby", "standby by TLS"].into_iter();
        let parents = names.zip(sites.parents(host));
        parents.map(move |(name, pid)| (name.to_owned(), host, pid))
    });
    let guests = roles.iter().flat_map(|(member, owner)| {
        let sides = [(*owner, "owner"), (1 - owner, "copy")];
        sides.into_iter().filter_map(|(host, role)| {
            let pid = sites.vmm(host, member)?;
            Some((format!("{} {role}", member.name), host, pid))
        })
    });
    parents.chain(guests).collect()
}

/// Processes of both hosts by name; zombies are none of theirs, as nobody knows whose those were.
fn counts(sites: &Sites) -> BTreeMap<String, usize> {
    let mut counts = BTreeMap::new();
    for pid in HOSTS.into_iter().flat_map(|host| sites.processes(host)) {
        let name = fs::read_to_string(format!("/proc/{}/comm", pid.as_raw_nonzero()));
        let name = name.unwrap_or_default().trim().to_owned();
        *counts.entry(name).or_default() += 1;
    }
    counts
}

/// How many entries a directory has.
fn entries(path: &std::path::Path) -> usize {
    fs::read_dir(path).map_or(0, Iterator::count)
}

/// Directories with more in them than there may be.
fn files(sites: &Sites, members: &[Member]) -> Vec<String> {
    let mut most = vec![(sites.path("tmp"), 0)];
    for host in HOSTS {
        most.push((sites.runtime(host), members.len()));
    }
    for member in members {
        most.extend(HOSTS.map(|host| (sites.runtime(host).join(member.name), GUEST_FILES_MAX)));
        most.push((sites.path("arbiter").join(member.name), TERM_FILES_MAX));
    }
    // An image and what is kept beside it, for each host.
    most.push((sites.path("images"), 4 * members.len()));
    let taps = sites.network.run("ip", &["-brief", "link"]);
    let taps = taps.lines().filter(|line| line.starts_with("tap")).count();
    let wrong = most
        .into_iter()
        .filter(|(path, most)| entries(path) > *most);
    let mut wrong: Vec<_> = wrong
        .map(|(path, most)| {
            format!(
                "{} entries in {}, not {most}",
                entries(&path),
                path.display()
            )
        })
        .collect();
    // All are made at first.
    if taps > 2 * members.len().max(1) {
        wrong.push(format!("there are {taps} taps"));
    }
    wrong
}

#[test]
fn a_process_that_grows_is_found() {
    let begin = Instant::now();
    let ledger = |threads: fn(u64) -> u64| {
        let samples = (0..30).map(|number| {
            let threads = threads(number);
            let at = begin + Duration::from_secs(number);
            (
                at,
                Sample {
                    threads,
                    ..Sample::default()
                },
            )
        });
        let mut ledger = Ledger::default();
        let key = ("a guest".to_owned(), 0, 1);
        ledger.samples.insert(key, samples.collect());
        ledger
    };
    assert_eq!(ledger(|number| 7 + number % 3).check(), Ok(()));
    let found = ledger(|number| 7 + number / 5).check().unwrap_err();
    assert!(found.contains("4 threads more"), "{found}");
}
