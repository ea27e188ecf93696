//! One measurement of each row: start a guest, load it, read figures, end it.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result};

use super::clients;
use super::engine::{Bench, Engine, Machine, NAME};
use super::figures::{Better, Sample};
use super::memory;
use crate::guest::Guest;
use crate::{netns, process};

/// Longest wait for a guest to be ready, or to end.
const PATIENCE: Duration = Duration::from_secs(60);
/// Starts per measurement, since one is over in milliseconds.
const STARTS: u32 = 10;
/// How long a guest is left alone before it counts as idle.
const IDLE: Duration = Duration::from_secs(1);
/// Seconds of each run of wrk.
const WRK_SECONDS: u32 = 3;
/// Seconds of each job of fio.
const FIO_SECONDS: u32 = 2;
/// Size of scratch disks: small enough to stay in the host's page cache.
const DISK_BYTES: u64 = 64 << 20;

/// Connections, depth of pipelining and requests of each run of redis-benchmark.
const REDIS_RUNS: &[(u32, u32, u64)] = &[(1, 1, 10_000), (50, 1, 100_000), (50, 16, 400_000)];
/// What fio does, and how many requests it keeps in flight.
const FIO_RUNS: &[(&str, u32)] = &[
    ("randread", 1),
    ("randread", 32),
    ("randwrite", 1),
    ("randwrite", 32),
];

/// Process start to the guest's first byte; for ours also to its first instruction.
pub(super) fn start(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    let machine = Machine::new(bench.image("hello"), "stay");
    let mut samples = Vec::new();
    for _ in 0..STARTS {
        let mut guest = Guest::start(&mut bench.command(engine, &machine))?;
        guest.wait_for("hello: ready", PATIENCE)?;
        samples.extend(first_byte(&guest));
        if engine == Engine::Tandem {
            let start_us = start_us(bench)?;
            samples.push(Sample::new(
                "process start to first instruction",
                "ms",
                Better::Lower,
                start_us / 1e3,
            ));
        }
    }
    Ok(samples)
}

fn first_byte(guest: &Guest) -> Option<Sample> {
    let after = guest.first_byte()?.as_secs_f64() * 1e3;
    Some(Sample::new(
        "process start to first byte",
        "ms",
        Better::Lower,
        after,
    ))
}

fn start_us(bench: &Bench) -> Result<f64> {
    let text = process::capture(&mut bench.tandem(&["info", NAME, "--format", "json"]))?;
    let info: serde_json::Value = serde_json::from_str(&text)?;
    info.get("start_us")
        .and_then(serde_json::Value::as_f64)
        .with_context(|| format!("`tandem info` does not say start_us: {text}"))
}

/// Memory beyond the guest's: of an idle guest without devices, and of a server under load.
pub(super) fn memory(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    let idle = Machine::new(bench.image("hello"), "stay");
    let mut guest = Guest::start(&mut bench.command(engine, &idle))?;
    guest.wait_for("hello: ready", PATIENCE)?;
    std::thread::sleep(IDLE);
    let mut samples = memory_of(&guest, &idle, "idle")?;
    drop(guest);
    let server = key_value_store(bench);
    let guest = serve(bench, engine, &server, "kv: ready")?;
    std::thread::sleep(IDLE);
    clients::redis(50, 16, 100_000)?;
    samples.extend(memory_of(&guest, &server, "kv under load")?);
    Ok(samples)
}

fn memory_of(guest: &Guest, machine: &Machine, when: &str) -> Result<Vec<Sample>> {
    let resident = memory::of_monitor(guest.pid(), machine.memory_mib)?;
    let mib = |kib: u64| kib as f64 / 1024.0;
    Ok(vec![
        Sample::new(
            &format!("{when}, resident"),
            "MiB",
            Better::Lower,
            mib(resident.beyond_guest_kib),
        ),
        Sample::new(
            &format!("{when}, private"),
            "MiB",
            Better::Lower,
            mib(resident.private_kib),
        ),
    ])
}

/// redis-benchmark on the `kv` guest.
pub(super) fn kv(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    let _guest = serve(bench, engine, &key_value_store(bench), "kv: ready")?;
    redis_figures()
}

