//! The screen that lives: keys, signals, time and answers go into the model, which is drawn.

use std::collections::HashSet;
use std::io;
use std::os::unix::net::UnixStream as Signals;
use std::time::Duration;

use ratatui::DefaultTerminal;
use ratatui::crossterm::event::{self, Event, KeyCode, KeyEvent, KeyEventKind, KeyModifiers};
use ratatui::crossterm::terminal::is_raw_mode_enabled;
use tokio::net::UnixStream;
use tokio::sync::mpsc;
use tokio::task::JoinSet;
use tokio::time::{Instant, MissedTickBehavior};

use super::ask::Inquirer;
use super::draw;
use super::model::{Key, Model, Step};
use super::sample::Sample;
use crate::runtime_dir::{Guest, Root};

/// How long answers gather before they are drawn.
const GATHER: Duration = Duration::from_millis(40);
/// Keys that wait for the screen; more than anybody presses meanwhile.
const KEYS_MAX: usize = 64;

/// The terminal's other screen, for as long as this lives, also when it ends by a panic.
struct Screen(DefaultTerminal);

impl Screen {
    fn enter() -> io::Result<Self> {
        match ratatui::try_init() {
            Ok(terminal) => Ok(Self(terminal)),
            Err(error) => {
                // What was done before it failed is undone, as far as it can be.
                let _ = ratatui::try_restore();
                Err(error)
            }
        }
    }
}

impl Drop for Screen {
    fn drop(&mut self) {
        let _ = self.0.show_cursor();
        // After a panic it was done already: once more, and the cursor would go back to above what was told.
        // A terminal that is gone cannot be restored.
        if is_raw_mode_enabled().unwrap_or(true) {
            let _ = ratatui::try_restore();
        }
    }
}

/// Shows the guests of `root`, or only one, until the user or a signal ends it.
pub(super) async fn live(
    root: &Root,
    only: Option<String>,
    interval: Duration,
    signals: Signals,
) -> io::Result<()> {
    // It does not block already.
    let signals = UnixStream::from_std(signals)?;
    let mut screen = Screen::enter()?;
    let mut show = Show {
        root,
        model: Model::new(interval, only.clone()),
        only,
        inquirer: Inquirer::new(),
        asked: JoinSet::new(),
        unanswered: HashSet::new(),
        // The first look is what is drawn first.
        draw_at: None,
    };
    show.run(&mut screen.0, &signals).await
}

/// What a guest answered.
type Answer = (String, Result<Sample, String>);

struct Show<'a> {
    root: &'a Root,
    only: Option<String>,
    model: Model,
    inquirer: Inquirer,
    asked: JoinSet<Answer>,
    /// Guests that were asked and have not answered: they are not asked twice.
    unanswered: HashSet<String>,
    /// When the screen is drawn, if something changed.
    draw_at: Option<Instant>,
}

impl Show<'_> {
    async fn run(
        &mut self,
        terminal: &mut DefaultTerminal,
        signals: &UnixStream,
    ) -> io::Result<()> {
        let mut keys = read_keys()?;
        let mut ticks = tokio::time::interval(self.model.interval);
        ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            let draw_at = self.draw_at;
            tokio::select! {
                ended = signals.readable() => return ended,
                event = keys.recv() => match event.transpose()? {
                    Some(event) if self.take_event(&event) == Step::On => {}
                    _ => return Ok(()),
                },
                _ = ticks.tick() => self.look(),
                Some(answer) = self.asked.join_next() => self.take_answer(answer?),
                () = tokio::time::sleep_until(draw_at.unwrap_or_else(Instant::now)),
                    if draw_at.is_some() => self.draw(terminal)?,
            }
        }
    }

    fn draw(&mut self, terminal: &mut DefaultTerminal) -> io::Result<()> {
        self.draw_at = None;
        let mut lines_above = 0;
        terminal.draw(|frame| lines_above = draw::draw(&self.model, frame))?;
        self.model.limit_scroll(lines_above);
        Ok(())
    }

    fn draw_in(&mut self, time: Duration) {
        let at = Instant::now() + time;
        self.draw_at = Some(self.draw_at.map_or(at, |earlier| earlier.min(at)));
    }

    /// Looks which guests run, and asks them how they are.
    fn look(&mut self) {
        let guests = match &self.only {
            Some(name) => self.root.find(name).into_iter().collect(),
            None => self.root.guests(),
        };
        let names: Vec<String> = guests.iter().map(Guest::name).collect();
        self.model.found(self.inquirer.now(), &names);
        for (name, guest) in names.into_iter().zip(guests) {
            if self.unanswered.insert(name.clone()) {
                let answer = self.inquirer.clone().ask(guest);
                self.asked.spawn(async move {
                    let answer = answer.await;
                    (name, answer.map_err(|e| tandem_vmm::error::causes(&e)))
                });
            }
        }
        self.draw_in(GATHER);
    }

    fn take_answer(&mut self, (name, answer): Answer) {
        self.unanswered.remove(&name);
        self.model.heard(&name, answer);
        self.draw_in(GATHER);
    }

    fn take_event(&mut self, event: &Event) -> Step {
        // A key is answered at once, and another size drawn.
        self.draw_in(Duration::ZERO);
        match event {
            Event::Key(pressed) => key(pressed).map_or(Step::On, |key| self.model.press(key)),
            _ => Step::On,
        }
    }
}

