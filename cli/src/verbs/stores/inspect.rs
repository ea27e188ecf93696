//! `tandem inspect NAME[@ID] --from STORE`: what a checkpoint holds.

use std::ffi::OsStr;

use serde_json::{Value, json};
use tandem_devices::virtio::block::redo::DiskRecord;
use tandem_store::capture::disks::image_name;
use tandem_store::manifest::{Counts, Manifest, STATE};
use tandem_store::redo::disks_of;
use tandem_store::survey::{Part, parts};
use tandem_store::{CheckpointId, Guest};
use tandem_vmm::snapshot::{GuestState, HardwareState};

use super::{choose, instant, names, page_bytes, read};
use crate::args::StoreArgs;
use crate::failure::Failure;
use crate::output::{self, Table};
use crate::settings::value::{self, Chosen};
use crate::verbs::Style;

/// What is known of a checkpoint.
struct Inspected {
    manifest: Manifest,
    /// Whether it counts.
    counts: bool,
    /// What it is based on, the nearest first, as far as that is there.
    chain: Vec<CheckpointId>,
    description: String,
    /// Nothing if the state is of another version.
    hardware: Option<HardwareState>,
    parts: Vec<Part>,
    passed_over: Vec<String>,
}

/// Shows a checkpoint.
pub(in crate::verbs) fn inspect(
    word: &OsStr,
    args: &StoreArgs,
    style: Style,
) -> Result<(), Failure> {
    let chosen = chosen(word)?;
    let (guest, whole) = choose(&read(args)?, &chosen)?;
    let inspected = look(&guest, whole.manifest, whole.passed_over)?;
    let printed = match style.json() {
        true => output::print_json(&inspected.to_json()),
        false => output::print(inspected.text()),
    };
    printed.map_err(Failure::host("print the result"))
}

/// The checkpoint that a word names.
fn chosen(word: &OsStr) -> Result<Chosen, Failure> {
    let word = word.to_string_lossy();
    value::checkpoint(&word).map_err(|source| Failure::Checkpoint {
        text: word.escape_debug().to_string(),
        source,
    })
}

fn look(guest: &Guest, manifest: Manifest, passed_over: Vec<String>) -> Result<Inspected, Failure> {
    let counting = guest.checkpoints()?;
    let counts = counting.contains(&manifest.id);
    let older = counting.into_iter().filter(|id| *id < manifest.id);
    let state = manifest.section(STATE);
    let state = state.and_then(|section| GuestState::from_bytes(&section.bytes).ok());
    Ok(Inspected {
        counts,
        // What does not count is based on its parent, and who knows on what that is.
        chain: match counts {
            true => older.collect(),
            false => manifest.parent.into_iter().collect(),
        },
        description: guest.description(&manifest)?,
        hardware: state.map(|state| state.hardware),
        parts: parts(guest, &manifest),
        manifest,
        passed_over,
    })
}

impl Inspected {
    fn text(&self) -> String {
        let mut text = String::new();
        for what in &self.passed_over {
            text += &format!("passed over  {what}\n");
        }
        text += &self.head();
        text += &format!("\n{}\n{}", self.images(), self.sections());
        text += &format!("\n{}", self.objects());
        text += &format!(
            "\nhardware as `tandem run` would be told of it:\n\n{}",
            self.description
        );
        text
    }

    fn head(&self) -> String {
        let Manifest {
            id,
            guest,
            begun_ms,
            tandem,
            counts,
            ..
        } = &self.manifest;
        let late = match self.counts {
            true => "",
            false => ", which does not count: another host had taken the guest",
        };
        let based_on = match &self.chain[..] {
            [] => "nothing".to_owned(),
            chain => names(chain),
        };
        let hardware = match &self.hardware {
            Some(hardware) => format!(
                "vCPUs        {}\nmemory       {}\ndevices      {}\n",
                hardware.cpus,
                value::size(hardware.memory),
                hardware.device_list(),
            ),
            None => "state        none that this version can read\n".to_owned(),
        };
        format!(
            "guest        {guest}\ncheckpoint   {id}{late}\ntime         {}\ntandem       {tandem}\nbased on     {based_on}\n{hardware}written      {} pages: {} zero, {} known, {} deltas, {} moved; {} stored\n",
            instant(*begun_ms),
            counts.pages,
            counts.zero,
            counts.known,
            counts.deltas,
            counts.moved,
            output::bytes(counts.stored_bytes),
        )
    }

