//! QEMU's machine protocol: a line of JSON for each request, answer and event.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};

use crate::interrupt;

/// Longest wait for QEMU to listen, and for an answer.
const PATIENCE: Duration = Duration::from_secs(30);
/// Pause before something is looked at again.
const LOOK: Duration = Duration::from_millis(10);

/// What makes QEMU listen on `path`, after `-qmp`.
pub(super) fn socket(path: &Path) -> String {
    format!("unix:{},server=on,wait=off", path.display())
}

/// A connection to one QEMU.
#[derive(Debug)]
pub(super) struct Monitor {
    to: UnixStream,
    from: BufReader<UnixStream>,
    events: BTreeMap<String, u64>,
}

impl Monitor {
    /// Connects to a QEMU that listens, or will soon.
    pub(super) fn connect(socket: &Path) -> Result<Self> {
        let to = connect(socket)?;
        to.set_read_timeout(Some(PATIENCE))?;
        let from = BufReader::new(to.try_clone()?);
        let mut monitor = Self {
            to,
            from,
            events: BTreeMap::new(),
        };
        monitor.from.read_line(&mut String::new())?;
        monitor.run("qmp_capabilities", &json!({}))?;
        Ok(monitor)
    }

    /// Lets QEMU do something; an error is what it refuses, or that it does not answer.
    pub(super) fn run(&mut self, command: &str, arguments: &Value) -> Result<Value> {
        let request = json!({ "execute": command, "arguments": arguments });
        writeln!(self.to, "{request}").context("QEMU's monitor is gone")?;
        loop {
            let mut line = String::new();
            let read = self.from.read_line(&mut line);
            if read.with_context(|| format!("QEMU does not answer {command}"))? == 0 {
                bail!("QEMU's monitor is gone");
            }
            let mut answer: Value = serde_json::from_str(&line)?;
            if let Some(error) = answer.get("error") {
                bail!("QEMU refuses {request}: {error}");
            }
            if let Some(result) = answer.get_mut("return") {
                return Ok(result.take());
            }
            self.note(&answer);
        }
    }

    /// How many events of a name QEMU has told by now.
    pub(super) fn events(&mut self, name: &str) -> Result<u64> {
        // Events come before the answer to what is asked after them.
        self.run("query-status", &json!({}))?;
        Ok(self.events.get(name).copied().unwrap_or(0))
    }

    fn note(&mut self, message: &Value) {
        if let Some(name) = message.get("event").and_then(Value::as_str) {
            *self.events.entry(name.to_owned()).or_default() += 1;
        }
    }
}

fn connect(socket: &Path) -> Result<UnixStream> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        match UnixStream::connect(socket) {
            Ok(stream) => return Ok(stream),
            Err(_) if Instant::now() < deadline => thread::sleep(LOOK),
            Err(error) => return Err(error).context("QEMU's monitor does not answer"),
        }
        interrupt::check()?;
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;

    /// A QEMU that greets and then says `lines`, whatever it is asked.
    fn qemu(lines: &'static str) -> (tempfile::TempDir, Monitor) {
        let place = tempfile::tempdir().expect("a directory");
        let path = place.path().join("qmp");
        let listener = UnixListener::bind(&path).expect("a socket");
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().expect("a client");
            let said = format!("{{\"QMP\": {{}}}}\n{{\"return\": {{}}}}\n{lines}");
            stream.write_all(said.as_bytes()).expect("it listens");
            // Until the client is gone.
            drop(BufReader::new(stream).lines().last());
        });
        let monitor = Monitor::connect(&path).expect("it greets");
        (place, monitor)
    }

    #[test]
    fn events_are_counted_in_between() {
        let (_place, mut qemu) = qemu(
            "{\"event\": \"STOP\"}\n{\"return\": 7}\n{\"event\": \"STOP\"}\n{\"return\": {}}\n",
        );
        let answer = qemu.run("query-seven", &json!({})).expect("an answer");
        assert_eq!(answer, json!(7));
        assert_eq!(qemu.events("STOP").expect("an answer"), 2);
    }

    #[test]
    fn a_refusal_is_an_error_that_says_what_was_asked() {
        let (_place, mut qemu) = qemu("{\"error\": {\"desc\": \"no\"}}\n");
        let error = qemu.run("x-colo", &json!({})).expect_err("refused");
        assert!(error.to_string().contains("x-colo"), "{error}");
    }
}
