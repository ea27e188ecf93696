//! The rows of the table: what is measured, and what that needs.

use anyhow::Result;

use super::engine::{Bench, Engine};
use super::figures::Sample;
use super::{loads, moves, pace, protect, resume, store};
use crate::process;

/// A row: one guest under one load, which may give several figures.
pub(super) struct Row {
    /// Its name on the command line and in the table.
    pub(super) name: &'static str,
    /// Programs that it needs.
    programs: &'static [&'static str],
    /// Images that it needs and that not every machine has.
    images: &'static [&'static str],
    /// Measures one monitor once.
    pub(super) measure: fn(&Bench, Engine) -> Result<Vec<Sample>>,
}

impl Row {
    /// Why the row cannot be measured, if it cannot.
    pub(super) fn obstacle(&self, bench: &Bench) -> Option<String> {
        let program = self
            .programs
            .iter()
            .find(|name| process::find(name).is_none());
        let image = self.images.iter().find(|name| !bench.image(name).is_file());
        program
            .map(|name| format!("{name} is not installed"))
            .or_else(|| image.map(|name| format!("there is no image {name}")))
    }
}

const REDIS: &[&str] = &["redis-benchmark"];
const WRK: &[&str] = &["wrk"];
const LINUX: &[&str] = &["vmlinux-ring3", "rootfs.ext4"];

/// All rows.
pub(super) const ROWS: &[Row] = &[
    Row {
        name: "start",
        programs: &[],
        images: &[],
        measure: loads::start,
    },
    Row {
        name: "memory",
        programs: REDIS,
        images: &[],
        measure: loads::memory,
    },
    Row {
        name: "kv",
        programs: REDIS,
        images: &[],
        measure: loads::kv,
    },
    Row {
        name: "http",
        programs: WRK,
        images: &[],
        measure: loads::http,
    },
    Row {
        name: "disk",
        programs: &[],
        images: &[],
        measure: loads::disk,
    },
    Row {
        name: "pace",
        programs: &[],
        images: &[],
        measure: pace::pace,
    },
    Row {
        name: "pause",
        programs: &[],
        images: &[],
        measure: moves::pause,
    },
    Row {
        name: "restore",
        programs: &[],
        images: &[],
        measure: moves::restore,
    },
    Row {
        name: "migrate",
        programs: &[],
        images: &[],
        measure: moves::migrate,
    },
    Row {
        name: "store",
        programs: &[],
        images: &[],
        measure: store::store,
    },
    Row {
        name: "resume",
        programs: &[],
        images: &[],
        measure: resume::resume,
    },
    Row {
        name: "linux-start",
        programs: &[],
        images: LINUX,
        measure: loads::linux_start,
    },
    Row {
        name: "linux-redis",
        programs: REDIS,
        images: LINUX,
        measure: loads::linux_redis,
    },
    Row {
        name: "linux-nginx",
        programs: WRK,
        images: LINUX,
        measure: loads::linux_nginx,
    },
    Row {
        name: "linux-fio",
        programs: &[],
        images: LINUX,
        measure: loads::linux_fio,
    },
    Row {
        name: "protect-kv",
        programs: REDIS,
        images: &[],
        measure: protect::protect_kv,
    },
    Row {
        name: "protect-http",
        programs: WRK,
        images: &[],
        measure: protect::protect_http,
    },
    Row {
        name: "protect-redis",
        programs: REDIS,
        images: LINUX,
        measure: protect::protect_redis,
    },
    Row {
        name: "protect-nginx",
        programs: WRK,
        images: LINUX,
        measure: protect::protect_nginx,
    },
    Row {
        name: "takeover-kv",
        programs: &[],
        images: &[],
        measure: protect::takeover_kv,
    },
    Row {
        name: "takeover-linux",
        programs: &[],
        images: LINUX,
        measure: protect::takeover_linux,
    },
    Row {
        name: "protect-disk",
        programs: REDIS,
        images: LINUX,
        measure: protect::protect_disk,
    },
    Row {
        name: "takeover-disk",
        programs: &[],
        images: LINUX,
        measure: protect::takeover_disk,
    },
    Row {
        name: "again",
        programs: &[],
        images: &[],
        measure: protect::again,
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_have_names_of_their_own() {
        for (number, row) in ROWS.iter().enumerate() {
            assert!(
                ROWS[..number].iter().all(|other| other.name != row.name),
                "{}",
                row.name
            );
        }
    }
}
