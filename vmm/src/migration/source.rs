//! The side that gives a guest away.

use std::time::{Duration, Instant};

use super::frame::{self, Hello, Kind, Purpose};
use super::pages::PageSender;
use super::protocol::{End, SourceFate, SourcePhase, source_fate};
use super::{Link, MigrationError, Route};
use crate::control::{FreezeTimes, Handle};
use crate::snapshot::save::{Precopy, Session};

/// What a migration came to.
#[derive(Clone, Copy, Debug)]
pub struct Report {
    /// Copying while the guest ran.
    pub precopy: Precopy,
    /// Pages sent while the guest stood.
    pub pages: u64,
    /// Bytes of memory sent in all.
    pub bytes: u64,
    /// How long the guest stood, as the source saw it.
    pub downtime: Duration,
    /// Parts of that: stopping the guest and reading its state.
    pub freeze: FreezeTimes,
    /// Sending the last pages and the state.
    pub send: Duration,
    /// Letting go of disks, taps and sockets.
    pub release: Duration,
    /// Until the target said that the guest runs.
    pub takeover: Duration,
}

/// Gives the guest of `guest` to who listens at `to`. Copying goes on until the last pages are
/// expected to take at most `budget`.
///
/// # Errors
/// When it could not be given away: then it goes on here, but for
/// [`MigrationError::InDoubt`] and [`MigrationError::Lost`].
pub fn migrate(
    guest: &Handle,
    to: &Route,
    description: &str,
    budget: Duration,
) -> Result<Report, MigrationError> {
    let mut link = to.connect()?;
    let mut session = Session::begin(guest)?;
    let hello = Hello {
        description: description.to_owned(),
        hardware: session.saving().hardware.clone(),
    };
    frame::send_preface(&mut link, Purpose::Migration)?;
    frame::send(&mut link, Kind::Hello, &hello.encode()?)?;
    frame::expect(&mut link, Kind::Accept)?;
    let given = hand_over(&mut session, &mut link, budget);
    let handed = match given {
        Ok(handed) => handed,
        Err(error) => {
            frame::refuse(&mut link, &error.to_string());
            return Err(error);
        }
    };
    conclude(session, &mut link, handed)
}

/// All but the end of a report.
#[derive(Clone, Copy)]
struct Handed {
    report: Report,
    since: Instant,
    waiting: Instant,
}

/// Copies and sends everything, lets devices go, and says that it is complete.
fn hand_over(
    session: &mut Session<'_>,
    link: &mut Link,
    budget: Duration,
) -> Result<Handed, MigrationError> {
    let saving = session.saving().clone();
    let mut sink = PageSender::new(&mut *link, saving);
    let precopy = session.precopy(&mut sink, budget)?;
    let stopped = session.freeze(&mut sink)?;
    let sending = Instant::now();
    frame::send(link, Kind::State, &stopped.frozen.state.to_bytes()?)?;
    let send = stopped.harvest + stopped.copy + sending.elapsed();
    let releasing = Instant::now();
    session.release(stopped.frozen.state)?;
    let report = Report {
        precopy,
        pages: stopped.pages,
        bytes: precopy.bytes + stopped.bytes,
        downtime: Duration::ZERO,
        freeze: stopped.frozen.times,
        send,
        release: releasing.elapsed(),
        takeover: Duration::ZERO,
    };
    let waiting = Instant::now();
    match frame::send(link, Kind::Complete, &[]) {
        // Whether it went out cannot be known: it is over once the target has said so.
        Ok(()) | Err(_) => Ok(Handed {
            report,
            since: stopped.frozen.since,
            waiting,
        }),
    }
}

/// Waits for the target's word, and does what it means.
fn conclude(
    session: Session<'_>,
    link: &mut Link,
    handed: Handed,
) -> Result<Report, MigrationError> {
    let answer = frame::expect(link, Kind::Running);
    let (downtime, takeover) = (handed.since.elapsed(), handed.waiting.elapsed());
    let end = match &answer {
        Ok(()) => End::Running,
        Err(error) => error.end_of_target(),
    };
    match (source_fate(SourcePhase::HandedOver, end), answer) {
        (SourceFate::Leave, _) => {
            session.leave()?;
            Ok(Report {
                downtime,
                takeover,
                ..handed.report
            })
        }
        (SourceFate::GoOn, answer) => {
            session
                .finish()
                .map_err(|e| MigrationError::Lost(e.to_string()))?;
            Err(answer.err().unwrap_or(MigrationError::Closed))
        }
        (SourceFate::InDoubt, _) => {
            session.leave_in_doubt()?;
            Err(MigrationError::InDoubt)
        }
    }
}
