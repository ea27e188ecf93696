//! The screen as a function of what is known. Pure: it asks nobody, neither for time nor for guests.

mod bar;
mod help;
pub(in crate::top) mod list;
mod minute;
mod pacing;
mod page;

use ratatui::Frame;
use ratatui::layout::{Constraint, Layout, Rect};
use ratatui::style::{Style, Stylize};
use ratatui::text::{Line, Span};
use ratatui::widgets::Paragraph;

use super::model::{Model, View};

/// Smallest screen on which there is something to see, in columns and rows.
const SCREEN_MIN: (u16, u16) = (40, 8);
/// Smallest space between head and foot in which the last minute has a place.
const MINUTE_SPACE_MIN: u16 = 14;

/// Draws everything, and says how many lines a page has above the last ones that fit.
pub(crate) fn draw(model: &Model, frame: &mut Frame<'_>) -> usize {
    let area = frame.area();
    if area.width < SCREEN_MIN.0 || area.height < SCREEN_MIN.1 {
        let text = format!("at least {}x{} needed", SCREEN_MIN.0, SCREEN_MIN.1);
        frame.render_widget(Paragraph::new(text), area);
        return 0;
    }
    let rows = [
        Constraint::Length(1),
        Constraint::Fill(1),
        Constraint::Length(1),
    ];
    let [head, body, foot] = Layout::vertical(rows).areas(area);
    frame.render_widget(head_line(model), head);
    frame.render_widget(foot_line(model), foot);
    if model.help {
        help::draw(frame, body);
        return 0;
    }
    match (model.view, model.chosen()) {
        (View::Page(line), Some(guest)) => {
            let rest = draw_minute(model, frame, body, false);
            page::draw(guest, line, frame, rest)
        }
        (View::Page(_), None) | (View::List, _) => {
            let rest = draw_minute(model, frame, body, true);
            list::draw(model, frame, rest);
            0
        }
    }
}

/// Draws the last minute of the guest that is chosen below or above the rest, if there is space; gives the rest.
fn draw_minute(model: &Model, frame: &mut Frame<'_>, body: Rect, below: bool) -> Rect {
    let Some(guest) = model.chosen() else {
        return body;
    };
    if body.height < MINUTE_SPACE_MIN {
        return body;
    }
    let (minute, rest) = if below {
        let rows = [Constraint::Fill(1), Constraint::Length(minute::HEIGHT)];
        let [rest, minute] = Layout::vertical(rows).areas(body);
        (minute, rest)
    } else {
        let rows = [Constraint::Length(minute::HEIGHT), Constraint::Fill(1)];
        let [minute, rest] = Layout::vertical(rows).areas(body);
        (minute, rest)
    };
    minute::draw(guest, model.now, frame, minute);
    rest
}

fn head_line(model: &Model) -> Line<'static> {
    let guests = match model.guests().len() {
        1 => "1 guest".to_owned(),
        count => format!("{count} guests"),
    };
    let every = format!("every {:?}", model.interval);
    let order = format!("by {}", model.order.word());
    let text = match model.view {
        View::List => format!(" tandem top   {guests}   {order}   {every}"),
        View::Page(_) => format!(" tandem top   {guests}   {every}"),
    };
    Line::from(text).bold()
}

fn foot_line(model: &Model) -> Line<'static> {
    let keys: &[(&str, &str)] = match model.view {
        _ if model.help => &[("Esc", "back"), ("q", "quit")],
        View::List => &[
            ("q", "quit"),
            ("↑↓", "choose"),
            ("Enter", "the guest's page"),
            ("s", "sort"),
            ("?", "help"),
        ],
        View::Page(_) => &[
            ("q", "quit"),
            ("↑↓", "scroll"),
            ("Esc", "all guests"),
            ("?", "help"),
        ],
    };
    let words = keys.iter().flat_map(|(key, does)| {
        let key = Span::styled(format!(" {key}"), Style::new().bold());
        [key, Span::from(format!(" {does}  "))]
    });
    Line::from_iter(words)
}

#[cfg(test)]
#[path = "tests.rs"]
mod tests;
