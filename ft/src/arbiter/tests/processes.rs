//! Claimants that are processes, and are killed at any moment.

use std::collections::HashSet;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};

use super::*;

/// Names the directory in which a process of this test claims terms.
const ROOT: &str = "TANDEM_TEST_CLAIM_IN";
/// The test that such a process runs.
const CLAIMS: &str = "arbiter::tests::processes::a_process_claims_terms";
/// Terms that one process claims on its own.
const ROUNDS: u64 = 20;
/// Processes at a time, and how many there are one after the other in each place.
const PLACES: usize = 4;
const LIVES: u32 = 12;
/// Every other process is killed at some moment of this, be it still opening the directory; the
/// others as long after they first said something.
const LIFE_MAX: Duration = Duration::from_millis(40);

/// Alone, it wins every term. In a storm it is one of the processes, and tells of what it wins.
#[test]
fn a_process_claims_terms() {
    if let Ok(root) = std::env::var(ROOT) {
        return claim_until_killed(Path::new(&root));
    }
    let root = directory();
    let (arbiter, me) = (open(root.path()), owner("alone"));
    for round in 1..=ROUNDS {
        let (term, claim) = claim_next(&arbiter, &me);
        assert_eq!((term, claim.unwrap()), (Term(round), Claim::Won));
    }
}

fn claim_until_killed(root: &Path) {
    let mut arbiter = open(root);
    arbiter.settle_within(RACE_SETTLE_TIME);
    let me = owner("process");
    loop {
        let (term, claim) = claim_next(&arbiter, &me);
        match claim.expect("storage works") {
            Claim::Won => println!("\nwon {term} {}", me.claimant),
            Claim::Lost(found) if found.term > term => {
                println!("\novertaken {term} {}", me.claimant);
            }
            Claim::Lost(_) => (),
        }
    }
}

/// Starts a process that claims, kills it, and gives what it said of the terms it claimed.
fn live_and_die(root: &Path, life: u32) -> Vec<Said> {
    let mut child = Command::new(std::env::current_exe().expect("this test is a program"))
        .args(["--exact", CLAIMS, "--nocapture"])
        .env(ROOT, root)
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .spawn()
        .expect("the test starts itself");
    let output = child.stdout.take().expect("a pipe");
    let lines = BufReader::new(output).lines().map_while(Result::ok);
    let mut said = lines.filter_map(|line| said(&line));
    let first = if life.is_multiple_of(2) {
        said.next()
    } else {
        None
    };
    thread::sleep(LIFE_MAX * (life + 1) / LIVES);
    child.kill().expect("it runs until it is killed");
    child.wait().expect("it was killed");
    first.into_iter().chain(said).collect()
}

/// A term, by whom it was claimed, and whether that one won it; else there was a newer one.
struct Said {
    term: u64,
    claimant: String,
    won: bool,
}

/// What a line says, if it was written to its end.
fn said(line: &str) -> Option<Said> {
    let mut words = line.split(' ');
    let won = match words.next() {
        Some("won") => true,
        Some("overtaken") => false,
        _ => return None,
    };
    let term = words.next()?.parse().ok()?;
    let claimant = words.next().filter(|id| id.len() == 32)?.to_owned();
    Some(Said {
        term,
        claimant,
        won,
    })
}

#[test]
fn processes_that_are_killed_leave_one_winner_per_term() {
    let root = directory();
    let place = || (0..LIVES).flat_map(|life| live_and_die(root.path(), life));
    let all: Vec<Said> = thread::scope(|scope| {
        let places: Vec<_> = (0..PLACES)
            .map(|_| scope.spawn(|| place().collect::<Vec<_>>()))
            .collect();
        let places = places.into_iter();
        places.flat_map(|place| place.join().unwrap()).collect()
    });
    let mut winners: HashMap<u64, String> = HashMap::new();
    let mut overtaken = HashSet::new();
    for said in all {
        if said.won {
            let other = winners.insert(said.term, said.claimant);
            assert_eq!(other, None, "term {} was won twice", said.term);
        } else {
            overtaken.insert(said.term);
        }
    }
    let arbiter = open(root.path());
    let (term, claim) = claim_next(&arbiter, &owner("after the storm"));
    assert_eq!(claim.unwrap(), Claim::Won);
    // Who had a term and did not win it was overtaken, or killed before it could say so.
    let known = |term: &u64| winners.contains_key(term) || overtaken.contains(term);
    let silent = (1..term.0).filter(|term| !known(term)).count();
    let kills = PLACES * LIVES as usize;
    assert!(silent <= kills, "{silent} of {term}, {kills} kills");
    assert!(!winners.is_empty(), "nobody lived long enough to win");
    println!(
        "{} terms won, {silent} silent, {kills} kills",
        winners.len()
    );
}
