//! Memory of a monitor beyond its guest's.

use std::fs;

use anyhow::{Context, Result};

/// Resident memory of a process in KiB.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Resident {
    /// Of all mappings that are smaller than the guest's memory.
    pub(super) beyond_guest_kib: u64,
    /// The private part of that, without pages of files that others may map too.
    pub(super) private_kib: u64,
}

/// Measures a monitor with a guest of `memory_mib`.
pub(super) fn of_monitor(pid: u32, memory_mib: u32) -> Result<Resident> {
    let path = format!("/proc/{pid}/smaps");
    let text = fs::read_to_string(&path).with_context(|| format!("cannot read {path}"))?;
    Ok(read(&text, u64::from(memory_mib) * 1024))
}

/// Adds up the mappings in the text of an `smaps` file that are smaller than `guest_kib`.
fn read(smaps: &str, guest_kib: u64) -> Resident {
    let mut resident = Resident {
        beyond_guest_kib: 0,
        private_kib: 0,
    };
    let mut is_guest = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(Ok(kib))) = (words.next(), words.next().map(str::parse::<u64>)) else {
            continue;
        };
        match key {
            "Size:" => is_guest = kib >= guest_kib,
            "Rss:" if !is_guest => resident.beyond_guest_kib += kib,
            "Private_Clean:" | "Private_Dirty:" if !is_guest => resident.private_kib += kib,
            _ => {}
        }
    }
    resident
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_guests_memory_is_left_out() {
        let smaps = "7f00-7f01 rw-p 0 00:00 0\nSize: 131072 kB\nRss: 9000 kB\nPrivate_Dirty: 9000 kB\n\
                     5500-5501 r-xp 0 08:01 7 /bin/x\nSize: 800 kB\nRss: 700 kB\nPrivate_Clean: 40 kB\n\
                     Private_Dirty: 2 kB\n";
        let resident = read(smaps, 128 * 1024);
        assert_eq!(
            resident,
            Resident {
                beyond_guest_kib: 700,
                private_kib: 42
            }
        );
    }
}
