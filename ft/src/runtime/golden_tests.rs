//! What earlier versions said is understood by every later one, or is refused by name.
//!
//! `golden/vN` has what a primary and its standby of a version said on each connection, byte by byte, as somebody in
//! between recorded it: a guest that prints now and then was run with `--protect`, protected, made the same once more and
//! protected no longer. `refusal.secondary` is what a standby of it said to the next version's first offer. A version that says something else gets a recording of the one before, which is never changed.

use std::io::Write;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Instant;

use tandem_vmm::memory;
use tandem_vmm::migration::frame::{self, HEADER_SIZE, Kind as FrameKind};
use tandem_vmm::migration::{Link, MigrationError, VERSION};

use super::checkpoint::Part;
use super::hostile::standby;
use super::{CALL_SIZE, Calls, Invitation, Joined, Pair, ProtectionError, token_of};
use crate::link::{Kind, Reader, put};

/// Recordings that there are.
const VERSIONS: [&str; 1] = ["v1"];
/// Bytes of a guest's memory in recordings.
const MEMORY: u64 = 16 << 20;
/// Bytes of what a connection begins with after its call, before its first frame.
const PREFACE: usize = 12;

fn recorded(version: &str, name: &str) -> Vec<u8> {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("golden");
    std::fs::read(golden.join(version).join(name)).unwrap()
}

/// A connection whose other side says `said`, and then waits.
struct Said {
    token: u128,
    link: Link,
    end: JoinHandle<UnixStream>,
}

impl Said {
    fn new(said: &[u8]) -> Self {
        let (call, said) = said.split_first_chunk::<CALL_SIZE>().unwrap();
        let (near, mut far) = UnixStream::pair().unwrap();
        let said = said.to_vec();
        let end = thread::spawn(move || {
            // Nobody may want all of it.
            drop(far.write_all(&said));
            far
        });
        Self {
            token: token_of(call).unwrap(),
            link: Link::Unix(near),
            end,
        }
    }

    /// As it was recorded, up to the end of its greeting.
    fn greeting(version: &str, name: &str) -> Self {
        let said = recorded(version, name);
        let start = CALL_SIZE + PREFACE;
        let length = said[start + 4..start + 8].try_into().unwrap();
        let length = u32::from_le_bytes(length) as usize;
        Self::new(&said[..start + HEADER_SIZE + length])
    }
}

/// Connections in the order in which they are made.
struct Made(Mutex<Vec<(u128, Link)>>);

impl Calls for Made {
    fn next(
        &self,
        _deadline: Option<Instant>,
        _first: Option<&Link>,
    ) -> Result<(u128, Link), ProtectionError> {
        Ok(self.0.lock().unwrap().remove(0))
    }
}

fn join(version: &str) -> (Joined, [JoinHandle<UnixStream>; 3]) {
    let first = Said::new(&recorded(version, "checkpoints.primary"));
    let [pairing, keeper] =
        ["messages.primary", "keeper.primary"].map(|name| Said::greeting(version, name));
    let invitation = Invitation::hear((first.token, first.link)).unwrap();
    assert_eq!(invitation.offer.hello.hardware.name, "guest");
    assert!(!invitation.offer.paced, "that came later");
    let calls = [(pairing.token, pairing.link), (keeper.token, keeper.link)];
    let calls = Made(Mutex::new(calls.into()));
    let [memory, beside] = [(); 2].map(|()| memory::allocate(MEMORY, false).unwrap());
    let pair = Arc::new(Pair::new("guest", 0, 0).unwrap());
    let joined = invitation.accept(Box::new(calls), &memory, beside, standby(), &pair);
    (joined.unwrap(), [first.end, pairing.end, keeper.end])
}

