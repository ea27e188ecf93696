//! What the outside sees: a client that wants answers, and remembers every one.

use super::guest::{Guest, Output};
use super::world::{Micros, ms};

/// Requests that the client has open at a time.
const WINDOW: usize = 3;
/// After which a request without an answer is sent again.
const SEND_AGAIN: Micros = ms(30);

/// The client, and everything that ever left a host.
#[derive(Default)]
pub(super) struct Outside {
    /// Digests of all outputs, by request.
    released: Vec<Option<u64>>,
    /// Requests answered, without a gap.
    pub(super) answered: usize,
    /// When a request was sent last, by request.
    sent: Vec<Micros>,
    pub(super) last_answer: Micros,
    /// Longest time without an answer around a takeover.
    pub(super) blackout: Micros,
    /// A secondary went live since the last answer.
    taken_over: bool,
}

impl Outside {
    /// Notes that an output leaves; says what is wrong with it.
    pub(super) fn note(&mut self, output: Output) -> Result<(), String> {
        if self.released.len() < output.position {
            self.released.resize(output.position, None);
        }
        let released = &mut self.released[output.position - 1];
        match released.replace(output.digest) {
            Some(before) if before != output.digest => Err(format!(
                "{output:?} contradicts {before}, which left before"
            )),
            _ => Ok(()),
        }
    }

    /// Says which output that left `guest` does not explain.
    pub(super) fn unexplained(&self, guest: &Guest) -> Option<Output> {
        let released = self.released.iter().enumerate();
        released
            .filter_map(|(index, digest)| {
                let position = index + 1;
                digest.map(|digest| Output { position, digest })
            })
            .find(|output| !guest.explains(*output))
    }

    /// A secondary went live.
    pub(super) fn note_takeover(&mut self) {
        self.taken_over = true;
    }

    /// The client got an answer.
    pub(super) fn answer(&mut self, now: Micros, output: Output) {
        if output.position == self.answered + 1 {
            self.answered += 1;
            if std::mem::take(&mut self.taken_over) {
                self.blackout = self.blackout.max(now - self.last_answer);
            }
            self.last_answer = now;
        }
    }

    /// Requests to send now.
    pub(super) fn requests(&mut self, now: Micros) -> Vec<usize> {
        let open = self.answered + 1..=self.answered + WINDOW;
        self.sent.resize(*open.end(), 0);
        let due = |position: &usize| {
            let sent = self.sent[position - 1];
            sent == 0 || now - sent >= SEND_AGAIN
        };
        let requests: Vec<usize> = open.filter(due).collect();
        requests.iter().for_each(|at| self.sent[at - 1] = now);
        requests
    }
}
