//! The command line: verbs, flags and their help, from which the manual is made too.

// Doc comments are help texts here; their brackets are no links.
#![allow(rustdoc::broken_intra_doc_links)]

mod stores;

use std::path::PathBuf;
use std::time::Duration;

use clap::{Args, Parser, Subcommand, ValueEnum};
use tandem_ft::mode::Choice;
use tandem_ft::runtime::ResyncMode;
use tandem_store::Place;
use tandem_store::capture::Every;
use tandem_vmm::config::{BootProtocol, ConsoleConfig, DiskConfig, NetConfig, Pace, VsockConfig};
use tandem_vmm::confinement::{Enforcement, User};
use tandem_vmm::migration::{Address, Addresses};
use tracing::level_filters::LevelFilter;

pub use stores::{
    BucketArgs, CheckpointsArgs, ExportArgs, ImportArgs, InspectArgs, PruneArgs, StoreArgs,
    StoreVerb, VerifyArgs,
};

use crate::exit;
use crate::failure::Failure;
use crate::settings::{Located, Origin, Problem, Settings, value};

const FILE: &str = "\
File: the keys of the TOML file are the names of these flags without the dashes in front, as in \
`memory = \"512MiB\"`; devices are tables: [[disk]] with path, readonly, id, direct, shared, redo, engine and \
pace; [[net]] with tap or socket, mac and pace; [vsock] with cid and path. Relative paths in it are relative to \
its directory. Flags win over the file; --disk and --net add to it.";

const PACE: &str = "\
Pace: completions of a paced device reach the guest at its nominal time or, if that is sooner, at a safepoint, when \
the guest can surely take the interrupt; never before the host is done. Profiles are none, hdd, ssd, nvme, nic-1g and \
custom, which may be followed by +KEY:VALUE, as in ssd+latency-us:300. Keys are latency-us, seek-min-us, seek-max-us, \
rotation-us, bytes-per-second, completions-per-second, coalesce (true or false) and safepoints (halted, user-mode, kick, \
poll, with / in between). In the TOML file a table with these keys and `profile` says the same: pace = { profile = \
\"ssd\", latency-us = 300, safepoints = [\"halted\"] }.";

const CONSOLE: &str = "\
Console: with `--console stdio` on a terminal every key goes to the guest but Ctrl-], which stops \
the guest: first by its power button; by force 10 s later, at a second Ctrl-], or if the guest does \
not listen to the button. SIGTERM, SIGINT and SIGHUP do the same.";

const RESTORE: &str = "\
Description: the snapshot's machine.toml says where the guest's disks, interfaces and sockets are; \
flags win over it. --disk and --net, if given, take the place of all disks or interfaces there, in \
their order. The guest's hardware must be the saved one. Disks are not in a snapshot: they must \
hold what they held when it was taken.";

const RESUME: &str = "\
Description: with --from, the guest's newest checkpoint says where its disks, interfaces and sockets are; flags win over \
it. --disk and --net, if given, take the place of all disks or interfaces there, in their order. The guest's hardware must \
be the saved one. Whoever had the guest before has it no longer: what is written to the store there does not count, and the \
guest ends there once its VMM finds out. The guest goes on with checkpoints in the same store. Without --from, the guest \
is one that `tandem pause` stopped, and no other flags apply.";

const RECEIVE: &str = "\
Description: the source says where the guest's disks, interfaces and sockets are; flags win over \
it. --disk and --net, if given, take the place of all disks or interfaces there, in their order. \
Disks must be the same storage on both sides, and so must be the files FILE.tandem beside them of a guest that is protected. \
Links to its standbys are verified by the keys of --tls too.";

const MIGRATION: &str = "\
Safety: the guest runs on one side, whatever fails. If nothing is heard of a target that was given \
the guest, the guest stands at the source: `tandem resume` lets it go on there if it does not run at \
the target, `tandem stop --force` ends it. A protected guest stays protected until it goes on at the target, which is \
decided by its arbiter, and is protected there by the same standbys. By HOST:PORT the connection is neither encrypted nor authenticated \
without --tls.";

const STANDBY: &str = "\
Description: the primary says where the guest's interfaces are; flags win over it. --net, if given, takes \
the place of all interfaces there, in their order. The interface must be of the same network as the \
primary's; nothing of the copy leaves by it before the copy takes over. By HOST:PORT the connections are neither encrypted \
nor authenticated without --tls.";

