//! Single values as users write them: each has one parser, used by the flags and by the file.
//!
//! A parser's error says what is allowed; whoever calls it says which key and which text.

use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

use bytesize::ByteSize;
use tandem_ft::mode::{Choice, LATENCY_BUDGET_MAX, LATENCY_BUDGET_MIN};
use tandem_ft::runtime::ResyncMode;
use tandem_vmm::config::{
    BootProtocol, CPUS_MAX, ConsoleConfig, DISK_ID_LEN_MAX, DiskConfig, DiskEngine, MEMORY_ALIGN,
    MEMORY_MIN, MacAddr, NAME_LEN_MAX, NetBackendConfig, NetConfig, Pace, PaceError, Safepoint,
    Safepoints, VsockConfig,
};
use tandem_vmm::confinement::{Enforcement, User};
use tandem_vmm::migration::{Address, Addresses, MigrationError};
use tracing::level_filters::LevelFilter;

mod stores;

pub use stores::{Chosen, checkpoint, every, every_text, interval, keep, percent, store};

/// Longest kernel command line, in bytes.
pub const CMDLINE_LEN_MAX: usize = 2047;
/// Longest path of a unix socket, in bytes (`sun_path` holds 108 with the final zero).
pub const SOCKET_PATH_LEN_MAX: usize = 107;
/// Longest name of a network interface, in bytes (IFNAMSIZ holds 16 with the final zero).
pub const TAP_NAME_LEN_MAX: usize = 15;
/// Longest time that a flag may give.
pub const DURATION_MAX: Duration = Duration::from_secs(24 * 60 * 60);
const CID_MIN: u32 = 3;
const CID_MAX: u32 = u32::MAX - 1;

/// A value that is not allowed; the text says what is.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{0}")]
pub struct ValueError(String);

fn allowed<T>(text: impl Into<String>) -> Result<T, ValueError> {
    Err(ValueError(text.into()))
}

/// Name of a guest.
///
/// # Errors
/// When it is empty, too long, or has other characters than a name may have.
pub fn name(text: &str) -> Result<String, ValueError> {
    let fits = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if text.is_empty()
        || text.len() > NAME_LEN_MAX
        || text.starts_with(['.', '-'])
        || !text.chars().all(fits)
    {
        return allowed(format!(
            "must be 1 to {NAME_LEN_MAX} letters, digits, `-`, `_` or `.`, the first not `-` or `.`"
        ));
    }
    Ok(text.to_owned())
}

/// Path of a file.
///
/// # Errors
/// When it is empty or has a zero byte.
pub fn path(text: &str) -> Result<PathBuf, ValueError> {
    if text.is_empty() || text.contains('\0') {
        return allowed("must be the path of a file");
    }
    Ok(PathBuf::from(text))
}

/// Path of a unix socket.
///
/// # Errors
/// When it is empty or longer than the kernel's limit.
pub fn socket_path(text: &str) -> Result<PathBuf, ValueError> {
    if text.len() > SOCKET_PATH_LEN_MAX {
        return allowed(format!(
            "must be the path of a unix socket of at most {SOCKET_PATH_LEN_MAX} bytes"
        ));
    }
    path(text)
}

/// Kernel command line.
///
/// # Errors
/// When it is too long or has a zero byte.
pub fn cmdline(text: &str) -> Result<String, ValueError> {
    if text.len() > CMDLINE_LEN_MAX || text.contains('\0') {
        return allowed(format!(
            "must be text of at most {CMDLINE_LEN_MAX} bytes without a zero byte"
        ));
    }
    Ok(text.to_owned())
}

/// Number of vCPUs.
///
/// # Errors
/// When it is no number or out of range.
pub fn cpus(text: &str) -> Result<u8, ValueError> {
    match text.parse() {
        Ok(n) if (1..=CPUS_MAX).contains(&n) => Ok(n),
        _ => allowed(format!("must be a whole number from 1 to {CPUS_MAX}")),
    }
}

/// Guest memory, in bytes.
///
/// # Errors
/// When it is no size, too small, or not a multiple of [`MEMORY_ALIGN`].
pub fn memory(text: &str) -> Result<u64, ValueError> {
    match ByteSize::from_str(text) {
        Ok(ByteSize(bytes)) if bytes >= MEMORY_MIN && bytes.is_multiple_of(MEMORY_ALIGN) => {
            Ok(bytes)
        }
        _ => allowed(format!(
            "must be a size such as 512MiB or 2GiB, at least {} and a multiple of {}",
            size(MEMORY_MIN),
            size(MEMORY_ALIGN)
        )),
    }
}

