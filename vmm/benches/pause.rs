//! How long a running guest stands while all of its state is captured into memory, by the number
//! of pages that it wrote since the last capture.
//!
//! `cargo bench -p tandem-vmm --bench pause -- GUEST [CAPTURES [PAGES...]]`, where GUEST is the `dirty`
//! guest's image. Prints one line of JSON for each number of pages.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tandem_devices::GuestMemory;
use tandem_vmm::config::{BootConfig, BootProtocol, ConsoleConfig, MachineConfig};
use tandem_vmm::confinement::Confinement;
use tandem_vmm::control::{Handle, StopMode};
use tandem_vmm::dirty::{PAGE_SIZE, PageSet};
use tandem_vmm::kvm::standing::{Stand, thread_time};
use tandem_vmm::machine::Machine;
use tandem_vmm::snapshot::SnapshotError;
use tandem_vmm::snapshot::save::{PageSink, Session, Stopped};
use vm_memory::{Bytes, GuestAddress};

const MEMORY: u64 = 256 << 20;
/// Pages that the guest writes per round.
const PAGES: [u64; 4] = [0, 1_000, 4_000, 16_000];
/// Time between two captures, in which the guest writes.
const INTERVAL: Duration = Duration::from_millis(20);
/// Longest wait for the guest to be ready.
const START: Duration = Duration::from_secs(2);

/// A copy of guest memory.
struct Copy {
    memory: Arc<GuestMemory>,
    bytes: Vec<u8>,
}

impl PageSink for Copy {
    fn all(&mut self) -> Result<u64, SnapshotError> {
        self.memory
            .read_slice(&mut self.bytes, GuestAddress(0))
            .unwrap();
        Ok(MEMORY)
    }

    fn pages(&mut self, pages: &PageSet) -> Result<u64, SnapshotError> {
        let mut bytes = 0;
        for run in pages.runs() {
            let (start, end) = (run.start * PAGE_SIZE, run.end * PAGE_SIZE);
            let to = &mut self.bytes[start as usize..end as usize];
            self.memory.read_slice(to, GuestAddress(start)).unwrap();
            bytes += end - start;
        }
        Ok(bytes)
    }
}

fn config(kernel: PathBuf, pages: u64) -> MachineConfig {
    // Without pages the guest computes nothing either: it waits.
    let cmdline = match pages {
        0 => "pages=1 span=1 period_ms=1000000".into(),
        pages => format!("pages={pages} span={pages} period_ms=1 report=1000000"),
    };
    MachineConfig {
        name: "pause".into(),
        boot: BootConfig {
            kernel,
            initrd: None,
            cmdline,
            protocol: BootProtocol::Auto,
            acpi: true,
        },
        cpus: 1,
        memory: MEMORY,
        hugepages: false,
        disks: Vec::new(),
        nets: Vec::new(),
        vsock: None,
        console: ConsoleConfig::Off,
        virtio_console: false,
        rng_seed: Some(1),
        no_reboot: true,
        pin: Vec::new(),
        realtime: None,
    }
}

/// Parts of a capture in their order: the vCPU stops, I/O is finished, the state is read; the thread that
/// saves hears of it, finds out which pages were written and copies them; the device loop hears of it and
/// lets the vCPU go, which goes on.
const PARTS: [&str; 8] = [
    "stop", "io", "state", "answer", "harvest", "copy", "thaw", "go_on",
];

/// One capture.
struct Capture {
    /// Pages that were copied.
    pages: u64,
    /// How long the vCPU stood, as its own thread saw it.
    stood: Duration,
    /// For how long of that some thread of the VMM worked. They take turns, so the rest is what it took
    /// the host to wake them and to give them a CPU, give or take a system call.
    worked: Duration,
    /// See [`PARTS`].
    parts: [Duration; PARTS.len()],
}

/// A capture of which the end is not known yet: the vCPU may not run before this thread sleeps.
struct Open {
    stopped: Stopped,
    answered: Instant,
    copied: Instant,
    device_loop: Stand,
    /// Processor time of this thread.
    worked: Duration,
}

