//! `tandem export` and `tandem import`: checkpoints to plain snapshots and from them.

use std::path::Path;

use serde_json::json;
use tandem_ft::arbiter::{Arbiter, Claimant, Owner};
use tandem_store::manifest::MEMORY;
use tandem_store::write::{Committed, Writer};
use tandem_store::{Guest, Store, plain};
use tandem_vmm::snapshot::directory::{Snapshot, open_snapshot};

use super::{choose, options, page_bytes, read};
use crate::args::{ExportArgs, ImportArgs};
use crate::failure::Failure;
use crate::output;
use crate::verbs::Style;

/// Name of a host that has none.
const NO_NAME: &str = "unnamed";

/// Makes a snapshot of a checkpoint.
pub(in crate::verbs) fn export(args: &ExportArgs, style: Style) -> Result<(), Failure> {
    let (guest, whole) = choose(&read(&args.store)?, &args.checkpoint)?;
    let directory = args.directory.as_path();
    for what in &whole.passed_over {
        style.hint(&format!("passed over: {what}"));
    }
    let manifest = whole.manifest;
    let (id, images) = (manifest.id, manifest.images.clone());
    let bytes = page_bytes(images.iter().map(|image| image.held).sum());
    let title = format!("{}@{id} is being exported", guest.name());
    let bar = output::byte_bar(&title, bytes, style.quiet);
    let exported = plain::export(&guest, manifest, directory, &mut |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    exported?;
    let disks: Vec<&str> = images
        .iter()
        .map(|image| image.name.as_str())
        .filter(|name| *name != MEMORY)
        .collect();
    let printed = match (style.json(), style.quiet) {
        (true, _) => output::print_json(&json!({
            "guest": guest.name(),
            "checkpoint": id.to_string(),
            "directory": directory,
            "bytes": bytes,
            "disks": disks,
        })),
        (false, true) => Ok(()),
        (false, false) => output::print(format!(
            "{}@{id}: exported to `{}`: {}{}\n",
            guest.name(),
            directory.display(),
            output::bytes(bytes),
            with_disks(&disks),
        )),
    };
    printed.map_err(Failure::host("print the result"))
}

fn with_disks(disks: &[&str]) -> String {
    match disks {
        [] => String::new(),
        disks => format!(", with the disks {}", disks.join(", ")),
    }
}

/// Makes a checkpoint of a snapshot.
pub(in crate::verbs) fn import(args: &ImportArgs, style: Style) -> Result<(), Failure> {
    // Before anybody is overtaken.
    let Snapshot { state, .. } = open_snapshot(&args.directory)?;
    let name = args.name.as_ref().unwrap_or(&state.hardware.name);
    let store = Store::open_at(&args.into, options(args.key.as_deref())?)?;
    let guest = store.guest(name)?;
    let arbiter = store.arbiter()?;
    if !args.replace {
        expect_free(&guest, arbiter.as_ref())?;
    }
    let tenancy = guest.begin_anew(arbiter.as_ref(), &owner()?)?;
    let mut writer = Writer::open(&guest, arbiter, tenancy.tenure, None)?;
    let title = format!("{name} is being imported");
    let bar = output::byte_bar(&title, state.hardware.memory, style.quiet);
    let made = plain::import(&mut writer, &args.directory, &mut |bytes| bar.inc(bytes));
    bar.finish_and_clear();
    print_import(name, &args.directory, &made?, style)
}

fn print_import(
    name: &str,
    directory: &Path,
    made: &Committed,
    style: Style,
) -> Result<(), Failure> {
    let (id, counts) = (made.id, made.counts);
    let printed = match (style.json(), style.quiet) {
        (true, _) => output::print_json(&json!({
            "guest": name,
            "checkpoint": id.to_string(),
            "directory": directory,
            "pages": super::inspect::pages_json(&counts),
            "stored_bytes": counts.stored_bytes,
        })),
        (false, true) => Ok(()),
        (false, false) => output::print(format!(
            "{name}@{id}: made of `{}`: {} pages, {} of them zero, in {}\n",
            directory.display(),
            counts.pages,
            counts.zero,
            output::bytes(counts.stored_bytes),
        )),
    };
    printed.map_err(Failure::host("print the result"))
}

/// Fails if a guest of this name has something in the store.
fn expect_free(guest: &Guest, arbiter: &dyn Arbiter) -> Result<(), Failure> {
    let name = guest.name().to_owned();
    if let Some(newest) = guest.checkpoints()?.first() {
        let what = format!("has checkpoints in the store, the newest {newest}");
        return Err(Failure::Stored { name, what });
    }
    let current = arbiter.current(guest.name());
    if let Some(tenure) = current.map_err(tandem_store::StoreError::from)? {
        let what = format!("is owned in the store, {tenure}");
        return Err(Failure::Stored { name, what });
    }
    Ok(())
}

/// This process, as the owner of a term.
fn owner() -> Result<Owner, Failure> {
    let name = rustix::system::uname();
    let host = name
        .nodename()
        .to_str()
        .ok()
        .filter(|name| !name.is_empty());
    Ok(Owner {
        claimant: Claimant::random().map_err(Failure::host("draw a random number"))?,
        host: host.unwrap_or(NO_NAME).to_owned(),
    })
}