/// `bytes` in the largest unit that divides it, as [`memory`] reads it.
pub fn size(bytes: u64) -> String {
    let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
    for (shift, unit) in units {
        if bytes != 0 && bytes.is_multiple_of(1 << shift) {
            return format!("{}{unit}", bytes >> shift);
        }
    }
    format!("{bytes}B")
}

/// `true` or `false`.
///
/// # Errors
/// On any other text.
pub fn boolean(text: &str) -> Result<bool, ValueError> {
    text.parse()
        .or_else(|_| allowed("must be `true` or `false`"))
}

/// Entry protocol.
///
/// # Errors
/// When there is no protocol of this name.
pub fn boot(text: &str) -> Result<BootProtocol, ValueError> {
    match text {
        "auto" => Ok(BootProtocol::Auto),
        "pvh" => Ok(BootProtocol::Pvh),
        "linux64" => Ok(BootProtocol::Linux64),
        _ => allowed("must be `auto`, `pvh` or `linux64`"),
    }
}

/// The text of a protocol, as [`boot`] reads it.
pub fn boot_text(protocol: BootProtocol) -> &'static str {
    match protocol {
        BootProtocol::Auto => "auto",
        BootProtocol::Pvh => "pvh",
        BootProtocol::Linux64 => "linux64",
    }
}

/// Where the serial console goes.
///
/// # Errors
/// When it is none of the allowed forms.
pub fn console(text: &str) -> Result<ConsoleConfig, ValueError> {
    match text.split_once('=') {
        None if text == "stdio" => Ok(ConsoleConfig::Stdio),
        None if text == "off" => Ok(ConsoleConfig::Off),
        Some(("file", file)) if !file.is_empty() => Ok(ConsoleConfig::File(path(file)?)),
        _ => allowed("must be `stdio`, `off` or `file=PATH`"),
    }
}

/// The text of a console, as [`console`] reads it.
pub fn console_text(console: &ConsoleConfig) -> String {
    match console {
        ConsoleConfig::Stdio => "stdio".into(),
        ConsoleConfig::Off => "off".into(),
        ConsoleConfig::File(path) => format!("file={}", path.display()),
    }
}

/// Seed of the entropy device.
///
/// # Errors
/// When it is no number of 64 bits.
pub fn rng_seed(text: &str) -> Result<u64, ValueError> {
    text.parse()
        .or_else(|_| allowed("must be a whole number from 0 to 2^64-1"))
}

/// Real-time priority.
///
/// # Errors
/// When it is no number from 1 to 99.
pub fn realtime(text: &str) -> Result<u8, ValueError> {
    match text.parse() {
        Ok(n @ 1..=99) => Ok(n),
        _ => allowed("must be a whole number from 1 to 99"),
    }
}

/// Number of a host CPU.
///
/// # Errors
/// When it is no number.
pub fn host_cpu(text: &str) -> Result<usize, ValueError> {
    text.trim()
        .parse()
        .or_else(|_| allowed("must be the numbers of host CPUs, one for each vCPU"))
}

/// Numbers of host CPUs, separated by commas.
///
/// # Errors
/// When one of them is no number.
pub fn pin(text: &str) -> Result<Vec<usize>, ValueError> {
    text.split(',').map(host_cpu).collect()
}

/// How much is logged.
///
/// # Errors
/// When there is no level of this name.
pub fn log_level(text: &str) -> Result<LevelFilter, ValueError> {
    match text {
        "off" | "error" | "warn" | "info" | "debug" | "trace" => text
            .parse()
            .map_err(|_| ValueError("must be a level".into())),
        _ => allowed("must be `off`, `error`, `warn`, `info`, `debug` or `trace`"),
    }
}

/// What happens when the VMM asks its host for what it should not.
///
/// # Errors
/// On any other text than the allowed ones.
pub fn confine(text: &str) -> Result<Enforcement, ValueError> {
    match text {
        "on" => Ok(Enforcement::On),
        "log" => Ok(Enforcement::Log),
        "off" => Ok(Enforcement::Off),
        _ => allowed("must be `on`, `log` or `off`"),
    }
}

/// The text of an enforcement, as [`confine`] reads it.
pub fn confine_text(enforcement: Enforcement) -> &'static str {
    match enforcement {
        Enforcement::On => "on",
        Enforcement::Log => "log",
        Enforcement::Off => "off",
    }
}

