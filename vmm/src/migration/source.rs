//! The side that gives a guest away.

use std::time::{Duration, Instant};

use super::frame::{self, Hello, Kind, Purpose};
use super::pages::PageSender;
use super::protocol::{End, SourceFate, SourcePhase};
use super::{Link, MigrationError, Route};
use crate::control::{ControlError, FreezeTimes, Handle};
use crate::snapshot::SnapshotError;
use crate::snapshot::save::{PageSink, Precopy, Session};

/// Pages that are copied once more while the guest runs, if so many were written while its company made ready.
const PAGES_MORE: u64 = 64;

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

/// What a guest has besides its machine, and takes along: its outputs, its protection. Called in the order of its
/// methods; [`Company::stay`] comes last whenever the guest stays.
pub trait Company {
    /// What the target is told of it first, if there is anything.
    ///
    /// # Errors
    /// When the guest cannot go.
    fn tell(&mut self) -> Result<Option<Vec<u8>>, MigrationError>;

    /// Most of memory is copied: from now on nobody else lets the guest stand. May take a while.
    ///
    /// # Errors
    /// When that cannot be had.
    fn make_ready(&mut self) -> Result<(), MigrationError>;

    /// The guest stands. From now on nothing of it leaves here, unless it stays; what has to leave there first, if
    /// there is anything.
    ///
    /// # Errors
    /// When it cannot be told.
    fn pack(&mut self) -> Result<Option<Vec<u8>>, MigrationError>;

    /// Disks, taps and sockets are let go: so must be others' hold of them. How many others save the guest, and begin
    /// anew if it stays.
    ///
    /// # Errors
    /// When they cannot be.
    fn let_go(&mut self) -> Result<usize, MigrationError>;

    /// In `phase` the conversation with the target ended so: what becomes of the guest, which stands if it was packed.
    fn decide(&mut self, phase: SourcePhase, end: End) -> SourceFate;

    /// The guest stays, and goes on by now.
    fn stay(&mut self);
}

/// Gives the guest of `guest` to who listens at `to`, with its `company`. Copying goes on until the last pages are
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
    company: &mut impl Company,
) -> Result<Report, MigrationError> {
    let moved = try_migrate(guest, to, description, budget, company);
    if moved.is_err() {
        company.stay();
    }
    moved
}

fn try_migrate(
    guest: &Handle,
    to: &Route,
    description: &str,
    budget: Duration,
    company: &mut impl Company,
) -> Result<Report, MigrationError> {
    let told = company.tell()?;
    let mut link = to.connect()?;
    let mut session = Session::begin(guest)?;
    let hello = Hello {
        description: description.to_owned(),
        hardware: session.saving().hardware.clone(),
        company: told.map(Into::into),
    };
    frame::send_preface(&mut link, Purpose::Migration)?;
    frame::send(&mut link, Kind::Hello, &hello.encode()?)?;
    frame::expect(&mut link, Kind::Accept)?;
    let given = hand_over(&mut session, &mut link, budget, company);
    let handed = match given {
        Ok(handed) => handed,
        Err(error) => {
            frame::refuse(&mut link, &error.to_string());
            return Err(give_up(session, error, company));
        }
    };
    conclude(session, &mut link, handed, company)
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
    company: &mut impl Company,
) -> Result<Handed, MigrationError> {
    let saving = session.saving().clone();
    let mut sink = PageSender::new(&mut *link, saving);
    let mut precopy = session.precopy(&mut sink, budget)?;
    company.make_ready()?;
    copy_more(session, &mut sink, &mut precopy)?;
    let stopped = session.freeze(&mut sink)?;
    let sending = Instant::now();
    let outputs = company.pack()?;
    // A target that has the state has everything.
    if let Some(outputs) = outputs {
        frame::send(link, Kind::Outputs, &outputs)?;
    }
    frame::send(link, Kind::State, &stopped.frozen.state.to_bytes()?)?;
    let send = stopped.harvest + stopped.copy + sending.elapsed();
    let releasing = Instant::now();
    let others = company.let_go()?;
    session.release(stopped.frozen.state, others)?;
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

/// Copies what the guest wrote while its company made ready, if that is much.
fn copy_more(
    session: &mut Session<'_>,
    sink: &mut impl PageSink,
    precopy: &mut Precopy,
) -> Result<(), SnapshotError> {
    if session.pending()? > PAGES_MORE {
        precopy.bytes += session.copy_pending(sink)?;
        precopy.rounds += 1;
    }
    Ok(())
}

/// The guest was not handed over: it goes on here, unless its company finds that somebody else has it. What to tell of it.
fn give_up(
    session: Session<'_>,
    error: MigrationError,
    company: &mut impl Company,
) -> MigrationError {
    match company.decide(SourcePhase::Owner, error.end_of_target()) {
        SourceFate::Leave => match session.leave() {
            Ok(()) => MigrationError::Lost(format!("another has it, since {error}")),
            Err(error) => error.into(),
        },
        // When the session ends.
        SourceFate::GoOn | SourceFate::InDoubt => error,
    }
}

/// Waits for the target's word, and does what it means.
fn conclude(
    session: Session<'_>,
    link: &mut Link,
    handed: Handed,
    company: &mut impl Company,
) -> Result<Report, MigrationError> {
    let answer = frame::expect(link, Kind::Running);
    let (downtime, takeover) = (handed.since.elapsed(), handed.waiting.elapsed());
    let end = match &answer {
        Ok(()) => End::Running,
        Err(error) => error.end_of_target(),
    };
    match (company.decide(SourcePhase::HandedOver, end), answer) {
        (SourceFate::Leave, _) => {
            match session.leave() {
                // Who was told by somebody else that it is another's has ended it.
                Ok(()) | Err(SnapshotError::Control(ControlError::Gone)) => {}
                Err(error) => return Err(error.into()),
            }
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
