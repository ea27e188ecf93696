//! All that is known of one guest.

use std::fmt::Write as _;

use ratatui::Frame;
use ratatui::layout::Rect;
use ratatui::style::{Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;
use tandem_ft::runtime::status::{Percentiles, Role, Status};

use super::{bar, pacing};
use crate::output::{self, Table};
use crate::settings::value;
use crate::top::figures::{self, UNKNOWN, count, rate};
use crate::top::model::{Contact, Guest};
use crate::top::rates::Rates;
use crate::top::sample::{Device, Sample};

/// Width of the sections' names.
const LABEL: usize = 12;

/// Space between two figures in a line.
const GAP: &str = "  ";

/// Counters of every device that are not worth a place.
const DULL: [&str; 2] = ["kicks", "events"];
/// Counters of disks and cards that are named only when there is something to say.
const RARE: [&str; 6] = [
    "discard_ops",
    "zero_ops",
    "faults",
    "link_changes",
    "rx_waits",
    "tx_full",
];
/// Counters of disks that have a column.
const DISK: [&str; 8] = [
    "read_ops",
    "read_bytes",
    "write_ops",
    "write_bytes",
    "flush_ops",
    "in_flight",
    "errors",
    "interrupts",
];
/// Counters of network cards that have a column.
const NET: [&str; 7] = [
    "rx_frames",
    "rx_bytes",
    "tx_frames",
    "tx_bytes",
    "rx_dropped",
    "tx_dropped",
    "interrupts",
];

/// Draws a guest from line `from` on, or as far down as there is something to see; gives how many lines
/// are above the last ones that fit.
pub(super) fn draw(guest: &Guest, from: usize, frame: &mut Frame<'_>, area: Rect) -> usize {
    let lines = lines(guest, area.width.into());
    let above = lines.len().saturating_sub(area.height.into());
    let seen: Vec<Line<'_>> = lines.into_iter().skip(from.min(above)).collect();
    frame.render_widget(Paragraph::new(seen), area);
    above
}

/// The page, in lines of a screen that is `width` columns wide.
fn lines(guest: &Guest, width: usize) -> Vec<Line<'static>> {
    let room = width.saturating_sub(LABEL);
    let mut page = Page::default();
    page.section("guest", guest_lines(guest, room));
    let Some(sample) = &guest.last else {
        return page.0;
    };
    let rates = guest.rates.as_ref();
    page.section("vCPUs", vcpu_lines(sample, rates, room));
    page.section("exits/s", exit_lines(rates, room));
    page.section("disks", disk_lines(sample, rates, room));
    page.section("network", net_lines(sample, rates, room));
    page.section("pacing", pacing::lines(sample, rates, room));
    page.section("others", other_lines(sample, rates, room));
    let protection = protection_lines(&sample.protection, rates, room);
    page.section("protection", protection);
    page.0
}

/// Sections, one after another.
#[derive(Default)]
struct Page(Vec<Line<'static>>);

impl Page {
    /// Adds `lines` under a name that stands at their left.
    fn section(&mut self, name: &str, lines: Vec<Line<'static>>) {
        for (index, line) in lines.into_iter().enumerate() {
            let name = if index == 0 { name } else { "" };
            let label = Span::styled(format!(" {name:<0$}", LABEL - 1), Style::new().bold());
            let mut spans = vec![label];
            spans.extend(
                line.spans
                    .into_iter()
                    .map(|span| span.patch_style(line.style)),
            );
            self.0.push(Line::from(spans));
        }
    }
}

fn guest_lines(guest: &Guest, room: usize) -> Vec<Line<'static>> {
    let mut lines = Vec::new();
    let mut state = format!("{}: {}", guest.name, guest.state_word());
    if let Some(sample) = &guest.last {
        // Writing to a string cannot fail.
        let _ = write!(
            state,
            ", up {}, {} resets, process {}",
            output::uptime(sample.uptime_ms),
            sample.resets,
            sample.pid
        );
    }
    lines.push(Line::from(state));
    if let Contact::Silent(reason) = &guest.contact {
        lines.extend(text_lines(reason, room).map(Stylize::red));
    }
    if let Some(sample) = &guest.last {
        let resident = sample.usage.resident.map(figures::memory);
        let resident = resident.unwrap_or(UNKNOWN.to_owned());
        let memory = value::size(sample.memory);
        let mut text = format!("{memory} of memory; {resident} in RAM, with its VMM");
        let protection = sample.protection.protection_memory_bytes;
        if protection > 0 {
            let _ = write!(text, "; {} for protection", figures::memory(protection));
        }
        lines.extend(text_lines(&text, room));
    }
    lines
}

