//! An arbiter in a directory: races, crashes, damage, and storage that fails.

mod processes;
mod storage;

use std::collections::HashMap;
use std::fs;
use std::path::Path;
use std::sync::Barrier;
use std::thread;
use std::time::Duration;

use tempfile::TempDir;

use super::*;

const GUEST: &str = "kv";
/// After which racers remove terms: longer than a racer stands still, short beside the race.
const RACE_SETTLE_TIME: Duration = Duration::from_millis(200);

fn directory() -> TempDir {
    tempfile::tempdir().expect("a temporary directory")
}

fn open(root: &Path) -> DirectoryArbiter {
    DirectoryArbiter::open(root).expect("the directory holds terms")
}

fn owner(host: &str) -> Owner {
    Owner {
        claimant: Claimant::random().expect("random bytes"),
        host: host.to_owned(),
    }
}

fn term_file(root: &Path, term: u64) -> PathBuf {
    root.join(GUEST).join(format!("term-{term:020}"))
}

/// Names in the guest's directory, sorted.
fn names(root: &Path) -> Vec<String> {
    let entries = fs::read_dir(root.join(GUEST)).expect("the guest has a directory");
    let mut names: Vec<String> = entries
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort();
    names
}

/// Claims the term after the newest.
fn claim_next(arbiter: &dyn Arbiter, owner: &Owner) -> (Term, Result<Claim, ArbiterError>) {
    let newest = arbiter.current(GUEST).expect("the newest term is known");
    let next = newest.map_or(Term::FIRST, |newest| newest.term.next());
    (next, arbiter.claim(GUEST, next, owner))
}

#[test]
fn terms_go_to_whoever_claims_first() {
    let root = directory();
    let arbiter = open(root.path());
    let (a, b) = (owner("a"), owner("b"));
    assert_eq!(arbiter.current(GUEST).unwrap(), None);
    assert_eq!(arbiter.claim(GUEST, Term(1), &a).unwrap(), Claim::Won);
    let first = Tenure {
        term: Term(1),
        owner: a.clone(),
    };
    assert_eq!(arbiter.current(GUEST).unwrap(), Some(first.clone()));
    let lost = arbiter.claim(GUEST, Term(1), &b).unwrap();
    assert_eq!(lost, Claim::Lost(first));
    assert_eq!(arbiter.claim(GUEST, Term(2), &b).unwrap(), Claim::Won);
    let Claim::Lost(found) = arbiter.claim(GUEST, Term(1), &a).unwrap() else {
        panic!("an old term was won again");
    };
    assert_eq!((found.term, found.owner), (Term(2), b));
}

#[test]
fn who_has_a_term_wins_it_again() {
    let root = directory();
    let arbiter = open(root.path());
    let a = owner("a");
    assert_eq!(arbiter.claim(GUEST, Term(1), &a).unwrap(), Claim::Won);
    assert_eq!(arbiter.claim(GUEST, Term(1), &a).unwrap(), Claim::Won);
    assert_eq!(names(root.path()), ["term-00000000000000000001"]);
}

#[test]
fn no_term_is_left_out() {
    let root = directory();
    let arbiter = open(root.path());
    let a = owner("a");
    for (term, next) in [(2, 1), (0, 1), (u64::MAX, 1)] {
        let error = arbiter.claim(GUEST, Term(term), &a).unwrap_err();
        assert!(
            matches!(error, ArbiterError::Gap { next: found, .. } if found == Term(next)),
            "{error}"
        );
    }
    assert_eq!(names(root.path()), Vec::<String>::new());
}

#[test]
fn names_that_lead_elsewhere_are_refused() {
    let root = directory();
    let arbiter = open(root.path());
    let long = "x".repeat(NAME_LENGTH_MAX + 1);
    for name in [
        "", ".", "..", "../kv", "a/b", "-a", ".probe-1", "a\0", &long,
    ] {
        let error = arbiter.claim(name, Term(1), &owner("a")).unwrap_err();
        assert!(matches!(error, ArbiterError::GuestName { .. }), "{error}");
        assert!(arbiter.current(name).is_err());
    }
    for host in ["", "a\n", "h\u{e4}", &long] {
        let error = arbiter.claim(GUEST, Term(1), &owner(host)).unwrap_err();
        assert!(matches!(error, ArbiterError::HostName { .. }), "{error}");
    }
}

#[test]
fn guests_have_terms_of_their_own() {
    let root = directory();
    let arbiter = open(root.path());
    let a = owner("a");
    for guest in ["kv", "web", &"x".repeat(NAME_LENGTH_MAX)] {
        assert_eq!(arbiter.claim(guest, Term(1), &a).unwrap(), Claim::Won);
    }
}

#[test]
fn a_directory_keeps_its_identity() {
    let (one, other) = (directory(), directory());
    let first = open(one.path());
    assert_eq!(first.identity(), open(one.path()).identity());
    assert_ne!(first.identity(), open(other.path()).identity());
}