#[test]
fn primaries_of_earlier_versions_are_joined_and_followed() {
    for version in VERSIONS {
        let (mut joined, ends) = join(version);
        assert_eq!((joined.cut.epoch, joined.state.vcpus.len()), (1, 1));
        assert!(joined.cut.modes.is_some());
        loop {
            match joined.receiver.next(&|| false).unwrap() {
                Part::Deltas(deltas) => joined.image.change(deltas).unwrap(),
                Part::Whole(_, cut) => {
                    assert_eq!(cut.epoch, 2);
                    assert!(cut.console.starts_with(b"dirty: round"));
                    break;
                }
                _ => panic!("something else was recorded"),
            }
        }
        drop(joined);
        for end in ends {
            drop(end.join().unwrap());
        }
    }
}

#[test]
fn secondaries_of_earlier_versions_accept() {
    for version in VERSIONS {
        let said = recorded(version, "checkpoints.secondary");
        frame::expect(&mut &said[..], FrameKind::Accept).unwrap();
    }
}

#[test]
fn what_earlier_versions_do_not_know_is_done_without() {
    for version in VERSIONS {
        let first = Said::new(&recorded(version, "checkpoints.primary"));
        let mut offer = Invitation::hear((first.token, first.link)).unwrap().offer;
        offer.paced = true;
        // It was told that.
        let said = recorded(version, "refusal.secondary");
        let refused = frame::receive(&mut &said[..], &mut Vec::new()).unwrap_err();
        let refused = ProtectionError::from(refused);
        assert!(offer.forgo(&refused) && !offer.paced, "{refused}");
        assert!(offer.modes.is_some());
        assert!(
            !offer.forgo(&refused),
            "there is nothing left to do without"
        );
        drop(first.end.join().unwrap());
    }
}

/// The messages of a recording, all of which are said today as they were then.
fn messages(said: &[u8]) -> Vec<Kind> {
    let (mut reader, mut kinds, mut again) = (Reader::default(), Vec::new(), Vec::new());
    let filled = reader.fill(|room| {
        room[..said.len()].copy_from_slice(said);
        Ok(said.len())
    });
    assert!(filled.unwrap());
    while let Some(message) = reader.take().unwrap() {
        put(&mut again, message.kind, message.device, message.payload);
        kinds.push(message.kind);
    }
    assert_eq!(again, said);
    kinds
}

#[test]
fn messages_of_earlier_versions_are_what_they_were() {
    for version in VERSIONS {
        let primary = recorded(version, "messages.primary");
        let start = CALL_SIZE + PREFACE;
        let length = u32::from_le_bytes(primary[start + 4..start + 8].try_into().unwrap());
        let said = messages(&primary[start + HEADER_SIZE + length as usize..]);
        for kind in [
            Kind::Beat,
            Kind::Cut,
            Kind::Committed,
            Kind::Settled,
            Kind::End,
        ] {
            assert!(said.contains(&kind), "{kind:?}");
        }
        let said = messages(&recorded(version, "messages.secondary"));
        for kind in [Kind::Answer, Kind::Loaded, Kind::ConsoleOutput] {
            assert!(said.contains(&kind), "{kind:?}");
        }
        assert!(!said.contains(&Kind::Taken), "that came later");
    }
}

#[test]
fn other_versions_of_the_protocol_are_refused_by_name_on_both_sides() {
    for other in [VERSION - 1, VERSION + 1] {
        let mut said = recorded("v1", "checkpoints.primary");
        let version = CALL_SIZE + PREFACE - 4..CALL_SIZE + PREFACE;
        said[version].copy_from_slice(&other.to_le_bytes());
        let said = Said::new(&said[..4096]);
        let refused = Invitation::hear((said.token, said.link));
        let error = refused.map(drop).unwrap_err().to_string();
        let mut end = said.end.join().unwrap();
        // The primary is told the same.
        let told = frame::receive(&mut end, &mut Vec::new()).unwrap_err();
        let MigrationError::Refused(why) = told else {
            panic!("{told}");
        };
        for text in [error, why] {
            let both = [other, VERSION].map(|version| version.to_string());
            assert!(both.iter().all(|version| text.contains(version)), "{text}");
        }
    }
}
