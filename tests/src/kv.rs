//! The guest `kv`, a key-value store: how it is spoken to (RESP, the protocol of Redis), and a count that clients see grow.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::time::{Duration, Instant};

use crate::network::Network;

/// Where it listens.
pub const PORT: u16 = 6379;
/// The key of the count.
const COUNT: &str = "count";

/// A connection to the key-value store.
pub struct Kv<'a>(BufReader<&'a TcpStream>);

impl<'a> Kv<'a> {
    /// On a stream to [`PORT`].
    pub fn new(stream: &'a TcpStream) -> Self {
        Self(BufReader::new(stream))
    }

    /// Sends a request; the reply without its kind, or nothing for one that says that there is nothing.
    ///
    /// # Errors
    /// A connection that broke, or a reply that says that the request is wrong.
    pub fn ask(&mut self, words: &[&str]) -> Result<Option<String>, String> {
        self.send(words)?;
        let first = self.line(words)?;
        match first.split_at_checked(1) {
            Some(("$", "-1")) => Ok(None),
            Some(("$", _)) => self.line(words).map(Some),
            Some((":" | "+", rest)) => Ok(Some(rest.to_owned())),
            _ => Err(format!("{words:?} was answered by {first:?}")),
        }
    }

    /// The time by the guest, in microseconds.
    ///
    /// # Errors
    /// A connection that broke, or a reply of another kind.
    pub fn time(&mut self) -> Result<u64, String> {
        const WORDS: [&str; 1] = ["TIME"];
        self.send(&WORDS)?;
        let mut reply = || self.line(&WORDS);
        let [kind, _, seconds, _, us] = [reply()?, reply()?, reply()?, reply()?, reply()?];
        let number = |text: &str| text.parse::<u64>().ok();
        match (kind.as_str(), number(&seconds), number(&us)) {
            ("*2", Some(seconds), Some(us)) => Ok(seconds * 1_000_000 + us),
            _ => Err(format!("TIME was answered by {kind:?} {seconds:?} {us:?}")),
        }
    }

    fn send(&mut self, words: &[&str]) -> Result<(), String> {
        let mut request = format!("*{}\r\n", words.len());
        for word in words {
            request.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        let sent = self.0.get_mut().write_all(request.as_bytes());
        sent.map_err(|e| format!("{words:?} cannot be sent: {e}"))
    }

    fn line(&mut self, words: &[&str]) -> Result<String, String> {
        let mut line = String::new();
        match self.0.read_line(&mut line) {
            Ok(0) => Err(format!("{words:?}: the connection was closed")),
            Ok(_) => Ok(line.trim_end().to_owned()),
            Err(error) => Err(format!("no reply to {words:?}: {error}")),
        }
    }
}

/// Counts up for a while; what the guest in `network` said, and when.
///
/// # Panics
/// When it does not answer, or another thing.
pub fn count_up(network: &Network, time: Duration) -> Vec<(u64, Instant)> {
    let connection = network.connect(PORT);
    let mut kv = Kv::new(&connection);
    let end = Instant::now() + time;
    let mut told = Vec::new();
    while Instant::now() < end {
        let count = kv.ask(&["INCR", COUNT]).unwrap().expect("a number");
        told.push((count.parse().unwrap(), Instant::now()));
    }
    told
}

/// What the guest has counted up to.
///
/// # Panics
/// As [`count_up`].
pub fn counted(network: &Network) -> u64 {
    let connection = network.connect(PORT);
    let found = Kv::new(&connection).ask(&["GET", COUNT]).unwrap();
    found.map_or(0, |text| text.parse().unwrap())
}
