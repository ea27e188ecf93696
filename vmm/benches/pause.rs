//! How long a running guest stands while all of its state is captured into memory, by the number
//! of pages that it wrote since the last capture.
//!
//! `cargo bench -p tandem-vmm --bench pause -- GUEST [CAPTURES]`, where GUEST is the `dirty` guest's
//! image. Prints one line of JSON for each number of pages.
#![allow(clippy::unwrap_used, reason = "a benchmark fails by panicking")]

use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tandem_devices::GuestMemory;
use tandem_vmm::config::{BootConfig, BootProtocol, ConsoleConfig, MachineConfig};
use tandem_vmm::confinement::Confinement;
use tandem_vmm::control::{Handle, StopMode};
use tandem_vmm::dirty::{PAGE_SIZE, PageSet};
use tandem_vmm::machine::Machine;
use tandem_vmm::snapshot::SnapshotError;
use tandem_vmm::snapshot::save::{PageSink, Session};
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

/// One capture.
struct Capture {
    /// Pages that were copied.
    pages: u64,
    /// How long the guest stood.
    stood: Duration,
    /// Parts of that: stopping, I/O, state, finding the pages, copying them.
    parts: [Duration; 5],
}

fn captures(handle: &Handle, count: usize) -> Vec<Capture> {
    let mut session = Session::begin(handle).unwrap();
    let mut copy = Copy {
        memory: session.saving().memory.clone(),
        bytes: vec![0; MEMORY as usize],
    };
    session.precopy(&mut copy, Duration::from_secs(1)).unwrap();
    let mut all = Vec::new();
    for _ in 0..count {
        std::thread::sleep(INTERVAL);
        let stopped = session.freeze(&mut copy).unwrap();
        session.thaw().unwrap();
        let times = stopped.frozen.times;
        all.push(Capture {
            pages: stopped.pages,
            stood: stopped.frozen.since.elapsed(),
            parts: [
                times.stop,
                times.quiesce,
                times.state,
                stopped.harvest,
                stopped.copy,
            ],
        });
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
    let captures = saver.join().unwrap();
    let stood = |percent| percentile(captures.iter().map(|c| us(c.stood)), percent);
    let part = |at: usize| percentile(captures.iter().map(|c| us(c.parts[at])), 50);
    // What the target allows for the pages of each capture, and how much of it was taken.
    let share = captures
        .iter()
        .map(|c| us(c.stood) / (500.0 + 0.9 * c.pages as f64));
    println!(
        "{{\"wanted\":{pages},\"captures\":{count},\"pages\":{},\"median_us\":{:.1},\"p99_us\":{:.1},\"max_us\":{:.1},\"share\":{:.3},\
         \"stop_us\":{:.1},\"io_us\":{:.1},\"state_us\":{:.1},\"harvest_us\":{:.1},\"copy_us\":{:.1}}}",
        percentile(captures.iter().map(|c| c.pages as f64), 50),
        stood(50),
        stood(99),
        stood(100),
        percentile(share, 50),
        part(0),
        part(1),
        part(2),
        part(3),
        part(4),
    );
}

fn main() {
    let mut arguments = std::env::args().skip(1).filter(|a| a != "--bench");
    let Some(kernel) = arguments.next() else {
        // As `cargo test --benches` calls it.
        println!("usage: pause GUEST [CAPTURES]");
        return;
    };
    let count = arguments.next().map_or(1000, |n| n.parse().unwrap());
    for pages in PAGES {
        measure(PathBuf::from(&kernel), pages, count);
    }
}
