//! What sources, primaries and copies send.

use tandem_ft::delta::{Encoder, VERSION, wanted};
use tandem_ft::link::{Kind, message};
use tandem_ft::paths::{Frame, Kind as PathKind};
use tandem_ft::runtime::encode_outputs;
use tandem_vmm::migration::frame::{self, HEADER_SIZE, Hello, Kind as FrameKind, Purpose};
use tandem_vmm::migration::pages::{PAGE, Page};
use tandem_vmm::snapshot::HardwareState;

use super::Seed;
use crate::outputs::gates;

/// Bytes of a payload of deltas before its pages.
const HEAD: usize = 9;

pub(super) fn frames() -> Vec<Seed> {
    let hello = Hello {
        description: "kernel = '/k'\n".into(),
        hardware: HardwareState {
            tandem: "0".into(),
            name: "web".into(),
            cpus: 1,
            memory: 64 << 10,
            devices: Vec::new(),
        },
        company: None,
    };
    let hello = hello.encode().expect("encoded");
    let page = [&1u32.to_le_bytes()[..], &2u64.to_le_bytes(), &[7; PAGE]].concat();
    let zero = [&1u32.to_le_bytes()[..], &(1u64 << 63 | 3).to_le_bytes()].concat();
    let send = |kinds: &[(FrameKind, &[u8])]| {
        let mut bytes = Vec::new();
        for (kind, payload) in kinds {
            frame::send(&mut bytes, *kind, payload).expect("room");
        }
        bytes
    };
    let mut preface = Vec::new();
    frame::send_preface(&mut preface, Purpose::Migration).expect("room");
    vec![
        ("preface", preface),
        ("hello", send(&[(FrameKind::Hello, &hello)])),
        (
            "pages",
            send(&[(FrameKind::Pages, &page), (FrameKind::Pages, &zero)]),
        ),
        ("deltas", send(&[(FrameKind::Deltas, &one_word())])),
        (
            "wanted",
            send(&[(FrameKind::Wanted, &wanted::encode(&[1..3, 9..10]))]),
        ),
        (
            "end",
            send(&[
                (FrameKind::State, b"state"),
                (FrameKind::Outputs, b"outputs"),
                (FrameKind::Complete, &[]),
            ]),
        ),
        ("refused", send(&[(FrameKind::Refuse, b"no room")])),
    ]
}

/// The payloads of what is sent of pages, one after the other.
fn encoded(encoder: &mut Encoder, pages: &[(u64, Option<&Page>)]) -> Vec<u8> {
    let mut bytes = Vec::new();
    let sent = encoder.send(pages.iter().copied(), &mut bytes);
    sent.expect("room");
    bytes.drain(..HEADER_SIZE);
    bytes
}

/// A word of a page that was used.
fn one_word() -> Vec<u8> {
    let mut encoder = Encoder::default();
    let old = [0x5a; PAGE];
    let mut new = old;
    new[100..108].copy_from_slice(b"changed!");
    encoded(&mut encoder, &[(2, Some(&old))]);
    encoded(&mut encoder, &[(2, Some(&new))])
}

pub(super) fn deltas() -> Vec<Seed> {
    let noise: Page = std::array::from_fn(|at| (at * at / 7 + at) as u8);
    let text: Page = std::array::from_fn(|at| b"server load "[at % 12]);
    let several = {
        let mut encoder = Encoder::default();
        let mut changed = text;
        changed[9..900].copy_from_slice(&noise[9..900]);
        changed[4095] = 1;
        encoded(&mut encoder, &[(4, Some(&text)), (6, Some(&text))]);
        encoded(
            &mut encoder,
            &[(1, None), (4, Some(&changed)), (6, Some(&noise))],
        )
    };
    let alone = |page: Option<&Page>| encoded(&mut Encoder::default(), &[(3, page)]);
    let raw = |pages: &[u8]| [&[VERSION][..], &[0; HEAD - 1], pages].concat();
    vec![
        ("one-word", one_word()),
        ("several", several),
        ("zero", alone(None)),
        ("whole", raw(&[&[1][..], &noise].concat())),
        ("packed", alone(Some(&text))),
        ("behind-memory", raw(&[0xff, 0xff, 0xff, 0xff, 0x0f, 0])),
        ("run-too-long", raw(&[3, 5, 0xfe, 0x1f, 4, 1, 1])),
        ("packed-of-more", raw(&[2, 6, 0x1f, 0, 1, 0, 0xff, 0xff])),
    ]
}

