//! A database in a Linux guest: SQLite, which makes what it says is stored durable first.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use crate::guest::PATIENCE;
use crate::network::Network;

/// Words that run SQLite for each connection. It makes each statement durable before it is done: it writes a journal, and has
/// that and the database written to the disk.
pub const WORDS: &str = "console=ttyS0 quiet acpi=off reboot=k panic=-1 tsc=reliable no-kvmapf root=/dev/vda rw \
    linux.run=\"mkdir -p /data && echo database: ready && exec nc -ll -p 6400 -e sqlite3 -batch /data/said\"";
/// What is printed when it is about to answer.
pub const READY: &str = "database: ready";
const PORT: u16 = 6400;
/// Pause before something is looked at again.
const LOOK: Duration = Duration::from_millis(5);

/// A connection to the database.
pub struct Session(BufReader<TcpStream>);

impl Session {
    /// Connects, once the guest in `network` lets it.
    ///
    /// # Panics
    /// When it does not, or does not answer.
    pub fn begin(network: &Network) -> Self {
        let mut session = Self(BufReader::new(network.connect_soon(PORT)));
        // What ends a statement, that its journal is gone, is durable too (with FULL it is only the next time).
        session.expect("PRAGMA synchronous=EXTRA;PRAGMA synchronous;", "3");
        session
    }

    /// Makes the table.
    ///
    /// # Panics
    /// When it is not made.
    pub fn make(&mut self) {
        let table = "CREATE TABLE said(number INTEGER, text TEXT);SELECT 'made';";
        self.expect(table, "made");
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
    ///
    /// # Panics
    /// When something else is said.
    pub fn store(&mut self, numbers: Range<u64>, stored: &AtomicU64) {
        for number in numbers {
            let text = format!("{number:08}").repeat(40);
            let statements =
                format!("INSERT INTO said VALUES({number},'{text}');SELECT 'has '||{number};");
            self.expect(&statements, &format!("has {number}"));
            stored.fetch_add(1, Ordering::SeqCst);
        }
    }

    /// Sees that each of so many numbers is there once, and nothing is wrong.
    ///
    /// # Panics
    /// When it is not so.
    pub fn expect_all(&mut self, numbers: u64) {
        let each = "SELECT count(*)||' '||count(DISTINCT number)||' '||min(number)||' '||max(number) FROM said \
            WHERE length(text)=320 AND CAST(substr(text,313) AS INTEGER)=number;";
        let last = numbers - 1;
        self.expect(each, &format!("{numbers} {numbers} 0 {last}"));
        self.expect("PRAGMA integrity_check;", "ok");
    }
}

/// Waits until so many numbers are stored.
///
/// # Panics
/// When they are not for longer than [`PATIENCE`].
pub fn wait_stored(stored: &AtomicU64, number: u64) {
    let deadline = Instant::now() + PATIENCE;
    while stored.load(Ordering::SeqCst) < number {
        assert!(Instant::now() < deadline, "{stored:?} of {number}");
        thread::sleep(LOOK);
    }
}
