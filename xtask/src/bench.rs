//! `cargo xtask bench`: figures of ours beside QEMU's microvm, of the same guest image in the same
//! run, one after the other in turn; under protection, beside QEMU's COLO.
//!
//! The monitor has host CPU 0 with all its threads, clients have CPU 1, and both are in a network
//! namespace of their own.

mod clients;
mod cpu;
mod engine;
mod figures;
mod loads;
mod memory;
mod moves;
mod pace;
mod protect;
mod qmp;
mod resume;
mod rows;
mod state;
mod store;

use std::fs;
use std::process::ExitCode;

use anyhow::{Context, Result, bail};

use crate::progress::Step;
use crate::setup::{self, Purpose};
use crate::workspace::Workspace;
use crate::{images, interrupt, netns, tandem};
use engine::{Bench, Engine};
use figures::Table;
use rows::{ROWS, Row};

/// Measurements of each monitor per row, if nothing else is asked for.
const ROUNDS_DEFAULT: u32 = 5;

/// What to measure.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only these rows; all by default.
    #[arg(value_name = "ROW")]
    rows: Vec<String>,
    /// Measurements of each monitor per row.
    #[arg(long, default_value_t = ROUNDS_DEFAULT, value_parser = clap::value_parser!(u32).range(1..=1000))]
    rounds: u32,
    /// Set by the benchmark itself once it is in a network of its own.
    #[arg(long, hide = true)]
    inside: bool,
}

/// Builds what is measured, then measures in a network of its own.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let chosen = choose(&arguments.rows)?;
    if arguments.inside {
        measure(workspace, &chosen, arguments.rounds)?;
        return Ok(ExitCode::SUCCESS);
    }
    if let Err(error) = setup::prepare(Purpose::Bench) {
        eprintln!("xtask: {error:#}; rows that need them are left out");
    }
    if let Err(why) = setup::kvm() {
        bail!("benchmarks need /dev/kvm, which {why}");
    }
    images::run(workspace, &images::Arguments::default())?;
    tandem::build(workspace)?;
    let rounds = arguments.rounds.to_string();
    let mut again = vec!["bench", "--inside", "--rounds", &rounds];
    again.extend(arguments.rows.iter().map(String::as_str));
    netns::run_again(&again)
}

fn choose(names: &[String]) -> Result<Vec<&'static Row>> {
    if let Some(unknown) = names
        .iter()
        .find(|name| ROWS.iter().all(|row| row.name != **name))
    {
        let known: Vec<&str> = ROWS.iter().map(|row| row.name).collect();
        bail!(
            "there is no row `{unknown}`; there are {}",
            known.join(", ")
        );
    }
    Ok(ROWS
        .iter()
        .filter(|row| names.is_empty() || names.iter().any(|name| name == row.name))
        .collect())
}

fn measure(workspace: &Workspace, rows: &[&Row], rounds: u32) -> Result<()> {
    netns::make_tap(engine::TAP)?;
    state::keep_clients_off_the_monitor()?;
    let bench = Bench::new(workspace)?;
    println!("{}", state::describe());
    let mut table = Table::default();
    for row in rows {
        let step = Step::begin(format!("measure {}", row.name));
        match row.obstacle(&bench) {
            Some(why) => table.leave_out(row.name, &why),
            None => measure_row(&bench, row, rounds, &step, &mut table)?,
        }
        step.done("done");
    }
    println!("\n{table}\n{}", state::describe());
    let path = workspace.target().join("bench.json");
    fs::write(&path, table.json()?).with_context(|| format!("cannot write {}", path.display()))?;
    println!("all samples are in {}", path.display());
    Ok(())
}

/// Measures the engines in turn; who begins alternates.
fn measure_row(
    bench: &Bench,
    row: &Row,
    rounds: u32,
    step: &Step,
    table: &mut Table,
) -> Result<()> {
    for round in 0..rounds {
        let mut engines = bench.engines();
        if round % 2 == 1 {
            engines.reverse();
        }
        for engine in engines {
            interrupt::check()?;
            step.at(&format!("round {} of {rounds}, {engine}", round + 1));
            match (row.measure)(bench, engine) {
                Ok(samples) => table.add(row.name, engine, samples),
                Err(error) => table.fail(row.name, engine, &error),
            }
            for remark in bench.take_remarks() {
                table.note(row.name, &remark);
            }
        }
    }
    if bench.engines() == [Engine::Tandem] {
        table.note(row.name, "peer not installed");
    }
    Ok(())
}
