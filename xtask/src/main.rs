//! Tasks of the workspace, run as `cargo xtask TASK`: what is not a test and not the program.

mod bench;
mod checking;
mod demo;
mod dist;
mod guest;
mod images;
mod interrupt;
mod netns;
mod process;
mod progress;
mod setup;
mod tandem;
mod test;
mod workspace;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, Subcommand};

use workspace::Workspace;

/// Build, test, demonstrate and measure Tandem.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", version)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

#[derive(Debug, Subcommand)]
enum Task {
    /// Measure ours beside QEMU's microvm: same guest image, same run.
    Bench(bench::Arguments),
    /// Show guests under `tandem run` that clients on this host talk to.
    Demo(demo::Arguments),
    /// Write manual pages and shell completions into target/dist.
    Dist,
    /// Build the guest images into target/images.
    Images(images::Arguments),
    /// Install the Debian packages that the tasks need, and say what this machine has.
    Setup,
    /// Check format and lints, build everything and run all tests.
    Test(test::Arguments),
}

fn main() -> ExitCode {
    match run(Arguments::parse()) {
        Ok(code) => code,
        Err(error) => {
            eprintln!("xtask: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: Arguments) -> Result<ExitCode> {
    interrupt::install()?;
    let workspace = Workspace::locate()?;
    match arguments.task {
        Task::Bench(chosen) => bench::run(&workspace, &chosen),
        Task::Dist => dist::run(&workspace).map(|()| ExitCode::SUCCESS),
        Task::Demo(chosen) => demo::run(&workspace, &chosen),
        Task::Images(chosen) => images::run(&workspace, &chosen).map(|()| ExitCode::SUCCESS),
        Task::Setup => setup::run().map(|()| ExitCode::SUCCESS),
        Task::Test(chosen) => test::run(&workspace, &chosen),
    }
}