#[test]
fn old_terms_and_claims_go_when_they_have_settled() {
    let root = directory();
    let mut arbiter = open(root.path());
    let a = owner("a");
    for term in 1..=5 {
        assert_eq!(arbiter.claim(GUEST, Term(term), &a).unwrap(), Claim::Won);
    }
    assert_eq!(names(root.path()).len(), 5, "none has settled");
    arbiter.settle_within(Duration::from_millis(10));
    thread::sleep(Duration::from_millis(20));
    assert_eq!(arbiter.claim(GUEST, Term(6), &a).unwrap(), Claim::Won);
    let left = [4, 5, 6].map(|term| format!("term-{term:020}"));
    assert_eq!(names(root.path()), left);
    // The second after term 4 is there for a while now.
    thread::sleep(Duration::from_millis(20));
    assert_eq!(arbiter.claim(GUEST, Term(6), &a).unwrap(), Claim::Won);
    assert_eq!(names(root.path()), left[1..]);
}

/// Whoever stood still between its first look and its link, and finds the name free again.
#[test]
fn a_claimant_that_slept_over_takeovers_does_not_win_an_old_term() {
    let root = directory();
    let arbiter = open(root.path());
    let a = owner("a");
    for term in 1..=4 {
        assert_eq!(arbiter.claim(GUEST, Term(term), &a).unwrap(), Claim::Won);
    }
    fs::remove_file(term_file(root.path(), 1)).unwrap();
    fs::remove_file(term_file(root.path(), 2)).unwrap();
    let sleeper = Tenure {
        term: Term(2),
        owner: owner("b"),
    };
    let Claim::Lost(found) = arbiter.link_late(GUEST, &sleeper).unwrap() else {
        panic!("an old term was won");
    };
    assert_eq!(found.term, Term(4));
    assert_eq!(arbiter.current(GUEST).unwrap(), Some(found));
}

/// What a racer was told of a term that it claimed.
struct Report {
    term: Term,
    claimant: Claimant,
    claim: Claim,
}

/// Claims the next term `rounds` times.
fn claim_terms(root: &Path, rounds: usize, settle: Duration, start: &Barrier) -> Vec<Report> {
    let mut arbiter = open(root);
    arbiter.settle_within(settle);
    let me = owner("racer");
    start.wait();
    let claim = || {
        let (term, claim) = claim_next(&arbiter, &me);
        Report {
            term,
            claimant: me.claimant,
            claim: claim.unwrap_or_else(|error| panic!("{term}: {error:?}")),
        }
    };
    (0..rounds).map(|_| claim()).collect()
}

/// Lets threads race; gives all that they were told, and the newest term.
fn race(root: &Path, settle: Duration) -> (Vec<Report>, Term) {
    const THREADS: usize = 8;
    const ROUNDS: usize = 60;
    let start = Barrier::new(THREADS);
    let reports = thread::scope(|scope| {
        let racers: Vec<_> = (0..THREADS)
            .map(|_| scope.spawn(|| claim_terms(root, ROUNDS, settle, &start)))
            .collect();
        let racers = racers.into_iter();
        racers.flat_map(|racer| racer.join().unwrap()).collect()
    });
    let newest = open(root).current(GUEST).unwrap().unwrap().term;
    assert!(newest.0 >= ROUNDS as u64);
    assert!(names(root).iter().all(|name| name.starts_with("term-")));
    (reports, newest)
}

/// Who was told to have won each term.
fn winners(reports: &[Report]) -> HashMap<Term, Claimant> {
    let mut winners = HashMap::new();
    for report in reports.iter().filter(|report| report.claim == Claim::Won) {
        let other = winners.insert(report.term, report.claimant);
        assert_eq!(other, None, "term {} was won twice", report.term);
    }
    winners
}

#[test]
fn no_term_is_won_twice_while_old_ones_are_removed() {
    let root = directory();
    let (reports, _) = race(root.path(), RACE_SETTLE_TIME);
    assert!(!winners(&reports).is_empty());
}

/// Each term is in one claimant's hands. That one was told so, or, if another took over before it had
/// looked again, of the newer term; and nobody else was told to have won.
#[test]
fn of_many_threads_one_has_each_term_and_knows() {
    let root = directory();
    let (reports, newest) = race(root.path(), Duration::MAX);
    let winners = winners(&reports);
    for term in (1..=newest.0).map(Term) {
        let bytes = fs::read(term_file(root.path(), term.0)).expect("nothing is removed");
        let holder = record::decode(&bytes, GUEST, term).unwrap().owner.claimant;
        let mut told = reports
            .iter()
            .filter(|r| (r.term, r.claimant) == (term, holder));
        match (winners.get(&term), told.next().map(|report| &report.claim)) {
            (Some(winner), Some(Claim::Won)) => assert_eq!(*winner, holder),
            (None, Some(Claim::Lost(found))) => assert!(found.term > term, "{term}: {found}"),
            other => panic!("term {term} of {holder}: {other:?}"),
        }
    }
    let last = winners.get(&newest);
    assert!(last.is_some(), "nobody can have overtaken the newest");
}
