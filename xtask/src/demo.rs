//! `cargo xtask demo`: a protected guest serves clients, its primary is killed, and the service carries
//! on.

mod hosts;

use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::Value;
use tempfile::TempDir;

use crate::checking::{Clients, Seen};
use crate::process::Background;
use crate::setup::{self, Purpose};
use crate::workspace::Workspace;
use crate::{images, netns, process, tandem};
use hosts::{Host, TAP};

/// Longest wait for the guest to be protected, or to be taken over.
const PATIENCE: Duration = Duration::from_secs(20);
/// Requests of redis-benchmark: enough that it is at work when the primary is killed.
const REQUESTS: &str = "300000";
/// How long the service is watched before the primary is killed, and after.
const WATCH: Duration = Duration::from_millis(1500);
/// Connections that check every reply.
const CONNECTIONS: usize = 8;
/// The guest.
const NAME: &str = "kv";
const HOST_A: &str = "10.99.0.11";
const HOST_B: &str = "10.99.0.12";
const STANDBY: &str = "10.99.0.12:7000";

/// How to run the demonstration.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Set by the demonstration itself once it is in a network of its own.
    #[arg(long, hide = true)]
    inside: bool,
}

/// Builds what is shown, then shows it in networks of its own.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    if arguments.inside {
        show(workspace)?;
        return Ok(ExitCode::SUCCESS);
    }
    setup::prepare(Purpose::Demo)?;
    if let Err(why) = setup::kvm() {
        anyhow::bail!("the demonstration needs /dev/kvm, which {why}");
    }
    images::run(workspace, &images::Arguments::only(["kv"]))?;
    tandem::build(workspace)?;
    netns::run_again(&["demo", "--inside"])
}

fn show(workspace: &Workspace) -> Result<()> {
    let started = Instant::now();
    hosts::make_network()?;
    let stage = Stage {
        workspace,
        a: Host::new("a", HOST_A)?,
        b: Host::new("b", HOST_B)?,
        directory: tempfile::Builder::new().prefix("tandem-demo-").tempdir()?,
    };
    let told = stage.show()?;
    println!(
        "\ndemo: {told}; all is removed again after {:.1} s",
        started.elapsed().as_secs_f64()
    );
    Ok(())
}

/// Two hosts, and what they share.
struct Stage<'a> {
    workspace: &'a Workspace,
    a: Host,
    b: Host,
    directory: TempDir,
}

