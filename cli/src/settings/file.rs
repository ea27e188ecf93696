//! Reads a guest's TOML file, and finds all that is wrong in it rather than the first thing.
//!
//! Keys are those of `tandem run`'s flags; `[[disk]]`, `[[net]]` and `[vsock]` are tables with the
//! parts of the flags of the same name. Relative paths are relative to the file's directory.

use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};

use tandem_vmm::config::{DiskConfig, DiskEngine, NetBackendConfig, NetConfig, Pace, VsockConfig};
use toml::Spanned;
use toml::de::{DeTable, DeValue};

use super::value::{self, ValueError};
use super::{DiskSetting, Located, NetSetting, Origin, Problem, Settings};

/// Longest file that is read, in bytes. Finding the place of each value takes time that grows with
/// the square of it.
pub const FILE_LEN_MAX: u64 = 64 << 10;
/// Least likeness (0 to 1) of an unknown key to a known one for it to be suggested.
const LIKENESS_MIN: f64 = 0.75;

/// Why a file could not be read at all.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// It cannot be opened or read.
    #[error("cannot read `{}`", .0.display())]
    Read(PathBuf, #[source] std::io::Error),
    /// It is too long to be a description of a guest.
    #[error("`{}` is longer than {FILE_LEN_MAX} bytes, which no description of a guest is", .0.display())]
    TooLong(PathBuf),
}

/// Reads the file at `path`: what could be understood, and the problems.
///
/// # Errors
/// When the file cannot be read.
pub fn read(path: &Path) -> Result<(Settings, Vec<Problem>), FileError> {
    let fail = |e| FileError::Read(path.to_owned(), e);
    let mut text = String::new();
    let file = File::open(path).map_err(fail)?;
    file.take(FILE_LEN_MAX + 1)
        .read_to_string(&mut text)
        .map_err(fail)?;
    if text.len() as u64 > FILE_LEN_MAX {
        return Err(FileError::TooLong(path.to_owned()));
    }
    let (mut settings, problems) = parse(&text);
    if let Some(directory) = path.parent().filter(|d| !d.as_os_str().is_empty()) {
        settings.rebase(directory);
    }
    Ok((settings, problems))
}

/// Reads a file's text; paths stay as they are.
pub fn parse(text: &str) -> (Settings, Vec<Problem>) {
    let (table, errors) = DeTable::parse_recoverable(text);
    let mut problems: Vec<Problem> = errors.iter().map(|e| syntax(text, e)).collect();
    problems.sort_by_key(|p| p.at);
    problems.dedup_by_key(|p| line(p.at));
    let broken: Vec<_> = problems.iter().map(|p| line(p.at)).collect();
    let mut root = Section::new("", table.get_ref(), Origin::Absent, text, &mut problems);
    let settings = settings(&mut root);
    root.finish();
    // The parser makes values up where the text is broken; nothing else is said of such a line.
    problems.retain(|p| p.key.is_empty() || !broken.contains(&line(p.at)));
    problems.sort_by_key(|p| p.at);
    (settings, problems)
}

fn syntax(text: &str, error: &toml::de::Error) -> Problem {
    let at = error
        .span()
        .map_or(Origin::Absent, |span| place(text, span.start));
    Problem::new(at, "", format!("not TOML: {}", error.message()))
}

fn line(at: Origin) -> Option<usize> {
    match at {
        Origin::File { line, .. } => Some(line),
        Origin::Absent | Origin::Flag => None,
    }
}

/// Line and column of the byte at `offset`.
fn place(text: &str, offset: usize) -> Origin {
    let before = text.get(..offset).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |i| i + 1);
    Origin::File {
        line: before.matches('\n').count() + 1,
        column: before[line_start..].chars().count() + 1,
    }
}

