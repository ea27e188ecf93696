//! Verbs about stores of checkpoints, on directories and on buckets.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use serde_bytes::ByteBuf;
use serde_json::Value;
use tandem_store::manifest::{MEMORY, STATE, Section};
use tandem_store::testing::{S3Server, unpack_snapshot};
use tandem_store::write::Writer;
use tandem_store::{Options, PAGE, Store};
use tandem_tests::guest::GuestBuilder;
use tandem_tests::images;
use tandem_tests::skip::{self, Need, must_skip};
use tempfile::TempDir;

/// Exit codes of the command.
const OK: i32 = 0;
const FAILED: i32 = 1;
const USAGE: i32 = 2;
const SNAPSHOT: i32 = 13;
/// Files of a plain snapshot.
const FILES: [&str; 4] = ["state", "memory", "checksums", "machine.toml"];

/// A store, and room beside it.
struct Place {
    root: TempDir,
    server: Option<S3Server>,
    address: String,
}

impl Place {
    fn directory() -> Self {
        let root = tempfile::tempdir().unwrap();
        let store = root.path().join("store");
        fs::create_dir(&store).unwrap();
        Self {
            address: format!("file://{}", store.display()),
            root,
            server: None,
        }
    }

    /// A bucket of moto's server; nothing where that is not installed, or `tandem` was built without.
    fn bucket() -> Option<Self> {
        let place = Self {
            root: tempfile::tempdir().unwrap(),
            server: Some(S3Server::start()?),
            address: "s3://bucket/some/prefix".to_owned(),
        };
        let (_, told) = place.expect(USAGE, &["checkpoints", "web", "--from", "STORE"]);
        if told.contains("built without S3") {
            skip::say("tandem was built without the feature `s3`");
            return None;
        }
        Some(place)
    }

    fn at(&self, name: &str) -> PathBuf {
        self.root.path().join(name)
    }

    /// Runs `tandem`; the word `STORE` stands for the store, `@NAME` for a file beside it.
    fn tandem(&self, words: &[&str]) -> Output {
        let mut command = Command::new(images::tandem());
        for word in words {
            match (*word, word.strip_prefix('@')) {
                ("STORE", _) => command.arg(&self.address),
                (_, Some(name)) => command.arg(self.at(name)),
                (word, None) => command.arg(word),
            };
        }
        for (name, value) in self.server.iter().flat_map(S3Server::settings) {
            command.env(name, value);
        }
        command.output().unwrap()
    }

    /// Runs it and expects that exit code; what it printed, and what it told.
    fn expect(&self, code: i32, words: &[&str]) -> (String, String) {
        let output = self.tandem(words);
        let [out, told] = [output.stdout, output.stderr].map(|o| String::from_utf8(o).unwrap());
        assert_eq!(output.status.code(), Some(code), "{words:?}: {out}{told}");
        (out, told)
    }

    fn json(&self, words: &[&str]) -> Value {
        let (out, _) = self.expect(OK, &[&["--format", "json"], words].concat());
        serde_json::from_str(&out).unwrap()
    }

    /// A snapshot that an earlier Tandem made, as `@snapshot`.
    fn golden_snapshot(&self) {
        let directory = self.at("snapshot");
        fs::create_dir(&directory).unwrap();
        unpack_snapshot("plain", &directory);
    }

    fn expect_same_files(&self, names: [&str; 2]) {
        for file in FILES {
            let read = |name: &str| fs::read(self.at(name).join(file)).unwrap();
            assert!(read(names[0]) == read(names[1]), "{file}");
        }
    }
}

// A snapshot's way through a store.

fn a_snapshot_comes_back_from(place: &Place) {
    place.golden_snapshot();
    let made = place.json(&["import", "@snapshot", "--into", "STORE", "--name", "web"]);
    assert_eq!(made["checkpoint"], "1-1");
    let import = ["import", "@snapshot", "--into", "STORE", "--name", "web"];
    let (_, told) = place.expect(FAILED, &import);
    assert!(
        told.contains("the newest 1-1") && told.contains("--replace"),
        "{told}"
    );
    place.expect(OK, &[&import[..], &["--replace"]].concat());
    let listed = &place.json(&["checkpoints", "web", "--from", "STORE"])[0];
    assert_eq!(
        (&listed["newest"], &listed["term"]),
        (&"2-1".into(), &2.into())
    );
    assert_eq!(listed["checkpoints"].as_array().unwrap().len(), 1);
    assert_eq!(listed["checkpoints"][0]["state"], "whole");
    let inspected = place.json(&["inspect", "web", "--from", "STORE"]);
    assert_eq!(inspected["hardware"]["name"], "guest");
    assert!(
        inspected["description"]
            .as_str()
            .unwrap()
            .contains("kernel")
    );
    for chosen in ["web", "web@2-1", "--all"] {
        let verified = place.json(&["verify", chosen, "--from", "STORE"]);
        assert_eq!(verified["damaged"], Value::Array(Vec::new()), "{chosen}");
        assert!(verified["bytes"].as_u64() > Some(1000), "{verified}");
    }
    place.expect(OK, &["export", "web", "@out", "--from", "STORE"]);
    place.expect_same_files(["snapshot", "out"]);
    let (_, told) = place.expect(SNAPSHOT, &["export", "web", "@out", "--from", "STORE"]);
    assert!(told.contains("exists"), "{told}");
}

