//! Rounds of Linux at native speed, with a file system that is written to all the time: clients of redis, which answers when what
//! it has to keep is on its disk, and of SQLite. What the last host leaves is a disk from which the guest begins anew, with all
//! that it said.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread;
use std::time::Instant;

use tandem_tests::database::{self, Session, wait_stored};
use tandem_tests::guest::{Guest, GuestBuilder};
use tandem_tests::kv::{Kv, PORT};
use tandem_tests::linux::{
    STORE, STORE_READY, add_journal, expect_sound, kernel_and_root, on_file_system,
};
use tandem_tests::rounds::rounds;

use crate::protection::clients::{NATIVE, Pace};
use crate::{COMMIT, Images, Loss, Shared, lose_little, lose_nothing};

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
    fn new(words: &'static str) -> Option<Self> {
        let (kernel, root) = kernel_and_root()?;
        let images = Images::new();
        fs::copy(root, images.path(0)).unwrap();
        add_journal(&images.path(0));
        let shared = Shared::new(Some(images));
        Some(Self {
            kernel,
            words,
            shared,
        })
    }

    fn image(&self) -> PathBuf {
        let images = self.shared.images.as_ref();
        images.unwrap().path(self.shared.hosts)
    }

    fn builder(&self, image: &Path) -> GuestBuilder {
        let disk = format!("path={}", image.display());
        on_file_system(&self.kernel, self.words, &disk, &self.shared.network)
    }

    fn start(&self, ready: &str, how: &[&str]) -> Guest {
        let guest = self.builder(&self.image());
        self.shared.start(guest, ready, how)
    }

    /// Loses a guest for the last time. Its disk is sound, and the guest that begins anew from it is ready.
    fn begin_anew(&mut self, guest: Guest, ready: &str) -> Guest {
        // Of two that raced either could have it.
        self.shared.lose(guest, Loss::Killed).kill();
        let image = self.image();
        expect_sound(&image);
        let mut again = self.builder(&image).start();
        again.wait_for(ready);
        again
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

    /// The last host of redis left on its disk what redis has.
    fn expect_stored(mut self, guest: Guest) {
        let stored = self.stored();
        assert!(stored.iter().any(Option::is_some), "{stored:?}");
        let _again = self.begin_anew(guest, STORE_READY);
        assert_eq!(self.stored(), stored);
    }
}

#[test]
fn with_commit_no_round_loses_or_contradicts_what_clients_of_redis_were_told() {
    let Some(mut linux) = Linux::new(STORE) else {
        return;
    };
    let guest = linux.start(STORE_READY, &COMMIT);
    let guest = lose_nothing(&mut linux.shared, guest, PACE, rounds(4));
    linux.expect_stored(guest);
}

#[test]
fn without_commit_redis_loses_in_no_round_more_than_came_after_the_last_checkpoint() {
    let Some(mut linux) = Linux::new(STORE) else {
        return;
    };
    let guest = linux.start(STORE_READY, &["--every", "100ms"]);
    let guest = lose_little(&mut linux.shared, guest, rounds(2));
    linux.expect_stored(guest);
}

#[test]
fn with_commit_a_database_has_after_each_round_all_that_it_said_is_stored() {
    let Some(mut linux) = Linux::new(database::WORDS) else {
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
    let _again = linux.begin_anew(guest, database::READY);
    Session::begin(&linux.shared.network).expect_all(rounds * NUMBERS);
}