    fn images(&self) -> String {
        let mut table = Table::new(&["IMAGE", "SIZE", "HELD"]);
        for image in &self.manifest.images {
            table.row(vec![
                image.name.escape_debug().to_string(),
                value::size(image.bytes),
                output::bytes(page_bytes(image.held)),
            ]);
        }
        // One that cannot be read is said by `verify`.
        for disk in disks_of(&self.manifest).unwrap_or_default() {
            table.row(vec![
                image_name(disk.disk),
                value::size(disk.bytes),
                format!(
                    "{} in {} layers of the redo log `{}`",
                    output::bytes(layer_bytes(&disk)),
                    disk.layers.len(),
                    disk.log.display()
                ),
            ]);
        }
        table.text()
    }

    fn sections(&self) -> String {
        let mut table = Table::new(&["SECTION", "VERSION", "BYTES"]);
        for section in &self.manifest.sections {
            table.row(vec![
                section.name.escape_debug().to_string(),
                section.version.to_string(),
                section.bytes.len().to_string(),
            ]);
        }
        table.text()
    }

    fn objects(&self) -> String {
        let mut table = Table::new(&["OBJECT", "KIND", "BYTES", "PAGES"]);
        for part in &self.parts {
            table.row(vec![
                part.name.clone(),
                part.kind.to_owned(),
                part.bytes.to_string(),
                part.pages.map_or(String::new(), |pages| pages.to_string()),
            ]);
        }
        table.text()
    }

    fn to_json(&self) -> Value {
        let manifest = &self.manifest;
        let images = manifest.images.iter().map(|image| {
            json!({
                "name": image.name,
                "bytes": image.bytes,
                "held_bytes": page_bytes(image.held),
            })
        });
        let logs = disks_of(manifest).unwrap_or_default();
        let sections = manifest.sections.iter().map(|section| {
            json!({
                "name": section.name,
                "version": section.version,
                "bytes": section.bytes.len(),
            })
        });
        json!({
            "guest": manifest.guest,
            "checkpoint": manifest.id.to_string(),
            "term": manifest.id.term,
            "number": manifest.id.sequence,
            "parent": manifest.parent.map(|id| id.to_string()),
            "counts": self.counts,
            "begun_ms": manifest.begun_ms,
            "time": instant(manifest.begun_ms),
            "tandem": manifest.tandem,
            "hardware": self.hardware,
            "description": self.description,
            "chain": self.chain.iter().map(ToString::to_string).collect::<Vec<_>>(),
            "images": images.collect::<Vec<_>>(),
            "redo_logs": logs.iter().map(log_json).collect::<Vec<_>>(),
            "sections": sections.collect::<Vec<_>>(),
            "objects": self.parts.iter().map(part_json).collect::<Vec<_>>(),
            "pages": pages_json(&manifest.counts),
            "passed_over": self.passed_over,
        })
    }
}

/// Bytes of the layers that a disk needs.
fn layer_bytes(disk: &DiskRecord) -> u64 {
    disk.layers.iter().map(|layer| layer.bytes).sum()
}

fn log_json(disk: &DiskRecord) -> Value {
    json!({
        "name": image_name(disk.disk),
        "image": disk.image,
        "log": disk.log,
        "bytes": disk.bytes,
        "layers": disk.layers.len(),
        "layer_bytes": layer_bytes(disk),
    })
}

fn part_json(part: &Part) -> Value {
    json!({
        "name": part.name,
        "kind": part.kind,
        "bytes": part.bytes,
        "pages": part.pages,
    })
}

/// What making a checkpoint came to, in pages.
pub(super) fn pages_json(counts: &Counts) -> Value {
    json!({
        "written": counts.pages,
        "zero": counts.zero,
        "known": counts.known,
        "deltas": counts.deltas,
        "moved": counts.moved,
    })
}
