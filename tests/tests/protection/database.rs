//! A database on a Linux guest's file system, whose hosts are lost while it is written to: all that it said is stored is there,
//! whoever goes on, and after the end of both.

use std::fs;
use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use rustix::process::Signal;
use tandem_tests::guest::{GuestBuilder, PATIENCE};
use tandem_tests::network::Network;
use tandem_tests::pair::{Pair, Side};
use tempfile::TempDir;

use super::disks::{
    add_journal, begin_resyncs, disk, expect_sound, has_printed, linux, on_file_system, reaches,
    wait_each,
};
use crate::ATTEMPTS;

/// Words of a kernel with everything built in that runs SQLite for each connection. It makes each statement durable before
/// it is done: it writes a journal, and has that and the database written to the disk.
const WORDS: &str = "console=ttyS0 quiet acpi=off reboot=k panic=-1 tsc=reliable no-kvmapf root=/dev/vda rw \
    linux.run=\"mkdir -p /data && echo database: ready && exec nc -ll -p 6400 -e sqlite3 -batch /data/said\"";
const READY: &str = "database: ready";
const PORT: u16 = 6400;
/// Numbers that are stored, and those of them before the first host is lost.
const NUMBERS: u64 = 300;
const BEFORE: u64 = 100;
/// Pause before something is looked at again.
const LOOK: Duration = Duration::from_millis(5);

/// A connection to the database.
struct Session(BufReader<TcpStream>);

impl Session {
    fn begin(network: &Network) -> Self {
        let mut session = Self(BufReader::new(network.connect_soon(PORT)));
        // What ends a statement, that its journal is gone, is durable too (with FULL it is only the next time).
        session.expect("PRAGMA synchronous=EXTRA;PRAGMA synchronous;", "3");
        session
    }

    /// Says `statements`, and hears the next line.
    fn ask(&mut self, statements: &str) -> String {
        let mut stream = self.0.get_ref();
        stream
            .write_all(format!("{statements}\n").as_bytes())
            .unwrap();
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line.trim_end().to_owned()
    }

    fn expect(&mut self, statements: &str, answer: &str) {
        assert_eq!(self.ask(statements), answer, "{statements}");
    }

    /// Stores each of `numbers`, and counts those that were said to be.
    fn store(&mut self, numbers: Range<u64>, stored: &AtomicU64) {
        for number in numbers {
            let text = format!("{number:08}").repeat(40);
            let statements =
                format!("INSERT INTO said VALUES({number},'{text}');SELECT 'has '||{number};");
            self.expect(&statements, &format!("has {number}"));
            stored.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Sees that each of `numbers` is there, and nothing is wrong.
    fn expect_all(&mut self, numbers: u64) {
        let each = "SELECT count(*)||' '||count(DISTINCT number)||' '||min(number)||' '||max(number) FROM said \
            WHERE length(text)=320 AND CAST(substr(text,313) AS INTEGER)=number;";
        let last = numbers - 1;
        self.expect(each, &format!("{numbers} {numbers} 0 {last}"));
        self.expect("PRAGMA integrity_check;", "ok");
    }
}

fn database(kernel: &Path, image: &Path, network: &Network) -> GuestBuilder {
    on_file_system(kernel, WORDS, &disk(image, ""), network)
}

/// A database that answers and is protected.
fn protected(kernel: &Path, images: &[std::path::PathBuf; 2], network: &Network) -> Pair {
    for _ in 0..ATTEMPTS {
        let replica = disk(&images[1], "");
        let guest = database(kernel, &images[0], network);
        let mut pair = Pair::start_prepared(guest, |standby| standby.arg("--disk").arg(replica));
        if reaches(&mut pair, |pair| {
            pair.is_protected() && has_printed(pair, READY)
        }) {
            return pair;
        }
    }
    panic!("no database stays protected");
}

fn wait_stored(stored: &AtomicU64, number: u64) {
    let deadline = Instant::now() + PATIENCE;
    while stored.load(Ordering::SeqCst) < number {
        assert!(Instant::now() < deadline, "{stored:?} of {number}");
        thread::sleep(LOOK);
    }
}

#[test]
fn a_database_has_all_that_it_said_is_stored_whenever_its_host_is_lost() {
    let Some((kernel, root)) = linux() else {
        return;
    };
    let place = TempDir::new().unwrap();
    let images = ["first", "second"].map(|name| place.path().join(name));
    for image in &images {
        fs::copy(&root, image).unwrap();
    }
    add_journal(&images[0]);
    let network = Network::new();
    let mut pair = protected(&kernel, &images, &network);
    let mut session = Session::begin(&network);
    session.expect(
        "CREATE TABLE said(number INTEGER, text TEXT);SELECT 'made';",
        "made",
    );
    let stored = Arc::<AtomicU64>::default();
    let counted = Arc::clone(&stored);
    // The connection outlives its host.
    let writer = thread::spawn(move || {
        session.store(0..NUMBERS, &counted);
        session
    });
    wait_stored(&stored, BEFORE / 2);
    let asked = begin_resyncs(&mut pair);
    wait_stored(&stored, BEFORE);
    wait_each(asked);
    assert!(
        reaches(&mut pair, |pair| pair.is_protected()),
        "{}",
        pair.account()
    );
    pair.kill(Side::Primary);
    assert_eq!(pair.wait_alone(), Side::Secondary);
    let mut session = writer.join().unwrap();
    session.expect_all(NUMBERS);
    let survivor = pair.into_side(Side::Secondary);
    survivor.signal(Signal::KILL);
    drop(survivor.wait());
    drop(session);

    expect_sound(&images[1]);
    let mut again = database(&kernel, &images[1], &network).start();
    again.wait_for(READY);
    Session::begin(&network).expect_all(NUMBERS);
}