/// How many guests a standby takes at once.
///
/// # Errors
/// When it is no such number.
pub fn guests_max(text: &str) -> Result<usize, ValueError> {
    let most = crate::reception::GUESTS_MAX;
    match text.parse() {
        Ok(number) if (1..=most).contains(&number) => Ok(number),
        _ => allowed(format!("must be 1 to {most}")),
    }
}

/// What of a resync a protected guest waits for.
///
/// # Errors
/// On any other text than the allowed ones.
pub fn resync(text: &str) -> Result<ResyncMode, ValueError> {
    match text {
        "running" => Ok(ResyncMode::Running),
        "stopped" => Ok(ResyncMode::Stopped),
        _ => allowed("must be `running` or `stopped`"),
    }
}

/// How a guest is protected.
///
/// # Errors
/// On any other text than the allowed ones.
pub fn mode(text: &str) -> Result<Choice, ValueError> {
    match Choice::ALL.into_iter().find(|choice| choice.name() == text) {
        Some(choice) => Ok(choice),
        None => allowed("must be `auto`, `lockstep` or `checkpoint`"),
    }
}

/// How long outputs may wait for a checkpoint.
///
/// # Errors
/// When it is no time, or out of range.
pub fn latency_budget(text: &str) -> Result<Duration, ValueError> {
    match duration(text) {
        Ok(time) if (LATENCY_BUDGET_MIN..=LATENCY_BUDGET_MAX).contains(&time) => Ok(time),
        _ => allowed("must be a time from 1ms to 1s, such as 10ms"),
    }
}

/// The text of a budget, as [`latency_budget`] reads it.
pub fn latency_budget_text(time: Duration) -> String {
    format!("{}ms", time.as_millis())
}

/// A user, and its group if it is not the user's own, by names or numbers.
///
/// # Errors
/// When there is no such user or group, or it is the superuser.
pub fn user(text: &str) -> Result<User, ValueError> {
    let user = match text.split_once(':') {
        Some((user, group)) => User {
            uid: match user.parse() {
                Ok(uid) => uid,
                Err(_) => known_user(user)?.uid,
            },
            gid: group_by(group)?,
        },
        None => known_user(text)?,
    };
    if user.uid == 0 {
        return allowed("must be another user than the superuser");
    }
    Ok(user)
}

/// A user that the host knows, with its own group.
fn known_user(text: &str) -> Result<User, ValueError> {
    let found = match text.parse::<u32>() {
        Ok(uid) => nix::unistd::User::from_uid(uid.into()),
        Err(_) => nix::unistd::User::from_name(text),
    };
    match found {
        Ok(Some(user)) => Ok(User {
            uid: user.uid.as_raw(),
            gid: user.gid.as_raw(),
        }),
        Ok(None) => allowed(
            "must be USER[:GROUP] by names or numbers, with the group if the host does not know the user",
        ),
        Err(error) => allowed(format!("cannot be looked up: {error}")),
    }
}

/// Number of a group.
fn group_by(text: &str) -> Result<u32, ValueError> {
    if let Ok(gid) = text.parse() {
        return Ok(gid);
    }
    match nix::unistd::Group::from_name(text) {
        Ok(Some(group)) => Ok(group.gid.as_raw()),
        Ok(None) => allowed("must be USER[:GROUP], and there is no such group"),
        Err(error) => allowed(format!("cannot be looked up: {error}")),
    }
}

/// The text of a user, as [`user`] reads it.
pub fn user_text(user: User) -> String {
    format!("{}:{}", user.uid, user.gid)
}

/// Identifier of a disk.
///
/// # Errors
/// When it is empty, too long, or not printable ASCII without commas.
pub fn disk_id(text: &str) -> Result<String, ValueError> {
    let fits = |b: u8| b.is_ascii_graphic() && b != b',';
    if text.is_empty() || text.len() > DISK_ID_LEN_MAX || !text.bytes().all(fits) {
        return allowed(format!(
            "must be 1 to {DISK_ID_LEN_MAX} printable ASCII characters other than space and comma"
        ));
    }
    Ok(text.to_owned())
}

/// How a disk's requests reach the host kernel.
///
/// # Errors
/// When there is no engine of this name.
pub fn engine(text: &str) -> Result<DiskEngine, ValueError> {
    match text {
        "auto" => Ok(DiskEngine::Auto),
        "uring" => Ok(DiskEngine::Uring),
        "threads" => Ok(DiskEngine::Threads),
        _ => allowed("must be `auto`, `uring` or `threads`"),
    }
}

