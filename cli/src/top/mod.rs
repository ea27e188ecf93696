//! `tandem top`: what guests do, as they do it.
//!
//! ```text
//! runtime directory, API sockets, /proc > sample > rates > model > draw > terminal
//! ```
//!
//! Only `ask`, `process` and `live` touch the outside; the rest is functions of values.

mod ask;
mod draw;
mod figures;
mod history;
mod live;
mod model;
mod once;
mod process;
mod rates;
mod sample;
#[cfg(test)]
mod testing;

use std::io::{self, IsTerminal};
use std::time::Duration;

use crate::args::{Format, TopArgs};
use crate::failure::Failure;
use crate::runtime_dir::Root;
use crate::settings::{Origin, Problem, value};
use crate::signals;

/// Shortest and longest time between two samples.
const INTERVAL: (Duration, Duration) = (Duration::from_millis(100), Duration::from_secs(60));

/// Reads a time between two samples.
///
/// # Errors
/// When it is no time, or out of range.
pub fn interval(text: &str) -> Result<Duration, String> {
    let (shortest, longest) = INTERVAL;
    match value::duration(text) {
        Ok(time) if (shortest..=longest).contains(&time) => Ok(time),
        _ => Err("must be a time such as 500ms or 2s, 100ms to 60s".into()),
    }
}

/// Shows what the guests of `root` do, or one of them: on the terminal until the user ends it, or once.
///
/// # Errors
/// When there is no such guest, or no terminal where one is needed.
pub fn top(root: &Root, args: &TopArgs, format: Format) -> Result<(), Failure> {
    if !args.once {
        check_terminal(format)?;
    }
    let one = args
        .name
        .as_deref()
        .map(|name| root.find(name))
        .transpose()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_io()
        .enable_time()
        .build()
        .map_err(Failure::host("wait for guests"))?;
    if args.once {
        let guests = one.map_or_else(|| root.guests(), |guest| vec![guest]);
        return runtime.block_on(once::once(guests, args.interval, format));
    }
    let signals = signals::catch().map_err(Failure::host("catch signals"))?;
    let shown = live::live(root, args.name.clone(), args.interval, signals);
    runtime
        .block_on(shown)
        .map_err(Failure::host("use the terminal"))
}

/// Whether the guests can be shown as they go.
fn check_terminal(format: Format) -> Result<(), Failure> {
    let reason = if format == Format::Json {
        "is needed with --format json"
    } else if !io::stdin().is_terminal() || !io::stdout().is_terminal() {
        "is needed where standard input and output are not both a terminal"
    } else {
        return Ok(());
    };
    Err(Failure::Settings {
        file: None,
        problems: vec![Problem::new(Origin::Flag, "once", reason)],
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn intervals_have_limits() {
        assert_eq!(interval("100ms"), Ok(Duration::from_millis(100)));
        assert_eq!(interval("1m"), Ok(Duration::from_secs(60)));
        for wrong in ["99ms", "61s", "0s", "1", "x"] {
            assert!(interval(wrong).is_err(), "{wrong}");
        }
    }
}
