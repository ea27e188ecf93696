//! What a guest did in the last minute, as curves.

use std::time::Duration;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::Stylize;
use ratatui::text::Line;
use ratatui::widgets::{Block, Borders, Paragraph, Sparkline};

use crate::top::figures;
use crate::top::model::Guest;
use crate::top::rates::Totals;

/// Rows that it takes.
pub(super) const HEIGHT: u16 = 6;
/// Columns of the screen from which on there is place for one curve more.
const WIDE: u16 = 100;
/// Curves are drawn in whole numbers: so many for 1.
const STEPS: f64 = 1000.0;

/// One figure.
struct Curve {
    label: &'static str,
    of: fn(&Totals) -> Option<f64>,
    text: fn(Option<f64>) -> String,
}

const CURVES: [Curve; 4] = [
    Curve {
        label: "CPU%",
        of: |totals| totals.cpu,
        text: figures::percent,
    },
    Curve {
        label: "exits/s",
        of: |totals| Some(totals.exits),
        text: figures::rate,
    },
    Curve {
        label: "disk requests/s",
        of: |totals| Some(totals.disk_ops),
        text: figures::rate,
    },
    Curve {
        label: "frames/s",
        of: |totals| Some(totals.net_frames),
        text: figures::rate,
    },
];

const MATCHED: Curve = Curve {
    label: "matched outputs/s",
    of: |totals| Some(totals.matched),
    text: figures::rate,
};

/// Draws the guest's curves beside each other, the latest at the right.
pub(super) fn draw(guest: &Guest, now: Duration, frame: &mut Frame<'_>, area: Rect) {
    let title = format!(" {}: the last minute ", guest.name);
    let block = Block::new().borders(Borders::TOP).title(title.bold());
    let inner = block.inner(area);
    frame.render_widget(block, area);
    let protected = guest
        .last
        .as_ref()
        .is_some_and(|last| last.protection.protected);
    let matched = (protected && area.width >= WIDE).then_some(&MATCHED);
    let curves: Vec<&Curve> = CURVES.iter().chain(matched).collect();
    let places = Layout::horizontal(vec![Constraint::Fill(1); curves.len()])
        .spacing(1)
        .split(inner);
    for (curve, place) in curves.into_iter().zip(places.iter()) {
        draw_curve(guest, now, curve, frame, *place);
    }
}

fn draw_curve(guest: &Guest, now: Duration, curve: &Curve, frame: &mut Frame<'_>, area: Rect) {
    let rows = [Constraint::Length(2), Constraint::Fill(1)];
    let [head, body] = Layout::vertical(rows).areas(area);
    let values = guest.history.columns(now, body.width.into(), curve.of);
    // A column is the mean of some samples: its height is no more than the most that was seen.
    let most = guest.history.most(now, curve.of);
    let latest = guest.totals().and_then(|totals| (curve.of)(&totals));
    let (latest, top) = ((curve.text)(latest), (curve.text)(most));
    let lines = vec![
        Line::from(curve.label),
        Line::from(format!("{latest} now {top} max")),
    ];
    frame.render_widget(Paragraph::new(lines), head);
    let bars = values.iter().map(|value| value.map(steps));
    let line = Sparkline::default()
        .data(bars)
        // Of nothing at all there is nothing to see.
        .max(most.map_or(0, steps).max(1))
        .cyan();
    frame.render_widget(line, body);
}

fn steps(value: f64) -> u64 {
    (value * STEPS) as u64
}