/// The text of an engine, as [`engine`] reads it.
pub fn engine_text(engine: DiskEngine) -> &'static str {
    match engine {
        DiskEngine::Auto => "auto",
        DiskEngine::Uring => "uring",
        DiskEngine::Threads => "threads",
    }
}

/// Name of a tap device.
///
/// # Errors
/// When it is no name that a network interface may have.
pub fn tap(text: &str) -> Result<String, ValueError> {
    let fits = |b: u8| b.is_ascii_graphic() && !matches!(b, b'/' | b':' | b',' | b'%');
    if text.is_empty()
        || text.len() > TAP_NAME_LEN_MAX
        || matches!(text, "." | "..")
        || !text.bytes().all(fits)
    {
        return allowed(format!(
            "must be the name of a network interface: 1 to {TAP_NAME_LEN_MAX} printable ASCII \
             characters other than space, `/`, `:`, `,` and `%`"
        ));
    }
    Ok(text.to_owned())
}

/// Ethernet address of the guest's side.
///
/// # Errors
/// When it is no unicast address.
pub fn mac(text: &str) -> Result<MacAddr, ValueError> {
    text.parse().or_else(|_| {
        allowed("must be six bytes in hex with colons, the first even, not all zero, such as 52:54:00:12:34:56")
    })
}

/// Context identifier of the guest on a virtio socket.
///
/// # Errors
/// When it is no number or reserved.
pub fn cid(text: &str) -> Result<u32, ValueError> {
    match text.parse() {
        Ok(n) if (CID_MIN..=CID_MAX).contains(&n) => Ok(n),
        _ => allowed(format!(
            "must be a whole number from {CID_MIN} to {CID_MAX}"
        )),
    }
}

/// An address for a migration.
///
/// # Errors
/// When it is none.
pub fn address(text: &str) -> Result<Address, ValueError> {
    text.parse()
        .map_err(|error: MigrationError| ValueError(error.to_string()))
}

/// Where a standby listens: `ADDRESS`, or `ADDRESS,second=ADDRESS` if that is in two networks.
///
/// # Errors
/// When it is none.
pub fn addresses(text: &str) -> Result<Addresses, ValueError> {
    text.parse()
        .map_err(|error: MigrationError| ValueError(error.to_string()))
}

/// Where others connect to a host: a number, or a name.
///
/// # Errors
/// When no certificate can be for it.
pub fn host(text: &str) -> Result<String, ValueError> {
    let label = |label: &str| {
        let inner = |c: char| c.is_ascii_alphanumeric() || c == '-' || c == '_';
        (1..=63).contains(&label.len()) && label.chars().all(inner)
    };
    let named = text.len() <= 253 && text.split('.').all(label);
    match text.parse::<std::net::IpAddr>().is_ok() || named {
        true => Ok(text.to_owned()),
        false => allowed("must be an IP or a DNS name, without a port"),
    }
}

/// For how long keys may be made, in days.
pub fn days() -> clap::builder::RangedI64ValueParser<u16> {
    clap::value_parser!(u16).range(1..=36_500)
}

/// A time, such as `10s`, `500ms` or `2m`.
///
/// # Errors
/// When it has no unit or is out of range.
pub fn duration(text: &str) -> Result<Duration, ValueError> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let number: Option<u64> = digits.parse().ok();
    let time = match (number, &text[digits.len()..]) {
        (Some(n), "ms") => Some(Duration::from_millis(n)),
        (Some(n), "s") => Some(Duration::from_secs(n)),
        (Some(n), "m") => n.checked_mul(60).map(Duration::from_secs),
        _ => None,
    };
    match time {
        Some(time) if time <= DURATION_MAX => Ok(time),
        _ => allowed("must be a time such as 500ms, 10s or 2m, at most 1440m"),
    }
}

/// Longest age in days.
const AGE_MAX_DAYS: u64 = 36_500;

/// An age, such as `90m`, `12h` or `7d`.
///
/// # Errors
/// When it has no unit or is out of range.
pub fn age(text: &str) -> Result<Duration, ValueError> {
    let digits = text.trim_end_matches(|c: char| c.is_ascii_alphabetic());
    let unit = match &text[digits.len()..] {
        "s" => Some(1),
        "m" => Some(60),
        "h" => Some(3600),
        "d" => Some(24 * 3600),
        _ => None,
    };
    let number: Option<u64> = digits.parse().ok();
    let seconds = number.zip(unit).and_then(|(n, unit)| n.checked_mul(unit));
    match seconds {
        Some(seconds) if seconds <= AGE_MAX_DAYS * 24 * 3600 => Ok(Duration::from_secs(seconds)),
        _ => allowed(format!(
            "must be an age such as 30s, 90m, 12h or 7d, at most {AGE_MAX_DAYS}d"
        )),
    }
}

