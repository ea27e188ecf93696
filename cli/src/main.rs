//! The `tandem` command.

use std::process::ExitCode;
use std::time::Instant;

use clap::Parser;
use tandem_cli::args::Cli;
use tandem_cli::exit::Exit;

fn main() -> ExitCode {
    let started = Instant::now();
    let cli = Cli::parse();
    // A panic has been reported and has let go of everything when it gets here.
    let ended = std::panic::catch_unwind(|| tandem_cli::verbs::dispatch(cli, started));
    ended.unwrap_or(Exit::Internal.into())
}
