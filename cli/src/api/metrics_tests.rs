use std::collections::{BTreeMap, BTreeSet};

use tandem_vmm::control::{DeviceStats, VcpuStats};

use super::*;

/// One sample as a scraper reads it.
#[derive(Debug, PartialEq)]
struct Sample {
    name: String,
    labels: BTreeMap<String, String>,
    value: f64,
}

/// Reads labels `a="b",c="d"}` and what follows.
fn read_labels(mut rest: &str) -> Option<(BTreeMap<String, String>, &str)> {
    let mut labels = BTreeMap::new();
    loop {
        let (name, after) = rest.split_once("=\"")?;
        let mut value = String::new();
        let mut chars = after.char_indices();
        let end = loop {
            match chars.next()? {
                (at, '"') => break at,
                (_, '\\') => value.push(match chars.next()?.1 {
                    'n' => '\n',
                    other => other,
                }),
                (_, c) => value.push(c),
            }
        };
        labels.insert(name.to_owned(), value);
        rest = &after[end + 1..];
        match rest.as_bytes().first()? {
            b',' => rest = &rest[1..],
            b'}' => return Some((labels, &rest[1..])),
            _ => return None,
        }
    }
}

fn read_sample(line: &str) -> Option<Sample> {
    let end = line.find(['{', ' '])?;
    let (name, rest) = line.split_at(end);
    let (labels, rest) = match rest.strip_prefix('{') {
        Some(rest) => read_labels(rest)?,
        None => (BTreeMap::new(), rest),
    };
    Some(Sample {
        name: name.to_owned(),
        labels,
        value: rest.trim().parse().ok()?,
    })
}

/// Reads the format as strictly as scrapers do: HELP and TYPE before a family's samples, each
/// family in one piece, no sample twice.
fn read(text: &str) -> Vec<Sample> {
    let mut samples: Vec<Sample> = Vec::new();
    let mut families = BTreeSet::new();
    let mut current = String::new();
    let mut helped = String::new();
    assert!(text.ends_with('\n'), "the last line must end");
    for line in text.lines() {
        if let Some(help) = line.strip_prefix("# HELP ") {
            helped = help.split(' ').next().expect("a name").to_owned();
        } else if let Some(kind) = line.strip_prefix("# TYPE ") {
            let (name, kind) = kind.split_once(' ').expect("name and type");
            assert_eq!(name, helped, "HELP goes before TYPE");
            assert!(families.insert(name.to_owned()), "{name} comes twice");
            assert!(["gauge", "counter"].contains(&kind), "{line}");
            assert_eq!(kind == "counter", name.ends_with("_total"), "{line}");
            current = name.to_owned();
        } else {
            let sample = read_sample(line).unwrap_or_else(|| panic!("cannot read {line}"));
            assert_eq!(sample.name, current, "{line} is not in its family");
            let twice = samples
                .iter()
                .any(|s| s.name == sample.name && s.labels == sample.labels);
            assert!(!twice, "{line} comes twice");
            samples.push(sample);
        }
    }
    samples
}

fn stats() -> MachineStats {
    let counters = |list: &[(&str, u64)]| list.iter().map(|(k, v)| ((*k).into(), *v)).collect();
    MachineStats {
        state: MachineState::Paused,
        uptime_ms: 61_005,
        start_us: 4_200,
        resets: 1,
        vcpus: vec![VcpuStats {
            index: 1,
            exits: counters(&[("io-in", 3), ("hlt", 4)]),
        }],
        devices: vec![
            DeviceStats {
                id: "disk0".into(),
                kind: "block".into(),
                pace: None,
                counters: counters(&[("read_bytes", 512), ("errors", 0)]),
            },
            DeviceStats {
                id: "disk1\"\\\n".into(),
                kind: "block".into(),
                pace: None,
                counters: counters(&[("read_bytes", 7), ("odd name", 1), ("redo_bytes", 9)]),
            },
        ],
    }
}

fn value(samples: &[Sample], name: &str, labels: &[(&str, &str)]) -> f64 {
    let wanted: BTreeMap<String, String> = labels
        .iter()
        .map(|(k, v)| ((*k).into(), (*v).into()))
        .collect();
    samples
        .iter()
        .find(|s| s.name == name && s.labels == wanted)
        .unwrap_or_else(|| panic!("no {name} {labels:?} in {samples:#?}"))
        .value
}

#[test]
fn a_scraper_reads_what_the_machine_counted() {
    let samples = read(&text("web", &stats(), &Status::unprotected("web")));
    let get = |name, labels: &[_]| value(&samples, name, labels);
    assert_eq!(get("tandem_guest_state", &[("state", "paused")]), 1.0);
    assert_eq!(get("tandem_guest_state", &[("state", "running")]), 0.0);
    assert_eq!(get("tandem_guest_uptime_seconds", &[]), 61.005);
    assert_eq!(get("tandem_guest_start_duration_seconds", &[]), 0.0042);
    assert_eq!(get("tandem_guest_resets_total", &[]), 1.0);
    let exits = [("vcpu", "1"), ("kind", "io-in")];
    assert_eq!(get("tandem_vcpu_exits_total", &exits), 3.0);
    let disk = [("device", "disk1\"\\\n"), ("kind", "block")];
    assert_eq!(get("tandem_device_read_bytes_total", &disk), 7.0);
    assert_eq!(get("tandem_device_odd_name_total", &disk), 1.0);
    assert_eq!(get("tandem_device_redo_bytes", &disk), 9.0);
}

#[test]
fn decimals_are_exact() {
    assert_eq!(decimal(u64::MAX, 6), "18446744073709.551615");
    assert_eq!(decimal(5, 3), "0.005");
}

#[test]
fn a_scraper_reads_how_checkpoints_stand() {
    let mut status = Status::unprotected("web");
    let families = |status: &Status| {
        let samples = read(&text("web", &stats(), status));
        let names = samples.iter().map(|sample| sample.name.clone());
        names.collect::<BTreeSet<_>>()
    };
    let without = families(&status);
    status.checkpoints = Some(Checkpoints {
        completed: 7,
        failing: Some("the store is away".into()),
        age_ms: Some(1500),
        ..Checkpoints::default()
    });
    let samples = read(&text("web", &stats(), &status));
    let get = |name| value(&samples, name, &[]);
    assert_eq!(get("tandem_checkpoints_completed_total"), 7.0);
    assert_eq!(get("tandem_checkpoints_failing"), 1.0);
    assert_eq!(get("tandem_checkpoints_age_seconds"), 1.5);
    let told = |name: &String| name.starts_with("tandem_checkpoints_");
    assert!(families(&status).iter().any(told) && !without.iter().any(told));
}
