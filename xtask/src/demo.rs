//! `cargo xtask demo`: guests under `tandem run`, and clients of the host that talk to them.

use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use tempfile::TempDir;

use crate::guest::Guest;
use crate::setup::{self, Purpose};
use crate::workspace::Workspace;
use crate::{images, netns, process, tandem};

/// Name of the tap.
const TAP: &str = "tap0";
/// Longest wait for a guest to say that it is ready.
const READY_MAX: Duration = Duration::from_secs(20);
/// Requests per run of redis-benchmark: a few seconds at most.
const REQUESTS: &str = "50000";

/// How to run the demonstration.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Set by the demonstration itself once it is in a network of its own.
    #[arg(long, hide = true)]
    inside: bool,
}

/// Builds what is shown, then shows it in a network of its own.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    if arguments.inside {
        show(workspace)?;
        return Ok(ExitCode::SUCCESS);
    }
    setup::prepare(Purpose::Demo)?;
    if let Err(why) = setup::kvm() {
        anyhow::bail!("the demonstration needs /dev/kvm, which {why}");
    }
    images::run(workspace, &images::Arguments::only(["kv", "http"]))?;
    tandem::build(workspace)?;
    netns::run_again(&["demo", "--inside"])
}

fn show(workspace: &Workspace) -> Result<()> {
    let started = Instant::now();
    netns::make_tap(TAP)?;
    let runtime = tempfile::Builder::new().prefix("tandem-demo-").tempdir()?;
    let stage = Stage { workspace, runtime };
    let pace = stage.key_value_store()?;
    let page = stage.web_server()?;
    println!(
        "\ndemo: redis-cli and curl talked to guests under tandem run ({pace}; {page}); all is \
         removed again after {:.1} s",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Where guests of the demonstration live.
struct Stage<'a> {
    workspace: &'a Workspace,
    runtime: TempDir,
}

impl Stage<'_> {
    /// Runs the `kv` guest and talks to it; returns words for its pace.
    fn key_value_store(&self) -> Result<String> {
        let guest = self.start("kv", "256MiB")?;
        println!();
        for (words, answer) in [
            ("PING", "PONG"),
            ("SET greeting hello", "OK"),
            ("GET greeting", "hello"),
            ("INCR visits", "1"),
            ("INCR visits", "2"),
        ] {
            self.ask(words, answer)?;
        }
        let mut pace = String::new();
        for depth in ["1", "16"] {
            pace = self.benchmark(depth)?;
        }
        self.stop("kv", guest)?;
        Ok(pace)
    }

    /// Sends one command by redis-cli and checks the answer.
    fn ask(&self, words: &str, answer: &str) -> Result<()> {
        let mut command = process::command("redis-cli", ["-h", netns::GUEST]);
        let said = process::capture(command.args(words.split(' ')))?;
        println!("  redis-cli {words:<22} {}", said.trim());
        ensure!(
            said.trim() == answer,
            "`{words}` was answered by `{}`, not {answer}",
            said.trim()
        );
        Ok(())
    }

    /// Measures by redis-benchmark with `depth` commands in flight per connection.
    fn benchmark(&self, depth: &str) -> Result<String> {
        let mut command = process::command("redis-benchmark", ["-h", netns::GUEST, "-q"]);
        command.args(["-t", "set,get", "-c", "50", "-n", REQUESTS, "-P", depth]);
        let said = process::capture(&mut command)?;
        // Progress is overwritten by carriage returns; what is last on a line is the result.
        let results = said.lines().filter_map(|line| line.rsplit('\r').next());
        let mut pace = String::new();
        for result in results.map(str::trim).filter(|result| !result.is_empty()) {
            println!("  redis-benchmark -P {depth:<4} {result}");
            pace = result.split(',').next().unwrap_or_default().to_owned();
        }
        ensure!(!pace.is_empty(), "redis-benchmark printed no result");
        Ok(pace)
    }

    /// Runs the `http` guest and fetches pages; returns words for what it served.
    fn web_server(&self) -> Result<String> {
        let guest = self.start("http", "128MiB")?;
        println!();
        let mut words = String::new();
        for (path, size) in [
            ("/", None),
            ("/size/1024", Some(1024)),
            ("/size/4194304", Some(4 << 20)),
        ] {
            words = fetch(path, size)?;
        }
        self.stop("http", guest)?;
        Ok(words)
    }

    /// Starts a guest by name and waits until it serves.
    fn start(&self, name: &str, memory: &str) -> Result<Guest> {
        let image = self.workspace.images().join(name);
        let mut command = self.tandem(&["run", "--name", name, "--memory", memory]);
        command
            .arg("--kernel")
            .arg(image)
            .arg(format!("--net=tap={TAP}"));
        command.args(["--cmdline", netns::GUEST_WORDS]);
        println!("\n$ {}", process::quoted(&command));
        let started = Instant::now();
        let mut guest = Guest::start(&mut command)?;
        guest.wait_for(&format!("{name}: ready"), READY_MAX)?;
        println!(
            "  {name} is ready after {:.0} ms",
            started.elapsed().as_secs_f64() * 1e3
        );
        print!(
            "{}",
            indented(&process::capture(&mut self.tandem(&["list"]))?)
        );
        Ok(guest)
    }

    /// Stops a guest as a user would.
    fn stop(&self, name: &str, guest: Guest) -> Result<()> {
        process::quiet(&mut self.tandem(&["stop", name, "--force"]))?;
        let (status, _) = guest.wait(READY_MAX)?;
        ensure!(status.success(), "tandem run of {name} ended with {status}");
        Ok(())
    }

    fn tandem(&self, arguments: &[&str]) -> Command {
        let mut command = process::command(tandem::program(self.workspace), ["--runtime-dir"]);
        command
            .arg(self.runtime.path())
            .args(arguments)
            .stdin(Stdio::null());
        command
    }
}

/// Fetches a page by curl and checks its size.
fn fetch(path: &str, size: Option<u64>) -> Result<String> {
    let url = format!("http://{}{path}", netns::GUEST);
    let wanted = "%{http_code} %{size_download} bytes in %{time_total} s";
    let mut command = process::command("curl", ["--silent", "--show-error", "--fail"]);
    command.args([
        "--max-time",
        "20",
        "--output",
        "/dev/null",
        "--write-out",
        wanted,
        &url,
    ]);
    let said = process::capture(&mut command)?;
    println!("  curl {url:<34} {said}");
    let words = said.trim_start_matches("200 ").to_owned();
    if let Some(size) = size {
        let expected = format!("200 {size} bytes");
        ensure!(
            said.starts_with(&expected),
            "curl got `{said}`, not {expected}"
        );
    }
    Ok(words)
}

fn indented(text: &str) -> String {
    text.lines().map(|line| format!("  {line}\n")).collect()
}
