//! The flags of verbs about stores of checkpoints.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use clap::{ArgGroup, Args, Subcommand};
use tandem_store::Place;
use tandem_vmm::confinement::{Enforcement, User};

use crate::settings::value::{self, Chosen};

/// What a store is called.
pub(super) const STORE: &str = "\
Store: a directory, such as one on storage that hosts share, which must exist; file:///DIRECTORY; or s3://BUCKET/PREFIX, \
a bucket of S3 or of what speaks as it does. Credentials, region and endpoint of a bucket come from the environment, as \
other tools take them: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION and AWS_ENDPOINT_URL; \
without, the host's role is asked for. A store that is encrypted needs --key FILE: 64 hexadecimal digits in a file that is its \
owner's alone, as `tandem store init --encrypt` makes it, the same on all hosts.";

const CHECKPOINTS: &str = "\
Columns: CHECKPOINT is TERM-NUMBER, with * for the one from which a resume would go on; SIZE is memory and disks; HELD \
what of them is not zero; OWN what was put into the store for it; PAGES how many were written for it. STATE is what can be \
seen without reading pages: `tandem verify` reads all. Deduplication is pages held by all checkpoints to pages \
stored; compression is bytes of these to bytes of the objects that they are in.

JSON: a list of guests, each with guest, term, host (who took it last), newest, totals (held_pages, stored_pages, pack_bytes, \
bytes, objects, deduplication, compression) and checkpoints, the newest first: checkpoint, term, number, parent, begun_ms, time, \
size_bytes, held_bytes, own_bytes, pages (written, zero, known, deltas, moved), packs, state (whole or damaged), damage, newest.";

const INSPECT: &str = "\
Checkpoints: with --from, NAME is a guest of a store, and its newest checkpoint that is whole is shown, or NAME@ID, as `tandem \
checkpoints` lists it: the hardware, what it is based on, memory and disks, saved state, and the objects that it needs.

JSON of a checkpoint: guest, checkpoint, term, number, parent, counts (whether it counts), begun_ms, time, tandem, hardware \
(name, tandem, cpus, memory, devices with id and kind; null if the state is of another version), description (the text), chain, images (name, \
bytes, held_bytes), redo_logs (name, image, log, bytes, layers, layer_bytes), sections (name, version, bytes), objects (name, kind, bytes, pages), pages \
(written, zero, known, deltas, moved), passed_over.";

const VERIFY: &str = "\
Exit code: 0 if every byte is as it was written; 1 if something is damaged, which is listed with the checkpoints that need it. \
What cannot be read at all is another error.

JSON: place, checkpoints, objects, bytes, unneeded (objects that no checkpoint needs), and damaged: a list with name, what and \
checkpoints.";

const PRUNE: &str = "\
Safety: nothing is removed that a checkpoint needs which is kept, or one that is being made, whoever is at work meanwhile; nor the \
checkpoint that the guest's owner went on from, which may still load memory from it. If a host takes the guest at that moment, \
nothing is removed at all. The times of checkpoints are by the clocks of the hosts that made them.

JSON: guest, dry_run, checkpoints, objects and bytes that were removed, and left (drafts of killed writers); with --all a list of these.";

const EXPORT: &str = "\
Disks: those that are in the checkpoint become files beside the snapshot's, named as they are: disk0 and so on. The \
snapshot's machine.toml says where the guest had its disks; `tandem restore DIR --disk path=DIR/disk0` takes the exported ones.

JSON: guest, checkpoint, directory, bytes, disks.";

const IMPORT: &str = "\
Safety: a guest that has checkpoints in the store, or is owned by some host, is not touched without --replace, which takes it \
from its owner: that one's checkpoints do not count any more then. A snapshot has no disks, and so has its checkpoint.

JSON: guest, checkpoint, directory, pages (written, zero, known, deltas, moved), stored_bytes.";

const INIT: &str = "\
Need: none for a store that is not encrypted: whoever first puts something into it makes it.

JSON: place, id, made (false if it was there), encrypted.";

/// What follows the help of a verb: its own, and what a store is called.
fn with_store(help: &str) -> String {
    format!("{help}\n\n{STORE}")
}

pub(super) fn checkpoints_help() -> String {
    with_store(CHECKPOINTS)
}

pub(super) fn inspect_help() -> String {
    with_store(INSPECT)
}

pub(super) fn verify_help() -> String {
    with_store(VERIFY)
}

pub(super) fn prune_help() -> String {
    with_store(PRUNE)
}

pub(super) fn export_help() -> String {
    with_store(EXPORT)
}

pub(super) fn import_help() -> String {
    with_store(IMPORT)
}

/// A store that is there.
#[derive(Clone, Debug, Args)]
pub struct StoreArgs {
    /// The store: DIR, file:///DIR or s3://BUCKET/PREFIX
    #[arg(long, value_name = "STORE", value_parser = value::store)]
    pub from: Place,
    /// The store's key, if it is encrypted
    #[arg(long, value_name = "FILE", value_parser = value::path)]
    pub key: Option<PathBuf>,
}