const KEYS: &str = "\
Description: links between hosts are encrypted, and each side verifies the other, where --tls DIR is given on \
both. DIR holds ca.pem (the certificates of the authorities that are trusted), host.pem and host.key (this host's \
certificate and its private key). An authority is made once, by `tandem keys new-ca`; its ca.key is needed only to \
make hosts' keys and belongs on neither host. The files are read anew for each connection: to renew them, put others \
in their place. Files that do not fit each other are not used, and those from before go on to be. With --user, \
that user must be able to read them.";

const TOP: &str = "\
Keys: q ends; the arrows choose a guest, Enter shows its page, Esc goes back; s changes the order; ? says what \
the figures mean. Rates are per second, between the last two samples; the curves are of the last minute. Exits are \
those to the VMM. The use of CPUs and memory is the kernel's, from /proc.";

const RUNTIME: &str = "\
Runtime directory: each running guest has a directory of its name in $TANDEM_RUNTIME_DIR, or else \
in /run/tandem for root and in $XDG_RUNTIME_DIR/tandem for others. It holds api.sock (HTTP), \
console.sock (the console's bytes), vmm.log, pid and lock, and goes when the guest ends.";

/// Runs guests on KVM.
#[derive(Debug, Parser)]
#[command(name = "tandem", version, max_term_width = 100, after_help = exit::table())]
#[command(disable_help_subcommand = true)]
pub struct Cli {
    /// Output for people (table) or for programs (json)
    #[arg(
        long,
        global = true,
        value_enum,
        default_value_t,
        value_name = "FORMAT"
    )]
    pub format: Format,
    /// Print only what was asked for: names in lists, no hints, no warnings
    #[arg(short, long, global = true)]
    pub quiet: bool,
    /// Directory of the running guests [default: see `tandem run --help`]
    #[arg(long, global = true, value_name = "DIR")]
    pub runtime_dir: Option<PathBuf>,
    /// What to do.
    #[command(subcommand)]
    pub verb: Verb,
}

/// How results are printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Format {
    /// For people.
    #[default]
    Table,
    /// For programs.
    Json,
}

