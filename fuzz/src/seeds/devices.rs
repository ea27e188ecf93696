//! Scripts of drivers.

use tandem_devices::virtio::testing::BUFFERS;
use tandem_devices::virtio::vsock::packet::{HEADER_SIZE, Header, Op, SHUTDOWN_BOTH, TYPE_STREAM};
use tandem_devices::virtio::vsock::{HOST_CID, RX, TX};

use super::Seed;
use crate::step::{Part, Step, script};
use crate::vsock_guest::CID;

const START: Step = Step::Start { without: 0 };
/// Without event index.
const START_PLAIN: Step = Step::Start { without: 1 << 29 };
const NEXT: u8 = 1;
const WRITE: u8 = 2;
const INDIRECT: u8 = 4;
/// The first table that belongs to no queue of any device.
const TABLE: u8 = 0x80;
const TABLE_AT: u32 = BUFFERS as u32 + 0x1c_0000;
const STATUS: u8 = 0x70 / 4;

fn part(at: u16, len: u16, writable: bool) -> Part {
    Part { at, len, writable }
}

fn chain(queue: u8, head: u8, parts: &[Part]) -> Step {
    let parts = parts.to_vec();
    Step::Chain { queue, head, parts }
}

fn poke(at: u64, bytes: &[u8]) -> Step {
    Step::Poke {
        at: at as u32,
        bytes: bytes.to_vec(),
    }
}

fn host(what: u8, value: u32) -> Step {
    Step::Host { what, value }
}

fn descriptor(table: u8, index: u8, at: u32, len: u32, flags: u8, next: u8) -> Step {
    Step::Descriptor {
        table,
        index,
        at,
        len,
        flags,
        next,
    }
}

fn indirect(queue: u8, len: u32, table: &[Step]) -> Vec<u8> {
    let mut steps = vec![START, descriptor(queue, 0, TABLE_AT, len, INDIRECT, 0)];
    steps.extend(table.iter().cloned());
    steps.extend([Step::Offer { queue, head: 0 }, Step::Kick { queue }]);
    script(&steps)
}

/// Rings of which the flags of the used one are the index of the available one: whatever the device
/// says of kicks changes what is available.
fn flags_on_index(queue: u8, request: &[Part]) -> Vec<u8> {
    script(&[
        Step::Negotiate { without: 1 << 29 },
        Step::Rings {
            queue,
            descriptors: 0x1_0000 * (1 + u32::from(queue)),
            available: 0x1_5002 + 0x1_0000 * u32::from(queue),
            used: 0x1_5004 + 0x1_0000 * u32::from(queue),
        },
        chain(queue, 0, request),
        Step::Register {
            at: STATUS,
            value: 0xf,
        },
        Step::Kick {
            queue: queue.wrapping_sub(1),
        },
        Step::Kick { queue },
        Step::Ready { token: 0 },
    ])
}

/// What is nasty for any device with a queue of this number, which takes such a request.
fn nasty(queue: u8, request: &[Part]) -> Vec<Seed> {
    let in_table =
        |at: u32, len: u32, flags: u8, next: u8| descriptor(TABLE, 0, at, len, flags, next);
    let ring = |queue: u8| 0x1_0000 + u64::from(queue) * 0x1_0000;
    vec![
        ("flags-on-index", flags_on_index(queue, request)),
        (
            "indirect",
            indirect(queue, 16, &[in_table(BUFFERS as u32, 64, WRITE, 0)]),
        ),
        (
            "indirect-in-indirect",
            indirect(queue, 16, &[in_table(TABLE_AT, 16, INDIRECT, 0)]),
        ),
        ("indirect-huge", indirect(queue, 0xffff_fff0, &[])),
        (
            "loop",
            script(&[
                START,
                descriptor(queue, 0, BUFFERS as u32, 1, NEXT, 1),
                descriptor(queue, 1, BUFFERS as u32, 1, NEXT, 0),
                Step::Offer { queue, head: 0 },
                Step::Kick { queue },
            ]),
        ),
        (
            "index-ahead",
            script(&[
                START,
                poke(ring(queue) + 0x4002, &[0xff, 0x7f]),
                Step::Kick { queue },
                Step::Ready { token: 0 },
            ]),
        ),
        (
            "full-ring-of-one-head",
            script(&[
                START_PLAIN,
                chain(queue, 0, request),
                poke(ring(queue) + 0x4002, &[0, 1]),
                Step::Kick { queue },
                Step::Again,
                Step::Pause,
                Step::Restore,
            ]),
        ),
        (
            "odd-registers",
            script(&[
                Step::Write {
                    at: 0x70,
                    bytes: vec![1],
                },
                Step::Read { at: 0xffe, len: 8 },
                Step::Write {
                    at: 0x104,
                    bytes: vec![9; 16],
                },
                START,
                Step::Register {
                    at: 0x50 / 4,
                    value: 77,
                },
                Step::Register {
                    at: 0x30 / 4,
                    value: u32::MAX,
                },
                Step::Register {
                    at: STATUS,
                    value: 0x80,
                },
                Step::Restore,
                Step::Reset,
            ]),
        ),
        (
            "rings-nowhere",
            script(&[
                Step::Negotiate { without: 0 },
                Step::Rings {
                    queue,
                    descriptors: 0xff00_0000,
                    available: 0xff00_0001,
                    used: 0xff00_0004,
                },
                Step::Register {
                    at: STATUS,
                    value: 0xf,
                },
                Step::Kick { queue },
            ]),
        ),
    ]
}

