//! Protected guests on two hosts, each pair in one of both directions, for as long as is asked for, with fault after fault:
//! no client loses a reply, gets one twice or a wrong one, every guest is protected again each time, and nothing of what
//! processes have, nor what is left in directories, grows.
//!
//! `TANDEM_SOAK_SECONDS` asks for more time than a run of all tests has, and has all guests then; `TANDEM_SEED` for other
//! faults.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

#[allow(
    dead_code,
    reason = "clients and histories are those of single protected guests, which need more of them"
)]
mod protection {
    pub(crate) mod clients;
    pub(crate) mod history;
}
mod two_hosts {
    pub(crate) mod book;
    pub(crate) mod fault;
    pub(crate) mod fleet;
    mod neighbours;
    pub(crate) mod resources;
    pub(crate) mod sites;
    pub(crate) mod watch;
}

use std::time::{Duration, Instant};

use serde_json::Value;

use protection::clients::Chance;
use tandem_tests::hosts::term;
use tandem_tests::rounds::number_from;
use tandem_tests::skip::{Need, must_skip};
use two_hosts::book::{Book, Event};
use two_hosts::fault::{self, Fault, Place};
use two_hosts::fleet::{Disk, FLEET, Member, VERIFIED, VERIFIES};
use two_hosts::resources::Ledger;
use two_hosts::sites::{HOSTS, Sites};
use two_hosts::watch::Watch;

/// How long faults come, if nobody asks for another time, in seconds.
const SECONDS: usize = 12;
/// Guests of a soak that is that short.
const FEW: usize = 4;
/// A soak that takes so long has all guests.
const LONG: Duration = Duration::from_secs(120);
/// Longest time between two faults, beside what it takes to be protected again.
const PAUSE: Duration = Duration::from_millis(400);
/// How long a guest may take to be protected again, on a machine that does other work too.
const PROTECTED_MAX: Duration = Duration::from_secs(40);
/// As much more if the machine is overloaded.
const PATIENCE_MAX: Duration = Duration::from_secs(120);
/// Runnable tasks from which on a machine is overloaded: a pair that is lost then is no fault of anybody's.
const OVERLOAD: f64 = 12.0;
/// Pause before something is looked at again.
const LOOK: Duration = Duration::from_millis(20);
/// Samples of processes are taken no more often.
const SAMPLED: Duration = Duration::from_secs(2);
/// Parts of a soak in which by turns all faults come, and those by which owners grow old.
const PARTS: u32 = 8;
/// The longest of them.
const PART_MAX: Duration = Duration::from_secs(300);
/// How often it is looked whether anything grows.
const CHECKED: Duration = Duration::from_secs(300);
/// How long a keeper that was brought along for a guest that has one waits for its VMM, and somewhat more.
const KEEPER_MAX: Duration = Duration::from_secs(35);
/// How long processes that are about to end may take for it.
const END_MAX: Duration = Duration::from_secs(10);
/// Violations after which nothing is learnt any more.
const VIOLATIONS_MAX: usize = 6;

/// Runnable tasks of the last minute, on average.
fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap();
    let first = text.split(' ').next();
    first.and_then(|first| first.parse().ok()).unwrap_or(0.0)
}

/// A guest and who looks at it.
struct Guest {
    member: Member,
    watch: Option<Watch>,
    /// Where it was last, and under which term.
    owner: usize,
    term: u64,
}

/// Guests under fire.
struct Soak {
    guests: Vec<Guest>,
    sites: Sites,
    chance: Chance,
    book: Book,
    ledger: Ledger,
    sampled: Instant,
    checked: Instant,
    /// When keepers were brought along that nobody needed.
    brought: Vec<Instant>,
}

impl Soak {
    fn begin(members: &[Member], seed: usize) -> Self {
        let mut sites = Sites::new(members);
        let guests = members.iter().map(|member| Guest {
            member: *member,
            watch: None,
            owner: member.number % HOSTS.len(),
            term: 0,
        });
        let guests: Vec<_> = guests.collect();
        for guest in &guests {
            sites.run(guest.owner, &guest.member);
        }
        let mut soak = Self {
            guests,
            sites,
            chance: Chance(seed as u64),
            book: Book::new(members),
            ledger: Ledger::default(),
            sampled: Instant::now(),
            checked: Instant::now(),
            brought: Vec::new(),
        };
        for number in 0..members.len() {
            soak.settle(number).unwrap_or_else(|why| panic!("{why}"));
            soak.watch(number);
        }
        let took = soak.expect_all("the beginning", None);
        // What came before they served counts for nothing.
        for watch in soak.guests.iter().filter_map(|guest| guest.watch.as_ref()) {
            watch.longest_silence();
        }
        soak.book
            .say(&format!("all are protected {took:?} after they were once"));
        soak
    }