/// wrk on the `http` guest.
pub(super) fn http(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    let _guest = serve(bench, engine, &web_server(bench), "http: ready")?;
    wrk_figures(&[
        ("/size/1024", "1 KiB", 50),
        ("/size/65536", "64 KiB", 50),
        ("/size/1024", "1 KiB", 1),
    ])
}

/// The `disk` guest's own figures, at depth 1 and 32.
pub(super) fn disk(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    let image = bench.scratch("disk.img");
    let mut samples = Vec::new();
    for (depth, operations) in [(1, 20_000), (32, 100_000)] {
        make_disk(&image)?;
        let words = format!("bench depth={depth} ops={operations} report={operations} flush=0");
        let machine = Machine::new(bench.image("disk"), &words).disk(&image, false);
        let guest = serve(bench, engine, &machine, "disk: done")?;
        let console = guest.console();
        let rate = number_before(console, " iops/s")
            .with_context(|| format!("the disk guest printed no figure: {console}"))?;
        let what = format!("4 KiB half reads, depth {depth}");
        samples.push(Sample::new(&what, "IO/s", Better::Higher, rate).over(operations));
    }
    Ok(samples)
}

/// Process start to the first line of Linux' init, and to its servers.
pub(super) fn linux_start(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    let machine = linux(bench, netns::GUEST_WORDS);
    let started = std::time::Instant::now();
    let mut guest = Guest::start(&mut bench.command(engine, &machine))?;
    guest.wait_for("linux: start", PATIENCE)?;
    let init = started.elapsed().as_secs_f64() * 1e3;
    guest.wait_for("READY", PATIENCE)?;
    let ready = started.elapsed().as_secs_f64() * 1e3;
    Ok(vec![
        Sample::new("process start to init", "ms", Better::Lower, init),
        Sample::new(
            "process start to redis and nginx",
            "ms",
            Better::Lower,
            ready,
        ),
    ])
}

/// redis-benchmark on redis in Linux.
pub(super) fn linux_redis(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    let machine = linux(
        bench,
        &format!("{} linux.services=redis", netns::GUEST_WORDS),
    );
    let _guest = serve(bench, engine, &machine, "READY")?;
    redis_figures()
}

/// wrk on nginx in Linux.
pub(super) fn linux_nginx(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    let machine = linux(
        bench,
        &format!("{} linux.services=nginx", netns::GUEST_WORDS),
    );
    let _guest = serve(bench, engine, &machine, "READY")?;
    wrk_figures(&[
        ("/index.html", "1 KiB", 50),
        ("/16k", "16 KiB", 50),
        ("/index.html", "1 KiB", 1),
    ])
}

/// fio in Linux, on a disk of its own, past the guest's page cache.
pub(super) fn linux_fio(bench: &Bench, engine: Engine) -> Result<Vec<Sample>> {
    let image = bench.scratch("fio.img");
    make_disk(&image)?;
    let jobs: Vec<String> = FIO_RUNS
        .iter()
        .map(|(kind, depth)| {
            format!(
                "fio --name={kind}-{depth} --filename=/dev/vdb --rw={kind} --bs=4k --direct=1 \
                 --ioengine=libaio --iodepth={depth} --runtime={FIO_SECONDS} --time_based --minimal"
            )
        })
        .collect();
    let machine = linux(bench, &format!("linux.run=\"{}\"", jobs.join("; "))).disk(&image, false);
    let guest = serve(bench, engine, &machine, "linux: exit")?;
    let console = guest.console();
    FIO_RUNS
        .iter()
        .map(|(kind, depth)| {
            let rate = fio_rate(console, &format!("{kind}-{depth}"))
                .with_context(|| format!("fio printed no figure for {kind}: {console}"))?;
            let what = format!("{kind} 4 KiB, depth {depth}");
            Ok(Sample::new(&what, "IO/s", Better::Higher, rate))
        })
        .collect()
}