pub(super) fn queue() -> Vec<Seed> {
    let mut seeds = nasty(0, &[part(0, 64, true)]);
    let parts = [part(0, 100, false), part(9, 0, false), part(64, 512, true)];
    seeds.push((
        "both-queues",
        script(&[
            START,
            chain(0, 0, &parts),
            chain(1, 8, &parts),
            Step::Again,
            Step::Restore,
            chain(1, 16, &parts[..1]),
            Step::Reset,
        ]),
    ));
    seeds
}

pub(super) fn block() -> Vec<Seed> {
    let request = |head: u8, kind: u8, sector: u8| {
        let mut header = [0; 16];
        (header[0], header[8]) = (kind, sector);
        let at = BUFFERS + u64::from(head) * 64;
        let data = part(64, 512, kind == 0 || kind == 8);
        let parts = [part(head.into(), 16, false), data, part(128, 1, true)];
        [poke(at, &header), chain(0, head, &parts)]
    };
    let all = [0, 1, 4, 8, 11, 13, 77].map(|kind| request(kind, kind, 1));
    let held = [request(0, 0, 1), request(8, 1, 63), request(16, 4, 0)];
    let mut seeds = nasty(
        0,
        &[
            part(0x100, 16, false),
            part(64, 512, true),
            part(128, 1, true),
        ],
    );
    seeds.push((
        "every-kind",
        script(&[vec![START], all.concat(), vec![Step::Restore]].concat()),
    ));
    let end = [
        host(3, 1),
        Step::Pause,
        host(0, 0),
        host(1, 1),
        host(3, 1023),
    ];
    let held = [&[START, host(0, 1), host(2, 2)], &held.concat()[..], &end].concat();
    seeds.push(("held", script(&held)));
    seeds.push((
        "beyond-the-end",
        script(&[&[START_PLAIN][..], &request(0, 0, 64), &request(8, 1, 255)].concat()),
    ));
    seeds.push((
        "zeroes",
        script(
            &[
                &[
                    START,
                    poke(BUFFERS + 64 * 64, &[0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 1]),
                ][..],
                &[
                    poke(BUFFERS, &[13]),
                    chain(
                        0,
                        0,
                        &[part(0, 16, false), part(64, 16, false), part(128, 1, true)],
                    ),
                ],
            ]
            .concat(),
        ),
    ));
    seeds
}

pub(super) fn net() -> Vec<Seed> {
    let mut seeds = nasty(1, &[part(0, 64, false)]);
    let receive = |head: u8, len: u16| chain(0, head, &[part(u16::from(head) * 32, len, true)]);
    let send = |head: u8, len: u16| chain(1, head, &[part(0x1000, len, false)]);
    seeds.push((
        "both-ways",
        script(&[
            START,
            receive(0, 2048),
            receive(1, 1500),
            host(4, 1000),
            host(4, 3000),
            send(0, 76),
            send(1, 0xfff0),
            Step::Pause,
            Step::Restore,
            send(2, 11),
        ]),
    ));
    seeds.push((
        "full-and-held",
        script(&[
            START,
            host(0, 1),
            send(0, 80),
            send(1, 80),
            host(0, 100),
            host(1, 1),
            send(2, 80),
            send(3, 80),
            host(2, 1),
            Step::Reset,
            host(2, 9),
        ]),
    ));
    seeds.push((
        "small-buffers",
        script(&[
            START,
            receive(0, 12),
            receive(1, 13),
            receive(2, 20),
            host(4, 65_562),
            host(4, 40),
            host(4, 5),
            Step::Pause,
            host(3, 0),
        ]),
    ));
    let plain = Step::Start {
        without: 1 << 15 | 1 << 28,
    };
    seeds.push((
        "one-buffer-a-frame",
        script(&[
            plain,
            host(4, 900),
            receive(0, 64),
            receive(1, 2000),
            host(4, 1500),
        ]),
    ));
    seeds
}