    /// Begins to look at a guest.
    fn watch(&mut self, number: usize) {
        let guest = &mut self.guests[number];
        let recordings = guest.watch.as_ref().map_or(0, Watch::recordings);
        guest.watch = Some(Watch::begin(&self.sites, &guest.member, recordings));
    }

    /// What both sides of a guest say: who owns it, and whether the other one is its copy.
    fn look(&self, number: usize) -> Option<(usize, Value)> {
        let member = &self.guests[number].member;
        let said = HOSTS.map(|host| self.sites.status(host, member));
        let owns = |host: &usize| {
            let status = said[*host].as_ref();
            status.is_some_and(|status| status["role"] == "primary")
        };
        let owner = HOSTS.into_iter().filter(owns);
        let owner = owner.max_by_key(|host| said[*host].as_ref().map(term))?;
        let status = said[owner].clone()?;
        let copy = said[1 - owner].as_ref()?;
        let is_copy = copy["role"] == "secondary" && copy["term"] == status["term"];
        (status["protected"] == true && is_copy).then_some((owner, status))
    }

    /// Whether a guest is protected now, as it was when it was looked last.
    fn is_protected(&self, number: usize) -> bool {
        let Guest {
            owner,
            term: before,
            ..
        } = self.guests[number];
        let is_same = |(now, status): (usize, Value)| now == owner && term(&status) == before;
        self.look(number).is_some_and(is_same)
    }

    /// Waits until a guest is protected. An error is that it is lost, or not protected in time.
    fn settle(&mut self, number: usize) -> Result<(), String> {
        let began = Instant::now();
        let mut missing: Option<Instant> = None;
        loop {
            if let Some((owner, status)) = self.look(number) {
                let guest = &mut self.guests[number];
                (guest.owner, guest.term) = (owner, term(&status));
                return Ok(());
            }
            self.sites.reap();
            let member = &self.guests[number].member;
            let gone = HOSTS.map(|host| self.sites.vmm(host, member).is_none()) == [true; 2];
            missing = gone.then(|| missing.unwrap_or_else(Instant::now));
            let lost = missing.is_some_and(|since| since.elapsed() > Duration::from_secs(1));
            let most = match load() > OVERLOAD {
                true => PATIENCE_MAX,
                false => PROTECTED_MAX,
            };
            if lost || began.elapsed() > most {
                let what = if lost { "is lost" } else { "is not protected" };
                let account = self.sites.account(member);
                return Err(format!("{} {what}: {account}", member.name));
            }
            std::thread::sleep(LOOK);
        }
    }

    /// Waits until every guest is protected and does what it should. Those of which that is not so begin anew. How long it
    /// took until all were protected.
    fn expect_all(&mut self, what: &str, struck: Option<usize>) -> Duration {
        let began = Instant::now();
        let terms: Vec<_> = self.guests.iter().map(|guest| guest.term).collect();
        let mut wrong: Vec<(usize, String)> = Vec::new();
        for number in 0..self.guests.len() {
            if let Err(why) = self.settle(number) {
                wrong.push((number, why));
            }
        }
        let took = began.elapsed();
        for (number, guest) in self.guests.iter().enumerate() {
            let unasked = struck.is_some_and(|struck| struck != number);
            let takeovers = guest.term.saturating_sub(terms[number]);
            let why = (unasked && takeovers > 0)
                .then(|| self.sites.last_events(guest.owner, &guest.member));
            self.book.terms(number, takeovers, why.as_deref());
        }
        let served: Vec<_> = std::thread::scope(|scope| {
            let watches = self.guests.iter().filter_map(|guest| guest.watch.as_ref());
            let served: Vec<_> = watches
                .map(|watch| scope.spawn(|| watch.progress()))
                .collect();
            served.into_iter().map(|one| one.join().unwrap()).collect()
        });
        for (number, served) in served.into_iter().enumerate() {
            if let Err(why) = served {
                let account = self.sites.account(&self.guests[number].member);
                wrong.push((number, format!("{why}: {account}")));
            }
        }
        for (number, why) in wrong {
            self.violated(number, &format!("after {what}: {why}"));
        }
        took
    }