/// A time as [`duration`] takes it.
pub fn time(time: Duration) -> String {
    match (time.as_millis(), time.as_secs()) {
        (ms, s) if u128::from(s) * 1000 != ms => format!("{ms}ms"),
        (_, s) if s > 0 && s.is_multiple_of(60) => format!("{}m", s / 60),
        (_, s) => format!("{s}s"),
    }
}

/// A key with Ctrl, such as `ctrl-]` or `^a`; gives the byte that a terminal sends for it.
///
/// # Errors
/// When there is no such key.
pub fn control_key(text: &str) -> Result<u8, ValueError> {
    let lower = text.to_ascii_lowercase();
    let key = lower.strip_prefix("ctrl-").or(lower.strip_prefix('^'));
    match key.map(str::as_bytes) {
        Some(&[key @ (b'a'..=b'z' | b'[' | b'\\' | b']' | b'^' | b'_')]) => Ok(key & 0x1f),
        _ => allowed("must be `ctrl-` and a letter or one of [ \\ ] ^ _, such as ctrl-] or ctrl-a"),
    }
}

/// The text of a key, as [`control_key`] reads it.
pub fn control_key_text(byte: u8) -> String {
    format!("Ctrl-{}", char::from(byte | 0x40))
}

/// One `key=value` or `key` of a flag that has several.
struct Part<'a> {
    key: &'a str,
    value: Option<&'a str>,
}

/// Takes a flag's value apart at its commas; `keys` are the allowed ones, each at most once.
fn parts<'a>(text: &'a str, form: &str, keys: &[&str]) -> Result<Vec<Part<'a>>, ValueError> {
    let mut parts: Vec<Part<'a>> = Vec::new();
    for piece in text.split(',') {
        let (key, value) = match piece.split_once('=') {
            Some((key, value)) => (key, Some(value)),
            None => (piece, None),
        };
        if !keys.contains(&key) {
            return allowed(format!("has `{key}`, which is not in the form {form}"));
        }
        if parts.iter().any(|p| p.key == key) {
            return allowed(format!("has `{key}` twice; the form is {form}"));
        }
        parts.push(Part { key, value });
    }
    Ok(parts)
}

impl Part<'_> {
    fn text(&self) -> Result<&str, ValueError> {
        self.value
            .ok_or_else(|| ValueError(format!("needs a value in `{}=VALUE`", self.key)))
    }

    fn flag(&self) -> Result<bool, ValueError> {
        self.value
            .map_or(Ok(true), boolean)
            .map_err(|e| self.name(e))
    }

    fn read<T>(&self, parse: fn(&str) -> Result<T, ValueError>) -> Result<T, ValueError> {
        parse(self.text()?).map_err(|e| self.name(e))
    }

    #[expect(clippy::needless_pass_by_value, reason = "used as a map_err function")]
    fn name(&self, error: ValueError) -> ValueError {
        ValueError(format!("`{}` {error}", self.key))
    }
}

const DISK_FORM: &str = "path=FILE[,readonly][,id=ID][,direct][,shared][,redo=FILE][,engine=auto|uring|threads][,pace=P]";

/// A disk as the flag gives it.
///
/// # Errors
/// When it does not have the form `path=FILE[,readonly][,id=ID][,direct][,shared][,redo=FILE][,engine=E][,pace=P]`.
pub fn disk(text: &str) -> Result<DiskConfig, ValueError> {
    let mut file = None;
    let mut disk = DiskConfig {
        path: PathBuf::new(),
        readonly: false,
        id: None,
        direct: false,
        shared: false,
        redo: None,
        engine: DiskEngine::Auto,
        pace: Pace::default(),
    };
    for part in parts(
        text,
        DISK_FORM,
        &[
            "path", "readonly", "id", "direct", "shared", "redo", "engine", "pace",
        ],
    )? {
        match part.key {
            "path" => file = Some(part.read(path)?),
            "readonly" => disk.readonly = part.flag()?,
            "id" => disk.id = Some(part.read(disk_id)?),
            "direct" => disk.direct = part.flag()?,
            "shared" => disk.shared = part.flag()?,
            "redo" => disk.redo = Some(part.read(path)?),
            "pace" => disk.pace = part.read(pace)?,
            _ => disk.engine = part.read(engine)?,
        }
    }
    disk.path = file.ok_or_else(|| ValueError(format!("must have the form {DISK_FORM}")))?;
    Ok(disk)
}