#[test]
fn a_snapshot_comes_back_from_a_directory() {
    a_snapshot_comes_back_from(&Place::directory());
}

#[test]
fn a_snapshot_comes_back_from_a_bucket() {
    if let Some(place) = Place::bucket() {
        a_snapshot_comes_back_from(&place);
    }
}

#[test]
fn an_encrypted_store_needs_its_key() {
    let place = Place::directory();
    place.golden_snapshot();
    let init = ["store", "init", "STORE", "--encrypt", "@key"];
    assert_eq!(place.json(&init)["made"], true);
    let key = fs::read_to_string(place.at("key")).unwrap();
    assert_eq!(place.json(&init)["made"], false);
    assert_eq!(fs::read_to_string(place.at("key")).unwrap(), key);
    let import = ["import", "@snapshot", "--into", "STORE", "--name", "web"];
    let (_, told) = place.expect(USAGE, &import);
    assert!(told.contains("is encrypted"), "{told}");
    place.expect(OK, &[&import[..], &["--key", "@key"]].concat());
    let verbs: [&[&str]; 5] = [
        &["checkpoints", "web"],
        &["inspect", "web"],
        &["verify", "web"],
        &["prune", "web", "--keep", "2"],
        &["export", "web", "@out"],
    ];
    for verb in verbs {
        let words = [verb, &["--from", "STORE"]].concat();
        let (_, told) = place.expect(USAGE, &words);
        assert!(told.contains("name the key file"), "{told}");
        place.expect(OK, &[&words[..], &["--key", "@key"]].concat());
    }
    place.expect_same_files(["snapshot", "out"]);
    // A key is not drawn for a store that has none.
    let other = ["store", "init", "STORE", "--encrypt", "@other"];
    place.expect(11, &other);
    assert!(!place.at("other").exists());
}

#[test]
fn a_guest_goes_on_from_what_was_exported() {
    if must_skip(&[Need::Kvm]) {
        return;
    }
    let place = Place::directory();
    let mut guest = GuestBuilder::image("spin", "iters=0 report=5").start();
    guest.wait_for("spin: ready");
    guest.succeed(&["snapshot", "guest", place.at("snapshot").to_str().unwrap()]);
    drop(guest);
    place.expect(OK, &["import", "@snapshot", "--into", "STORE"]);
    place.expect(OK, &["export", "guest@1-1", "@out", "--from", "STORE"]);
    place.expect_same_files(["snapshot", "out"]);
    let mut again = GuestBuilder::saved(&place.at("out")).start();
    again.wait_for("sum");
}

// Several checkpoints.

/// Makes checkpoints of a guest `web`, each of which differs from the one before it in a page.
fn make_checkpoints(place: &Place, count: u64) {
    let store = Store::open(&place.address, Options::default()).unwrap();
    let guest = store.guest("web").unwrap();
    let arbiter = store.arbiter().unwrap();
    let owner = tandem_ft::arbiter::Owner {
        claimant: tandem_ft::arbiter::Claimant::random().unwrap(),
        host: "a".to_owned(),
    };
    let tenancy = guest.begin_anew(arbiter.as_ref(), &owner).unwrap();
    let mut writer = Writer::open(&guest, arbiter, tenancy.tenure, None).unwrap();
    for number in 1..=count {
        let mut upload = writer.begin(&[(MEMORY, 64 * PAGE as u64)]).unwrap();
        let pages = if number == 1 {
            0..60
        } else {
            number..number + 1
        };
        for page in pages {
            let content = noise(page + number * 1000);
            upload.page(0, page, Some(&content)).unwrap();
        }
        let state = Section::new(STATE, 1, number.to_le_bytes().to_vec());
        upload.commit("name = 'web'\n", vec![state]).unwrap();
    }
}

/// A page that nothing makes smaller.
fn noise(seed: u64) -> [u8; PAGE] {
    let mut page = [0; PAGE];
    let mut state = seed;
    for word in page.as_chunks_mut::<8>().0 {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1);
        *word = (state ^ state >> 29).to_le_bytes();
    }
    page
}

fn listed(place: &Place) -> Vec<String> {
    let (out, _) = place.expect(OK, &["-q", "checkpoints", "web", "--from", "STORE"]);
    out.lines().map(str::to_owned).collect()
}