/// What the command can do.
#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Run a guest until it ends
    #[command(after_help = format!("{FILE}\n\n{PACE}\n\n{CONSOLE}\n\n{RUNTIME}\n\n{}", exit::table()))]
    Run(Box<RunArgs>),
    /// Look for everything that is wrong in a guest's file
    Check {
        /// The TOML file
        file: PathBuf,
    },
    /// List the running guests
    List,
    /// Show a guest's state and configuration
    Info {
        /// The guest
        #[arg(value_parser = value::name)]
        name: String,
    },
    /// Show what guests do, as they do it
    #[command(after_help = TOP)]
    Top(TopArgs),
    /// Attach to a guest's serial console
    Console {
        /// The guest
        #[arg(value_parser = value::name)]
        name: String,
        /// Key that detaches
        #[arg(long, value_name = "KEY", default_value = "ctrl-]", value_parser = value::control_key)]
        detach_key: u8,
    },
    /// Print a guest's recent console output (the last 64 KiB), or its VMM's log
    Logs {
        /// The guest
        #[arg(value_parser = value::name)]
        name: String,
        /// Go on printing until the guest ends
        #[arg(short, long)]
        follow: bool,
        /// The VMM's log instead of the guest's output
        #[arg(long)]
        vmm: bool,
    },
    /// Stop a guest's vCPUs and devices; nothing is lost
    Pause(ChangeArgs),
    /// Let a paused guest run on; or, with --from, a guest that was lost, from its newest checkpoint, until it ends
    #[command(after_help = format!("{RESUME}\n\n{CONSOLE}\n\n{}", exit::table()))]
    Resume(Box<ResumeArgs>),
    /// End a guest: by its power button, then by force
    Stop {
        /// Guest and dry run.
        #[command(flatten)]
        change: ChangeArgs,
        /// End it now, without asking it
        #[arg(long)]
        force: bool,
        /// How long the guest may take before it is ended by force
        #[arg(long, value_name = "TIME", default_value = "10s", value_parser = value::duration)]
        timeout: Duration,
    },
    /// Change how fast completions of a guest's disk or network interface reach it, while it runs
    #[command(after_help = PACE)]
    Pace {
        /// Guest and dry run.
        #[command(flatten)]
        change: ChangeArgs,
        /// The device, such as disk0 or net0: see `tandem metrics`
        device: String,
        /// The pace, such as hdd, or none
        #[arg(value_parser = value::pace)]
        pace: Pace,
    },
    /// Save a guest to a directory; it runs on
    Snapshot {
        /// Guest and dry run.
        #[command(flatten)]
        change: ChangeArgs,
        /// The directory, which must not exist
        directory: PathBuf,
    },
    /// Run a guest on from where it was saved, until it ends
    #[command(after_help = format!("{RESTORE}\n\n{CONSOLE}\n\n{}", exit::table()))]
    Restore(Box<RestoreArgs>),
    /// Move a running guest to another process or host, where `tandem receive` waits for it
    #[command(after_help = MIGRATION)]
    Migrate {
        /// Guest and dry run.
        #[command(flatten)]
        change: ChangeArgs,
        /// Where the target waits: HOST:PORT or the path of a unix socket
        #[arg(long, value_name = "ADDRESS", value_parser = value::address)]
        to: Address,
        /// How long the last pages may take, for which the guest stands
        #[arg(long, value_name = "TIME", default_value = "5ms", value_parser = value::duration)]
        downtime: Duration,
        /// Encrypt the link, by the keys in this directory: see `tandem keys --help`
        #[arg(long, value_name = "DIR", value_parser = value::path)]
        tls: Option<PathBuf>,
    },
    /// Wait for a guest that is migrated here, and run it until it ends
    #[command(after_help = format!("{RECEIVE}\n\n{MIGRATION}\n\n{CONSOLE}\n\n{}", exit::table()))]
    Receive(Box<ReceiveArgs>),
    /// Wait for a guest that is to be protected, and run its copy, which takes over when the guest is lost
    #[command(after_help = format!("{STANDBY}\n\n{CONSOLE}\n\n{}", exit::table()))]
    Standby(Box<StandbyArgs>),
    /// Show how a guest is protected
    Status {
        /// The guest
        #[arg(value_parser = value::name)]
        name: String,
    },
    /// Protect a running guest by a copy of it that runs where `tandem standby` listens, or change the mode of one
    /// that is protected
    Protect {
        /// Guest and dry run.
        #[command(flatten)]
        change: ChangeArgs,
        /// Where the standby listens: HOST:PORT or the path of a unix socket, and `,second=` with where it is reached
        /// by another network, for when the first breaks; repeatable: all are tried in their order. A guest that is
        /// protected needs none
        #[arg(long, value_name = "ADDRESS[,second=ADDRESS]", value_parser = value::addresses, requires = "arbiter",
            required_unless_present_any = ["mode", "latency_budget"])]
        to: Vec<Addresses>,
        /// The directory that decides who owns the guest; on storage that both hosts share
        #[arg(long, value_name = "DIR", value_parser = value::path, requires = "to")]
        arbiter: Option<PathBuf>,
        /// How the guest is protected: `lockstep` (both copies run and are compared), `checkpoint` (the copy stands,
        /// outputs wait for the next checkpoint) or `auto`, whichever costs the guest less [default: auto]
        #[arg(long, value_name = "MODE", value_parser = value::mode)]
        mode: Option<Choice>,
        /// How long outputs may wait for a checkpoint [default: 10ms]
        #[arg(long, value_name = "TIME", value_parser = value::latency_budget)]
        latency_budget: Option<Duration>,
        /// What the guest waits for when its copy is made the same: `running` only for its own part,
        /// `stopped` until the copy runs too, which then needs no second image of the guest's memory
        #[arg(long, value_name = "MODE", default_value = "running", value_parser = value::resync)]
        resync: ResyncMode,
        /// How long to wait until the guest is protected
        #[arg(long, value_name = "TIME", default_value = "30s", value_parser = value::duration)]
        timeout: Duration,
        /// Encrypt the links, by the keys in this directory: see `tandem keys --help`
        #[arg(long, value_name = "DIR", value_parser = value::path)]
        tls: Option<PathBuf>,
    },
    /// Protect a guest no longer: its copy ends
    Unprotect(ChangeArgs),
    /// Make a guest's copy the same as the guest once more
    Resync(ChangeArgs),
    /// Let a guest's copy take over: the guest ends here and goes on there
    Failover(ChangeArgs),
    /// Show what happened to a guest's protection
    Events {
        /// The guest
        #[arg(value_parser = value::name)]
        name: String,
        /// Go on until the guest ends
        #[arg(short, long)]
        follow: bool,
    },
    /// Make and show the keys by which hosts know each other
    #[command(after_help = KEYS)]
    Keys {
        /// What to do with them.
        #[command(subcommand)]
        keys: KeysVerb,
    },
    /// List the checkpoints of a guest in a store, and what they take there
    #[command(after_help = stores::checkpoints_help())]
    Checkpoints(CheckpointsArgs),
    /// Show what a snapshot or a checkpoint holds, and whether it is whole
    #[command(after_help = stores::inspect_help())]
    Inspect(InspectArgs),
    /// Read every byte of a guest's checkpoints in a store, and say what is damaged
    #[command(after_help = stores::verify_help())]
    Verify(VerifyArgs),
    /// Remove old checkpoints of a guest, or of all, from a store
    #[command(after_help = stores::prune_help())]
    Prune(PruneArgs),
    /// Make a snapshot, as `tandem restore` takes it, of a checkpoint in a store
    #[command(after_help = stores::export_help())]
    Export(ExportArgs),
    /// Make a checkpoint in a store of a snapshot
    #[command(after_help = stores::import_help())]
    Import(ImportArgs),
    /// Make and try stores of checkpoints
    #[command(after_help = stores::STORE)]
    Store {
        /// What to do with it.
        #[command(subcommand)]
        store: StoreVerb,
    },
    /// Print a guest's metrics in Prometheus' text format
    Metrics {
        /// The guest
        #[arg(value_parser = value::name)]
        name: String,
    },
    /// Print the version
    Version,
    /// Speak to a bucket for the VMM that has the other end of standard input
    #[command(hide = true)]
    Bucket(BucketArgs),
    /// Write the manual pages into a directory
    #[command(hide = true)]
    Man {
        /// The directory, which is made if it does not exist
        directory: PathBuf,
    },
    /// Print a shell's completions
    #[command(hide = true)]
    Completions {
        /// The shell
        shell: clap_complete::Shell,
    },
}