/// The text of a disk, as [`disk`] reads it.
pub fn disk_text(disk: &DiskConfig) -> String {
    let mut text = format!("path={}", disk.path.display());
    for (key, on) in [
        ("readonly", disk.readonly),
        ("direct", disk.direct),
        ("shared", disk.shared),
    ] {
        if on {
            text += &format!(",{key}");
        }
    }
    if let Some(id) = &disk.id {
        text += &format!(",id={id}");
    }
    if let Some(log) = &disk.redo {
        text += &format!(",redo={}", log.display());
    }
    text + &format!(
        ",engine={}{}",
        engine_text(disk.engine),
        pace_part(disk.pace)
    )
}

/// The part of a device's text that says its pace.
fn pace_part(pace: Pace) -> String {
    match pace.is_none() {
        true => String::new(),
        false => format!(",pace={pace}"),
    }
}

/// How fast completions reach the guest.
///
/// # Errors
/// When it is no profile, or values do not fit.
pub fn pace(text: &str) -> Result<Pace, ValueError> {
    Ok(text.parse::<Pace>()?)
}

impl From<PaceError> for ValueError {
    fn from(error: PaceError) -> Self {
        Self(error.to_string())
    }
}

/// A kind of safepoints.
///
/// # Errors
/// When there is none of this name.
pub fn safepoint(text: &str) -> Result<Safepoint, ValueError> {
    let names: Vec<&str> = Safepoints::default().names().collect();
    Safepoint::from_name(text)
        .ok_or_else(|| ValueError(format!("must be one of {}", names.join(", "))))
}

/// A part of a pace, as the number that it is.
///
/// # Errors
/// When it is none.
pub fn pace_number(text: &str) -> Result<u64, ValueError> {
    text.parse().or_else(|_| allowed("must be a whole number"))
}

/// The text of an interface with the address `mac`, as [`net`] reads it.
pub fn net_text(net: &NetConfig, mac: MacAddr) -> String {
    let backend = match &net.backend {
        NetBackendConfig::Tap(name) => format!("tap={name}"),
        NetBackendConfig::Socket(path) => format!("socket={}", path.display()),
    };
    format!("{backend},mac={mac}{}", pace_part(net.pace))
}

const NET_FORM: &str = "tap=NAME[,mac=M][,pace=P] or socket=PATH[,mac=M][,pace=P]";

/// A network interface as the flag gives it.
///
/// # Errors
/// When it does not have the form `tap=NAME[,mac=M][,pace=P]` or `socket=PATH[,mac=M][,pace=P]`.
pub fn net(text: &str) -> Result<NetConfig, ValueError> {
    let (mut backends, mut address, mut speed) = (Vec::new(), None, Pace::default());
    for part in parts(text, NET_FORM, &["tap", "socket", "mac", "pace"])? {
        match part.key {
            "tap" => backends.push(NetBackendConfig::Tap(part.read(tap)?)),
            "socket" => backends.push(NetBackendConfig::Socket(part.read(socket_path)?)),
            "pace" => speed = part.read(pace)?,
            _ => address = Some(part.read(mac)?),
        }
    }
    match (backends.pop(), backends.is_empty()) {
        (Some(backend), true) => Ok(NetConfig {
            backend,
            mac: address,
            pace: speed,
        }),
        _ => allowed(format!("must have the form {NET_FORM}")),
    }
}

const VSOCK_FORM: &str = "cid=N,path=SOCKET";

/// A socket device as the flag gives it.
///
/// # Errors
/// When it does not have the form `cid=N,path=SOCKET`.
pub fn vsock(text: &str) -> Result<VsockConfig, ValueError> {
    let (mut number, mut socket) = (None, None);
    for part in parts(text, VSOCK_FORM, &["cid", "path"])? {
        match part.key {
            "cid" => number = Some(part.read(cid)?),
            _ => socket = Some(part.read(socket_path)?),
        }
    }
    match (number, socket) {
        (Some(cid), Some(path)) => Ok(VsockConfig { cid, path }),
        _ => allowed(format!("must have the form {VSOCK_FORM}")),
    }
}

#[cfg(test)]
#[path = "value_tests.rs"]
mod tests;
