//! Where the VMM's log goes: a bounded file, and warnings to standard error as well.

use std::fmt;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use tracing::level_filters::LevelFilter;
use tracing::{Event, Level, Subscriber};
use tracing_subscriber::Layer;
use tracing_subscriber::fmt::format::Writer;
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::registry::LookupSpan;

/// Length at which the log is set aside and a new one begun, in bytes; there are two at most.
pub const LOG_LEN_MAX: u64 = 1 << 20;

/// Logs to `path` from now on, with `old` for the part before; warnings go to standard error too
/// unless `quiet`.
///
/// # Errors
/// When the file cannot be made.
pub fn start(path: PathBuf, old: PathBuf, level: LevelFilter, quiet: bool) -> io::Result<()> {
    let file = tracing_subscriber::fmt::layer()
        .with_ansi(false)
        .log_internal_errors(false)
        .with_writer(Mutex::new(BoundedFile::create(path, old)?))
        .with_filter(level);
    let loud = if quiet {
        LevelFilter::ERROR
    } else {
        LevelFilter::WARN
    };
    let stderr = tracing_subscriber::fmt::layer()
        .with_writer(io::stderr)
        .event_format(OneLine)
        .log_internal_errors(false)
        .with_filter(loud.min(level));
    let subscriber = tracing_subscriber::registry().with(file).with(stderr);
    // Only a second guest in one process, as in tests, finds the place taken; it shares the log.
    let _ = tracing::subscriber::set_global_default(subscriber);
    Ok(())
}

/// `tandem: warning: message field=value`.
struct OneLine;

impl<S, N> FormatEvent<S, N> for OneLine
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(
        &self,
        context: &FmtContext<'_, S, N>,
        mut writer: Writer<'_>,
        event: &Event<'_>,
    ) -> fmt::Result {
        let word = match *event.metadata().level() {
            Level::ERROR => "error",
            Level::WARN => "warning",
            _ => "note",
        };
        write!(writer, "tandem: {word}: ")?;
        context
            .field_format()
            .format_fields(writer.by_ref(), event)?;
        writer.write_char('\n')
    }
}

/// A file that is set aside when it gets long, so that no guest can fill the disk with log lines.
struct BoundedFile {
    path: PathBuf,
    old: PathBuf,
    file: File,
    len: u64,
}

impl BoundedFile {
    fn create(path: PathBuf, old: PathBuf) -> io::Result<Self> {
        let file = create(&path)?;
        Ok(Self {
            path,
            old,
            file,
            len: 0,
        })
    }
}

fn create(path: &Path) -> io::Result<File> {
    File::options()
        .create(true)
        .write(true)
        .truncate(true)
        .open(path)
}

impl Write for BoundedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.len >= LOG_LEN_MAX {
            fs::rename(&self.path, &self.old)?;
            self.file = create(&self.path)?;
            self.len = 0;
        }
        let written = self.file.write(bytes)?;
        self.len += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_bounded() {
        let dir = tempfile::tempdir().expect("a directory");
        let (path, old) = (dir.path().join("log"), dir.path().join("old"));
        let mut log = BoundedFile::create(path.clone(), old.clone()).expect("made");
        let line = [b'x'; 1000];
        for _ in 0..3 * LOG_LEN_MAX / 1000 {
            log.write_all(&line).expect("written");
        }
        for file in [path, old] {
            let len = fs::metadata(file).expect("there").len();
            assert!(len <= LOG_LEN_MAX + 1000, "{len}");
        }
    }
}
