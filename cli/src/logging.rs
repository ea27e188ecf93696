//! Where the VMM's log goes: a bounded file, and warnings to standard error as well.

use std::fmt;
use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::FileExt;
use std::path::Path;
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
/// Bytes that are copied at a time when the log is set aside.
const COPY_CHUNK: usize = 16 << 10;

/// Logs to `path` from now on, with `old` for the part before; warnings go to standard error too
/// unless `quiet`.
///
/// # Errors
/// When the file cannot be made.
pub fn start(path: &Path, old: &Path, level: LevelFilter, quiet: bool) -> io::Result<()> {
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
///
/// Both files are opened at the start: a thread that logs may be confined and unable to open any. So
/// what is set aside is copied.
struct BoundedFile {
    file: File,
    old: File,
    len: u64,
}

impl BoundedFile {
    fn create(path: &Path, old: &Path) -> io::Result<Self> {
        Ok(Self {
            file: create(path)?,
            old: create(old)?,
            len: 0,
        })
    }

    fn set_aside(&mut self) -> io::Result<()> {
        self.old.set_len(0)?;
        let mut chunk = [0; COPY_CHUNK];
        let mut at = 0;
        while at < self.len {
            let read = self.file.read_at(&mut chunk, at)?;
            if read == 0 {
                break;
            }
            self.old.write_all_at(&chunk[..read], at)?;
            at += read as u64;
        }
        self.file.set_len(0)?;
        self.len = 0;
        Ok(())
    }
}

fn create(path: &Path) -> io::Result<File> {
    File::options()
        .create(true)
        .read(true)
        .write(true)
        .truncate(true)
        .open(path)
}

impl Write for BoundedFile {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if self.len >= LOG_LEN_MAX {
            self.set_aside()?;
        }
        let written = self.file.write_at(bytes, self.len)?;
        self.len += written as u64;
        Ok(written)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_log_is_bounded() {
        let dir = tempfile::tempdir().expect("a directory");
        let (path, old) = (dir.path().join("log"), dir.path().join("old"));
        let mut log = BoundedFile::create(&path, &old).expect("made");
        let line = [b'x'; 1000];
        for _ in 0..3 * LOG_LEN_MAX / 1000 {
            log.write_all(&line).expect("written");
        }
        for file in [path, old] {
            let len = std::fs::metadata(file).expect("there").len();
            assert!(len <= LOG_LEN_MAX + 1000, "{len}");
        }
    }
}
