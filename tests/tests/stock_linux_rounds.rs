//! Debian's stock kernel as a guest with checkpoints in a store, lost and resumed on an emulated host round after round, while
//! clients write down what redis tells them: with `--commit` nothing is lost or contradicted, without it no more than what
//! came after the last checkpoint that was complete.
//!
//! `TANDEM_ROUNDS` says how many rounds there are; the suite has a few.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::time::{Duration, Instant};

use serde_json::Value;
use tandem_tests::emulated::{EmulatedHost, GuestConsole, HostBuilder, PATIENCE};
use tandem_tests::rounds::rounds;

/// A client of the guest's redis, which prints nothing but replies.
const REDIS: &str = "redis-cli --raw -h 10.99.0.2";
/// Where clients write down what they are told.
const TOLD: &str = "/tmp/told";
/// How often checkpoints are made.
const INTERVAL: Duration = Duration::from_millis(200);
/// By how much later than that one may be complete on an emulated host.
const LATE: Duration = Duration::from_secs(15);
/// What the host's clock and the age of a checkpoint are rounded by.
const ROUNDED: Duration = Duration::from_millis(12);
/// Replies that show that a client gets on.
const PROGRESS: usize = 3;
/// Pause before something is looked at again.
const LOOK: Duration = Duration::from_millis(200);

/// A host, and the guest on it.
struct Stage {
    host: EmulatedHost,
    guest: GuestConsole,
}

impl Stage {
    /// A guest of which checkpoints are made, with `more` flags; `None`, said aloud, where no host can be emulated.
    fn begin(more: &str) -> Option<Self> {
        let builder = HostBuilder::new()?
            .program("redis-cli")?
            .file("bzImage")?
            .file("initramfs")?
            .disk("rootfs.ext4")?;
        let mut host = builder.start();
        host.succeed(
            "tunctl -t tap0 && ip link set tap0 address 02:00:00:00:99:01 && \
             ip addr add 10.99.0.1/24 dev tap0 && ip link set tap0 up && mkdir /tmp/store",
        );
        let every = INTERVAL.as_millis();
        let words = format!(
            "--kernel /mnt/bzImage --initrd /mnt/initramfs --cpus 2 --memory 256MiB --disk path=/dev/vdb,readonly \
             --cmdline 'console=ttyS0 quiet root=/dev/vda ip=10.99.0.2/24 linux.services=redis' \
             --net tap=tap0 --checkpoint /tmp/store --every {every}ms {more}"
        );
        let guest = host.start_guest("server", &words);
        guest.wait_for("READY", 1);
        let mut stage = Self { host, guest };
        stage.wait_checkpoint();
        Some(stage)
    }

    /// Waits until a checkpoint of the guest as it runs now is complete.
    fn wait_checkpoint(&mut self) {
        let complete = |status: &Value| status["checkpoints"]["age_ms"].is_u64();
        let deadline = Instant::now() + PATIENCE;
        while !self.status().as_ref().is_some_and(complete) {
            assert!(Instant::now() < deadline, "{}", self.guest.text());
            std::thread::sleep(LOOK);
        }
    }

    fn status(&mut self) -> Option<Value> {
        let said = self.host.run("tandem status server --format json");
        serde_json::from_str(said.output.get(said.output.find('{')?..)?).ok()
    }

    /// Kills the owner of the guest, and says how a shell command ended that runs just before.
    fn lose(&mut self, before: &str) -> String {
        let kill = "kill -9 $(cat /run/tandem/server/pid)";
        let ran = self.host.run(&format!("{before}\n{kill}"));
        // It may have ended by itself.
        assert_eq!(ran.code, 0, "{} {}", ran.output, self.guest.text());
        self.guest.wait();
        ran.output
    }

    fn resume(&mut self) {
        let words = "resume server --from /tmp/store --console off";
        self.guest = self.host.start_tandem("server", words);
        self.wait_checkpoint();
    }

    /// What clients were told from line `from` on; a line that is being written does not count.
    fn told(&mut self, from: usize) -> Vec<String> {
        let said = self.host.succeed(&format!("tail -n +{} {TOLD}", from + 1));
        let whole = said.rfind('\n').map_or("", |end| &said[..=end]);
        whole.lines().map(str::to_owned).collect()
    }

    /// Megabytes of the store, which is in the host's memory.
    fn stored_mb(&mut self) -> String {
        let said = self.host.succeed("du -sm /tmp/store | cut -f 1");
        said.trim().to_owned()
    }

    fn end(mut self) {
        self.host.succeed("tandem stop --force server");
        self.guest.wait();
    }
}

/// A client on one connection, which lives through all rounds, is told a number that grows by one each time.
struct Counter {
    told: usize,
}

impl Counter {
    fn start(stage: &mut Stage) -> Self {
        let ask = "while :; do echo INCR count; sleep 0.2; done";
        let client = format!("( {ask} | {REDIS} >{TOLD} 2>{TOLD}.errors & )");
        stage.host.succeed(&client);
        Self { told: 0 }
    }

