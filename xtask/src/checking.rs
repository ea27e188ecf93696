//! Clients that check every reply: each connection counts a key of its own up, and writes and reads
//! another, for as long as it is told to.

use std::io::{BufRead, BufReader, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use crate::netns;

/// Port of the key-value store.
const PORT: u16 = 6379;
/// Longest wait for a reply.
const REPLY_MAX: Duration = Duration::from_secs(20);

/// What one connection saw.
#[derive(Debug)]
pub(crate) struct Seen {
    /// Replies, all of which were right.
    pub(crate) replies: u64,
    /// When each gap between two replies that was long began and ended.
    gaps: Vec<(Instant, Instant)>,
}

impl Seen {
    /// The longest time without a reply that ended after `moment`: replies that were under way then do
    /// not end it.
    pub(crate) fn silence(&self, moment: Instant) -> Option<Duration> {
        let after = self.gaps.iter().filter(|(_, end)| *end > moment);
        after.map(|(begin, end)| *end - *begin).max()
    }

    /// From `moment` to the next reply, as far as the connection waited for one then or soon after.
    pub(crate) fn blackout(&self, moment: Instant) -> Option<Duration> {
        let gap = self.gaps.iter().find(|(_, end)| *end > moment)?;
        Some(gap.1 - moment)
    }
}

/// Connections at work.
pub(crate) struct Clients {
    stop: Arc<AtomicBool>,
    threads: Vec<JoinHandle<Result<Seen>>>,
}

impl Clients {
    /// Starts `count` connections.
    pub(crate) fn start(count: usize) -> Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let threads = (0..count).map(|number| {
            let connection = Connection::new(number)?;
            let stop = Arc::clone(&stop);
            Ok(std::thread::spawn(move || connection.work(&stop)))
        });
        let threads = threads.collect::<Result<_>>()?;
        Ok(Self { stop, threads })
    }

    /// Ends them; what each saw. An error is a reply that was wrong, or a connection that was lost.
    pub(crate) fn finish(self) -> Vec<Result<Seen>> {
        self.stop.store(true, Ordering::SeqCst);
        let ended = self.threads.into_iter().map(|thread| {
            let ended = thread.join();
            ended.unwrap_or_else(|_| bail!("a client failed"))
        });
        ended.collect()
    }
}

struct Connection {
    number: usize,
    stream: BufReader<TcpStream>,
}

impl Connection {
    fn new(number: usize) -> Result<Self> {
        let stream = TcpStream::connect((netns::GUEST, PORT)).context("cannot connect")?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(REPLY_MAX))?;
        let stream = BufReader::new(stream);
        Ok(Self { number, stream })
    }

    fn work(mut self, stop: &AtomicBool) -> Result<Seen> {
        let mut seen = Seen {
            replies: 0,
            gaps: Vec::new(),
        };
        let mut last = Instant::now();
        let mut count = 0u64;
        while !stop.load(Ordering::SeqCst) {
            count += 1;
            let (counter, key) = (
                format!("counter:{}", self.number),
                format!("key:{}", self.number),
            );
            for (request, expected) in [
                (format!("INCR {counter}"), format!(":{count}")),
                (format!("SET {key} value-{count}"), "+OK".to_owned()),
                (format!("GET {key}"), format!("value-{count}")),
            ] {
                let reply = self.ask(&request)?;
                ensure!(
                    reply == expected,
                    "`{request}` was answered by `{reply}`, not `{expected}`"
                );
                let now = Instant::now();
                seen.replies += 1;
                seen.gaps.push((last, now));
                last = now;
            }
        }
        Ok(seen)
    }

    /// Sends a request; the reply's line, or the text of a bulk reply.
    fn ask(&mut self, request: &str) -> Result<String> {
        let words: Vec<&str> = request.split(' ').collect();
        let mut bytes = format!("*{}\r\n", words.len());
        for word in words {
            bytes.push_str(&format!("${}\r\n{word}\r\n", word.len()));
        }
        self.stream.get_mut().write_all(bytes.as_bytes())?;
        let line = self.line()?;
        match line.strip_prefix('$') {
            Some(_) => self.line(),
            None => Ok(line),
        }
    }

    fn line(&mut self) -> Result<String> {
        let mut line = String::new();
        let read = self.stream.read_line(&mut line);
        ensure!(
            read.context("a connection was lost")? > 0,
            "a connection was closed"
        );
        Ok(line.trim_end().to_owned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_reply_under_way_does_not_end_a_silence() {
        let at = |ms| Instant::now() + Duration::from_millis(ms);
        let moments = [at(0), at(5), at(11), at(61), at(62)];
        let seen = Seen {
            replies: 5,
            gaps: moments.windows(2).map(|pair| (pair[0], pair[1])).collect(),
        };
        let killed = moments[1] + Duration::from_millis(1);
        assert_eq!(seen.silence(killed), Some(moments[3] - moments[2]));
        assert_eq!(seen.blackout(killed), Some(moments[2] - killed));
        assert_eq!(seen.silence(moments[4]), None);
    }
}