#[test]
fn old_checkpoints_go_and_the_others_stay_whole() {
    let place = Place::directory();
    make_checkpoints(&place, 6);
    let prune = ["prune", "web", "--from", "STORE", "--keep", "2"];
    let with = |more: &[&str]| place.json(&[&prune[..], more].concat())["checkpoints"].clone();
    assert_eq!(with(&["--dry-run"]), 4);
    assert_eq!(with(&["--older-than", "1d"]), 0);
    assert_eq!(listed(&place).len(), 6);
    assert_eq!(with(&["--older-than", "0s"]), 4);
    assert_eq!(listed(&place), ["web@1-6", "web@1-5"]);
    assert_eq!(with(&[]), 0);
    let (out, _) = place.expect(OK, &["verify", "web", "--from", "STORE"]);
    assert!(
        out.contains("2 checkpoints") && out.contains("as it was written"),
        "{out}"
    );
    place.expect(USAGE, &["prune", "web", "--from", "STORE", "--keep", "1"]);
    let (_, told) = place.expect(FAILED, &["prune", "wbe", "--from", "STORE", "--keep", "2"]);
    assert!(told.contains("it has web"), "{told}");
}

#[test]
fn what_is_listed_says_what_is_shared() {
    let place = Place::directory();
    make_checkpoints(&place, 3);
    let listed = &place.json(&["checkpoints", "--all", "--from", "STORE"])[0];
    let totals = &listed["totals"];
    // 60 pages, and one more that is written anew in each of the others.
    assert_eq!(
        (&totals["held_pages"], &totals["stored_pages"]),
        (&180.into(), &62.into())
    );
    let checkpoints = listed["checkpoints"].as_array().unwrap();
    let numbers: Vec<u64> = checkpoints
        .iter()
        .map(|c| c["number"].as_u64().unwrap())
        .collect();
    assert_eq!(numbers, [3, 2, 1]);
    let newest: Vec<bool> = checkpoints
        .iter()
        .map(|c| c["newest"].as_bool().unwrap())
        .collect();
    assert_eq!(newest, [true, false, false]);
    let own: Vec<u64> = checkpoints
        .iter()
        .map(|c| c["own_bytes"].as_u64().unwrap())
        .collect();
    assert!(own[0] * 5 < own[2], "{own:?}");
    let inspected = place.json(&["inspect", "web", "--from", "STORE"]);
    assert_eq!(inspected["chain"], serde_json::json!(["1-2", "1-1"]));
}

#[test]
fn what_is_damaged_is_named_and_passed_over() {
    let place = Place::directory();
    make_checkpoints(&place, 3);
    let store = place.at("store");
    let objects = objects_below(&store, &store);
    assert!(objects.len() >= 8, "{objects:?}");
    for name in &objects {
        let path = store.join(name);
        let sound = fs::read(&path).unwrap();
        let mut bytes = sound.clone();
        bytes[sound.len() / 2] ^= 4;
        fs::write(&path, bytes).unwrap();
        let (out, _) = place.expect(FAILED, &["-q", "verify", "--all", "--from", "STORE"]);
        assert!(out.contains(name), "{name}: {out}");
        fs::write(&path, sound).unwrap();
    }
    let newest = store
        .join("guests/web/checkpoints")
        .join(format!("{:020}-{:020}", 1, 3));
    fs::write(&newest, "x").unwrap();
    let listed = &place.json(&["checkpoints", "web", "--from", "STORE"])[0];
    assert_eq!(
        (&listed["checkpoints"][0]["state"], &listed["newest"]),
        (&"damaged".into(), &"1-2".into())
    );
    let inspected = place.json(&["inspect", "web", "--from", "STORE"]);
    assert_eq!(inspected["number"], 2);
    assert!(
        inspected["passed_over"][0]
            .as_str()
            .unwrap()
            .contains("1-3")
    );
    place.expect(SNAPSHOT, &["inspect", "web@1-3", "--from", "STORE"]);
    place.expect(OK, &["verify", "web@1-2", "--from", "STORE"]);
    place.expect(FAILED, &["verify", "web@1-3", "--from", "STORE"]);
    let (_, told) = place.expect(FAILED, &["verify", "web@1-9", "--from", "STORE"]);
    assert!(told.contains("no checkpoint 1-9"), "{told}");
}

/// Names of all objects in a directory but the arbiter's, which has files that nobody needs.
fn objects_below(root: &Path, directory: &Path) -> Vec<String> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).unwrap() {
        let path = entry.unwrap().path();
        let name = path
            .strip_prefix(root)
            .unwrap()
            .to_str()
            .unwrap()
            .to_owned();
        if path.is_file() {
            names.push(name);
        } else if name != "terms" {
            names.extend(objects_below(root, &path));
        }
    }
    names.sort();
    names
}