/// Read and written operations per second in fio's terse output (version 3, fields 8 and 49).
fn fio_rate(console: &str, job: &str) -> Option<f64> {
    let mark = format!(";{job};");
    let line = console.lines().find(|line| line.contains(&mark))?;
    let fields: Vec<&str> = line.split(';').collect();
    let number = |at: usize| fields.get(at)?.parse::<f64>().ok();
    Some(number(7)? + number(48)?)
}

/// The `http` guest.
pub(super) fn web_server(bench: &Bench) -> Machine {
    Machine::new(bench.image("http"), netns::GUEST_WORDS).on_network()
}

/// The `kv` guest.
pub(super) fn key_value_store(bench: &Bench) -> Machine {
    Machine::new(bench.image("kv"), netns::GUEST_WORDS)
        .on_network()
        .memory_mib(256)
}

/// Linux on the kernel that has everything built in, with its root image.
pub(super) fn linux(bench: &Bench, words: &str) -> Machine {
    const KERNEL_WORDS: &str = "console=ttyS0 quiet acpi=off reboot=k panic=-1 tsc=reliable \
                                no-kvmapf root=/dev/vda";
    Machine::new(
        bench.image("vmlinux-ring3"),
        &format!("{KERNEL_WORDS} {words}"),
    )
    .on_network()
    .memory_mib(256)
    .disk(&bench.image("rootfs.ext4"), true)
}

fn serve(bench: &Bench, engine: Engine, machine: &Machine, ready: &str) -> Result<Guest> {
    let mut guest = Guest::start(&mut bench.command(engine, machine))?;
    guest.wait_for(ready, PATIENCE)?;
    Ok(guest)
}

fn redis_figures() -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for &(connections, depth, requests) in REDIS_RUNS {
        for result in clients::redis(connections, depth, requests)? {
            let what = format!("{} -c {connections} -P {depth}", result.test);
            samples.push(Sample::new(&what, "1/s", Better::Higher, result.rate).over(requests));
            let p99 = Sample::new(&format!("{what}, p99"), "ms", Better::Lower, result.p99_ms);
            samples.push(p99.over(requests));
            if connections == 1 {
                let p50 = Sample::new(&format!("{what}, p50"), "ms", Better::Lower, result.p50_ms);
                samples.push(p50.over(requests));
            }
        }
    }
    Ok(samples)
}

fn wrk_figures(runs: &[(&str, &str, u32)]) -> Result<Vec<Sample>> {
    let mut samples = Vec::new();
    for &(path, size, connections) in runs {
        let result = clients::wrk(path, connections, WRK_SECONDS)?;
        let what = format!("{size} -c {connections}");
        samples.push(Sample::new(&what, "1/s", Better::Higher, result.rate).over(result.requests));
        let p99 = Sample::new(&format!("{what}, p99"), "ms", Better::Lower, result.p99_ms);
        samples.push(p99.over(result.requests));
    }
    Ok(samples)
}

/// Makes an empty disk image whose blocks are all allocated.
pub(super) fn make_disk(path: &Path) -> Result<()> {
    let zeros = vec![0; 1 << 20];
    let mut file =
        File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    for _ in 0..DISK_BYTES / zeros.len() as u64 {
        std::io::Write::write_all(&mut file, &zeros)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    Ok(())
}

/// The last number right before `mark`.
pub(super) fn number_before(text: &str, mark: &str) -> Option<f64> {
    let before = &text[..text.rfind(mark)?];
    before.rsplit(' ').next()?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_figure_of_the_disk_guest_is_found() {
        let console =
            "disk: 10 ops, 5 iops/s, errors=0\ndisk: 20 ops, 4321 iops/s, errors=0 sum=1\n";
        assert_eq!(number_before(console, " iops/s"), Some(4321.0));
    }

    #[test]
    fn the_figure_of_fio_is_found() {
        let mut fields = vec!["0"; 60];
        fields[..3].copy_from_slice(&["3", "fio-3.33", "randread-1"]);
        fields[7] = "2720";
        let console = format!("linux: start\n{}\nlinux: exit 0\n", fields.join(";"));
        assert_eq!(fio_rate(&console, "randread-1"), Some(2720.0));
        assert_eq!(fio_rate(&console, "randread-32"), None);
    }
}