    /// Something is wrong with a guest: it is told, and the guest begins anew.
    fn violated(&mut self, number: usize, why: &str) {
        let name = self.guests[number].member.name;
        self.book
            .violation(&format!("{name}: {why}"), load() > OVERLOAD);
        if self.book.violations() > VIOLATIONS_MAX {
            self.book.print(&self.ledger);
            panic!("too much is wrong");
        }
        if let Some(watch) = self.guests[number].watch.take() {
            // Its clients may wait for long.
            std::thread::spawn(move || drop(watch.end()));
        }
        let (owner, member) = (self.guests[number].owner, self.guests[number].member);
        for host in HOSTS {
            drop(self.sites.tandem(host, &["stop", member.name, "--force"]));
        }
        let deadline = Instant::now() + PROTECTED_MAX;
        while HOSTS
            .iter()
            .any(|host| self.sites.vmm(*host, &member).is_some())
        {
            assert!(Instant::now() < deadline, "{name} does not end");
            std::thread::sleep(LOOK);
        }
        // Its image may be a part of a copy on one of the hosts.
        let hosts = [owner, 1 - owner, owner, 1 - owner].into_iter();
        let begun = hosts.map(|host| {
            self.sites.run(host, &member);
            self.settle(number)
        });
        let failed: Vec<_> = begun.map_while(Result::err).collect();
        assert!(failed.len() < 4, "{name} does not begin anew: {failed:#?}");
        self.watch(number);
    }

    /// A fault, and what comes of it.
    fn strike(&mut self, fault: Fault) {
        std::thread::sleep(self.chance.part_of(PAUSE));
        let number = self.chance.below(self.guests.len());
        // On a busy machine a side may take the other for dead at any time.
        while !(0..self.guests.len()).all(|number| self.is_protected(number)) {
            self.expect_all("nothing", None);
        }
        self.silences(None);
        let Guest {
            member,
            owner,
            term,
            ..
        } = self.guests[number];
        let (began, load_before) = (Instant::now(), load());
        let mut place = Place {
            sites: &mut self.sites,
            member: &member,
            owner,
        };
        let refused = place.happen(fault, &mut self.chance).err();
        let happened = began.elapsed();
        if fault == Fault::ProtectAnew {
            self.brought.push(Instant::now());
        }
        if fault.changes_term() && refused.is_none() {
            self.wait_later(number, term);
        }
        let struck = (!fault.strikes_all()).then_some(number);
        self.expect_all(&format!("{fault:?} of {}", member.name), struck);
        let took = began.elapsed();
        let silence = self.silences(Some(fault));
        let longest = || (0..silence.len()).max_by_key(|number| silence[*number]);
        let silent = struck.or_else(longest).unwrap_or_default();
        self.book.event(&Event {
            fault,
            whom: struck.map_or("all", |_| member.name),
            owner,
            term,
            happened,
            took,
            silence: (silence[silent], self.guests[silent].member.name),
            load: load_before,
            refused,
        });
    }

    /// Waits until a guest has a later term; what comes of it is looked at later.
    fn wait_later(&self, number: usize, before: u64) {
        let deadline = Instant::now() + PROTECTED_MAX;
        let later = |(_, status): (usize, Value)| term(&status) > before;
        while !self.look(number).is_some_and(later) && Instant::now() < deadline {
            let member = &self.guests[number].member;
            if HOSTS
                .iter()
                .all(|host| self.sites.vmm(*host, member).is_none())
            {
                return;
            }
            std::thread::sleep(LOOK);
        }
    }

    /// For how long each guest was silent since this was asked last.
    fn silences(&mut self, fault: Option<Fault>) -> Vec<Duration> {
        let mut all = Vec::new();
        for (number, guest) in self.guests.iter().enumerate() {
            let silence = guest.watch.as_ref().map(Watch::longest_silence);
            let silence = silence.unwrap_or_default();
            self.book.silence(number, silence, fault);
            all.push(silence);
        }
        all
    }

