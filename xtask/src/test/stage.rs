//! The stages of `cargo xtask test`.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use super::ceph::CephFs;
use super::moto;
use super::output::{self, Counts};
use crate::progress::Step;
use crate::workspace::Workspace;
use crate::{images, interrupt, process};

/// Lines of a failed stage's output that are shown; all of it is in the log.
const SHOWN_MAX: usize = 150;

/// One stage.
#[derive(Debug)]
pub(super) struct Stage {
    /// Its name on the command line and in the report.
    pub(super) name: &'static str,
    /// Whether it is run where no stages are named.
    pub(super) by_default: bool,
    work: fn(&Workspace) -> Result<Work>,
}

/// What a stage does.
enum Work {
    /// Runs commands one after the other.
    Commands(Vec<Command>),
    /// Runs commands while there is such a file system.
    On(CephFs, Vec<Command>),
    /// Was done by the stage itself.
    Done,
    /// Has nothing to do, and says why.
    Absent(&'static str),
}

/// How a stage ended.
#[derive(Debug)]
pub(super) struct Ended {
    /// Whether all of it went well.
    pub(super) success: bool,
    /// Tests that it ran.
    pub(super) counts: Counts,
    /// How long it took.
    pub(super) duration: Duration,
}

/// Longest that tests on Ceph may take, each command of them: what waits for a file system cannot be ended otherwise.
const CEPH_TIME_MAX: Duration = Duration::from_secs(1800);

/// The same of tests on emulated hosts with NFS.
const NFS_TIME_MAX: Duration = Duration::from_secs(1800);

/// What is tested is all that can be built: buckets are no default of the command.
const FEATURES: [&str; 2] = ["--features", "tandem/s3"];

/// All stages, cheap ones first.
pub(super) const STAGES: &[Stage] = &[
    Stage {
        name: "format",
        by_default: true,
        work: format,
    },
    Stage {
        name: "clippy",
        by_default: true,
        work: clippy,
    },
    Stage {
        name: "licences",
        by_default: true,
        work: licences,
    },
    Stage {
        name: "images",
        by_default: true,
        work: build_images,
    },
    Stage {
        name: "tests",
        by_default: true,
        work: tests,
    },
    Stage {
        name: "guests",
        by_default: true,
        work: guests,
    },
    Stage {
        name: "docs",
        by_default: true,
        work: docs,
    },
    Stage {
        name: "ceph",
        by_default: false,
        work: ceph,
    },
    Stage {
        name: "nfs",
        by_default: false,
        work: nfs,
    },
];

impl Stage {
    /// Runs the stage. An error is one of this program or an interrupt, not of what is tested.
    pub(super) fn run(&self, workspace: &Workspace) -> Result<Ended> {
        let started = Instant::now();
        let step = Step::begin(self.name);
        let (success, counts) = match (self.work)(workspace) {
            Ok(Work::Commands(commands)) => self.commands(workspace, commands)?,
            Ok(Work::On(storage, commands)) => {
                let ended = self.commands(workspace, commands)?;
                drop(storage);
                ended
            }
            Ok(Work::Done) => (true, Counts::default()),
            Ok(Work::Absent(why)) => {
                eprintln!("xtask: {}: {why}", self.name);
                (true, Counts::default())
            }
            Err(error) => {
                interrupt::check()?;
                eprintln!("xtask: {}: {error:#}", self.name);
                (false, Counts::default())
            }
        };
        drop(step);
        Ok(Ended {
            success,
            counts,
            duration: started.elapsed(),
        })
    }