fn settings(root: &mut Section<'_, '_>) -> Settings {
    Settings {
        name: root.text("name", value::name),
        kernel: root.text("kernel", value::path),
        initrd: root.text("initrd", value::path),
        cmdline: root.text("cmdline", value::cmdline),
        boot: root.text("boot", value::boot),
        acpi: root.boolean("acpi"),
        cpus: root.number("cpus", value::cpus),
        memory: root.text("memory", value::memory),
        hugepages: root.boolean("hugepages"),
        console: root.text("console", value::console),
        virtio_console: root.boolean("virtio-console"),
        rng_seed: root.number("rng-seed", value::rng_seed),
        no_reboot: root.boolean("no-reboot"),
        pin: root.numbers("pin", value::host_cpu),
        realtime: root.number("realtime", value::realtime),
        api: root.text("api", value::socket_path),
        log_level: root.text("log-level", value::log_level),
        confine: root.text("confine", value::confine),
        user: root.text("user", value::user),
        protect: root.texts("protect", value::addresses, 1),
        arbiter: root.text("arbiter", value::path),
        resync: root.text("resync", value::resync),
        mode: root.text("mode", value::mode),
        latency_budget: root.text("latency-budget", value::latency_budget),
        tls: root.text("tls", value::path),
        checkpoint: root.text("checkpoint", value::store),
        every: root.text("every", value::every),
        commit: root.boolean("commit"),
        store_key: root.text("store-key", value::path),
        disks: root.tables("disk", disk),
        nets: root.tables("net", net),
        vsock: root.table("vsock", vsock),
    }
}

fn disk(section: &mut Section<'_, '_>) -> Option<DiskSetting> {
    let path = section.text("path", value::path);
    let id = section.text("id", value::disk_id);
    let readonly = section.boolean("readonly");
    let direct = section.boolean("direct");
    let shared = section.boolean("shared");
    let redo = section.text("redo", value::path);
    let engine = section.text("engine", value::engine);
    let pace = section.pace();
    section.require("path");
    let path = path?;
    Some(DiskSetting {
        path_at: path.at,
        id_at: id.as_ref().map_or(Origin::Absent, |id| id.at),
        config: DiskConfig {
            path: path.value,
            readonly: readonly.is_some_and(|v| v.value),
            id: id.map(|id| id.value),
            direct: direct.is_some_and(|v| v.value),
            shared: shared.is_some_and(|v| v.value),
            redo: redo.map(|v| v.value),
            engine: engine.map_or(DiskEngine::Auto, |v| v.value),
            pace,
        },
    })
}

fn net(section: &mut Section<'_, '_>) -> Option<NetSetting> {
    let tap = section.text("tap", value::tap);
    let socket = section.text("socket", value::socket_path);
    let mac = section.text("mac", value::mac);
    let pace = section.pace();
    if section.has("tap") == section.has("socket") {
        let at = section.at;
        section.problem(at, "net", "must have `tap` or `socket`, and not both");
        return None;
    }
    let (backend, backend_at) = match (tap, socket) {
        (Some(tap), _) => (NetBackendConfig::Tap(tap.value), tap.at),
        (None, socket) => {
            let socket = socket?;
            (NetBackendConfig::Socket(socket.value), socket.at)
        }
    };
    Some(NetSetting {
        backend_at,
        mac_at: mac.as_ref().map_or(Origin::Absent, |mac| mac.at),
        config: NetConfig {
            backend,
            mac: mac.map(|mac| mac.value),
            pace,
        },
    })
}

/// A pace by its values: a profile, of which others than given are kept, and lists of safepoints.
fn pace_table(section: &mut Section<'_, '_>) -> Option<Pace> {
    let profile = section.text("profile", value::pace);
    let mut pace = profile.map(|p| p.value).unwrap_or_default();
    let mut set = |section: &mut Section<'_, '_>, key, at, text: &str| {
        let result = pace.set(key, text);
        section.keep(key, at, text, result.map_err(Into::into));
    };
    for key in Pace::NUMBERS {
        if let Some(number) = section.number(key, value::pace_number) {
            set(section, key, number.at, &number.value.to_string());
        }
    }
    if let Some(coalesce) = section.boolean(Pace::COALESCE) {
        set(
            section,
            Pace::COALESCE,
            coalesce.at,
            &coalesce.value.to_string(),
        );
    }
    if let Some(kinds) = section.texts(Pace::SAFEPOINTS, value::safepoint, 0) {
        let names: Vec<&str> = kinds.value.iter().map(|kind| kind.name()).collect();
        set(section, Pace::SAFEPOINTS, kinds.at, &names.join("/"));
    }
    Some(pace)
}

fn vsock(section: &mut Section<'_, '_>) -> Option<VsockConfig> {
    let cid = section.number("cid", value::cid);
    let path = section.text("path", value::socket_path);
    section.require("cid");
    section.require("path");
    Some(VsockConfig {
        cid: cid?.value,
        path: path?.value,
    })
}