    /// Looks at histories that are long enough, and at what processes have.
    fn look_around(&mut self) {
        for number in 0..self.guests.len() {
            let guest = &mut self.guests[number];
            let Some(watch) = &mut guest.watch else {
                continue;
            };
            let looked = watch.look_at_history(&self.sites.network, &guest.member);
            if let Err(why) = looked.and_then(|()| watch.check()) {
                self.violated(number, &why);
            }
        }
        if self.sampled.elapsed() > SAMPLED {
            self.sampled = Instant::now();
            let roles: Vec<_> = self
                .guests
                .iter()
                .map(|guest| (&guest.member, guest.owner))
                .collect();
            let looked = self.ledger.look(&self.sites, &roles);
            self.expect_no_growth(looked);
        }
        if self.checked.elapsed() > CHECKED {
            self.check();
        }
    }

    fn expect_no_growth(&mut self, looked: Result<(), String>) {
        if let Err(why) = looked {
            self.book.violation(&why, false);
        }
    }

    /// Looks whether anything grows.
    fn check(&mut self) {
        self.checked = Instant::now();
        let members: Vec<_> = self.guests.iter().map(|guest| guest.member).collect();
        let deadline = Instant::now() + END_MAX;
        let left = loop {
            self.brought.retain(|since| since.elapsed() < KEEPER_MAX);
            let keepers = self.brought.len();
            let left = self
                .ledger
                .look_at_leftovers(&self.sites, &members, keepers);
            if left.is_ok() || Instant::now() > deadline {
                break left;
            }
            std::thread::sleep(LOOK);
        };
        self.expect_no_growth(left);
        let grown = self.ledger.check();
        self.expect_no_growth(grown);
        self.book.print(&self.ledger);
    }

    /// Sees that each disk has all that its guest was promised.
    fn check_disks(&mut self) {
        for guest in &self.guests {
            if matches!(guest.member.disk, Disk::None) {
                continue;
            }
            let said = self.sites.run_alone(guest.owner, &guest.member, VERIFIES);
            for wanted in VERIFIED {
                if !said.contains(wanted) {
                    let name = guest.member.name;
                    let why = format!("the disk of {name} is not as it should be: {said}");
                    self.book.violation(&why, false);
                }
            }
        }
    }

    fn finish(mut self) {
        self.expect_all("the end", None);
        self.check();
        for guest in &mut self.guests {
            match guest.watch.take().map(Watch::end) {
                Some(Ok(operations)) => self.book.checked(operations),
                Some(Err(why)) => self.book.violation(&why, false),
                None => {}
            }
        }
        HOSTS.iter().for_each(|host| self.sites.crash(*host));
        self.check_disks();
        self.book.print_sums();
        let namespace = self.sites.network.namespace().to_owned();
        drop(self.sites);
        let left = std::process::Command::new("ip")
            .args(["netns", "list"])
            .output();
        let left = String::from_utf8(left.unwrap().stdout).unwrap();
        assert!(!left.contains(&namespace), "{left}");
        assert_eq!(self.book.violations(), 0, "see above");
    }
}

#[test]
fn guests_of_two_hosts_outlive_fault_after_fault_and_nothing_grows() {
    if must_skip(&[
        Need::Kvm,
        Need::Root,
        Need::Program("ip"),
        Need::Program("nft"),
    ]) {
        return;
    }
    let time = Duration::from_secs(number_from("TANDEM_SOAK_SECONDS", SECONDS) as u64);
    let seed = number_from("TANDEM_SEED", 1);
    println!("TANDEM_SEED={seed}");
    let few = if time < LONG { FEW } else { FLEET.len() };
    let mut soak = Soak::begin(&FLEET[..few], seed);
    soak.check();
    let (began, part) = (Instant::now(), (time / PARTS).min(PART_MAX));
    while began.elapsed() < time {
        let parts = began.elapsed().as_nanos() / part.as_nanos();
        let faults = match parts % 2 {
            0 => &fault::ALL[..],
            _ => &fault::OLD_AGE[..],
        };
        let fault = faults[soak.chance.below(faults.len())];
        soak.strike(fault);
        soak.look_around();
    }
    soak.finish();
}
