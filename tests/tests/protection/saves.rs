//! Protected guests are saved: each mode, and while their copies are made the same.

use tandem_tests::guest::GuestBuilder;
use tandem_tests::kv::Kv;
use tandem_tests::network::Network;
use tandem_tests::pair::{Pair, Side};

use super::clients::KV;
use crate::{Stage, cannot_run};

/// How often each is saved.
const SAVES: usize = 2;

/// A guest whose protection `start` begins is saved while it serves and its copy is made the same; what is saved is a
/// guest that serves.
fn is_saved(start: fn(GuestBuilder) -> Pair) {
    if cannot_run() {
        return;
    }
    let mut stage = Stage::with(KV, start);
    let connection = stage.network.connect(KV.port);
    assert_eq!(
        Kv::new(&connection).ask(&["SET", "saved", "yes"]),
        Ok(Some("OK".into()))
    );
    let place = tempfile::tempdir().unwrap();
    let saved = |number: usize| place.path().join(number.to_string());
    for number in 0..SAVES {
        let primary = stage.pair.side(Side::Primary);
        let mut resync = primary.begin(&["resync", "guest"]);
        primary.save(&saved(number));
        resync.wait().unwrap();
        stage.load.expect_progress();
    }
    stage.pair.kill(Side::Primary);
    assert_eq!(stage.expect_one(), Side::Secondary);
    assert_eq!(
        Kv::new(&connection).ask(&["GET", "saved"]),
        Ok(Some("yes".into()))
    );
    stage.finish();
    for number in 0..SAVES {
        let network = Network::new();
        let restored = GuestBuilder::saved(&saved(number)).in_namespace(network.namespace());
        let _restored = restored.start();
        let connection = network.connect_soon(KV.port);
        assert_eq!(
            Kv::new(&connection).ask(&["GET", "saved"]),
            Ok(Some("yes".into()))
        );
    }
}

fn in_mode(guest: GuestBuilder, words: [&str; 2]) -> Pair {
    Pair::start(guest.arg(words[0]).arg(words[1]))
}

#[test]
fn a_guest_in_lockstep_is_saved() {
    is_saved(|guest| in_mode(guest, ["--mode", "lockstep"]));
}

#[test]
fn a_guest_whose_copy_stands_is_saved() {
    is_saved(|guest| in_mode(guest, ["--mode", "checkpoint"]));
}

#[test]
fn a_guest_that_stands_for_its_resyncs_is_saved() {
    is_saved(|guest| in_mode(guest, ["--resync", "stopped"]));
}
