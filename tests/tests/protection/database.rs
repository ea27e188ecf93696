//! A database on a Linux guest's file system, whose hosts are lost while it is written to: all that it said is stored is there,
//! whoever goes on, and after the end of both.

use std::fs;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::thread;

use rustix::process::Signal;
use tandem_tests::database::{READY, Session, WORDS, wait_stored};
use tandem_tests::guest::GuestBuilder;
use tandem_tests::linux::{add_journal, expect_sound, kernel_and_root, on_file_system};
use tandem_tests::network::Network;
use tandem_tests::pair::{Pair, Side};
use tempfile::TempDir;

use super::disks::{begin_resyncs, disk, has_printed, reaches, wait_each};
use crate::ATTEMPTS;

/// Numbers that are stored, and those of them before the first host is lost.
const NUMBERS: u64 = 300;
const BEFORE: u64 = 100;

fn database(kernel: &Path, image: &Path, network: &Network) -> GuestBuilder {
    on_file_system(kernel, WORDS, &disk(image, ""), network)
}

/// A database that answers and is protected.
fn protected(kernel: &Path, images: &[std::path::PathBuf; 2], network: &Network) -> Pair {
    for _ in 0..ATTEMPTS {
        let replica = disk(&images[1], "");
        let guest = database(kernel, &images[0], network);
        let mut pair = Pair::start_prepared(guest, |standby| standby.arg("--disk").arg(replica));
        if reaches(&mut pair, |pair| {
            pair.is_protected() && has_printed(pair, READY)
        }) {
            return pair;
        }
    }
    panic!("no database stays protected");
}

#[test]
fn a_database_has_all_that_it_said_is_stored_whenever_its_host_is_lost() {
    let Some((kernel, root)) = kernel_and_root() else {
        return;
    };
    let place = TempDir::new().unwrap();
    let images = ["first", "second"].map(|name| place.path().join(name));
    for image in &images {
        fs::copy(&root, image).unwrap();
    }
    add_journal(&images[0]);
    let network = Network::new();
    let mut pair = protected(&kernel, &images, &network);
    let mut session = Session::begin(&network);
    session.make();
    let stored = Arc::<AtomicU64>::default();
    let counted = Arc::clone(&stored);
    // The connection outlives its host.
    let writer = thread::spawn(move || {
        session.store(0..NUMBERS, &counted);
        session
    });
    wait_stored(&stored, BEFORE / 2);
    let asked = begin_resyncs(&mut pair);
    wait_stored(&stored, BEFORE);
    wait_each(asked);
    assert!(
        reaches(&mut pair, |pair| pair.is_protected()),
        "{}",
        pair.account()
    );
    pair.kill(Side::Primary);
    assert_eq!(pair.wait_alone(), Side::Secondary);
    let mut session = writer.join().unwrap();
    session.expect_all(NUMBERS);
    let survivor = pair.into_side(Side::Secondary);
    survivor.signal(Signal::KILL);
    drop(survivor.wait());
    drop(session);

    expect_sound(&images[1]);
    let mut again = database(&kernel, &images[1], &network).start();
    again.wait_for(READY);
    Session::begin(&network).expect_all(NUMBERS);
}
