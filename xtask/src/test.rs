//! `cargo xtask test`: all that a change must pass.
//!
//! One profile serves all: tests and the `tandem` program under test are built by `dev`, which
//! optimises a little, so that no crate is compiled twice and overflow checks and debug assertions
//! are on. Guests are built in release, as they are shipped.

mod ceph;
mod moto;
mod output;
mod report;
mod stage;

use std::env;
use std::process::ExitCode;

use anyhow::{Result, bail};

use crate::setup::{self, Purpose};
use crate::workspace::Workspace;
use report::Report;
use stage::{STAGES, Stage};

/// Which stages to run.
#[derive(Debug, clap::Args)]
pub(crate) struct Arguments {
    /// Only these stages; all by default but `ceph`, which installs a Ceph and runs tests of stores on its file system, and `nfs`,
    /// which runs pairs on emulated hosts whose disk is on NFS.
    #[arg(value_name = "STAGE")]
    stages: Vec<String>,
}

/// Runs the stages and sums up. A test that cannot run here is skipped with its reason; under
/// `CI=true` a skipped test is a failure.
pub(crate) fn run(workspace: &Workspace, arguments: &Arguments) -> Result<ExitCode> {
    let chosen = choose(&arguments.stages)?;
    setup::prepare(Purpose::Test)?;
    let mut report = Report::new(is_ci());
    for stage in chosen {
        println!("{}", report.add(stage.name, stage.run(workspace)?));
    }
    Ok(report.conclude())
}

fn is_ci() -> bool {
    env::var("CI").is_ok_and(|value| value == "true" || value == "1")
}

fn choose(names: &[String]) -> Result<Vec<&'static Stage>> {
    if let Some(unknown) = names
        .iter()
        .find(|name| STAGES.iter().all(|stage| stage.name != **name))
    {
        let known: Vec<&str> = STAGES.iter().map(|stage| stage.name).collect();
        bail!(
            "there is no stage `{unknown}`; there are {}",
            known.join(", ")
        );
    }
    Ok(STAGES
        .iter()
        .filter(|stage| match names {
            [] => stage.by_default,
            names => names.iter().any(|name| name == stage.name),
        })
        .collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_unknown_stage_is_refused_with_the_known_ones() {
        let error = choose(&["clipy".to_owned()]).expect_err("unknown");
        assert!(error.to_string().contains("clippy"), "{error}");
    }

    #[test]
    fn stages_run_in_their_order() {
        let chosen = choose(&["clippy".to_owned(), "format".to_owned()]).expect("known");
        let names: Vec<&str> = chosen.iter().map(|stage| stage.name).collect();
        assert_eq!(names, ["format", "clippy"]);
    }

    #[test]
    fn what_takes_long_is_run_only_where_it_is_named() {
        let names = |chosen: Vec<&Stage>| chosen.iter().any(|stage| stage.name == "ceph");
        assert!(!names(choose(&[]).expect("known")));
        assert!(names(choose(&["ceph".to_owned()]).expect("known")));
    }
}