/// The flags of `tandem top`.
#[derive(Debug, Args)]
pub struct TopArgs {
    /// The guest [default: all that run]
    #[arg(value_parser = value::name)]
    pub name: Option<String>,
    /// Time between two samples, 100ms to 60s
    #[arg(long, value_name = "TIME", default_value = "1s", value_parser = crate::top::interval)]
    pub interval: Duration,
    /// Print what the guests do during one interval, and end
    #[arg(long)]
    pub once: bool,
}

/// What `tandem keys` can do.
#[derive(Debug, Subcommand)]
pub enum KeysVerb {
    /// Make an authority: a key, and the certificate by which hosts know those that it signed
    NewCa {
        /// Where ca.pem and ca.key go; made if it does not exist
        directory: PathBuf,
        /// The authority's name
        #[arg(long, default_value = "tandem", value_parser = value::name)]
        name: String,
        /// How long it is valid, in days
        #[arg(long, value_name = "DAYS", default_value_t = 3650, value_parser = value::days())]
        days: u16,
        /// Take the place of keys that are there
        #[arg(long)]
        replace: bool,
    },
    /// Make a host's keys, signed by an authority
    NewHost {
        /// Where ca.pem, host.pem and host.key go; made if it does not exist
        directory: PathBuf,
        /// The directory of the authority
        #[arg(long, value_name = "DIR")]
        ca: PathBuf,
        /// The host's name, which is one of its addresses
        #[arg(long, value_parser = value::host)]
        name: String,
        /// Where others connect to the host, besides its name: an IP or a DNS name; repeatable
        #[arg(long = "address", value_name = "ADDRESS", value_parser = value::host)]
        addresses: Vec<String>,
        /// How long they are valid, in days
        #[arg(long, value_name = "DAYS", default_value_t = 365, value_parser = value::days())]
        days: u16,
        /// Take the place of keys that are there
        #[arg(long)]
        replace: bool,
    },
    /// Show whose keys a directory has, and how long they are valid
    Show {
        /// The directory of a host or of an authority
        directory: PathBuf,
    },
}

/// A change to a running guest.
#[derive(Debug, Args)]
pub struct ChangeArgs {
    /// The guest
    #[arg(value_parser = value::name)]
    pub name: String,
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
}

