//! A client of our own that asks one thing at a time, for a while: what redis-benchmark and wrk do not
//! measure, or not for as long as one says.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::bench::clients::Measured;
use crate::bench::figures::percentile;
use crate::{interrupt, netns};

/// Longest wait for a connection or a reply.
const REPLY_MAX: Duration = Duration::from_secs(15);

/// What is asked.
#[derive(Debug)]
pub(super) struct Question {
    /// Of whom.
    pub(super) port: u16,
    /// In which words.
    pub(super) text: &'static str,
    /// Lines of the reply, on one connection; without, each question has a connection of its own and its reply
    /// ends with that.
    pub(super) lines: Option<u32>,
}

/// Asks for `time`; requests and latencies.
pub(super) fn ask(question: &Question, time: Duration) -> Result<Measured> {
    ask_at(guest(question.port)?, question, time)
}

/// Where the guest serves a port.
pub(super) fn guest(port: u16) -> Result<SocketAddr> {
    let address = netns::GUEST.parse().context("the guest's address")?;
    Ok(SocketAddr::new(address, port))
}

fn ask_at(server: SocketAddr, question: &Question, time: Duration) -> Result<Measured> {
    let mut kept = question.lines.map(|_| connect(server)).transpose()?;
    let mut latencies_ms = Vec::new();
    let began = Instant::now();
    while began.elapsed() < time {
        interrupt::check()?;
        let asked = Instant::now();
        match (&mut kept, question.lines) {
            (Some(connection), Some(lines)) => converse(connection, question.text, lines)?,
            _ => ask_once(server, question.text)?,
        }
        latencies_ms.push(asked.elapsed().as_secs_f64() * 1e3);
    }
    let rate = latencies_ms.len() as f64 / began.elapsed().as_secs_f64();
    let at = |percent| percentile(&latencies_ms, percent).context("nothing was asked");
    Ok(Measured {
        rate,
        p50_ms: at(50)?,
        p99_ms: at(99)?,
        max_ms: at(100)?,
        requests: latencies_ms.len() as u64,
    })
}

fn connect(server: SocketAddr) -> Result<BufReader<TcpStream>> {
    let stream = TcpStream::connect_timeout(&server, REPLY_MAX).context("cannot connect")?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(REPLY_MAX))?;
    Ok(BufReader::new(stream))
}

fn converse(connection: &mut BufReader<TcpStream>, text: &str, lines: u32) -> Result<()> {
    connection.get_mut().write_all(text.as_bytes())?;
    for _ in 0..lines {
        let read = connection.read_line(&mut String::new());
        let read = read.context("no reply")?;
        ensure!(read > 0, "the connection was closed");
    }
    Ok(())
}

fn ask_once(server: SocketAddr, text: &str) -> Result<()> {
    let mut connection = connect(server)?;
    connection.get_mut().write_all(text.as_bytes())?;
    let mut reply = Vec::new();
    connection.read_to_end(&mut reply).context("no reply")?;
    ensure!(!reply.is_empty(), "the connection was closed");
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    const SHORT: Duration = Duration::from_millis(50);

    /// Answers each line it reads with two, or with one and the end of the connection.
    fn serve(ends: bool) -> SocketAddr {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a socket");
        let address = listener.local_addr().expect("an address");
        thread::spawn(move || {
            for stream in listener.incoming() {
                let mut stream = BufReader::new(stream.expect("a client"));
                let mut line = String::new();
                while stream.read_line(&mut line).is_ok_and(|read| read > 0) {
                    let said = stream.get_mut().write_all(b"one\r\ntwo\r\n");
                    if ends || said.is_err() {
                        break;
                    }
                }
            }
        });
        address
    }

    #[test]
    fn questions_are_counted_on_one_connection_and_on_many() {
        for lines in [Some(2), None] {
            let question = Question {
                port: 0,
                text: "x\r\n",
                lines,
            };
            let measured = ask_at(serve(lines.is_none()), &question, SHORT).expect("replies");
            assert!(measured.requests > 0 && measured.rate > 0.0);
            assert!(measured.p50_ms <= measured.p99_ms && measured.p99_ms <= measured.max_ms);
        }
    }

    #[test]
    fn a_server_that_goes_away_is_an_error() {
        let question = Question {
            port: 0,
            text: "x\r\n",
            lines: Some(2),
        };
        ask_at(serve(true), &question, SHORT).expect_err("the connection ends");
    }
}
