//! Who looks whether a guest does what it should: clients that check every reply, or who reads its consoles.

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tandem_tests::disk::FLAWS;
use tandem_tests::guest::PATIENCE;
use tandem_tests::network::Network;

use super::fleet::Member;
use super::sites::{HOSTS, Sites};
use crate::protection::clients::{KV, Load, Pace};
use crate::protection::history::{Crowd, Recording};

/// What is asked of each guest that serves.
const PACE: Pace = Pace {
    connections: 1,
    progress: 6,
    patience: Duration::from_secs(60),
    pause: Duration::from_millis(40),
};
/// Clients of a store whose history is checked.
const CROWD: Crowd = Crowd {
    clients: 3,
    pause: Duration::from_millis(50),
};
/// How long a history is, before it is checked and another one begins.
const HISTORY: Duration = Duration::from_secs(20);
/// How often consoles are read.
const LOOK: Duration = Duration::from_millis(10);
/// Reports of a guest after which it is said to carry on.
const REPORTS: u64 = 2;

/// Who looks at a guest.
pub(crate) enum Watch {
    /// Its clients.
    Clients(Box<Clients>),
    /// Who reads its consoles.
    Console(Follower),
}

pub(crate) struct Clients {
    load: Load,
    recording: Option<(Recording, Instant)>,
    /// Recordings so far.
    recordings: usize,
    /// Operations whose order was found.
    checked: usize,
}

impl Watch {
    /// Begins to look at a guest, which can be reached.
    pub(crate) fn begin(sites: &Sites, member: &Member, recordings: usize) -> Self {
        let Some(service) = member.service else {
            let consoles = HOSTS.map(|host| sites.console(host, member));
            return Self::Console(Follower::start(consoles));
        };
        let mut clients = Clients {
            load: Load::begin(&sites.network, &member.address(), service, PACE),
            recording: None,
            recordings,
            checked: 0,
        };
        if service.port == KV.port {
            clients.record(&sites.network, member);
        }
        Self::Clients(Box::new(clients))
    }

    /// Recordings of the guest's history so far.
    pub(crate) fn recordings(&self) -> usize {
        match self {
            Self::Clients(clients) => clients.recordings,
            Self::Console(_) => 0,
        }
    }

    /// Waits until the guest does more of what it does. An error is what is wrong.
    pub(crate) fn progress(&self) -> Result<(), String> {
        match self {
            Self::Clients(clients) => clients.load.progress(),
            Self::Console(follower) => follower.progress(),
        }
    }

    /// What is wrong so far.
    pub(crate) fn check(&self) -> Result<(), String> {
        match self {
            Self::Clients(clients) => clients.load.check(),
            Self::Console(follower) => follower.check(),
        }
    }

    /// For how long nothing came at most, since this was asked last.
    pub(crate) fn longest_silence(&self) -> Duration {
        match self {
            Self::Clients(clients) => clients.load.longest_silence(),
            Self::Console(follower) => follower.longest_silence(),
        }
    }

    /// Looks at a history that is long enough.
    pub(crate) fn look_at_history(
        &mut self,
        network: &Network,
        member: &Member,
    ) -> Result<(), String> {
        let Self::Clients(clients) = self else {
            return Ok(());
        };
        let is_long = |(_, since): &(Recording, Instant)| since.elapsed() > HISTORY;
        if clients.recording.as_ref().is_some_and(is_long) {
            clients.check_history()?;
            clients.record(network, member);
        }
        Ok(())
    }

    /// Ends looking: how many operations of its histories had an order.
    pub(crate) fn end(self) -> Result<usize, String> {
        match self {
            Self::Clients(mut clients) => {
                let history = clients.check_history();
                clients.load.end()?;
                history.map(|()| clients.checked)
            }
            Self::Console(follower) => follower.check().map(|()| 0),
        }
    }
}

impl Clients {
    fn record(&mut self, network: &Network, member: &Member) {
        let recording = Recording::start_at(network, &member.address(), self.recordings, CROWD);
        self.recording = Some((recording, Instant::now()));
        self.recordings += 1;
    }

    fn check_history(&mut self) -> Result<(), String> {
        if let Some((recording, _)) = self.recording.take() {
            self.checked += recording.end()?.check()?;
        }
        Ok(())
    }
}