    /// Fails unless it was told, since this was last asked, what comes after that; says how long that took.
    fn expect_progress(&mut self, stage: &mut Stage) -> Duration {
        let (begun, from) = (Instant::now(), self.told);
        while self.told < from + PROGRESS {
            for line in stage.told(self.told) {
                self.told += 1;
                assert_eq!(line, self.told.to_string(), "{}", errors(stage));
            }
            let stands = begun.elapsed() > PATIENCE;
            assert!(!stands, "{} {}", errors(stage), stage.guest.text());
            std::thread::sleep(LOOK);
        }
        begun.elapsed()
    }
}

fn errors(stage: &mut Stage) -> String {
    stage.host.succeed(&format!("cat {TOLD}.errors"))
}

#[test]
fn stock_linux_loses_nothing_with_commit() {
    let Some(mut stage) = Stage::begin("--commit") else {
        return;
    };
    let mut counter = Counter::start(&mut stage);
    counter.expect_progress(&mut stage);
    for round in 0..rounds(2) {
        let began = Instant::now();
        stage.lose(":");
        stage.resume();
        let resumed = began.elapsed();
        let silent = counter.expect_progress(&mut stage);
        let (told, stored) = (counter.told, stage.stored_mb());
        println!(
            "linux, commit, round {round}: {told} told, resumed after {resumed:?}, replies {silent:?} later, {stored} MB"
        );
    }
    stage.end();
}

/// Starts clients that count up, one after the other, on a connection each, and write down what they were told and when.
/// Waits until some were told, and for some intervals more.
fn start_counting(stage: &mut Stage) {
    let count =
        format!("count=$({REDIS} INCR count) && read now _ </proc/uptime && echo \"$count $now\"");
    let counting = format!("while [ ! -e /tmp/enough ]; do {count}; done >{TOLD} 2>/dev/null");
    let some = format!("until [ $(wc -l <{TOLD}) -ge {PROGRESS} ]; do sleep 0.2; done; sleep 2");
    let command = format!("rm -f /tmp/enough; : >{TOLD}; ( {counting} & ); {some}");
    stage.host.succeed(&command);
}

/// Ends the clients; what they were told, and when. One may have asked and not been told.
fn stop_counting(stage: &mut Stage) -> Vec<(u64, Duration)> {
    let stop = "touch /tmp/enough; killall redis-cli 2>/dev/null";
    let said = stage.host.succeed(&format!("{stop}; cat {TOLD}"));
    said.lines().map(count_and_time).collect()
}

/// What is read of the host before the guest is lost: when, and how old the last checkpoint was.
const LOOK_AT: &str = "read now _ </proc/uptime; echo \"looked $now\"; \
     echo \"status $(tandem status server --format json | tr -d '\\n')\"; \
     read now _ </proc/uptime; echo \"killed $now\"";

/// What a loss showed, in time since the host's start.
struct Lost {
    looked: Duration,
    killed: Duration,
    age: Duration,
}

impl Lost {
    fn read(said: &str) -> Self {
        let after = |word: &str| {
            let found = said.lines().find_map(|line| line.strip_prefix(word));
            found.unwrap_or_else(|| panic!("no `{word}`: {said}"))
        };
        let status: Value = serde_json::from_str(after("status ")).unwrap();
        let age = status["checkpoints"]["age_ms"].as_u64().unwrap();
        Self {
            looked: seconds(after("looked ")),
            killed: seconds(after("killed ")),
            age: Duration::from_millis(age),
        }
    }
}

fn seconds(text: &str) -> Duration {
    Duration::from_secs_f64(text.trim().parse().unwrap())
}

fn count_and_time(line: &str) -> (u64, Duration) {
    let (count, at) = line.split_once(' ').unwrap();
    (count.parse().unwrap(), seconds(at))
}

/// What redis has counted up to: it says nothing of what it never counted.
fn counted(stage: &mut Stage) -> u64 {
    let ask = format!("until {REDIS} GET count; do sleep 1; done 2>/dev/null");
    let said = stage.host.succeed(&ask);
    match said.trim() {
        "" => 0,
        count => count.parse().unwrap(),
    }
}

#[test]
fn stock_linux_loses_no_more_than_came_after_its_last_checkpoint() {
    let Some(mut stage) = Stage::begin("") else {
        return;
    };
    let mut lost_most = Duration::ZERO;
    for round in 0..rounds(2) {
        start_counting(&mut stage);
        let lost = Lost::read(&stage.lose(LOOK_AT));
        let told = stop_counting(&mut stage);
        stage.resume();
        let found = counted(&mut stage);
        // What it stood for then is complete, and perhaps more is.
        let kept = |at: &Duration| *at + lost.age + ROUNDED < lost.looked;
        let least = told.iter().rev().find(|(_, at)| kept(at));
        let least = least.map_or(0, |(count, _)| *count);
        let most = told.last().unwrap().0 + 1;
        assert!(
            (least..=most).contains(&found),
            "{least} {found} {most} {:?}",
            lost.age
        );
        let first_lost = told.iter().find(|(count, _)| *count > found);
        let time = first_lost.map_or(Duration::ZERO, |(_, at)| lost.killed.saturating_sub(*at));
        assert!(time <= INTERVAL + LATE, "{time:?}");
        lost_most = lost_most.max(time);
        let (replies, stored) = (told.len(), stage.stored_mb());
        println!(
            "linux, round {round}: {replies} replies, checkpoint {:?} old, lost {time:?}, at most so far {lost_most:?}, {stored} MB",
            lost.age
        );
    }
    stage.end();
}