impl Stage<'_> {
    fn show(&self) -> Result<String> {
        std::fs::create_dir(self.directory.path().join("shared"))?;
        let mut standby = self.standby()?;
        let mut primary = self.primary()?;
        self.wait_until("a", &mut primary, |status| status["protected"] == true)?;
        println!("\nThe guest is protected:\n{}", self.status("a")?);
        self.ask("SET greeting hello", "OK")?;
        let clients = Clients::start(CONNECTIONS)?;
        let mut load = redis_benchmark();
        println!(
            "\n{CONNECTIONS} connections check every reply; beside them\n$ {}",
            process::quoted(&load)
        );
        let load = Background::start(load.stdout(Stdio::piped()))?;
        std::thread::sleep(WATCH);
        println!("\nThe primary is killed:\n$ kill -9 {}", primary.pid());
        let killed = Instant::now();
        primary.child().kill()?;
        self.wait_until("b", &mut standby, |status| status["role"] == "primary")?;
        let said = finish_load(load)?;
        std::thread::sleep(WATCH);
        let seen: Vec<Seen> = clients.finish().into_iter().collect::<Result<_>>()?;
        println!("\nThe copy has taken over:\n{}", self.status("b")?);
        println!("  redis-benchmark {said}");
        self.ask("GET greeting", "hello")?;
        Ok(account(&seen, killed))
    }

    /// Starts the standby on host b.
    fn standby(&self) -> Result<Background> {
        let mut command = self.tandem("b", &["standby", "--once", "--listen", STANDBY]);
        command.arg("--arbiter").arg(self.arbiter());
        command.args(["--net", &format!("tap={TAP}"), "--console", "off"]);
        println!("\nhost b$ {}", self.shown(&command));
        Background::start(command.stderr(Stdio::null()))
    }

    /// Starts the guest on host a.
    fn primary(&self) -> Result<Background> {
        let mut command = self.tandem("a", &["run", "--name", NAME, "--memory", "256MiB"]);
        command
            .arg("--kernel")
            .arg(self.workspace.images().join("kv"))
            .args(["--cmdline", netns::GUEST_WORDS])
            .args(["--net", &format!("tap={TAP}"), "--console", "off"])
            .args(["--protect", STANDBY, "--arbiter"])
            .arg(self.arbiter());
        println!("host a$ {}", self.shown(&command));
        Background::start(command.stderr(Stdio::null()))
    }

    fn arbiter(&self) -> std::path::PathBuf {
        self.directory.path().join("shared")
    }

    fn tandem(&self, host: &str, arguments: &[&str]) -> Command {
        let on = if host == "a" { &self.a } else { &self.b };
        let mut command = on.command(tandem::program(self.workspace));
        command
            .arg("--runtime-dir")
            .arg(self.directory.path().join(host))
            .args(arguments)
            .stdin(Stdio::null());
        command
    }

    /// A command as a user of the host would type it.
    fn shown(&self, command: &Command) -> String {
        let words = command
            .get_args()
            .skip(5)
            .map(|word| word.to_string_lossy());
        let words: Vec<_> = words.map(|word| word.into_owned()).collect();
        format!("tandem {}", words.join(" "))
    }

    fn status(&self, host: &str) -> Result<String> {
        let said = process::capture(&mut self.tandem(host, &["status", NAME]))?;
        Ok(said.lines().map(|line| format!("  {line}\n")).collect())
    }

    /// Waits until the guest's status on `host`, where `monitor` runs it, is as wanted.
    fn wait_until(
        &self,
        host: &str,
        monitor: &mut Background,
        wanted: impl Fn(&Value) -> bool,
    ) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let said =
                process::capture(&mut self.tandem(host, &["status", NAME, "--format", "json"]));
            let status = said.ok().and_then(|said| serde_json::from_str(&said).ok());
            if status.as_ref().is_some_and(&wanted) {
                return Ok(());
            }
            if let Some(ended) = monitor.poll()? {
                bail!("tandem on host {host} ended with {ended}");
            }
            ensure!(
                Instant::now() < deadline,
                "the guest on host {host} is not as it should be: {status:?}"
            );
            std::thread::sleep(Duration::from_millis(20));
        }
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
}

fn redis_benchmark() -> Command {
    let mut command = process::command("redis-benchmark", ["-h", netns::GUEST, "-q"]);
    command.args(["-t", "set", "-c", "20", "-n", REQUESTS]);
    command.stdin(Stdio::null());
    command
}

/// Waits for redis-benchmark; what it says of its pace.
fn finish_load(mut load: Background) -> Result<String> {
    let output = load.child().stdout.take().context("it has no output")?;
    let said = std::io::read_to_string(output)?;
    let status = load.wait(PATIENCE)?;
    ensure!(
        status.success(),
        "redis-benchmark ended with {status}: {said}"
    );
    let mut lines = said.lines().filter_map(|line| line.rsplit('\r').next());
    let result = lines.find(|line| line.contains("requests per second"));
    Ok(result.unwrap_or("printed no result").trim().to_owned())
}

/// What the clients saw, in a sentence.
fn account(seen: &[Seen], killed: Instant) -> String {
    let replies: u64 = seen.iter().map(|seen| seen.replies).sum();
    let mut blackouts: Vec<_> = seen
        .iter()
        .filter_map(|seen| seen.blackout(killed))
        .collect();
    blackouts.sort_unstable();
    let ms = |at: usize| {
        blackouts
            .get(at)
            .map_or(0.0, |time| time.as_secs_f64() * 1e3)
    };
    format!(
        "a protected guest lost its primary under load and went on: {} connections, {replies} replies, none lost, \
         repeated or wrong; blackout {:.1} ms (median), {:.1} ms (longest)",
        seen.len(),
        ms(blackouts.len() / 2),
        ms(blackouts.len().saturating_sub(1)),
    )
}