// Stores of earlier versions.

#[test]
fn golden_stores_are_read_by_all_verbs() {
    for (name, key) in [("plain", false), ("encrypted", true)] {
        let place = Place::directory();
        let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../store/golden/v1");
        let packed = fs::read(golden.join(format!("{name}.store"))).unwrap();
        let objects: BTreeMap<String, ByteBuf> = rmp_serde::from_slice(&packed).unwrap();
        for (name, bytes) in objects {
            let path = place.at("store").join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, bytes).unwrap();
        }
        write_key(&place.at("key"));
        let key: &[&str] = if key { &["--key", "@key"] } else { &[] };
        let words = |words: &[&'static str]| [words, &["--from", "STORE"], key].concat();
        let listed = &place.json(&words(&["checkpoints", "web"]))[0];
        assert_eq!(
            (&listed["newest"], &listed["host"]),
            (&"2-3".into(), &"b".into())
        );
        assert_eq!(listed["checkpoints"].as_array().unwrap().len(), 3);
        assert_eq!(place.json(&words(&["inspect", "web@2-2"]))["parent"], "1-1");
        assert_eq!(place.json(&words(&["verify", "web"]))["checkpoints"], 3);
        place.expect(OK, &words(&["verify", "web@1-1"]));
        // Its state is that of no guest.
        place.expect(SNAPSHOT, &words(&["export", "web", "@out"]));
        assert!(!place.at("out").exists());
        // The owner of term 2 went on from 1-1, and may still load memory from it.
        let pruned = place.json(&words(&["prune", "web", "--keep", "2"]));
        assert_eq!(pruned["checkpoints"], 0);
        assert_eq!(place.json(&words(&["verify", "web"]))["checkpoints"], 3);
    }
}

/// The key of the golden store that is encrypted.
fn write_key(path: &Path) {
    use std::os::unix::fs::PermissionsExt;
    fs::write(path, "5a".repeat(32)).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o600)).unwrap();
}

// What is promised.

#[test]
fn help_names_every_key_of_json() {
    let place = Place::directory();
    place.golden_snapshot();
    let verbs: [&[&str]; 7] = [
        &["store", "init", "STORE"],
        &["import", "@snapshot", "--into", "STORE", "--name", "web"],
        &["checkpoints", "web", "--from", "STORE"],
        &["inspect", "web", "--from", "STORE"],
        &["verify", "web", "--from", "STORE"],
        &["prune", "web", "--from", "STORE", "--keep", "2"],
        &["export", "web", "@out", "--from", "STORE"],
    ];
    for verb in verbs {
        let mut keys = BTreeSet::new();
        collect_keys(&place.json(verb), &mut keys);
        let verb = if verb[0] == "store" {
            &verb[..2]
        } else {
            &verb[..1]
        };
        let (help, _) = place.expect(OK, &[verb, &["--help"]].concat());
        let (_, json) = help.split_once("JSON").unwrap();
        for key in keys {
            let word = |c: char| !c.is_ascii_alphanumeric() && c != '_';
            let named = json.split(word).any(|word| word == key);
            assert!(named, "{verb:?}: `{key}` is not in the help");
        }
    }
}

fn collect_keys(value: &Value, keys: &mut BTreeSet<String>) {
    match value {
        Value::Object(fields) => {
            keys.extend(fields.keys().cloned());
            fields.values().for_each(|value| collect_keys(value, keys));
        }
        Value::Array(items) => items.iter().for_each(|item| collect_keys(item, keys)),
        _ => {}
    }
}

#[test]
fn what_is_no_store_is_refused_in_words() {
    let place = Place::directory();
    let wrong = [
        (
            &["checkpoints", "web", "--from", "STORE"][..],
            USAGE,
            "there is none",
        ),
        (
            &["checkpoints", "web", "--from", "@none"],
            11,
            "cannot list",
        ),
        (
            &["checkpoints", "web", "--from", "http://x/y"],
            USAGE,
            "s3://BUCKET/PREFIX",
        ),
        (&["checkpoints", "--from", "STORE"], USAGE, "NAME|--all"),
        (
            &["inspect", "web@x", "--from", "STORE"],
            USAGE,
            "NAME@TERM-NUMBER",
        ),
        (
            &["verify", "web@x", "--from", "STORE"],
            USAGE,
            "NAME@TERM-NUMBER",
        ),
        (
            &[
                "prune",
                "web",
                "--from",
                "STORE",
                "--keep",
                "2",
                "--older-than",
                "7",
            ],
            USAGE,
            "7d",
        ),
    ];
    for (words, code, expected) in wrong {
        let (_, told) = place.expect(code, words);
        assert!(told.contains(expected), "{words:?}: {told}");
    }
}