/// The flags of `tandem run`.
#[derive(Debug, Default, Args)]
#[command(next_help_heading = "Guest")]
pub struct RunArgs {
    /// TOML file with the same keys as these flags
    #[arg(long, value_name = "FILE")]
    pub config: Option<PathBuf>,
    /// Name of the guest, unique on this host [default: the file's name without its ending, else vm-PID]
    #[arg(long, value_parser = value::name)]
    pub name: Option<String>,
    /// Kernel: an ELF with a PVH note, an ELF vmlinux, or a bzImage
    #[arg(long, value_name = "FILE", value_parser = value::path)]
    pub kernel: Option<PathBuf>,
    /// Initial RAM disk
    #[arg(long, value_name = "FILE", value_parser = value::path)]
    pub initrd: Option<PathBuf>,
    /// Kernel command line
    #[arg(long, value_name = "TEXT", value_parser = value::cmdline)]
    pub cmdline: Option<String>,
    /// Entry protocol: auto, pvh or linux64 [default: auto]
    #[arg(long, value_name = "PROTOCOL", value_parser = value::boot)]
    pub boot: Option<BootProtocol>,
    /// Describe the machine by ACPI tables; without, the kernel's command line names its devices
    /// [default: true]
    #[arg(long, value_name = "BOOL", value_parser = value::boolean)]
    #[arg(num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub acpi: Option<bool>,
    /// Number of vCPUs [default: 1]
    #[arg(long, value_name = "N", value_parser = value::cpus)]
    pub cpus: Option<u8>,
    /// Memory, such as 512MiB [default: 128MiB]
    #[arg(long, value_name = "SIZE", value_parser = value::memory)]
    pub memory: Option<u64>,
    /// Disk: path=FILE[,readonly][,id=ID][,direct][,shared][,redo=FILE][,engine=auto|uring|threads][,pace=P]; repeatable
    #[arg(long = "disk", value_name = "DISK", value_parser = value::disk)]
    pub disks: Vec<DiskConfig>,
    /// Network interface: tap=NAME[,mac=M][,pace=P] or socket=PATH[,mac=M][,pace=P]; repeatable
    #[arg(long = "net", value_name = "NET", value_parser = value::net)]
    pub nets: Vec<NetConfig>,
    /// Virtio socket: cid=N,path=SOCKET
    #[arg(long, value_name = "VSOCK", value_parser = value::vsock)]
    pub vsock: Option<VsockConfig>,
    /// Serial console: stdio, off or file=PATH [default: stdio]
    #[arg(long, value_name = "CONSOLE", value_parser = value::console)]
    pub console: Option<ConsoleConfig>,
    /// Give the guest a virtio console too
    #[arg(long, value_name = "BOOL", value_parser = value::boolean)]
    #[arg(num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub virtio_console: Option<bool>,
    /// Seed of the guest's entropy device [default: drawn from the host]
    #[arg(long, value_name = "N", value_parser = value::rng_seed)]
    pub rng_seed: Option<u64>,
    /// End the run when the guest resets, instead of restarting it
    #[arg(long, value_name = "BOOL", value_parser = value::boolean)]
    #[arg(num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub no_reboot: Option<bool>,
    /// Back the guest's memory by huge pages
    #[arg(long, value_name = "BOOL", value_parser = value::boolean, help_heading = "Host")]
    #[arg(num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub hugepages: Option<bool>,
    /// Host CPU for each vCPU, such as 0,1 [default: any]
    #[arg(long, value_name = "CPUS", value_parser = value::host_cpu, help_heading = "Host")]
    #[arg(value_delimiter = ',', num_args = 1)]
    pub pin: Option<Vec<usize>>,
    /// Real-time priority of the guest's threads, 1 to 99 [default: none]
    #[arg(long, value_name = "PRIORITY", value_parser = value::realtime, help_heading = "Host")]
    pub realtime: Option<u8>,
    /// Socket of the API [default: api.sock in the runtime directory]
    #[arg(long, value_name = "SOCKET", value_parser = value::socket_path, help_heading = "Host")]
    pub api: Option<PathBuf>,
    /// What the VMM logs: off, error, warn, info, debug or trace [default: info]
    #[arg(long, value_name = "LEVEL", value_parser = value::log_level, help_heading = "Host")]
    pub log_level: Option<LevelFilter>,
    /// What the VMM may ask of its host's kernel: on (a guest's process ends if it asks for more), log
    /// (the kernel logs it) or off [default: on]
    #[arg(long, value_name = "MODE", value_parser = value::confine, help_heading = "Host")]
    pub confine: Option<Enforcement>,
    /// User, and group if it is not the user's, to run as once everything is opened; for the superuser
    #[arg(long, value_name = "USER[:GROUP]", value_parser = value::user, help_heading = "Host")]
    pub user: Option<User>,
    /// Check everything, print the settings that would be used, and do not run
    #[arg(long, help_heading = "Host")]
    pub dry_run: bool,
    /// Protect the guest by a copy of it that runs where `tandem standby` listens: HOST:PORT, or the
    /// path of a unix socket, and `,second=` with where it is reached by another network, for when the
    /// first breaks; repeatable: all are tried in their order, and whoever takes the guest over goes on
    /// with the others
    #[arg(long, value_name = "ADDRESS[,second=ADDRESS]", value_parser = value::addresses, help_heading = "Protection")]
    pub protect: Option<Vec<Addresses>>,
    /// The directory that decides who owns the guest; on storage that both hosts share
    #[arg(long, value_name = "DIR", value_parser = value::path, help_heading = "Protection")]
    pub arbiter: Option<PathBuf>,
    /// What the guest waits for when its copy is made the same: `running` only for its own part,
    /// `stopped` until the copy runs too, which then needs no second image of the guest's memory [default: running]
    #[arg(long, value_name = "MODE", value_parser = value::resync, help_heading = "Protection")]
    pub resync: Option<ResyncMode>,
    /// How the guest is protected: `lockstep` (both copies run and are compared), `checkpoint` (the copy stands,
    /// outputs wait for the next checkpoint) or `auto`, whichever costs the guest less [default: auto]
    #[arg(long, value_name = "MODE", value_parser = value::mode, help_heading = "Protection")]
    pub mode: Option<Choice>,
    /// How long outputs may wait for a checkpoint [default: 10ms]
    #[arg(long, value_name = "TIME", value_parser = value::latency_budget, help_heading = "Protection")]
    pub latency_budget: Option<Duration>,
    /// Encrypt the links with the copy, by the keys in this directory (see `tandem keys --help`); without, links by
    /// HOST:PORT are neither encrypted nor authenticated
    #[arg(long, value_name = "DIR", value_parser = value::path, help_heading = "Protection")]
    pub tls: Option<PathBuf>,
    /// Make checkpoints of the guest in this store, from which any host that reaches it lets the guest go on by
    /// `tandem resume`: a directory that hosts share, or s3://BUCKET/PREFIX; the last few are kept
    #[arg(long, value_name = "STORE", value_parser = value::store, help_heading = "Checkpoints")]
    pub checkpoint: Option<Place>,
    /// How often, such as 500ms or 10s: what is lost at most with the guest, and how long outputs wait with --commit; or
    /// auto[,pause=PERCENT][,bandwidth=SIZE]: from every 100ms to every 60s, so that the guest stands for no more of its
    /// time and no more goes to the store per second (1% and 32MiB, where nothing is said) [default: 1s]
    #[arg(long, value_name = "TIME|auto", value_parser = value::every, help_heading = "Checkpoints")]
    pub every: Option<Every>,
    /// Hold what the guest sends and prints until a checkpoint that explains it is complete, so that a guest that goes
    /// on from there contradicts nothing; without, outputs leave at once
    #[arg(long, value_name = "BOOL", value_parser = value::boolean, help_heading = "Checkpoints")]
    #[arg(num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub commit: Option<bool>,
    /// File with the key by which the store is encrypted
    #[arg(long, value_name = "FILE", value_parser = value::path, help_heading = "Checkpoints")]
    pub store_key: Option<PathBuf>,
    /// Begin anew although the guest has checkpoints in the store: they do not count any more
    #[arg(long, requires = "checkpoint", help_heading = "Checkpoints")]
    pub anew: bool,
    /// Use disks that hold a part of a copy of another host's disk, as they are; refused otherwise
    #[arg(long, help_heading = "Protection")]
    pub incomplete_disks: bool,
}