fn vcpu_lines(sample: &Sample, rates: Option<&Rates>, room: usize) -> Vec<Line<'static>> {
    let vcpus = sample.vcpus.iter().map(|vcpu| {
        let busy = rates.and_then(|rates| rates.vcpu_busy.get(&vcpu.index).copied());
        let exits = rates.and_then(|rates| rates.vcpu_exits.get(&vcpu.index).copied());
        let text = format!(
            "{:<4}{:>5} % {:>5} exits/s  ",
            vcpu.index,
            figures::percent(busy),
            rate(exits)
        );
        bar::line(text, busy.unwrap_or(0.0), room)
    });
    let mut lines: Vec<_> = vcpus.collect();
    let busy = rates.and_then(|rates| rates.vmm_busy);
    let text = format!("{:<4}{:>5} % {:15}", "VMM", figures::percent(busy), "");
    lines.push(bar::line(text, busy.unwrap_or(0.0), room));
    lines
}

/// The kinds of exits that there were, as a histogram.
fn exit_lines(rates: Option<&Rates>, room: usize) -> Vec<Line<'static>> {
    let kinds = rates.into_iter().flat_map(|rates| &rates.exits);
    let kinds: Vec<_> = kinds.filter(|(_, rate)| **rate > 0.0).collect();
    if kinds.is_empty() {
        let none = if rates.is_some() { "none" } else { UNKNOWN };
        return vec![Line::from(none)];
    }
    let most = kinds
        .iter()
        .fold(0.0, |most: f64, (_, rate)| most.max(**rate));
    let line = |(kind, rate): (&String, &f64)| {
        let text = format!("{kind:<16}{:>5}  ", count(*rate));
        bar::line(text, rate / most, room)
    };
    kinds.into_iter().map(line).collect()
}

fn disk_lines(sample: &Sample, rates: Option<&Rates>, room: usize) -> Vec<Line<'static>> {
    let headings = [
        "ID", "READ/s", "B/s", "WRITE/s", "B/s", "FLUSH/s", "FLIGHT", "ERRORS", "IRQ/s",
    ];
    let cells = |device: &Device| {
        let rate = |name| rate(rates.and_then(|rates| rates.of(&device.id, name)));
        let total = |name| total(device, &[name]);
        vec![
            device.id.clone(),
            rate("read_ops"),
            rate("read_bytes"),
            rate("write_ops"),
            rate("write_bytes"),
            rate("flush_ops"),
            total("in_flight"),
            total("errors"),
            rate("interrupts"),
        ]
    };
    let mut lines = device_table(sample, "block", &headings, cells);
    lines.extend(more_lines(sample, "block", &DISK, rates, room));
    lines
}

fn net_lines(sample: &Sample, rates: Option<&Rates>, room: usize) -> Vec<Line<'static>> {
    let headings = ["ID", "IN/s", "B/s", "OUT/s", "B/s", "DROPPED", "IRQ/s"];
    let cells = |device: &Device| {
        let rate = |name| rate(rates.and_then(|rates| rates.of(&device.id, name)));
        vec![
            device.id.clone(),
            rate("rx_frames"),
            rate("rx_bytes"),
            rate("tx_frames"),
            rate("tx_bytes"),
            total(device, &["rx_dropped", "tx_dropped"]),
            rate("interrupts"),
        ]
    };
    let mut lines = device_table(sample, "net", &headings, cells);
    lines.extend(more_lines(sample, "net", &NET, rates, room));
    lines
}

fn total(device: &Device, names: &[&str]) -> String {
    let values = names.iter().filter_map(|name| device.counters.get(*name));
    values
        .copied()
        .reduce(u64::saturating_add)
        .map_or(UNKNOWN.to_owned(), |total| count(total as f64))
}

/// A row for each device of a kind, under headings; nothing if there is none.
fn device_table(
    sample: &Sample,
    kind: &str,
    headings: &[&str],
    cells: impl Fn(&Device) -> Vec<String>,
) -> Vec<Line<'static>> {
    let mut devices = sample.devices.iter().filter(|d| d.kind == kind).peekable();
    if devices.peek().is_none() {
        return Vec::new();
    }
    let mut table = Table::new(headings);
    devices.for_each(|device| table.row(cells(device)));
    let text = table.text();
    text.lines()
        .map(|line| Line::from(line.to_owned()))
        .collect()
}

/// What the devices of a kind count besides what has a column in `shown`.
fn more_lines(
    sample: &Sample,
    kind: &str,
    shown: &[&str],
    rates: Option<&Rates>,
    room: usize,
) -> Vec<Line<'static>> {
    let devices = sample.devices.iter().filter(|d| d.kind == kind);
    let lines = devices.flat_map(|device| {
        let mut words = vec![format!("{}:", device.id)];
        words.extend(more_words(device, shown, rates));
        if words.len() > 1 {
            wrapped(&words, GAP, room)
        } else {
            Vec::new()
        }
    });
    lines.collect()
}

