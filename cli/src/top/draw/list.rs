//! All guests, one per row.

use ratatui::Frame;
use ratatui::layout::{Constraint, Rect};
use ratatui::style::{Style, Stylize};
use ratatui::text::Line;
use ratatui::widgets::{Paragraph, Row, Table, TableState};

use crate::output;
use crate::top::figures::{self, UNKNOWN};
use crate::top::model::{Contact, Guest, Model};

/// The columns: heading and width.
const COLUMNS: [(&str, Constraint); 11] = [
    ("NAME", Constraint::Min(8)),
    ("STATE", Constraint::Length(8)),
    ("UPTIME", Constraint::Length(7)),
    ("CPU%", Constraint::Length(5)),
    ("EXITS/s", Constraint::Length(7)),
    ("DISK/s", Constraint::Length(6)),
    ("B/s", Constraint::Length(5)),
    ("NET/s", Constraint::Length(5)),
    ("B/s", Constraint::Length(5)),
    ("MEMORY", Constraint::Length(6)),
    ("PROT", Constraint::Length(4)),
];

/// The headings of [`cells`].
pub(in crate::top) fn headings() -> [&'static str; COLUMNS.len()] {
    COLUMNS.map(|(heading, _)| heading)
}

/// Draws the guests, so that the one that is chosen can be seen.
pub(super) fn draw(model: &Model, frame: &mut Frame<'_>, area: Rect) {
    let guests = model.guests();
    if guests.is_empty() {
        let text = Line::from(" no guest runs").dim();
        frame.render_widget(Paragraph::new(text), area);
        return;
    }
    let rows = guests.iter().map(|guest| row(guest));
    let table = Table::new(rows, COLUMNS.map(|(_, width)| width))
        .header(Row::new(headings()).bold())
        .row_highlight_style(Style::new().reversed());
    let mut state = TableState::new().with_selected(model.position());
    frame.render_stateful_widget(table, area, &mut state);
}

fn row(guest: &Guest) -> Row<'static> {
    let row = Row::new(cells(guest));
    match guest.contact {
        Contact::Silent(_) => row.red(),
        Contact::Ended(_) => row.dim(),
        Contact::Asked | Contact::Answers => row,
    }
}

/// A guest's row: a cell per column.
pub(in crate::top) fn cells(guest: &Guest) -> [String; COLUMNS.len()] {
    let (last, totals) = (guest.last.as_ref(), guest.totals());
    let text = |value: Option<String>| value.unwrap_or(UNKNOWN.to_owned());
    let resident = last.and_then(|sample| sample.usage.resident);
    [
        guest.name.clone(),
        guest.state_word(),
        text(last.map(|sample| output::uptime(sample.uptime_ms))),
        figures::percent(totals.and_then(|totals| totals.cpu)),
        figures::rate(totals.map(|totals| totals.exits)),
        figures::rate(totals.map(|totals| totals.disk_ops)),
        figures::rate(totals.map(|totals| totals.disk_bytes)),
        figures::rate(totals.map(|totals| totals.net_frames)),
        figures::rate(totals.map(|totals| totals.net_bytes)),
        text(resident.map(figures::memory)),
        text(last.map(|sample| sample.protection_word().to_owned())),
    ]
}