impl Open {
    fn close(self, vcpu: Stand) -> Capture {
        let times = self.stopped.frozen.times;
        let parked = self.device_loop.from + times.stop;
        let read = parked + times.quiesce + times.state;
        Capture {
            pages: self.stopped.pages,
            stood: vcpu.until - vcpu.from,
            worked: vcpu.worked + self.device_loop.worked + self.worked,
            parts: [
                parked - vcpu.from,
                times.quiesce,
                times.state,
                self.answered - read,
                self.stopped.harvest,
                self.stopped.copy,
                self.device_loop.until - self.copied,
                vcpu.until - self.device_loop.until,
            ],
        }
    }
}

fn capture(session: &mut Session<'_>, copy: &mut Copy) -> Open {
    let begin = thread_time();
    let stopped = session.freeze(copy).unwrap();
    let copied = Instant::now();
    let worked = thread_time() - begin;
    let answered = copied - stopped.copy - stopped.harvest;
    let device_loop = session.thaw().unwrap();
    Open {
        stopped,
        answered,
        copied,
        device_loop,
        worked,
    }
}

fn captures(handle: &Handle, count: usize) -> Vec<Capture> {
    let mut session = Session::begin(handle).unwrap();
    let mut copy = Copy {
        memory: session.saving().memory.clone(),
        bytes: vec![0; MEMORY as usize],
    };
    session.precopy(&mut copy, Duration::from_secs(1)).unwrap();
    let standing = session.saving().standings[0].clone();
    std::thread::sleep(INTERVAL);
    let mut all = Vec::new();
    for _ in 0..count {
        let open = capture(&mut session, &mut copy);
        std::thread::sleep(INTERVAL);
        all.push(open.close(standing.last().unwrap()));
    }
    session.finish().unwrap();
    all
}

fn percentile(values: impl Iterator<Item = f64>, percent: usize) -> f64 {
    let mut sorted: Vec<f64> = values.collect();
    sorted.sort_by(f64::total_cmp);
    sorted[(sorted.len() - 1) * percent / 100]
}

fn us(time: Duration) -> f64 {
    time.as_secs_f64() * 1e6
}

fn measure(kernel: PathBuf, pages: u64, count: usize) {
    let machine =
        Machine::open(config(kernel, pages), &Confinement::none(), Instant::now()).unwrap();
    let handle = machine.handle();
    let saver = std::thread::spawn(move || {
        std::thread::sleep(START);
        let captures = captures(&handle, count);
        handle.stop(StopMode::Force).unwrap();
        captures
    });
    machine.run().unwrap();
    print(pages, &saver.join().unwrap());
}

fn print(wanted: u64, captures: &[Capture]) {
    let of = |percent, value: fn(&Capture) -> f64| percentile(captures.iter().map(value), percent);
    let mut line = format!(
        "{{\"wanted\":{wanted},\"captures\":{},\"pages\":{}",
        captures.len(),
        of(50, |c| c.pages as f64)
    );
    for (name, percent) in [("median", 50), ("p99", 99), ("max", 100)] {
        let stood = of(percent, |c| us(c.stood));
        line += &format!(",\"{name}_us\":{stood:.1}");
    }
    // What the target allows for the pages of each capture, and how much of it was taken.
    let share = of(50, |c| us(c.stood) / (500.0 + 0.9 * c.pages as f64));
    line += &format!(",\"share\":{share:.3}");
    for (name, percent) in [("median", 50), ("p99", 99)] {
        let vmm = of(percent, |c| us(c.worked));
        let host = of(percent, |c| us(c.stood.saturating_sub(c.worked)));
        line += &format!(",\"{name}_parts_us\":{{\"vmm\":{vmm:.1},\"host\":{host:.1}");
        for (at, part) in PARTS.iter().enumerate() {
            let time = percentile(captures.iter().map(|c| us(c.parts[at])), percent);
            line += &format!(",\"{part}\":{time:.1}");
        }
        line.push('}');
    }
    println!("{line}}}");
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    let Some(kernel) = arguments.next() else {
        // As `cargo test --benches` calls it.
        println!("usage: pause GUEST [CAPTURES [PAGES...]]");
        return;
    };
    let count = arguments.next().map_or(1000, |n| n.parse().unwrap());
    let chosen: Vec<u64> = arguments.map(|n| n.parse().unwrap()).collect();
    let all = if chosen.is_empty() {
        &PAGES[..]
    } else {
        &chosen
    };
    for pages in all {
        measure(PathBuf::from(&kernel), *pages, count);
    }
}