/// One table of the file. It remembers which keys it was asked for: those are the allowed ones.
struct Section<'a, 'i> {
    name: &'static str,
    table: &'a DeTable<'i>,
    at: Origin,
    text: &'a str,
    known: Vec<&'static str>,
    problems: &'a mut Vec<Problem>,
}

impl<'a, 'i> Section<'a, 'i> {
    fn new(
        name: &'static str,
        table: &'a DeTable<'i>,
        at: Origin,
        text: &'a str,
        problems: &'a mut Vec<Problem>,
    ) -> Self {
        let known = Vec::new();
        Self {
            name,
            table,
            at,
            text,
            known,
            problems,
        }
    }

    fn problem(&mut self, at: Origin, key: &str, message: impl Into<String>) {
        self.problems.push(Problem::new(at, key, message));
    }

    fn path(&self, key: &str) -> String {
        match self.name {
            "" => key.to_owned(),
            name => format!("{name}.{key}"),
        }
    }

    fn has(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    fn require(&mut self, key: &'static str) {
        if !self.has(key) {
            let path = self.path(key);
            self.problem(self.at, &path, "missing");
        }
    }

    fn get(&mut self, key: &'static str) -> Option<(&'a DeValue<'i>, Origin)> {
        self.known.push(key);
        let value: &'a Spanned<DeValue<'i>> = self.table.get(key)?;
        Some((value.get_ref(), place(self.text, value.span().start)))
    }

    fn keep<T>(
        &mut self,
        key: &str,
        at: Origin,
        shown: &str,
        result: Result<T, ValueError>,
    ) -> Option<Located<T>> {
        match result {
            Ok(value) => Some(Located { value, at }),
            Err(error) => {
                let path = self.path(key);
                self.problem(at, &path, format!("`{shown}` is not allowed: {error}"));
                None
            }
        }
    }

    fn wrong_type(&mut self, key: &str, at: Origin, wanted: &str, found: &DeValue<'_>) {
        let path = self.path(key);
        let message = format!("must be {wanted}, not {}", kind(found));
        self.problem(at, &path, message);
    }

    fn text<T>(
        &mut self,
        key: &'static str,
        parse: fn(&str) -> Result<T, ValueError>,
    ) -> Option<Located<T>> {
        match self.get(key)? {
            (DeValue::String(text), at) => self.keep(key, at, text, parse(text)),
            (other, at) => {
                self.wrong_type(key, at, "text in quotes", other);
                None
            }
        }
    }

    fn number<T>(
        &mut self,
        key: &'static str,
        parse: fn(&str) -> Result<T, ValueError>,
    ) -> Option<Located<T>> {
        match self.get(key)? {
            (value @ DeValue::Integer(_), at) => {
                let text = decimal(value);
                self.keep(key, at, &text, parse(&text))
            }
            (other, at) => {
                self.wrong_type(key, at, "a whole number", other);
                None
            }
        }
    }

    fn boolean(&mut self, key: &'static str) -> Option<Located<bool>> {
        match self.get(key)? {
            (DeValue::Boolean(value), at) => Some(Located { value: *value, at }),
            (other, at) => {
                self.wrong_type(key, at, "`true` or `false`", other);
                None
            }
        }
    }

    fn numbers<T>(
        &mut self,
        key: &'static str,
        parse: fn(&str) -> Result<T, ValueError>,
    ) -> Option<Located<Vec<T>>> {
        let (value, at) = self.get(key)?;
        let DeValue::Array(items) = value else {
            self.wrong_type(key, at, "a list of whole numbers, such as [0, 1]", value);
            return None;
        };
        let mut numbers = Vec::new();
        for item in items.iter() {
            let at = place(self.text, item.span().start);
            let DeValue::Integer(_) = item.get_ref() else {
                self.wrong_type(key, at, "a list of whole numbers", item.get_ref());
                return None;
            };
            let text = decimal(item.get_ref());
            numbers.push(self.keep(key, at, &text, parse(&text))?.value);
        }
        Some(Located { value: numbers, at })
    }

    /// One text, or a list of them, at least so many.
    fn texts<T>(
        &mut self,
        key: &'static str,
        parse: fn(&str) -> Result<T, ValueError>,
        least: usize,
    ) -> Option<Located<Vec<T>>> {
        const WANTED: &str = "text in quotes, or a list of such";
        let (value, at) = self.get(key)?;
        let items = match value {
            DeValue::String(text) => {
                let one = self.keep(key, at, text, parse(text))?;
                let value = vec![one.value];
                return Some(Located { value, at });
            }
            DeValue::Array(items) if items.len() >= least => items,
            other => {
                self.wrong_type(key, at, WANTED, other);
                return None;
            }
        };
        let mut texts = Vec::new();
        for item in items.iter() {
            let at = place(self.text, item.span().start);
            let DeValue::String(text) = item.get_ref() else {
                self.wrong_type(key, at, WANTED, item.get_ref());
                return None;
            };
            texts.push(self.keep(key, at, text, parse(text))?.value);
        }
        Some(Located { value: texts, at })
    }

    fn table<T>(
        &mut self,
        key: &'static str,
        read: fn(&mut Section<'_, '_>) -> Option<T>,
    ) -> Option<Located<T>> {
        let (value, at) = self.get(key)?;
        let DeValue::Table(table) = value else {
            self.wrong_type(key, at, &format!("a table, `[{key}]`"), value);
            return None;
        };
        let value = self.section(key, table, at, read)?;
        Some(Located { value, at })
    }

    fn tables<T>(
        &mut self,
        key: &'static str,
        read: fn(&mut Section<'_, '_>) -> Option<T>,
    ) -> Vec<T> {
        let Some((value, at)) = self.get(key) else {
            return Vec::new();
        };
        let wanted = format!("tables, `[[{key}]]` each");
        let DeValue::Array(items) = value else {
            self.wrong_type(key, at, &wanted, value);
            return Vec::new();
        };
        let mut values = Vec::new();
        for item in items.iter() {
            let at = place(self.text, item.span().start);
            match item.get_ref() {
                DeValue::Table(table) => values.extend(self.section(key, table, at, read)),
                other => self.wrong_type(key, at, &wanted, other),
            }
        }
        values
    }

    fn section<T>(
        &mut self,
        name: &'static str,
        table: &DeTable<'_>,
        at: Origin,
        read: fn(&mut Section<'_, '_>) -> Option<T>,
    ) -> Option<T> {
        let mut section = Section::new(name, table, at, self.text, self.problems);
        let value = read(&mut section);
        section.finish();
        value
    }

    /// How a device is paced: text, or a table of values; none if nothing is said.
    fn pace(&mut self) -> Pace {
        const KEY: &str = "pace";
        match self.get(KEY) {
            None => None,
            Some((DeValue::String(text), at)) => {
                let pace = self.keep(KEY, at, text, value::pace(text));
                pace.map(|pace| pace.value)
            }
            Some((DeValue::Table(table), at)) => self.section(KEY, table, at, pace_table),
            Some((other, at)) => {
                self.wrong_type(KEY, at, "text in quotes, or a table of values", other);
                None
            }
        }
        .unwrap_or_default()
    }

    /// Reports the keys that nobody asked for.
    fn finish(self) {
        for key in self.table.keys() {
            let name: &str = key.get_ref();
            if self.known.contains(&name) {
                continue;
            }
            let at = place(self.text, key.span().start);
            let message = unknown(name, &self.known);
            self.problems
                .push(Problem::new(at, self.path(name), message));
        }
    }
}

fn unknown(key: &str, known: &[&str]) -> String {
    let key = key.to_ascii_lowercase().replace('_', "-");
    let near = known
        .iter()
        .map(|k| (strsim::jaro_winkler(&key, k), k))
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .filter(|(likeness, _)| *likeness >= LIKENESS_MIN);
    let hint = near.map_or(String::new(), |(_, k)| format!(", did you mean `{k}`?"));
    let end = if hint.is_empty() { ";" } else { "" };
    format!("unknown{hint}{end} allowed keys: {}", known.join(", "))
}

fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "text",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a number with a fraction",
        DeValue::Boolean(_) => "`true` or `false`",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// An integer's text in base ten; the text as it stands where it does not fit 128 bits.
fn decimal(value: &DeValue<'_>) -> String {
    let Some(integer) = value.as_integer() else {
        return String::new();
    };
    i128::from_str_radix(integer.as_str(), integer.radix())
        .map_or_else(|_| integer.to_string(), |n| n.to_string())
}
