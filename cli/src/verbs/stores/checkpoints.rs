//! `tandem checkpoints`: what guests have in a store.

use serde_json::{Value, json};
use tandem_store::survey::{Survey, Surveyed, Totals};
use tandem_store::{CheckpointId, Store};

use super::{instant, known_guest, page_bytes, read};
use crate::args::CheckpointsArgs;
use crate::failure::Failure;
use crate::output::{self, Table};
use crate::verbs::Style;

/// Marks the checkpoint from which a resume would go on.
const NEWEST: &str = "*";

/// Lists the checkpoints of a guest, or of all.
pub(in crate::verbs) fn list(args: &CheckpointsArgs, style: Style) -> Result<(), Failure> {
    let title = format!("{} is being read", args.store.from);
    let progress = output::spinner(&title, style.quiet);
    let surveys = read(&args.store).and_then(|store| survey(&store, args.name.as_deref()));
    progress.finish_and_clear();
    let surveys = surveys?;
    let printed = match (style.json(), style.quiet) {
        (true, _) => output::print_json(&surveys.iter().map(to_json).collect::<Vec<_>>()),
        (false, true) => output::print(surveys.iter().map(names).collect::<String>()),
        (false, false) => output::print(text(&surveys)),
    };
    printed.map_err(Failure::host("print the result"))
}

/// A guest's name and what it has.
type Named = (String, Survey);

fn survey(store: &Store, name: Option<&str>) -> Result<Vec<Named>, Failure> {
    let names = match name {
        Some(name) => vec![known_guest(store, name)?.name().to_owned()],
        None => store.guests()?,
    };
    let surveys = names.into_iter().map(|name| {
        let survey = store.guest(&name)?.survey()?;
        Ok((name, survey))
    });
    surveys.collect()
}

/// A checkpoint per line, as other verbs take them.
fn names((guest, survey): &Named) -> String {
    let checkpoints = survey.checkpoints.iter();
    checkpoints.map(|c| format!("{guest}@{}\n", c.id)).collect()
}

fn text(surveys: &[Named]) -> String {
    let headings = [
        "GUEST",
        "CHECKPOINT",
        "TIME",
        "SIZE",
        "HELD",
        "OWN",
        "PAGES",
        "STATE",
    ];
    let mut table = Table::new(&headings);
    for (guest, survey) in surveys {
        for checkpoint in &survey.checkpoints {
            table.row(row(guest, checkpoint, survey.newest));
        }
    }
    let lines: String = surveys.iter().map(summary).collect();
    match lines.is_empty() {
        true => table.text(),
        false => format!("{}\n{lines}", table.text()),
    }
}

fn row(guest: &str, checkpoint: &Surveyed, newest: Option<CheckpointId>) -> Vec<String> {
    let mark = if newest == Some(checkpoint.id) {
        NEWEST
    } else {
        ""
    };
    let mut row = vec![guest.to_owned(), format!("{}{mark}", checkpoint.id)];
    match &checkpoint.summary {
        None => row.extend(["?"; 5].map(str::to_owned)),
        Some(summary) => row.extend([
            instant(summary.begun_ms),
            output::bytes(summary.image_bytes),
            output::bytes(page_bytes(summary.held)),
            output::bytes(summary.own_bytes),
            summary.counts.pages.to_string(),
        ]),
    }
    row.push(match &checkpoint.damage {
        None => "whole".to_owned(),
        Some(damage) => format!("damaged: {damage}"),
    });
    row
}

/// What a guest's checkpoints come to, in a line.
fn summary((guest, survey): &Named) -> String {
    let Totals {
        held,
        bytes,
        objects,
        ..
    } = survey.totals;
    let taken = match &survey.taken {
        Some(taken) => format!("taken by {} in term {}; ", taken.host, taken.term),
        None => String::new(),
    };
    let ratio = |ratio: Option<f64>| ratio.map_or("-".to_owned(), |ratio| format!("{ratio:.1}"));
    format!(
        "{guest}: {taken}{} of {} in {objects} objects, {} in all: deduplication {}, compression {}\n",
        output::count(survey.checkpoints.len() as u64, "checkpoint"),
        output::bytes(page_bytes(held)),
        output::bytes(bytes),
        ratio(survey.totals.deduplication()),
        ratio(survey.totals.compression()),
    )
}

fn to_json((guest, survey): &Named) -> Value {
    let totals = &survey.totals;
    let checkpoints = survey.checkpoints.iter();
    let checkpoints: Vec<Value> = checkpoints
        .map(|checkpoint| checkpoint_json(checkpoint, survey.newest))
        .collect();
    json!({
        "guest": guest,
        "term": survey.taken.as_ref().map(|taken| taken.term),
        "host": survey.taken.as_ref().map(|taken| &taken.host),
        "newest": survey.newest.map(|id| id.to_string()),
        "totals": {
            "held_pages": totals.held,
            "stored_pages": totals.stored,
            "pack_bytes": totals.pack_bytes,
            "bytes": totals.bytes,
            "objects": totals.objects,
            "deduplication": totals.deduplication(),
            "compression": totals.compression(),
        },
        "checkpoints": checkpoints,
    })
}

fn checkpoint_json(checkpoint: &Surveyed, newest: Option<CheckpointId>) -> Value {
    let summary = checkpoint.summary.as_ref();
    let counts = summary.map(|summary| summary.counts);
    json!({
        "checkpoint": checkpoint.id.to_string(),
        "term": checkpoint.id.term,
        "number": checkpoint.id.sequence,
        "parent": summary.and_then(|s| s.parent).map(|id| id.to_string()),
        "begun_ms": summary.map(|s| s.begun_ms),
        "time": summary.map(|s| instant(s.begun_ms)),
        "size_bytes": summary.map(|s| s.image_bytes),
        "held_bytes": summary.map(|s| page_bytes(s.held)),
        "own_bytes": summary.map(|s| s.own_bytes),
        "pages": counts.map(|counts| super::inspect::pages_json(&counts)),
        "packs": summary.map(|s| s.packs),
        "state": if checkpoint.damage.is_none() { "whole" } else { "damaged" },
        "damage": checkpoint.damage.as_ref().map(ToString::to_string),
        "newest": newest == Some(checkpoint.id),
    })
}