/// The flags of `tandem checkpoints`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("guests").args(["name", "all"]).required(true))]
pub struct CheckpointsArgs {
    /// The guest
    #[arg(value_parser = value::name)]
    pub name: Option<String>,
    /// All guests of the store
    #[arg(long)]
    pub all: bool,
    /// The store.
    #[command(flatten)]
    pub store: StoreArgs,
}

/// The flags of `tandem inspect`.
#[derive(Debug, Args)]
pub struct InspectArgs {
    /// The snapshot's directory; with --from a guest, or a checkpoint of it: NAME[@ID]
    #[arg(value_name = "DIRECTORY|NAME[@ID]")]
    pub what: OsString,
    /// Read all of the snapshot's memory and check it too
    #[arg(long, conflicts_with = "from")]
    pub verify: bool,
    /// The store that has the checkpoint: DIR, file:///DIR or s3://BUCKET/PREFIX
    #[arg(long, value_name = "STORE", value_parser = value::store)]
    pub from: Option<Place>,
    /// The store's key, if it is encrypted
    #[arg(long, value_name = "FILE", value_parser = value::path, requires = "from")]
    pub key: Option<PathBuf>,
}

/// The flags of `tandem verify`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("what").args(["checkpoint", "all"]).required(true))]
pub struct VerifyArgs {
    /// The guest, or one of its checkpoints: NAME[@ID]
    #[arg(value_name = "NAME[@ID]", value_parser = value::checkpoint)]
    pub checkpoint: Option<Chosen>,
    /// All guests of the store
    #[arg(long)]
    pub all: bool,
    /// The store.
    #[command(flatten)]
    pub store: StoreArgs,
}

/// The flags of `tandem prune`.
#[derive(Debug, Args)]
#[command(group = ArgGroup::new("pruned").args(["name", "all"]).required(true))]
pub struct PruneArgs {
    /// The guest
    #[arg(value_parser = value::name)]
    pub name: Option<String>,
    /// All guests of the store
    #[arg(long)]
    pub all: bool,
    /// Say what would be done, and do nothing
    #[arg(long)]
    pub dry_run: bool,
    /// How many of the newest to keep, 2 or more
    #[arg(long, value_name = "N", value_parser = value::keep)]
    pub keep: usize,
    /// Keep all that are not older than this as well, such as 90m, 12h or 7d
    #[arg(long, value_name = "TIME", value_parser = value::age)]
    pub older_than: Option<Duration>,
    /// The store.
    #[command(flatten)]
    pub store: StoreArgs,
}

/// The flags of `tandem export`.
#[derive(Debug, Args)]
pub struct ExportArgs {
    /// The guest, for its newest checkpoint that is whole, or NAME@ID
    #[arg(value_name = "NAME[@ID]", value_parser = value::checkpoint)]
    pub checkpoint: Chosen,
    /// The snapshot's directory, which must not exist
    pub directory: PathBuf,
    /// The store.
    #[command(flatten)]
    pub store: StoreArgs,
}

/// The flags of `tandem import`.
#[derive(Debug, Args)]
pub struct ImportArgs {
    /// The snapshot's directory
    pub directory: PathBuf,
    /// The store: DIR, file:///DIR or s3://BUCKET/PREFIX; made if there is none
    #[arg(long, value_name = "STORE", value_parser = value::store)]
    pub into: Place,
    /// The store's key, if it is encrypted
    #[arg(long, value_name = "FILE", value_parser = value::path)]
    pub key: Option<PathBuf>,
    /// Name of the guest in the store [default: the one that it had]
    #[arg(long, value_parser = value::name)]
    pub name: Option<String>,
    /// Take the guest from whoever has it in the store; its checkpoints there do not count any more
    #[arg(long)]
    pub replace: bool,
}

/// The flags of `tandem bucket`, which users do not see.
#[derive(Debug, Args)]
pub struct BucketArgs {
    /// The bucket
    #[arg(value_parser = value::store)]
    pub place: Place,
    /// As the VMM's
    #[arg(long, value_parser = value::confine)]
    pub confine: Option<Enforcement>,
    /// As the VMM's
    #[arg(long, value_parser = value::user)]
    pub user: Option<User>,
}

/// What `tandem store` can do.
#[derive(Debug, Subcommand)]
pub enum StoreVerb {
    /// Make a store, and see whether the storage gives each name to one of several who race for it
    #[command(after_help = with_store(INIT))]
    Init {
        /// The store: DIR, which must exist, file:///DIR or s3://BUCKET/PREFIX. If there is one, it is tried
        #[arg(value_name = "STORE", value_parser = value::store)]
        place: Place,
        /// Encrypt what is put into it, by the key in this file, which is drawn if there is none
        #[arg(long, value_name = "FILE", value_parser = value::path)]
        encrypt: Option<PathBuf>,
    },
}