/// What a key means, if it means anything.
fn key(pressed: &KeyEvent) -> Option<Key> {
    if pressed.kind == KeyEventKind::Release {
        return None;
    }
    let control = pressed.modifiers.contains(KeyModifiers::CONTROL);
    match pressed.code {
        KeyCode::Char('c') if control => Some(Key::Quit),
        _ if control => None,
        KeyCode::Char('q') => Some(Key::Quit),
        KeyCode::Char('s') => Some(Key::Sort),
        KeyCode::Char('?' | 'h') => Some(Key::Help),
        KeyCode::Char('k') | KeyCode::Up => Some(Key::Up),
        KeyCode::Char('j') | KeyCode::Down => Some(Key::Down),
        KeyCode::Enter => Some(Key::Enter),
        KeyCode::Esc => Some(Key::Escape),
        _ => None,
    }
}

/// What happens at the terminal, as a thread of its own reads it: reading blocks. The thread ends with the
/// process.
fn read_keys() -> io::Result<mpsc::Receiver<io::Result<Event>>> {
    let (sender, receiver) = mpsc::channel(KEYS_MAX);
    let read = move || {
        loop {
            let event = event::read();
            let failed = event.is_err();
            if sender.blocking_send(event).is_err() || failed {
                return;
            }
        }
    };
    std::thread::Builder::new()
        .name("keys".into())
        .spawn(read)?;
    Ok(receiver)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn press(code: KeyCode, modifiers: KeyModifiers) -> Option<Key> {
        key(&KeyEvent::new(code, modifiers))
    }

    #[test]
    fn keys_mean_what_the_help_says() {
        let none = KeyModifiers::NONE;
        let known = [
            (KeyCode::Char('q'), Key::Quit),
            (KeyCode::Char('s'), Key::Sort),
            (KeyCode::Char('?'), Key::Help),
            (KeyCode::Up, Key::Up),
            (KeyCode::Down, Key::Down),
            (KeyCode::Enter, Key::Enter),
            (KeyCode::Esc, Key::Escape),
        ];
        for (code, key) in known {
            assert_eq!(press(code, none), Some(key));
        }
        let control = KeyModifiers::CONTROL;
        assert_eq!(press(KeyCode::Char('c'), control), Some(Key::Quit));
        assert_eq!(press(KeyCode::Char('s'), control), None);
        assert_eq!(press(KeyCode::Char('c'), none), None);
    }

    #[test]
    fn a_key_that_is_let_go_means_nothing() {
        let mut event = KeyEvent::new(KeyCode::Char('q'), KeyModifiers::NONE);
        event.kind = KeyEventKind::Release;
        assert_eq!(key(&event), None);
    }

    /// Tells the next test that it is run by the one after it.
    const ON_A_TERMINAL: &str = "TANDEM_TEST_ON_A_TERMINAL";

    /// What the next test runs on a terminal.
    #[test]
    fn panics_on_the_screen() {
        if std::env::var_os(ON_A_TERMINAL).is_none() {
            return;
        }
        let mut screen = Screen::enter().expect("a terminal");
        let drawn = screen
            .0
            .draw(|frame| frame.render_widget("drawn", frame.area()));
        drawn.expect("a screen");
        panic!("told the user");
    }

    #[test]
    fn a_panic_is_told_once_the_terminal_is_as_before() {
        let directory = tempfile::tempdir().expect("a directory");
        let log = directory.path().join("log");
        let test = std::env::current_exe().expect("this test");
        let commands = format!(
            "stty cols 80 rows 24; stty -a; {ON_A_TERMINAL}=1 {} --nocapture --exact {}::panics_on_the_screen; stty -a",
            test.display(),
            module_path!().split_once("::").expect("a crate").1
        );
        let ended = std::process::Command::new("script")
            .args(["--quiet", "--flush", "--command", &commands])
            .arg(&log)
            .stdin(std::process::Stdio::null())
            .output()
            .expect("script runs");
        let log = std::fs::read(log).expect("what it printed");
        let log = String::from_utf8_lossy(&log);
        let (before, shown) = log.split_once("\x1b[?1049h").expect("another screen");
        let (shown, after) = shown.split_once("\x1b[?1049l").expect("is left");
        assert!(shown.contains("drawn"), "{ended:?} {log}");
        assert!(after.contains("told the user"), "{log}");
        assert!(!after.contains("\x1b[?1049l"), "{log:?}");
        assert!(after.contains("\x1b[?25h"), "the cursor is hidden: {log:?}");
        for modes in ["isig icanon", "echo echoe"] {
            assert!(before.contains(modes) && after.contains(modes), "{log}");
        }
    }
}