/// What `tandem standby` takes.
#[derive(Debug, Args)]
pub struct StandbyArgs {
    /// Where to wait for a guest: HOST:PORT, or the path of a unix socket
    #[arg(long, value_name = "ADDRESS", value_parser = value::address)]
    pub listen: Address,
    /// The directory that decides who owns the guest; on storage that both hosts share
    #[arg(long, value_name = "DIR")]
    pub arbiter: PathBuf,
    /// Take only who is verified by the keys in this directory: see `tandem keys --help`
    #[arg(long, value_name = "DIR", value_parser = value::path)]
    pub tls: Option<PathBuf>,
    /// Where others stand by for a guest that was taken over here, instead of where its lost owner had them:
    /// HOST:PORT, or the path of a unix socket, `,second=ADDRESS` as with `run`; repeatable
    #[arg(long, value_name = "ADDRESS[,second=ADDRESS]", value_parser = value::addresses)]
    pub protect: Vec<Addresses>,
    /// Directory of files, NAME.toml each, with what is another here for the guest NAME than at its primary;
    /// the flags below are for all guests
    #[arg(long, value_name = "DIR", conflicts_with = "once")]
    pub guests: Option<PathBuf>,
    /// Guests at once [default: 16]
    #[arg(long, value_name = "N", value_parser = value::guests_max, conflicts_with = "once")]
    pub guests_max: Option<usize>,
    /// Take one guest, in this process, and end with it
    #[arg(long)]
    pub once: bool,
    /// Take the guest whose connections come by standard input.
    #[arg(long, hide = true)]
    pub handed: bool,
    /// What is another here than at the primary.
    #[command(flatten)]
    pub place: PlaceArgs,
}

