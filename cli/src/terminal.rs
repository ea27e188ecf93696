//! Raw mode of the terminal, undone however the process ends.

use std::io::{self, IsTerminal};
use std::sync::{Mutex, Once, PoisonError};

use rustix::stdio::stdin;
use rustix::termios::{
    InputModes, LocalModes, OptionalActions, SpecialCodeIndex, Termios, tcgetattr, tcsetattr,
};

/// Value that turns a special key off (`_POSIX_VDISABLE`).
const KEY_OFF: u8 = 0;

/// The terminal's mode before it was made raw; none while it is not.
static BEFORE: Mutex<Option<Termios>> = Mutex::new(None);
static HOOK: Once = Once::new();

/// What the user's keys do while the terminal is raw.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Keys {
    /// All of them are input.
    Input,
    /// All of them are input but this one, which sends SIGINT to this process.
    Interrupt(u8),
}

/// The terminal on standard input, raw for as long as this lives.
#[derive(Debug)]
pub struct RawTerminal(());

impl RawTerminal {
    /// Makes the terminal raw; nothing if standard input is none, or is another job's.
    ///
    /// # Errors
    /// When the terminal refuses.
    pub fn enter(keys: Keys) -> io::Result<Option<Self>> {
        if !io::stdin().is_terminal() || !in_foreground() {
            return Ok(None);
        }
        let before = tcgetattr(stdin())?;
        tcsetattr(stdin(), OptionalActions::Now, &raw(&before, keys))?;
        *BEFORE.lock().unwrap_or_else(PoisonError::into_inner) = Some(before);
        HOOK.call_once(restore_before_panics);
        Ok(Some(Self(())))
    }
}

impl Drop for RawTerminal {
    fn drop(&mut self) {
        restore();
    }
}

/// Whether the terminal is ours to change: a background job that tried would be stopped.
fn in_foreground() -> bool {
    rustix::termios::tcgetpgrp(stdin()).is_ok_and(|group| group == rustix::process::getpgrp())
}

fn raw(before: &Termios, keys: Keys) -> Termios {
    let mut raw = before.clone();
    raw.input_modes -= InputModes::ICRNL
        | InputModes::INLCR
        | InputModes::IGNCR
        | InputModes::ISTRIP
        | InputModes::IXON
        | InputModes::BRKINT
        | InputModes::PARMRK;
    // Output modes stay, so that our own lines end properly too.
    raw.local_modes -= LocalModes::ECHO
        | LocalModes::ECHONL
        | LocalModes::ICANON
        | LocalModes::IEXTEN
        | LocalModes::ISIG;
    raw.special_codes[SpecialCodeIndex::VMIN] = 1;
    raw.special_codes[SpecialCodeIndex::VTIME] = 0;
    if let Keys::Interrupt(key) = keys {
        raw.local_modes |= LocalModes::ISIG;
        raw.special_codes[SpecialCodeIndex::VINTR] = key;
        raw.special_codes[SpecialCodeIndex::VQUIT] = KEY_OFF;
        raw.special_codes[SpecialCodeIndex::VSUSP] = KEY_OFF;
    }
    raw
}

fn restore() {
    let before = BEFORE.lock().unwrap_or_else(PoisonError::into_inner).take();
    if let Some(before) = before {
        let _ = tcsetattr(stdin(), OptionalActions::Now, &before);
    }
}

fn restore_before_panics() {
    let next = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        restore();
        next(info);
    }));
}
