//! How results are printed.

use std::fmt::Write as _;
use std::io::{self, Write as _};
use std::time::Duration;

use bytesize::ByteSize;
use indicatif::{ProgressBar, ProgressStyle};
use serde::Serialize;

/// How often a spinner moves.
const SPIN_INTERVAL: Duration = Duration::from_millis(120);
/// Space between two columns.
const GAP: &str = "  ";

/// Rows under headings, each column as wide as its longest cell.
#[derive(Clone, Debug, Default)]
pub struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with `headings`.
    pub fn new(headings: &[&str]) -> Self {
        let headings = headings.iter().map(|h| (*h).to_owned()).collect();
        Self {
            rows: vec![headings],
        }
    }

    /// Adds a row with a cell per heading.
    pub fn row(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// The table as text.
    pub fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns)
            .map(|i| self.rows.iter().map(|r| width(r.get(i))).max().unwrap_or(0))
            .collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                // Writing to a string cannot fail.
                let _ = write!(line, "{cell:width$}{GAP}");
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }
}

fn width(cell: Option<&String>) -> usize {
    cell.map_or(0, |c| c.chars().count())
}

/// Prints `bytes` to standard output. A reader that went away early (`| head`) is no error.
///
/// # Errors
/// When they cannot be written.
pub fn print(bytes: impl AsRef<[u8]>) -> io::Result<()> {
    let mut out = io::stdout().lock();
    match out.write_all(bytes.as_ref()).and_then(|()| out.flush()) {
        Err(e) if e.kind() == io::ErrorKind::BrokenPipe => Ok(()),
        result => result,
    }
}

/// Prints a line to standard error. If nobody reads it, a guest must not die of it.
pub fn tell(line: &str) {
    let _ = writeln!(io::stderr(), "{line}");
}

/// Prints `value` as JSON, indented, with an end of line.
///
/// # Errors
/// When it cannot be written.
pub fn print_json<T: Serialize>(value: &T) -> io::Result<()> {
    let mut text = serde_json::to_string_pretty(value).map_err(io::Error::other)?;
    text.push('\n');
    print(text)
}

/// Shows on a terminal that something is being done, until the result is finished; nothing
/// elsewhere or if `quiet`.
pub fn spinner(text: &str, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let bar = ProgressBar::new_spinner();
    bar.set_message(text.to_owned());
    bar.enable_steady_tick(SPIN_INTERVAL);
    bar
}

/// Shows on a terminal how many of `total` bytes were read or written, until the result is finished; nothing elsewhere or
/// if `quiet`.
pub fn byte_bar(text: &str, total: u64, quiet: bool) -> ProgressBar {
    if quiet {
        return ProgressBar::hidden();
    }
    let template = "{msg} {wide_bar} {binary_bytes}/{binary_total_bytes}, {binary_bytes_per_sec}";
    let style = ProgressStyle::with_template(template);
    let bar = ProgressBar::new(total);
    bar.set_style(style.unwrap_or_else(|_| ProgressStyle::default_bar()));
    bar.set_message(text.to_owned());
    bar
}

/// Bytes for people, such as `12.3 MiB`.
pub fn bytes(bytes: u64) -> String {
    ByteSize(bytes).display().iec().to_string()
}

/// A number of things, such as `1 checkpoint` or `3 checkpoints`.
pub fn count(number: u64, thing: &str) -> String {
    let plural = if number == 1 { "" } else { "s" };
    format!("{number} {thing}{plural}")
}

/// A time for people, such as `1d 2h`, `3m 20s` or `45s`.
pub fn uptime(ms: u64) -> String {
    let seconds = ms / 1000;
    let (days, hours) = (seconds / 86_400, seconds / 3600 % 24);
    let (minutes, rest) = (seconds / 60 % 60, seconds % 60);
    match (days, hours, minutes) {
        (0, 0, 0) => format!("{rest}s"),
        (0, 0, _) => format!("{minutes}m {rest}s"),
        (0, _, _) => format!("{hours}h {minutes}m"),
        _ => format!("{days}d {hours}h"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["NAME", "STATE"]);
        table.row(vec!["a-long-name".into(), "running".into()]);
        table.row(vec!["ä".into(), String::new()]);
        assert_eq!(
            table.text(),
            "NAME         STATE\na-long-name  running\nä\n"
        );
    }

    #[test]
    fn bytes_have_a_unit_and_one_digit_behind_the_point() {
        assert_eq!(
            [0, 1023, 12_900_000].map(bytes),
            ["0 B", "1023 B", "12.3 MiB"]
        );
    }

    #[test]
    fn uptimes_have_two_units() {
        let texts = [0, 59_999, 200_000, 3_700_000, 94_000_000].map(uptime);
        assert_eq!(texts, ["0s", "59s", "3m 20s", "1h 1m", "1d 2h"]);
    }
}