/// The flags of `tandem restore`.
#[derive(Debug, Args)]
pub struct RestoreArgs {
    /// The snapshot's directory
    pub directory: PathBuf,
    /// Do not let the guest run before `tandem resume`
    #[arg(long)]
    pub paused: bool,
    /// Load all memory before the guest runs, instead of when it is touched
    #[arg(long)]
    pub eager: bool,
    /// Where the guest goes on.
    #[command(flatten)]
    pub place: PlaceArgs,
}

/// The flags of `tandem resume`.
#[derive(Debug, Args)]
pub struct ResumeArgs {
    /// The guest
    #[arg(id = "guest", value_name = "NAME", value_parser = value::name)]
    pub guest: String,
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// The store that has its checkpoints: a directory that hosts share
    #[arg(long, value_name = "STORE", value_parser = value::store)]
    pub from: Option<Place>,
    /// Do not let the guest run before `tandem resume`
    #[arg(long, requires = "from")]
    pub paused: bool,
    /// Load and check all memory before the guest runs, instead of when it is touched; a checkpoint that is damaged is
    /// passed over for the one before it
    #[arg(long, requires = "from")]
    pub eager: bool,
    /// How often checkpoints are made, as for `tandem run` [default: as before]
    #[arg(long, value_name = "TIME|auto", value_parser = value::every, requires = "from")]
    pub every: Option<Every>,
    /// Whether outputs wait for a checkpoint that explains them [default: as before]
    #[arg(long, value_name = "BOOL", value_parser = value::boolean, requires = "from")]
    #[arg(num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub commit: Option<bool>,
    /// File with the key by which the store is encrypted
    #[arg(long, value_name = "FILE", value_parser = value::path, requires = "from")]
    pub store_key: Option<PathBuf>,
    /// Where the guest goes on.
    #[command(flatten)]
    pub place: PlaceArgs,
}

/// The flags of `tandem receive`.
#[derive(Debug, Args)]
pub struct ReceiveArgs {
    /// Where to wait for the source: HOST:PORT or the path of a unix socket
    #[arg(long, value_name = "ADDRESS", value_parser = value::address)]
    pub listen: Address,
    /// Take only who is verified by the keys in this directory: see `tandem keys --help`
    #[arg(long, value_name = "DIR", value_parser = value::path)]
    pub tls: Option<PathBuf>,
    /// For a protected guest: the directory that decides who owns it, if it is at another path here than at the source
    #[arg(long, value_name = "DIR", value_parser = value::path)]
    pub arbiter: Option<PathBuf>,
    /// For a protected guest: where others stand by for it, instead of where its source has them: HOST:PORT, or the
    /// path of a unix socket, `,second=ADDRESS` as with `run`; repeatable
    #[arg(long, value_name = "ADDRESS[,second=ADDRESS]", value_parser = value::addresses)]
    pub protect: Vec<Addresses>,
    /// Where the guest goes on.
    #[command(flatten)]
    pub place: PlaceArgs,
}

/// The flags that say where a guest goes on.
#[derive(Debug, Args)]
#[command(next_help_heading = "Guest")]
pub struct PlaceArgs {
    /// Name of the guest, unique on this host [default: the one it had]
    #[arg(long, value_parser = value::name)]
    pub name: Option<String>,
    /// Disk: path=FILE[,readonly][,id=ID][,direct][,shared][,redo=FILE][,engine=auto|uring|threads][,pace=P]; repeatable
    #[arg(long = "disk", value_name = "DISK", value_parser = value::disk)]
    pub disks: Vec<DiskConfig>,
    /// Network interface: tap=NAME[,mac=M][,pace=P] or socket=PATH[,mac=M][,pace=P]; repeatable
    #[arg(long = "net", value_name = "NET", value_parser = value::net)]
    pub nets: Vec<NetConfig>,
    /// Virtio socket: cid=N,path=SOCKET
    #[arg(long, value_name = "VSOCK", value_parser = value::vsock)]
    pub vsock: Option<VsockConfig>,
    /// Serial console: stdio, off or file=PATH
    #[arg(long, value_name = "CONSOLE", value_parser = value::console)]
    pub console: Option<ConsoleConfig>,
    /// End the run when the guest resets, instead of restarting it
    #[arg(long, value_name = "BOOL", value_parser = value::boolean)]
    #[arg(num_args = 0..=1, default_missing_value = "true", require_equals = true)]
    pub no_reboot: Option<bool>,
    /// Host CPU for each vCPU, such as 0,1 [default: any]
    #[arg(long, value_name = "CPUS", value_parser = value::host_cpu, help_heading = "Host")]
    #[arg(value_delimiter = ',', num_args = 1)]
    pub pin: Option<Vec<usize>>,
    /// Real-time priority of the guest's threads, 1 to 99 [default: none]
    #[arg(long, value_name = "PRIORITY", value_parser = value::realtime, help_heading = "Host")]
    pub realtime: Option<u8>,
    /// Socket of the API [default: api.sock in the runtime directory]
    #[arg(long, value_name = "SOCKET", value_parser = value::socket_path, help_heading = "Host")]
    pub api: Option<PathBuf>,
    /// What the VMM logs: off, error, warn, info, debug or trace [default: info]
    #[arg(long, value_name = "LEVEL", value_parser = value::log_level, help_heading = "Host")]
    pub log_level: Option<LevelFilter>,
    /// What the VMM may ask of its host's kernel: on (a guest's process ends if it asks for more), log
    /// (the kernel logs it) or off [default: on]
    #[arg(long, value_name = "MODE", value_parser = value::confine, help_heading = "Host")]
    pub confine: Option<Enforcement>,
    /// User, and group if it is not the user's, to run as once everything is opened; for the superuser
    #[arg(long, value_name = "USER[:GROUP]", value_parser = value::user, help_heading = "Host")]
    pub user: Option<User>,
}