/// What consoles said.
#[derive(Debug)]
struct Said {
    reports: u64,
    last: Instant,
    silence: Duration,
    flaw: Option<String>,
}

/// Reads what a guest that writes to a disk says, wherever it is.
pub(crate) struct Follower {
    said: Arc<Mutex<Said>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

fn lock(said: &Mutex<Said>) -> MutexGuard<'_, Said> {
    said.lock().expect("nobody panics with it")
}

impl Follower {
    fn start(consoles: [PathBuf; 2]) -> Self {
        let said = Arc::new(Mutex::new(Said {
            reports: 0,
            last: Instant::now(),
            silence: Duration::ZERO,
            flaw: None,
        }));
        let stop = Arc::<AtomicBool>::default();
        let (told, tells) = (Arc::clone(&stop), Arc::clone(&said));
        let thread = std::thread::spawn(move || {
            // What earlier ones said was read.
            let mut readers = consoles.map(Reader::at_end);
            while !told.load(Ordering::SeqCst) {
                for reader in &mut readers {
                    reader
                        .lines()
                        .iter()
                        .for_each(|line| lock(&tells).add(line));
                }
                std::thread::sleep(LOOK);
            }
        });
        Self {
            said,
            stop,
            thread: Some(thread),
        }
    }

    fn check(&self) -> Result<(), String> {
        let flaw = lock(&self.said).flaw.clone();
        flaw.map_or(Ok(()), |flaw| Err(format!("it said {flaw:?}")))
    }

    fn progress(&self) -> Result<(), String> {
        let before = lock(&self.said).reports;
        let deadline = Instant::now() + 2 * PATIENCE;
        while lock(&self.said).reports < before + REPORTS {
            self.check()?;
            if Instant::now() > deadline {
                return Err(format!("nothing comes after {before} reports"));
            }
            std::thread::sleep(LOOK);
        }
        self.check()
    }

    fn longest_silence(&self) -> Duration {
        let mut said = lock(&self.said);
        let silence = std::mem::take(&mut said.silence);
        silence.max(said.last.elapsed())
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::SeqCst);
        if let Some(thread) = self.thread.take() {
            drop(thread.join());
        }
    }
}

impl Said {
    fn add(&mut self, line: &str) {
        if has_flaw(line) {
            self.flaw.get_or_insert_with(|| line.to_owned());
        }
        if line.contains("ops, errors=") {
            self.reports += 1;
            self.silence = self.silence.max(self.last.elapsed());
            self.last = Instant::now();
        }
    }
}

/// Whether a guest with a disk says that something is wrong. A line may be cut off where its host was lost, and go on with
/// another one.
fn has_flaw(line: &str) -> bool {
    let mut counts = line.split("errors=").skip(1);
    let wrong = counts.any(|rest| rest.starts_with(|c: char| c.is_ascii_digit() && c != '0'));
    wrong || FLAWS.iter().any(|flaw| line.contains(flaw))
}

/// A console that grows.
struct Reader {
    path: PathBuf,
    at: u64,
    rest: String,
}

impl Reader {
    fn at_end(path: PathBuf) -> Self {
        let at = path.metadata().map_or(0, |data| data.len());
        Self {
            path,
            at,
            rest: String::new(),
        }
    }

    /// Whole lines that came.
    fn lines(&mut self) -> Vec<String> {
        let mut came = Vec::new();
        let Ok(mut file) = File::open(&self.path) else {
            return Vec::new();
        };
        file.seek(SeekFrom::Start(self.at)).unwrap();
        file.read_to_end(&mut came).unwrap();
        self.at += came.len() as u64;
        self.rest += &String::from_utf8_lossy(&came);
        let Some(end) = self.rest.rfind('\n') else {
            return Vec::new();
        };
        let rest = self.rest.split_off(end + 1);
        let whole = std::mem::replace(&mut self.rest, rest);
        whole.lines().map(str::to_owned).collect()
    }
}

#[test]
fn what_is_wrong_on_a_console_is_seen() {
    for (line, wrong) in [
        ("disk: 20 ops, errors=0 sum=12", false),
        ("disk: 20 ops, errors=1 sum=12", true),
        ("disk: 20 ops, errors=disk: ready depth=2", false),
        ("disk: CORRUPT block 7: older", true),
        ("PANIC: it", true),
    ] {
        assert_eq!(has_flaw(line), wrong, "{line}");
    }
}