    /// Runs all commands, also after one that failed.
    fn commands(&self, workspace: &Workspace, commands: Vec<Command>) -> Result<(bool, Counts)> {
        let log = log_path(workspace, self.name)?;
        let file = File::create(&log).with_context(|| format!("cannot write {}", log.display()))?;
        let mut success = true;
        for mut command in commands {
            command.current_dir(workspace.root()).stdin(Stdio::null());
            command.stdout(file.try_clone()?).stderr(file.try_clone()?);
            success &= process::status(&mut command)?.success();
        }
        let text = String::from_utf8_lossy(&fs::read(&log)?).into_owned();
        if !success {
            show_end(&text, &log);
        }
        Ok((success, output::read(&text)))
    }
}

fn log_path(workspace: &Workspace, name: &str) -> Result<PathBuf> {
    let directory = workspace.target().join("test-logs");
    fs::create_dir_all(&directory)
        .with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory.join(format!("{name}.log")))
}

fn show_end(text: &str, log: &Path) {
    let lines: Vec<&str> = text.lines().collect();
    let from = lines.len().saturating_sub(SHOWN_MAX);
    for line in &lines[from..] {
        eprintln!("{line}");
    }
    eprintln!("xtask: all of it is in {}", log.display());
}

fn cargo(arguments: &[&str]) -> Command {
    let mut command = process::command("cargo", arguments);
    command.env("CARGO_TERM_COLOR", "never");
    command
}

/// The same, which is ended if it takes longer.
fn cargo_within(at_most: Duration, arguments: &[&str]) -> Command {
    let mut command = process::command("timeout", ["--kill-after=10"]);
    command.arg(at_most.as_secs().to_string()).arg("cargo");
    command.args(arguments).env("CARGO_TERM_COLOR", "never");
    command
}

/// The same for the guests' workspace, which has a target directory of its own.
fn guests_cargo(workspace: &Workspace, verb: &[&str], rest: &[&str]) -> Command {
    let mut command = cargo(verb);
    command
        .arg("--manifest-path")
        .arg(workspace.file("guest-images/Cargo.toml"));
    if verb[0] != "fmt" {
        command
            .arg("--target-dir")
            .arg(workspace.target().join("guest-images"));
    }
    command.args(rest);
    command
}

fn format(workspace: &Workspace) -> Result<Work> {
    Ok(Work::Commands(vec![
        cargo(&["fmt", "--all", "--check"]),
        guests_cargo(workspace, &["fmt", "--all"], &["--check"]),
    ]))
}

fn clippy(workspace: &Workspace) -> Result<Work> {
    let strict = ["--", "-D", "warnings"];
    let all = ["clippy", "--locked", "--workspace", "--all-targets"];
    // No runner has it by default.
    let nfs = [
        "clippy",
        "--locked",
        "--package",
        "tandem-tests",
        "--test",
        "nfs",
    ];
    Ok(Work::Commands(vec![
        cargo(&[all.as_slice(), &FEATURES, &strict].concat()),
        cargo(&[&nfs[..], &strict].concat()),
        guests_cargo(workspace, &all, &strict),
    ]))
}

/// Checks licences and sources by `deny.toml`. Installing the checker takes longer than all else
/// here, and what it checks changes seldom.
fn licences(_: &Workspace) -> Result<Work> {
    if process::find("cargo-deny").is_none() {
        return Ok(Work::Absent("cargo-deny is not installed"));
    }
    Ok(Work::Commands(vec![cargo(&[
        "deny",
        "--offline",
        "check",
        "bans",
        "licenses",
        "sources",
    ])]))
}

fn build_images(workspace: &Workspace) -> Result<Work> {
    images::run(workspace, &images::Arguments::default())?;
    Ok(Work::Done)
}

fn tests(workspace: &Workspace) -> Result<Work> {
    let build = ["build", "--locked", "--quiet", "--package", "tandem"];
    let build = cargo(&[&build[..], &FEATURES].concat());
    let mut run = runner([&["--locked", "--workspace"][..], &FEATURES].concat());
    run.env("TANDEM_BIN", workspace.target().join("debug/tandem"));
    run.env("TANDEM_IMAGES", workspace.images());
    if let Some(moto) = moto::server(workspace) {
        run.env("TANDEM_MOTO_SERVER", moto);
    }
    Ok(Work::Commands(vec![
        build,
        run,
        cargo(&[&["test", "--locked", "--workspace", "--doc"][..], &FEATURES].concat()),
    ]))
}