impl PlaceArgs {
    /// The settings that these flags give.
    pub fn settings(&self) -> Settings {
        Settings {
            name: self.name.clone().map(Located::flag),
            console: self.console.clone().map(Located::flag),
            no_reboot: self.no_reboot.map(Located::flag),
            pin: self.pin.clone().map(Located::flag),
            realtime: self.realtime.map(Located::flag),
            api: self.api.clone().map(Located::flag),
            log_level: self.log_level.map(Located::flag),
            confine: self.confine.map(Located::flag),
            user: self.user.map(Located::flag),
            disks: self.disks.iter().cloned().map(Into::into).collect(),
            nets: self.nets.iter().cloned().map(Into::into).collect(),
            vsock: self.vsock.clone().map(Located::flag),
            ..Settings::default()
        }
    }
}

impl ResumeArgs {
    /// The change to a guest that was paused, if it is one.
    ///
    /// # Errors
    /// When there are flags that only apply to a guest that goes on from a store.
    pub fn change(&self) -> Result<ChangeArgs, Failure> {
        if self.place.settings() != Settings::default() {
            let message = "is missing, and what is said of the guest's place applies only with it";
            let problems = vec![Problem::new(Origin::Flag, "from", message)];
            return Err(Failure::Settings {
                file: None,
                problems,
            });
        }
        Ok(ChangeArgs {
            name: self.guest.clone(),
            dry_run: self.dry_run,
        })
    }
}

impl RunArgs {
    /// The settings that these flags give.
    pub fn settings(self) -> Settings {
        Settings {
            name: self.name.map(Located::flag),
            kernel: self.kernel.map(Located::flag),
            initrd: self.initrd.map(Located::flag),
            cmdline: self.cmdline.map(Located::flag),
            boot: self.boot.map(Located::flag),
            acpi: self.acpi.map(Located::flag),
            cpus: self.cpus.map(Located::flag),
            memory: self.memory.map(Located::flag),
            hugepages: self.hugepages.map(Located::flag),
            console: self.console.map(Located::flag),
            virtio_console: self.virtio_console.map(Located::flag),
            rng_seed: self.rng_seed.map(Located::flag),
            no_reboot: self.no_reboot.map(Located::flag),
            pin: self.pin.map(Located::flag),
            realtime: self.realtime.map(Located::flag),
            api: self.api.map(Located::flag),
            log_level: self.log_level.map(Located::flag),
            confine: self.confine.map(Located::flag),
            user: self.user.map(Located::flag),
            protect: self.protect.map(Located::flag),
            arbiter: self.arbiter.map(Located::flag),
            resync: self.resync.map(Located::flag),
            mode: self.mode.map(Located::flag),
            latency_budget: self.latency_budget.map(Located::flag),
            tls: self.tls.map(Located::flag),
            checkpoint: self.checkpoint.map(Located::flag),
            every: self.every.map(Located::flag),
            commit: self.commit.map(Located::flag),
            store_key: self.store_key.map(Located::flag),
            disks: self.disks.into_iter().map(Into::into).collect(),
            nets: self.nets.into_iter().map(Into::into).collect(),
            vsock: self.vsock.map(Located::flag),
        }
    }
}

#[cfg(test)]
#[path = "args_tests.rs"]
mod tests;
