//! Every target over its corpus, and over inputs drawn and mutated from it.

#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use std::fs;
use std::io::Write;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::PathBuf;
use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, Once};
use std::time::{Duration, Instant};

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tandem_fuzz::{TARGETS, Target};

/// How long each target draws inputs beside its corpus.
const DRAWING_TIME: Duration = Duration::from_millis(1500);
/// Most inputs drawn; the first are the same in every run.
const DRAWN_MAX: u64 = 4000;
/// An input that takes longer hangs.
const INPUT_TIME_MAX: Duration = Duration::from_secs(20);
/// Most address space that the tests take, all targets together.
const MEMORY_MAX: u64 = 4 << 30;
/// Most bytes of one target's corpus.
const CORPUS_SIZE_MAX: usize = 64 << 10;
/// Longest input that is drawn without a template.
const RANDOM_LEN_MAX: u64 = 512;
/// Values at which code changes its mind.
const INTERESTING: [u32; 8] = [0, 1, 0x7f, 0xff, 0x7fff, 0xffff, 0x7fff_ffff, u32::MAX];

macro_rules! targets {
    ($($name:ident),*) => {
        $(#[test]
        fn $name() {
            bears_everything(&Target::named(stringify!($name)));
        })*

        #[test]
        fn every_target_is_tested() {
            let tested = [$(stringify!($name)),*];
            assert_eq!(TARGETS.map(|target| target.name), tested);
        }
    };
}

targets!(
    queue, block, net, console, rng, vsock, net_stream, vsock_host, snapshot, config, api, kernel,
    frames, deltas, link, outputs, joining, pairing, paths, mirror, keeper, store
);

fn bears_everything(target: &Target) {
    limit_memory();
    let corpus = corpus(target);
    let size: usize = corpus.iter().map(|(_, bytes)| bytes.len()).sum();
    assert!(
        !corpus.is_empty() && size <= CORPUS_SIZE_MAX,
        "{size} bytes"
    );
    let watchdog = Watchdog::new();
    for (path, bytes) in &corpus {
        watchdog.begin(&path.display().to_string());
        run(target, &path.display().to_string(), bytes);
    }
    let end = Instant::now() + DRAWING_TIME;
    for seed in 0..DRAWN_MAX {
        if Instant::now() > end {
            break;
        }
        let name = format!("{} drawn from seed {seed}", target.name);
        watchdog.begin(&name);
        run(target, &name, &draw(&mut Random(seed), &corpus));
    }
}

/// Runs a target; when it panics, keeps the input and says where.
fn run(target: &Target, name: &str, bytes: &[u8]) {
    let Err(panic) = catch_unwind(AssertUnwindSafe(|| target.run(bytes))) else {
        return;
    };
    let kept = std::env::temp_dir().join(format!("{}-{}", target.name, std::process::id()));
    let written = fs::write(&kept, bytes);
    eprintln!(
        "{name} fails; its input is in {} ({written:?})",
        kept.display()
    );
    resume_unwind(panic);
}

fn corpus(target: &Target) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = fs::read_dir(target.corpus()).unwrap();
    let mut paths: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    paths.sort();
    paths
        .into_iter()
        .map(|path| (path.clone(), fs::read(path).unwrap()))
        .collect()
}

/// An input: random, or one or two of the corpus with some changes.
fn draw(random: &mut Random, corpus: &[(PathBuf, Vec<u8>)]) -> Vec<u8> {
    if random.below(16) == 0 {
        return (0..random.below(RANDOM_LEN_MAX))
            .map(|_| random.next() as u8)
            .collect();
    }
    let pick = |random: &mut Random| &corpus[random.below(corpus.len() as u64) as usize].1;
    let mut bytes = pick(random).clone();
    if random.below(4) == 0 {
        let other = pick(random);
        bytes.truncate(random.below(bytes.len() as u64 + 1) as usize);
        bytes.extend(&other[random.below(other.len() as u64 + 1) as usize..]);
    }
    for _ in 0..=random.below(6) {
        mutate(random, &mut bytes);
    }
    bytes
}

fn mutate(random: &mut Random, bytes: &mut Vec<u8>) {
    let at = random.below(bytes.len() as u64 + 1) as usize;
    let len = (random.below(16) as usize).min(bytes.len() - at);
    match random.below(6) {
        0 => drop(bytes.drain(at..at + len)),
        1 => {
            let copy = bytes[at..at + len].to_vec();
            bytes.splice(at..at, copy);
        }
        2 => bytes.insert(at, random.next() as u8),
        3 => {
            let value = INTERESTING[random.below(8) as usize].to_le_bytes();
            let width = [1, 2, 4][random.below(3) as usize];
            let end = (at + width).min(bytes.len());
            bytes.splice(at..end, value[..width].iter().copied());
        }
        _ => {
            if let Some(byte) = bytes.get_mut(at) {
                *byte ^= 1 << random.below(8);
            }
        }
    }
}

/// SplitMix64.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    fn below(&mut self, end: u64) -> u64 {
        self.next() % end
    }
}

/// A target that takes memory without bound fails to get it, which ends the process.
fn limit_memory() {
    static LIMITED: Once = Once::new();
    LIMITED.call_once(|| {
        let maximum = getrlimit(Resource::As).maximum;
        let current = Some(MEMORY_MAX);
        setrlimit(Resource::As, Rlimit { current, maximum }).unwrap();
    });
}

/// Ends the process when an input takes too long, and says which.
struct Watchdog {
    at: Arc<Mutex<(String, Instant)>>,
    _end: Sender<()>,
}

impl Watchdog {
    fn new() -> Self {
        let at = Arc::new(Mutex::new((String::new(), Instant::now())));
        let (end, ended) = channel::<()>();
        let seen = Arc::clone(&at);
        std::thread::spawn(move || {
            while ended.recv_timeout(Duration::from_millis(200)) == Err(RecvTimeoutError::Timeout) {
                let (name, since) = &*seen.lock().unwrap();
                if since.elapsed() > INPUT_TIME_MAX {
                    // Not `eprintln`, which the test harness keeps to itself.
                    let _ = writeln!(std::io::stderr(), "{name} hangs");
                    std::process::abort();
                }
            }
        });
        Self { at, _end: end }
    }

    fn begin(&self, name: &str) {
        *self.at.lock().unwrap() = (name.to_owned(), Instant::now());
    }
}