/// What every backend must do, on CephFS by two mounts, and guests whose checkpoints are there.
fn ceph(workspace: &Workspace) -> Result<Work> {
    images::run(workspace, &images::Arguments::only(["kv", "disk", "linux"]))?;
    let storage = CephFs::start(workspace)?;
    let directories = storage.directories()?;
    let build = ["build", "--locked", "--quiet", "--package", "tandem"];
    let build = cargo(&[&build[..], &FEATURES].concat());
    // What is built is what other stages build.
    let test = |words: &[&str]| {
        let test = ["test", "--locked", "--no-fail-fast", "--workspace"];
        let mut run = cargo_within(CEPH_TIME_MAX, &[&test[..], &FEATURES, words].concat());
        run.args(["--nocapture", "--test-threads=1"]);
        run.env("TANDEM_SHARED_DIRECTORIES", &directories);
        run.env("TANDEM_BIN", workspace.target().join("debug/tandem"));
        run.env("TANDEM_IMAGES", workspace.images());
        run
    };
    let contract = test(&["--lib", "--", "tests::contract"]);
    let rounds = test(&["--test", "rounds", "--"]);
    Ok(Work::On(storage, vec![build, contract, rounds]))
}

/// Pairs whose shared disk is on NFS, on emulated hosts.
fn nfs(workspace: &Workspace) -> Result<Work> {
    images::run(workspace, &images::Arguments::only(["linux"]))?;
    let build = ["build", "--locked", "--quiet", "--package", "tandem"];
    let test = [
        "test",
        "--locked",
        "--package",
        "tandem-tests",
        "--test",
        "nfs",
    ];
    let mut run = cargo_within(NFS_TIME_MAX, &test);
    run.args(["--", "--nocapture", "--test-threads=1"]);
    run.env("TANDEM_BIN", workspace.target().join("debug/tandem"));
    run.env("TANDEM_IMAGES", workspace.images());
    let build = cargo(&[&build[..], &FEATURES].concat());
    Ok(Work::Commands(vec![build, run]))
}

/// Tests of the guests' logic that run on the host.
fn guests(workspace: &Workspace) -> Result<Work> {
    let manifest = workspace.file("guest-images/Cargo.toml");
    let target = workspace.target().join("guest-images");
    let run = runner([
        "--locked".as_ref(),
        "--workspace".as_ref(),
        "--manifest-path".as_ref(),
        manifest.as_os_str(),
        "--target-dir".as_ref(),
        target.as_os_str(),
    ]);
    Ok(Work::Commands(vec![run]))
}

fn docs(_: &Workspace) -> Result<Work> {
    let doc = ["doc", "--locked", "--workspace", "--no-deps", "--quiet"];
    let mut command = cargo(&[&doc[..], &FEATURES].concat());
    command.env("RUSTDOCFLAGS", "-D warnings");
    Ok(Work::Commands(vec![command]))
}

/// nextest where it is installed, else cargo's own runner; both print the output of tests that
/// pass, where a test says that it was skipped.
fn runner<S: AsRef<OsStr>>(arguments: impl IntoIterator<Item = S>) -> Command {
    if process::find("cargo-nextest").is_some() {
        let mut command = cargo(&["nextest", "run", "--no-fail-fast", "--color=never"]);
        command.args([
            "--success-output=immediate",
            "--failure-output=immediate-final",
        ]);
        command.arg("--no-tests=pass");
        command.args(arguments);
        return command;
    }
    let mut command = cargo(&["test", "--no-fail-fast", "--lib", "--bins", "--tests"]);
    command.args(arguments).args(["--", "--show-output"]);
    command
}
