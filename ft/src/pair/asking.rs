//! A question to the arbiter, asked until there is an answer.

use std::time::Instant;

use super::{ASK_AGAIN, Action, Actions, Notice, Outcome};
use crate::arbiter::{Tenure, Term};

/// A term that is being asked for.
#[derive(Clone, Debug)]
pub(super) struct Asking {
    term: Term,
    /// When to ask again; nothing while the question is under way.
    again: Option<Instant>,
    reported: bool,
}

/// Hears the arbiter on the question in `asking`, which is over if there is an answer.
///
/// # Panics
/// When nobody asked.
pub(super) fn hear(
    asking: &mut Option<Asking>,
    now: Instant,
    (term, outcome): (Term, Outcome),
    actions: &mut Actions,
) -> Option<Answer> {
    let asked = asking.as_mut().expect("somebody asked");
    let answer = asked.answer(now, term, outcome, actions)?;
    *asking = None;
    Some(answer)
}

/// A definite answer.
pub(super) enum Answer {
    Won(Term),
    Lost(Tenure),
}

impl Asking {
    /// Asks for `term`.
    pub(super) fn begin(term: Term, actions: &mut Actions) -> Self {
        actions.push(Action::Ask(term));
        Self {
            term,
            again: None,
            reported: false,
        }
    }

    /// Asks again if it is time.
    pub(super) fn timer(&mut self, now: Instant, actions: &mut Actions) {
        if self.again.is_some_and(|again| again <= now) {
            self.again = None;
            actions.push(Action::Ask(self.term));
        }
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.again
    }

    /// The answer, if `outcome` is one.
    ///
    /// # Panics
    /// When the question was not asked.
    fn answer(
        &mut self,
        now: Instant,
        term: Term,
        outcome: Outcome,
        actions: &mut Actions,
    ) -> Option<Answer> {
        assert_eq!(term, self.term, "an answer to another question");
        assert!(self.again.is_none(), "an answer without a question");
        match outcome {
            Outcome::Won => Some(Answer::Won(term)),
            Outcome::Lost(found) => {
                assert!(found.term >= term, "lost {term} to an older {found}");
                Some(Answer::Lost(found))
            }
            Outcome::Unknown => {
                self.again = Some(now + ASK_AGAIN);
                if !self.reported {
                    self.reported = true;
                    actions.push(Action::Report(Notice::ArbiterSilent(term)));
                }
                None
            }
        }
    }
}