pub(super) fn console() -> Vec<Seed> {
    let mut seeds = nasty(1, &[part(0, 64, false)]);
    let output = chain(1, 0, &[part(0, 100, false), part(2, 300, false)]);
    seeds.push((
        "slow-screen",
        script(&[
            START,
            host(0, 50),
            output.clone(),
            Step::Pause,
            Step::Restore,
            host(0, 200),
            host(0, 5000),
            output,
        ]),
    ));
    seeds.push((
        "typing",
        script(&[
            START,
            host(2, 5000),
            chain(0, 0, &[part(0, 64, true)]),
            chain(0, 4, &[part(8, 4096, true), part(99, 4096, true)]),
            host(1, 0x20_0050),
            Step::Again,
        ]),
    ));
    seeds
}

pub(super) fn rng() -> Vec<Seed> {
    let mut seeds = nasty(0, &[part(0, 64, true)]);
    let whole = [part(0, 0xffff, true), part(0, 0xffff, true)];
    seeds.push((
        "greedy",
        script(&[
            START,
            chain(0, 0, &whole),
            chain(0, 4, &whole),
            chain(0, 8, &whole),
            chain(0, 12, &whole),
            chain(0, 16, &whole),
            Step::Again,
            Step::Restore,
            Step::Again,
        ]),
    ));
    seeds
}

fn packet(op: Op, host_port: u32, guest_port: u32, len: u32, flags: u32) -> [Step; 2] {
    let header = Header {
        src_cid: CID,
        dst_cid: HOST_CID,
        src_port: guest_port,
        dst_port: host_port,
        len,
        kind: TYPE_STREAM,
        op: op as u16,
        flags,
        buf_alloc: 4096,
        fwd_cnt: 0,
    };
    let total = HEADER_SIZE as u16 + len as u16;
    [
        poke(BUFFERS + 0x1_0000, &header.encode()),
        chain(TX as u8, 100, &[part(0x400, total, false)]),
    ]
}

pub(super) fn vsock() -> Vec<Seed> {
    let mut seeds = nasty(TX as u8, &[part(0, 64, false)]);
    let room: Vec<Step> = (0..8)
        .map(|head| chain(RX as u8, head, &[part(u16::from(head) * 16, 1000, true)]))
        .collect();
    let with_room = |steps: &[Step]| script(&[&[START], &room[..], steps].concat());
    let open = packet(Op::Request, 1024, 5, 0, 0);
    let data = packet(Op::Data, 1024, 5, 500, 0);
    let shut = packet(Op::Shutdown, 1024, 5, 0, SHUTDOWN_BOTH);
    let talk = [host(5, 300 << 8), host(4, 100 << 8), host(6, 0)];
    seeds.push((
        "guest-connects",
        with_room(&[&open[..], &data, &talk, &data, &shut, &[Step::Restore]].concat()),
    ));
    let slow = packet(Op::Request, 1025, 6, 0, 0);
    seeds.push((
        "slow-program",
        with_room(&[&slow[..], &[host(3, 0)], &packet(Op::Data, 1025, 6, 9, 0)].concat()),
    ));
    seeds.push((
        "slow-program-refuses",
        with_room(&[&slow[..], &slow, &[host(2, 0)], &slow, &[host(0, 50_000)]].concat()),
    ));
    let accept = packet(Op::Response, 1 << 30, 77, 0, 0);
    seeds.push((
        "host-connects",
        with_room(&[&[host(1, 77)], &accept[..], &talk, &[host(7, 0)]].concat()),
    ));
    seeds.push((
        "more-than-credit",
        with_room(&[&open[..], &[&data[..]; 20].concat(), &[host(7, 0)], &data].concat()),
    ));
    let stray = packet(Op::Data, 3, 3, 0, 0);
    seeds.push(("strays", script(&[&[START], &stray[..], &stray].concat())));
    seeds.push((
        "timeouts",
        with_room(
            &[
                &[host(1, 9)][..],
                &open,
                &shut,
                &[host(0, 99_999), host(0, 99_999)],
            ]
            .concat(),
        ),
    ));
    seeds
}