pub(super) fn link() -> Vec<Seed> {
    let say = |piece: u8, messages: &[(Kind, &[u8])]| {
        let mut bytes = vec![piece];
        for (kind, payload) in messages {
            message::put(&mut bytes, *kind, 1, payload);
        }
        bytes
    };
    let number = 7u64.to_le_bytes();
    vec![
        (
            "primary",
            say(
                40,
                &[
                    (Kind::Input, &[1; 60]),
                    (Kind::ConsoleInput, b"typed"),
                    (Kind::Settled, &number),
                    (Kind::Cut, &number),
                    (Kind::Committed, &number),
                    (Kind::Beat, &number),
                    (Kind::Term, &number),
                    (Kind::End, &[]),
                ],
            ),
        ),
        (
            "copy",
            say(
                255,
                &[
                    (Kind::Output, &[2; 1514]),
                    (Kind::ConsoleOutput, b"printed"),
                    (Kind::Loaded, &number),
                    (Kind::Answer, &number),
                ],
            ),
        ),
        (
            "in-bytes",
            say(0, &[(Kind::Beat, &number), (Kind::Output, &[3; 80])]),
        ),
        (
            "no-number",
            say(3, &[(Kind::Beat, &[1, 2, 3]), (Kind::Cut, &[])]),
        ),
        (
            "too-long",
            [
                &say(9, &[])[..],
                &[1, 0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0],
            ]
            .concat(),
        ),
    ]
}

pub(super) fn outputs() -> Vec<Seed> {
    let good = encode_outputs(&gates(), 3).expect("encoded");
    // As the good ones, but with a frame and a connection that is no connection.
    let mut held = Vec::new();
    held.extend(*b"\x84\xa5epoch\x03\xa3age\x92\x00\x00\xa4nets\x91");
    held.extend(*b"\x82\xa7covered\x91\xc4\x02hi\xa7mapping\x81\xabconnections\x90");
    held.extend(*b"\xa7console\xc4\x02ok");
    let mut named = Vec::new();
    named.extend(*b"\x84\xa5epoch\x03\xa3age\x92\x00\x00\xa4nets\x91");
    named.extend(*b"\x82\xa7covered\x90\xa7mapping\x81\xabconnections\x91");
    named.extend(*b"\x89\xa4flow\x91\x01\xa8sequence\x01\xa4time\x01\xa7initial\xc0");
    named.extend(*b"\xa7opening\xc0\xa4seen\xc0\xa5floor\xc0\xabguest_ended\xc2");
    named.extend(*b"\xadoutside_ended\xc2\xa7console\xc4\x00");
    vec![("good", good), ("held", held), ("no-connection", named)]
}

/// Steps of [`crate::paths`].
pub(super) fn paths() -> Vec<Seed> {
    let said = |path: u8, kind: PathKind, offset: u64, taken: u64, payload: &[u8]| {
        let frame = Frame {
            kind,
            hears: 3,
            offset,
            taken,
            payload: &[],
        };
        let mut bytes = Vec::new();
        frame.put_head(payload.len(), &mut bytes);
        bytes.extend_from_slice(payload);
        [&[path, 7, bytes.len() as u8][..], &bytes].concat()
    };
    let data = |path, offset, payload| said(path, PathKind::Data, offset, 0, payload);
    let connect = |path| vec![path, 0];
    let take = vec![0, 2];
    let later = |ms| vec![0, 3, ms];
    vec![
        (
            "both-paths",
            [
                connect(1),
                data(0, 0, b"abc"),
                data(1, 0, b"abcdef"),
                take.clone(),
            ]
            .concat(),
        ),
        (
            "first-breaks",
            [
                connect(1),
                data(0, 0, b"abc"),
                vec![0, 1],
                data(1, 3, b"def"),
                later(50),
                take,
            ]
            .concat(),
        ),
        (
            "silence-and-end",
            [
                connect(1),
                later(50),
                said(1, PathKind::Ping, 0, 48, &[]),
                vec![0, 4],
                said(1, PathKind::End, 0, 48, &[]),
            ]
            .concat(),
        ),
        ("gap", data(0, 1, b"x")),
        ("taken-too-much", said(0, PathKind::Ping, 0, 49, &[])),
    ]
}
