//! Verbs that write what is made from the command line's definition: manual pages, completions.

use std::fs;
use std::path::Path;

use clap::CommandFactory;
use clap_complete::Shell;

use crate::args::Cli;
use crate::failure::Failure;
use crate::output;

/// Writes a manual page per verb.
pub(super) fn man(directory: &Path) -> Result<(), Failure> {
    fs::create_dir_all(directory).map_err(Failure::host("make the directory"))?;
    clap_mangen::generate_to(Cli::command(), directory)
        .map_err(Failure::host("write the manual pages"))
}

/// Prints a shell's completions.
pub(super) fn completions(shell: Shell) -> Result<(), Failure> {
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut Cli::command(), "tandem", &mut script);
    output::print(script).map_err(Failure::host("print the completions"))
}