/// Figures of a device that this program does not know, such as those of a newer VMM, if there is one that is not 0,
/// and the rare ones that are not.
fn more_words(device: &Device, shown: &[&str], rates: Option<&Rates>) -> Vec<String> {
    let known =
        |name: &str| shown.contains(&name) || DULL.contains(&name) || pacing::is_pacing(name);
    let rare = |name: &str| RARE.contains(&name);
    let all = &device.counters;
    let any = all
        .iter()
        .any(|(name, value)| *value > 0 && !known(name) && !rare(name));
    let wanted = |name: &str, value: u64| !known(name) && (value > 0 || any && !rare(name));
    let words = all.iter().filter(|(name, value)| wanted(name, **value));
    words
        .map(|(name, value)| counter_text(device, name, *value, rates))
        .collect()
}

/// What devices that are neither disks nor network cards did.
fn other_lines(sample: &Sample, rates: Option<&Rates>, room: usize) -> Vec<Line<'static>> {
    let others = sample
        .devices
        .iter()
        .filter(|d| d.kind != "block" && d.kind != "net");
    let lines = others.flat_map(|device| {
        let wanted =
            |name: &str, value: u64| value > 0 && !DULL.contains(&name) && !pacing::is_pacing(name);
        let counters = device
            .counters
            .iter()
            .filter(|(name, value)| wanted(name, **value));
        let mut words = vec![format!("{}:", device.id)];
        words.extend(counters.map(|(name, value)| counter_text(device, name, *value, rates)));
        if words.len() > 1 {
            wrapped(&words, GAP, room)
        } else {
            Vec::new()
        }
    });
    lines.collect()
}

/// A counter by its name, with what it is and what it changes.
fn counter_text(device: &Device, name: &str, value: u64, rates: Option<&Rates>) -> String {
    let rate = rate(rates.and_then(|rates| rates.of(&device.id, name)));
    format!("{name} {} ({rate}/s)", count(value as f64))
}

/// A sentence in lines of at most `room` columns, as far as its words allow.
fn text_lines(text: &str, room: usize) -> impl Iterator<Item = Line<'static>> {
    let words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
    wrapped(&words, " ", room).into_iter()
}

/// `words` with `gap` between them in lines of at most `room` columns, as far as they can be.
fn wrapped(words: &[String], gap: &str, room: usize) -> Vec<Line<'static>> {
    let mut lines: Vec<String> = Vec::new();
    for word in words {
        match lines.last_mut() {
            Some(line) if line.chars().count() + gap.len() + word.chars().count() <= room => {
                line.push_str(gap);
                line.push_str(word);
            }
            _ => lines.push(word.clone()),
        }
    }
    lines.into_iter().map(Line::from).collect()
}

fn protection_lines(status: &Status, rates: Option<&Rates>, room: usize) -> Vec<Line<'static>> {
    let role = match status.role {
        Role::Primary => "primary",
        Role::Secondary => "secondary",
    };
    let (word, style) = if status.protected {
        ("protected", Style::new().green())
    } else {
        ("not protected", Style::new().yellow())
    };
    let how = format!("{role}, {word}: {}", status.reason);
    let mut lines: Vec<_> = text_lines(&how, room)
        .map(|line| line.style(style))
        .collect();
    // Nobody ever asked for it.
    if status.term == 0 && status.peer.is_none() && status.looking_at.is_none() {
        return lines;
    }
    lines.extend(text_lines(&peer_text(status), room));
    lines.extend(text_lines(&output_text(status, rates), room));
    let times = [
        ("pause", &status.pause_us),
        ("added latency", &status.added_latency_us),
        ("copy's lag", &status.secondary_lag_us),
        ("resync", &status.resync_us),
    ];
    let mut table = Table::new(&["", "P50", "P99", "MAX"]);
    for (name, times) in times {
        table.row(times_cells(name, times));
    }
    let text = table.text();
    lines.extend(text.lines().map(|line| Line::from(line.to_owned())));
    lines
}

fn peer_text(status: &Status) -> String {
    let peer = status.peer.as_deref().unwrap_or("none");
    let mode = status.mode.name();
    let mut text = format!(
        "peer {peer}, {mode}, term {}, epoch {}",
        status.term, status.epoch
    );
    if let Some(left) = status.lease_ms {
        // Writing to a string cannot fail.
        let _ = write!(text, ", lease {left} ms");
    }
    if let Some(place) = &status.looking_at {
        let left = status.next_try_ms.unwrap_or(0);
        let _ = write!(text, ", looks for one at {place} in {left} ms");
    }
    text
}

fn output_text(status: &Status, rates: Option<&Rates>) -> String {
    let mut text = format!(
        "matched outputs {}/s, resyncs {} ({}/s)",
        rate(rates.and_then(|rates| rates.matched)),
        status.resyncs,
        rate(rates.and_then(|rates| rates.resyncs)),
    );
    if let Some(reason) = &status.last_resync {
        // Writing to a string cannot fail.
        let _ = write!(text, ", last: {reason}");
    }
    text
}

fn times_cells(name: &str, times: &Percentiles) -> Vec<String> {
    let mut cells = vec![name.to_owned()];
    cells.extend(
        [times.p50, times.p99, times.max].map(|time| match times.samples {
            0 => UNKNOWN.to_owned(),
            _ => figures::time(time),
        }),
    );
    cells
}
