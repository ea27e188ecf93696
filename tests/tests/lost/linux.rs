//! Rounds of Linux at native speed, with a file system that is written to all the time: clients of redis, which answers when what
//! it has to keep is on its disk, and of SQLite. What the last host leaves is a disk from which the guest begins anew, with all
//! that it said.

use std::fs;
use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::Instant;

use tandem_tests::database::{self, Session, wait_stored};
use tandem_tests::guest::{Guest, GuestBuilder};
use tandem_tests::images::tandem;
use tandem_tests::kv::{Kv, PORT};
use tandem_tests::linux::{
    STORE, STORE_READY, add_journal, expect_sound, kernel_and_root, on_file_system,
};
use tandem_tests::rounds::rounds;

use crate::protection::clients::{NATIVE, Pace};
use crate::{COMMIT, Images, Loss, Reach, Shared, lose_little, lose_nothing};

/// Each reply waits for a checkpoint, and for the guest's disk.
const PACE: Pace = Pace {
    progress: 4,
    ..NATIVE
};
/// Numbers that are stored in a round, of which the first come before its loss.
const NUMBERS: u64 = 12;
const BEFORE: u64 = 4;

/// A Linux guest that does what `words` say, and what its hosts share.
struct Linux {
    kernel: PathBuf,
    words: &'static str,
    shared: Shared,
}

impl Linux {
    /// `None`, said aloud, where it cannot run.
    fn new(words: &'static str, disk: Reach) -> Option<Self> {
        let (kernel, root) = kernel_and_root()?;
        let images = Images::new(disk);
        fs::copy(root, images.path(0)).unwrap();
        add_journal(&images.path(0));
        let shared = Shared::new(Some(images));
        Some(Self {
            kernel,
            words,
            shared,
        })
    }

    fn images(&self) -> &Images {
        self.shared.images.as_ref().unwrap()
    }

    fn builder(&self) -> GuestBuilder {
        let disk = self.images().flag(self.shared.hosts);
        on_file_system(&self.kernel, self.words, &disk, &self.shared.network)
    }

    fn start(&self, ready: &str, how: &[&str]) -> Guest {
        self.shared.start(self.builder(), ready, how)
    }

    /// Loses a guest that goes on at the newest host. Before, that of two that raced either could have it.
    fn settle(&mut self, guest: Guest) -> Guest {
        self.shared.lose(guest, Loss::Killed)
    }

    /// Ends a guest at the newest host as the end of that would. Its disk is sound, and the guest that begins anew from it is
    /// ready.
    fn begin_anew(&self, guest: Guest, ready: &str) -> Guest {
        guest.kill();
        let mut again = match self.images().reach {
            Reach::Host => {
                expect_sound(&self.images().path(self.shared.hosts));
                self.builder().start()
            }
            Reach::All => {
                expect_sound(&self.exported());
                let store = self.shared.store.of_host(self.shared.hosts);
                let guest = self.builder().arg("--checkpoint").arg(store);
                guest.arg("--anew").start()
            }
        };
        again.wait_for(ready);
        again
    }

    /// The disk of the newest checkpoint as a file of its own.
    fn exported(&self) -> PathBuf {
        let place = self.images().directory.path().join("exported");
        let store = self.shared.store.of_host(self.shared.hosts);
        let mut export = Command::new(tandem());
        export.args(["export", "guest"]).arg(&place);
        let exported = export.arg("--from").arg(store).output().unwrap();
        assert!(exported.status.success(), "{exported:?}");
        place.join("disk0")
    }

    /// What redis has of what clients counted and set.
    fn stored(&self) -> Vec<Option<String>> {
        let connection = self.shared.network.connect_soon(PORT);
        let mut kv = Kv::new(&connection);
        let clients = 0..PACE.connections;
        let names = clients.flat_map(|n| [format!("counter-{n}"), format!("key-{n}")]);
        let names = names.chain(["count".to_owned()]);
        names.map(|name| kv.ask(&["GET", &name]).unwrap()).collect()
    }

    /// The last host of redis leaves on its disk what redis has at the end. It is asked there: what its clients asked before, and
    /// its checkpoint has not answered, is done only then.
    fn expect_left(&self, guest: Guest) {
        let stored = self.stored();
        assert!(stored.iter().any(Option::is_some), "{stored:?}");
        let _again = self.begin_anew(guest, STORE_READY);
        assert_eq!(self.stored(), stored);
    }
}

fn lose_nothing_of_redis(disk: Reach) {
    let Some(mut linux) = Linux::new(STORE, disk) else {
        return;
    };
    let guest = linux.start(STORE_READY, &COMMIT);
    let guest = lose_nothing(&mut linux.shared, guest, PACE, rounds(4));
    let told = linux.stored();
    let guest = linux.settle(guest);
    assert_eq!(linux.stored(), told);
    linux.expect_left(guest);
}

#[test]
fn with_commit_no_round_loses_or_contradicts_what_clients_of_redis_were_told() {
    lose_nothing_of_redis(Reach::Host);
}

#[test]
fn with_commit_and_a_redo_log_no_round_loses_or_contradicts_what_clients_of_redis_were_told() {
    lose_nothing_of_redis(Reach::All);
}

#[test]
fn without_commit_redis_loses_in_no_round_more_than_came_after_the_last_checkpoint() {
    let Some(mut linux) = Linux::new(STORE, Reach::Host) else {
        return;
    };
    let guest = linux.start(STORE_READY, &["--every", "100ms"]);
    let guest = lose_little(&mut linux.shared, guest, rounds(2));
    let guest = linux.settle(guest);
    linux.expect_left(guest);
}

#[test]
fn with_commit_a_database_has_after_each_round_all_that_it_said_is_stored() {
    let Some(mut linux) = Linux::new(database::WORDS, Reach::Host) else {
        return;
    };
    let mut guest = linux.start(database::READY, &COMMIT);
    // The connection outlives all hosts.
    let mut session = Session::begin(&linux.shared.network);
    session.make();
    let stored = Arc::<AtomicU64>::default();
    let rounds = rounds(2) as u64;
    for round in 0..rounds {
        let (counted, numbers) = (Arc::clone(&stored), round * NUMBERS..(round + 1) * NUMBERS);
        let (first, last) = (numbers.start, numbers.end);
        let writer = thread::spawn(move || {
            session.store(numbers, &counted);
            session
        });
        wait_stored(&stored, first + BEFORE);
        let (loss, began) = (Loss::of(round as usize), Instant::now());
        guest = linux.shared.lose(guest, loss);
        let resumed = began.elapsed();
        session = writer.join().unwrap();
        session.expect_all(last);
        println!("database, round {round}: {loss:?}, resumed after {resumed:?}");
    }
    drop(session);
    let guest = linux.settle(guest);
    let _again = linux.begin_anew(guest, database::READY);
    Session::begin(&linux.shared.network).expect_all(rounds * NUMBERS);
}
