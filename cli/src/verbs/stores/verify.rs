//! `tandem verify`: every byte of a guest's checkpoints.

use serde_json::{Value, json};
use tandem_store::verify::{Damage, Progress, Report, verify as verify_store, verify_checkpoint};
use tandem_store::{Place, Store, StoreError};

use super::{known_guest, names, read};
use crate::args::VerifyArgs;
use crate::exit::Exit;
use crate::failure::Failure;
use crate::output::{self, Table};
use crate::settings::value::Chosen;
use crate::verbs::Style;

/// Reads every byte of a checkpoint, of a guest, or of all; says what is damaged.
pub(in crate::verbs) fn verify(args: &VerifyArgs, style: Style) -> Result<Exit, Failure> {
    let from = &args.store.from;
    let bar = output::byte_bar(&format!("{from} is being read"), 0, style.quiet);
    let verified = read_all(args, &mut |progress| match progress {
        Progress::Begin(bytes) => bar.inc_length(bytes),
        Progress::Read(bytes) => bar.inc(bytes),
    });
    bar.finish_and_clear();
    let report = verified?;
    let printed = match (style.json(), style.quiet) {
        (true, _) => output::print_json(&to_json(from, &report)),
        (false, true) => output::print(report.damaged.iter().map(line).collect::<String>()),
        (false, false) => output::print(text(&report)),
    };
    printed.map_err(Failure::host("print the result"))?;
    Ok(match report.damaged.is_empty() {
        true => Exit::Ok,
        false => Exit::Failed,
    })
}

/// A store whose description is damaged is damaged.
fn damaged_store(error: StoreError) -> Result<Report, Failure> {
    match error {
        StoreError::Damaged { name, what } => Ok(Report {
            damaged: vec![Damage {
                name,
                what,
                checkpoints: Vec::new(),
            }],
            ..Report::default()
        }),
        error => Err(error.into()),
    }
}

fn read_all(args: &VerifyArgs, progress: &mut dyn FnMut(Progress)) -> Result<Report, Failure> {
    let store = match read(&args.store) {
        Ok(store) => store,
        Err(Failure::Store(error)) => return damaged_store(*error),
        Err(failure) => return Err(failure),
    };
    match &args.checkpoint {
        Some(Chosen {
            guest,
            id: Some(id),
        }) => Ok(verify_checkpoint(
            &known_guest(&store, guest)?,
            *id,
            progress,
        )?),
        Some(Chosen { guest, id: None }) => {
            known_guest(&store, guest)?;
            all(&store, Some(guest), progress)
        }
        None => all(&store, None, progress),
    }
}

fn all(
    store: &Store,
    only: Option<&str>,
    progress: &mut dyn FnMut(Progress),
) -> Result<Report, Failure> {
    let arbiter = store.arbiter_if_used()?;
    Ok(verify_store(store, arbiter.as_deref(), only, progress)?)
}

fn line(damage: &Damage) -> String {
    damage.name.clone() + "\n"
}

fn text(report: &Report) -> String {
    let mut read = format!(
        "{} in {} objects, {} in all",
        output::count(report.checkpoints, "checkpoint"),
        report.objects,
        output::bytes(report.bytes),
    );
    if report.unneeded > 0 {
        read += &format!(", {} of them needed by none", report.unneeded);
    }
    if report.damaged.is_empty() {
        return read + ": every byte is as it was written\n";
    }
    let mut table = Table::new(&["DAMAGED", "NEEDED BY", "WHAT IS WRONG"]);
    for damage in &report.damaged {
        let needed_by = match &damage.checkpoints[..] {
            [] => "-".to_owned(),
            ids => names(ids),
        };
        table.row(vec![damage.name.clone(), needed_by, damage.what.clone()]);
    }
    let count = report.damaged.len();
    format!("{}\n{read}: {count} damaged\n", table.text())
}

fn to_json(from: &Place, report: &Report) -> Value {
    let damaged = report.damaged.iter().map(|damage| {
        let needed_by = damage.checkpoints.iter().map(ToString::to_string);
        json!({
            "name": damage.name,
            "what": damage.what,
            "checkpoints": needed_by.collect::<Vec<_>>(),
        })
    });
    json!({
        "place": from.to_string(),
        "checkpoints": report.checkpoints,
        "objects": report.objects,
        "bytes": report.bytes,
        "unneeded": report.unneeded,
        "damaged": damaged.collect::<Vec<_>>(),
    })
}
