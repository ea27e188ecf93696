//! `tandem prune`: old checkpoints go.

use std::time::{SystemTime, UNIX_EPOCH};

use serde_json::{Value, json};
use tandem_store::prune::{Pruned, prune as prune_guest, prune_before, sweep};
use tandem_store::{Guest, StoreError};

use super::{known_guest, read};
use crate::args::PruneArgs;
use crate::failure::Failure;
use crate::output;
use crate::verbs::Style;

/// What was removed of one guest.
type OfGuest = (String, Pruned);

/// Removes a guest's checkpoints, or those of all, but those that are kept.
pub(in crate::verbs) fn prune(args: &PruneArgs, style: Style) -> Result<(), Failure> {
    let store = read(&args.store)?;
    let guests = match &args.name {
        Some(name) => vec![known_guest(&store, name)?],
        None => {
            let names = store.guests()?;
            let guests = names.iter().map(|name| store.guest(name));
            guests.collect::<Result<_, _>>()?
        }
    };
    let progress = output::spinner("", style.quiet);
    let done = guests.iter().map(|guest| {
        progress.set_message(format!("{} is being pruned", guest.name()));
        let pruned = remove(guest, args)?;
        Ok::<OfGuest, StoreError>((guest.name().to_owned(), pruned))
    });
    let done = done.collect::<Result<Vec<_>, _>>();
    progress.finish_and_clear();
    let done = done?;
    let left = if args.dry_run { 0 } else { sweep(&store)? };
    let printed = match (style.json(), style.quiet) {
        (true, _) => output::print_json(&to_json(args, &done, left)),
        (false, true) => Ok(()),
        (false, false) => output::print(text_of_all(&done, args.dry_run)),
    };
    printed.map_err(Failure::host("print the result"))
}

fn remove(guest: &Guest, args: &PruneArgs) -> Result<Pruned, StoreError> {
    let (keep, dry) = (args.keep, args.dry_run);
    let Some(age) = args.older_than else {
        return prune_guest(guest, keep, dry);
    };
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    let before = now.unwrap_or_default().saturating_sub(age);
    let before_ms = u64::try_from(before.as_millis()).unwrap_or(u64::MAX);
    prune_before(guest, keep, before_ms, dry)
}

/// One guest as an object, all of them as a list of such.
fn to_json(args: &PruneArgs, done: &[OfGuest], left: u64) -> Value {
    let of_guest = |(name, pruned): &OfGuest| {
        json!({
            "guest": name,
            "dry_run": args.dry_run,
            "checkpoints": pruned.checkpoints,
            "objects": pruned.objects,
            "bytes": pruned.bytes,
            "left": left,
        })
    };
    match done {
        [one] if !args.all => of_guest(one),
        all => all.iter().map(of_guest).collect(),
    }
}

fn text_of_all(done: &[OfGuest], dry: bool) -> String {
    done.iter().map(|of| text(of, dry)).collect()
}

fn text((guest, pruned): &OfGuest, dry: bool) -> String {
    let would = if dry { "would be " } else { "" };
    format!(
        "{guest}: {would}removed: {}, {}, {}\n",
        output::count(pruned.checkpoints, "checkpoint"),
        output::count(pruned.objects, "object"),
        output::bytes(pruned.bytes),
    )
}
