//! Descriptions of guests: as a TOML file, and as flags with one argument a line.

use std::path::Path;

use clap::Parser;
use tandem_cli::args::{Cli, Verb};
use tandem_cli::settings::{Settings, file};

/// Most arguments of a command line.
const ARGUMENTS_MAX: usize = 64;

pub(crate) fn run(data: &[u8]) {
    let text = String::from_utf8_lossy(data);
    let (settings, problems) = file::parse(&text);
    for problem in &problems {
        assert!(
            !problem
                .display(Some(Path::new("vm.toml")))
                .to_string()
                .is_empty()
        );
    }
    if problems.is_empty() {
        comes_back(&settings);
    }
    let flags = flags(&text).unwrap_or_default();
    comes_back(&flags);
    launch(settings.merge(flags));
}

/// The settings that lines give as flags, if they are flags.
fn flags(text: &str) -> Option<Settings> {
    let lines = text.lines().take(ARGUMENTS_MAX);
    let cli = Cli::try_parse_from(["tandem", "run"].into_iter().chain(lines)).ok()?;
    match cli.verb {
        Verb::Run(run) => Some(run.settings()),
        _ => None,
    }
}

/// Settings are the same after they were written as a file and read again.
fn comes_back(settings: &Settings) {
    let text = settings.to_string();
    let (again, problems) = file::parse(&text);
    assert!(problems.is_empty(), "{problems:?} in\n{text}");
    assert_eq!(again.to_string(), text);
}

/// Either there is a machine, or it is said why not.
fn launch(settings: Settings) {
    if let Err(problems) = settings.launch("fuzz".to_owned()) {
        assert!(!problems.is_empty());
    }
}
