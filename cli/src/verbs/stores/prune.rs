//! `tandem prune`: old checkpoints go.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::json;
use tandem_store::prune::{Pruned, prune as prune_guest, prune_before, sweep};
use tandem_store::{Guest, StoreError};

use super::{known_guest, read};
use crate::args::PruneArgs;
use crate::failure::Failure;
use crate::output;
use crate::verbs::Style;

/// Removes a guest's checkpoints but those that are kept.
pub(in crate::verbs) fn prune(args: &PruneArgs, style: Style) -> Result<(), Failure> {
    let (name, dry) = (&args.change.name, args.change.dry_run);
    let store = read(&args.store)?;
    let guest = known_guest(&store, name)?;
    let progress = output::spinner(&format!("{name} is being pruned"), style.quiet);
    let done = remove(&guest, args).and_then(|pruned| {
        let left = if dry { 0 } else { sweep(&store)? };
        Ok((pruned, left))
    });
    progress.finish_and_clear();
    let (pruned, left) = done?;
    let printed = match (style.json(), style.quiet) {
        (true, _) => output::print_json(&json!({
            "guest": name,
            "dry_run": dry,
            "checkpoints": pruned.checkpoints,
            "objects": pruned.objects,
            "bytes": pruned.bytes,
            "left": left,
        })),
        (false, true) => Ok(()),
        (false, false) => output::print(text(name, &pruned, dry)),
    };
    printed.map_err(Failure::host("print the result"))
}

fn remove(guest: &Guest, args: &PruneArgs) -> Result<Pruned, StoreError> {
    let (keep, dry) = (args.keep, args.change.dry_run);
    let Some(age) = args.older_than else {
        return prune_guest(guest, keep, dry);
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let before = now.unwrap_or_default().saturating_sub(age);
    let before_ms = u64::try_from(before.as_millis()).unwrap_or(u64::MAX);
    prune_before(guest, keep, before_ms, dry)
}

fn text(guest: &str, pruned: &Pruned, dry: bool) -> String {
    let would = if dry { "would be " } else { "" };
    format!(
        "{guest}: {would}removed: {}, {}, {}\n",
        output::count(pruned.checkpoints, "checkpoint"),
        output::count(pruned.objects, "object"),
        output::bytes(pruned.bytes),
    )
}
