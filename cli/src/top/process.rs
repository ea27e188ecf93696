//! What a guest's VMM takes of its host, as the kernel tells everybody in `/proc`.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::time::Duration;

/// Threads of a process that are looked at.
const THREADS_MAX: usize = 4096;
/// How the names of threads begin that run vCPUs; the number follows.
const VCPU: &str = "vcpu";

/// What a process takes. What the kernel does not tell is missing.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Usage {
    /// Processor time of each vCPU's thread, by number.
    pub(crate) vcpus: BTreeMap<u8, Duration>,
    /// Processor time of all other threads together.
    pub(crate) rest: Option<Duration>,
    /// Memory of the process that is in RAM, in bytes.
    pub(crate) resident: Option<u64>,
}

impl Usage {
    /// That of the process `pid`.
    pub(crate) fn of(pid: u32) -> Self {
        Self::at(&Path::new("/proc").join(pid.to_string()))
    }

    fn at(process: &Path) -> Self {
        let status = fs::read_to_string(process.join("status")).ok();
        let mut usage = Self {
            resident: status.and_then(|text| resident(&text)),
            ..Self::default()
        };
        let threads = fs::read_dir(process.join("task")).into_iter().flatten();
        for thread in threads.flatten().take(THREADS_MAX) {
            usage.add_thread(&thread.path());
        }
        usage
    }

    /// Adds a thread, if it has not ended meanwhile.
    fn add_thread(&mut self, thread: &Path) {
        let read = |file| fs::read_to_string(thread.join(file)).ok();
        let time = read("schedstat").and_then(|text| busy(&text));
        let (Some(name), Some(time)) = (read("comm"), time) else {
            return;
        };
        match vcpu(&name) {
            Some(index) => *self.vcpus.entry(index).or_default() += time,
            None => *self.rest.get_or_insert_default() += time,
        }
    }
}

/// The number of the vCPU that the thread `name` runs, if it does.
fn vcpu(name: &str) -> Option<u8> {
    name.trim_end().strip_prefix(VCPU)?.parse().ok()
}

/// Processor time, the first number of a `schedstat` (sched-stats.rst of the kernel), in nanoseconds.
fn busy(schedstat: &str) -> Option<Duration> {
    let nanoseconds = schedstat.split_whitespace().next()?.parse().ok()?;
    Some(Duration::from_nanos(nanoseconds))
}

/// Bytes in RAM, from a process's `status`, which has them in KiB (`proc_pid_status`(5)).
fn resident(status: &str) -> Option<u64> {
    let line = status.lines().find_map(|l| l.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
    kib.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn threads_are_told_apart_by_their_names() {
        assert_eq!(vcpu("vcpu12\n"), Some(12));
        for name in ["vcpu\n", "vcpu-1\n", "vcpu300\n", "tandem\n", "vcpux"] {
            assert_eq!(vcpu(name), None, "{name}");
        }
    }

    #[test]
    fn the_kernels_texts_are_read() {
        assert_eq!(busy("1500 20 3\n"), Some(Duration::from_nanos(1500)));
        assert_eq!((busy(""), busy("x 1 1")), (None, None));
        assert_eq!(
            resident("VmHWM:\t 9 kB\nVmRSS:\t    12 kB\n"),
            Some(12 * 1024)
        );
        assert_eq!(resident("Name:\tx\n"), None);
        let most = format!("VmRSS: {} kB", u64::MAX);
        assert_eq!(resident(&most), None);
    }

    #[test]
    fn a_directory_of_threads_adds_up() {
        let proc = tempfile::tempdir().expect("a directory");
        let threads = [("1", "tandem", 5), ("2", "vcpu0", 7), ("3", "api", 6)];
        for (tid, name, time) in threads {
            let thread = proc.path().join("task").join(tid);
            fs::create_dir_all(&thread).expect("a directory");
            fs::write(thread.join("comm"), format!("{name}\n")).expect("a file");
            fs::write(thread.join("schedstat"), format!("{time} 0 0\n")).expect("a file");
        }
        // Has ended between being listed and being read.
        fs::create_dir(proc.path().join("task/4")).expect("a directory");
        let usage = Usage::at(proc.path());
        assert_eq!(usage.vcpus, [(0, Duration::from_nanos(7))].into());
        assert_eq!(usage.rest, Some(Duration::from_nanos(11)));
        assert_eq!(usage.resident, None);
    }

    #[test]
    fn a_process_that_is_gone_takes_nothing() {
        assert_eq!(Usage::of(u32::MAX), Usage::default());
    }
}
