//! Claimants that are processes, and are killed at any moment.

use std::collections::HashSet;
use std::io::{BufRead, BufReader};
use std::process::{Child, Command, Stdio};
use std::time::Instant;

use super::*;

/// Names the directory in which a process of this test claims terms.
const ROOT: &str = "TANDEM_TEST_CLAIM_IN";
/// The test that such a process runs.
const CLAIMS: &str = "arbiter::tests::processes::a_process_claims_terms";
/// Terms that one process claims on its own.
const ROUNDS: u64 = 20;
/// How long the storm lasts, and how long one process lives in it.
const STORM: Duration = Duration::from_secs(3);
const LIFE_MAX: Duration = Duration::from_millis(60);
const PROCESSES: usize = 4;

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

/// A process that claims; killed and read out when asked.
struct Claiming {
    child: Child,
    dies: Instant,
}

impl Claiming {
    fn start(root: &Path, life: Duration) -> Self {
        let child = Command::new(std::env::current_exe().expect("this test is a program"))
            .args(["--exact", CLAIMS, "--nocapture"])
            .env(ROOT, root)
            .stdout(Stdio::piped())
            .stderr(Stdio::null())
            .spawn()
            .expect("the test starts itself");
        let dies = Instant::now() + life;
        Self { child, dies }
    }

    /// Kills it; gives what it said of the terms it claimed.
    fn kill(mut self) -> Vec<Said> {
        self.child.kill().expect("it runs until it is killed");
        let output = self.child.stdout.take().expect("a pipe");
        let lines = BufReader::new(output).lines().map_while(Result::ok);
        let said = lines.filter_map(|line| said(&line)).collect();
        self.child.wait().expect("it was killed");
        said
    }
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
    let end = Instant::now() + STORM;
    let mut winners: HashMap<u64, String> = HashMap::new();
    let mut overtaken = HashSet::new();
    let mut note = |all: Vec<Said>| {
        for said in all {
            if said.won {
                let other = winners.insert(said.term, said.claimant);
                assert_eq!(other, None, "term {} was won twice", said.term);
            } else {
                overtaken.insert(said.term);
            }
        }
    };
    let (mut kills, mut running) = (0_usize, Vec::new());
    while Instant::now() < end {
        while running.len() < PROCESSES {
            kills += 1;
            let life = LIFE_MAX * (kills as u32 % 7 + 1) / 7;
            running.push(Claiming::start(root.path(), life));
        }
        thread::sleep(Duration::from_millis(1));
        let dead = running.extract_if(.., |process| process.dies <= Instant::now());
        dead.for_each(|process| note(process.kill()));
    }
    running.into_iter().for_each(|process| note(process.kill()));
    let arbiter = open(root.path());
    let (term, claim) = claim_next(&arbiter, &owner("after the storm"));
    assert_eq!(claim.unwrap(), Claim::Won);
    // Who had a term and did not win it was overtaken, or killed before it could say so.
    let known = |term: &u64| winners.contains_key(term) || overtaken.contains(term);
    let silent = (1..term.0).filter(|term| !known(term)).count();
    assert!(silent <= kills, "{silent} of {term}, {kills} kills");
    assert!(!winners.is_empty(), "nobody lived long enough to win");
    println!(
        "{} terms won, {silent} silent, {kills} kills",
        winners.len()
    );
}
