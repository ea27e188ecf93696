//! Streams, states, descriptions, requests and images.

use tandem_devices::state::{CmosState, PmState, SerialState, TransportState};
use tandem_vmm::kvm::state::{
    ClockState, CpuidEntry, DebugState, EventsState, IrqchipState, KvmState, PitState,
    RegistersState, SystemState, VcpuState,
};
use tandem_vmm::snapshot::Writer;

use super::Seed;
use crate::snapshot::{SLOTS, busy, subject};

pub(super) fn net_stream() -> Vec<Seed> {
    let frame = |len: u16| [&[1][..], &len.to_le_bytes(), &[0x77]].concat();
    let transmit = |len: u16| [&[2][..], &len.to_le_bytes(), &[0]].concat();
    let bytes = |bytes: &[u8]| [&[0, bytes.len() as u8][..], bytes].concat();
    let length = |length: u32| [&[4][..], &length.to_le_bytes()].concat();
    let reads = [3, 0xff, 0xff];
    vec![
        (
            "both-ways",
            [
                frame(60),
                transmit(60),
                frame(1514),
                transmit(1514),
                reads.to_vec(),
            ]
            .concat(),
        ),
        (
            "in-pieces",
            [
                bytes(&[0, 0]),
                bytes(&[0, 20, 1, 2]),
                bytes(&[9; 30]),
                vec![5],
            ]
            .concat(),
        ),
        (
            "short-and-empty",
            [bytes(&[0; 64]), frame(13), frame(14), frame(0)].concat(),
        ),
        (
            "too-long",
            [frame(100), length(0xffff_ffff), frame(100), transmit(64)].concat(),
        ),
        (
            "does-not-read",
            [
                vec![transmit(0xfff0); 12].concat(),
                vec![reads.to_vec(); 9].concat(),
            ]
            .concat(),
        ),
        (
            "largest",
            [
                frame(0xffff),
                frame(0xffff),
                transmit(0xffff),
                [2, 0xff, 0xff, 9].to_vec(),
            ]
            .concat(),
        ),
    ]
}

pub(super) fn vsock_host() -> Vec<Seed> {
    let say = |who: u8, text: &[u8]| [&[1, who, text.len() as u8][..], text].concat();
    let script = |parts: &[&[u8]]| parts.concat();
    let wait = |what: u8| [9, what];
    vec![
        (
            "served",
            script(&[
                &[0, 0],
                &say(0, b"CONNECT 5\nfirst"),
                &say(0, b"more"),
                &[7, 0, 9, 0],
                &[6, 0, 99, 0],
            ]),
        ),
        (
            "refused",
            script(&[&[0, 0], &say(0, b"CONNECT 8\nx"), &[6, 0, 9, 0]]),
        ),
        (
            "in-pieces",
            script(&[
                &[0, 0],
                &say(0, b"CONN"),
                &say(0, b"ECT 9"),
                &say(0, b"\n"),
                &[3, 0],
            ]),
        ),
        (
            "other-words",
            script(&[
                &[0, 0],
                &say(0, b"GET / HTTP/1.1\r\n"),
                &[0, 0],
                &say(0, &[b'C'; 40]),
                &[0, 0],
                &say(0, b"CONNECT 99999999999\n"),
            ]),
        ),
        (
            "silence",
            script(&[
                &[0, 0, 0, 0, 0, 0],
                &say(1, b"CONN"),
                &wait(1),
                &say(1, b"ECT 1\n"),
            ]),
        ),
        (
            "leaves-early",
            script(&[
                &[0, 0, 2, 0, 5, 5, 0],
                &[0, 0, 2, 0, 6, 10, 0, 4, 0, 7, 0, 0, 9, 3, 0, 5, 0],
            ]),
        ),
        (
            "guest-asks",
            script(&[
                &[8, 0, 8, 0, 7, 0, 0, 64],
                &say(0, b"answer"),
                &say(1, b"answer"),
                &[5, 0, 7, 0, 0, 64, 7, 1, 0, 64],
            ]),
        ),
        (
            "does-not-read",
            script(&[
                &[8, 0],
                &[7, 0, 0xff, 0x7f].repeat(6),
                &[6, 0, 0xff, 0xff],
                &[4, 0],
                &wait(0),
            ]),
        ),
        (
            "accept-late",
            script(&[&[0, 0, 2, 0, 12], &wait(0), &say(0, b"x"), &wait(2)]),
        ),
    ]
}

pub(super) fn snapshot() -> Vec<Seed> {
    let mut seeds = vec![("legacy", written(legacy)), ("kvm", written(kvm))];
    let mut all = Vec::new();
    for (slot, (name, kind)) in ["block", "net", "console", "rng", "vsock"]
        .into_iter()
        .zip(SLOTS)
        .enumerate()
    {
        let mut subject = subject(kind);
        let mut driver = busy(subject.as_mut());
        driver.transport.kick_all(&mut driver.poller);
        driver.transport.quiesce(&mut driver.poller);
        let (transport, device) = driver.transport.save().expect("quiesced devices are saved");
        let slot = slot as u32;
        seeds.push((
            name,
            written(|to| {
                to.state::<TransportState>(slot, &transport)
                    .expect("written");
                to.device(slot, &device).expect("written");
            }),
        ));
        all.push((slot, transport, device));
    }
    seeds.push((
        "whole",
        written(|to| {
            for (slot, transport, device) in &all {
                to.state(*slot, transport).expect("written");
                to.device(*slot, device).expect("written");
            }
            legacy(to);
        }),
    ));
    seeds
}

fn written(states: impl FnOnce(&mut Writer<Vec<u8>>)) -> Vec<u8> {
    let mut writer = Writer::new(Vec::new()).expect("begun");
    states(&mut writer);
    writer.finish().expect("ended")
}

fn legacy(to: &mut Writer<Vec<u8>>) {
    let serial = SerialState {
        divisor: 12,
        interrupt_enable: 1,
        interrupt_identification: 1,
        line_control: 3,
        line_status: 0x60,
        modem_control: 8,
        modem_status: 0,
        scratch: 0,
        fifo: b"fifo".to_vec(),
        waiting: b"waiting".to_vec(),
    };
    let power = PmState {
        status: 0,
        enable: 0x100,
    };
    to.state(0, &serial).expect("written");
    to.state(0, &power).expect("written");
    to.state(0, &CmosState { index: 7 }).expect("written");
}

fn kvm(to: &mut Writer<Vec<u8>>) {
    let leaf = CpuidEntry {
        leaf: 1,
        index: 0,
        flags: 0,
        eax: 0x306c3,
        ebx: 0,
        ecx: 0,
        edx: 1,
    };
    let vcpu = VcpuState {
        cpuid: vec![leaf; 2],
        tsc_khz: Some(2_000_000),
        mp_state: 0,
        registers: RegistersState::default(),
        system: SystemState::default(),
        xcrs: vec![(0, 7)],
        debug: DebugState::default(),
        xsave: vec![0; 64],
        lapic: vec![0; 64],
        msrs: vec![(0x10, 1), (0x1b, 0xfee0_0900)],
        events: EventsState::default(),
    };
    to.state(0, &vcpu).expect("written");
    to.kvm(&KvmState {
        irqchip: IrqchipState::default(),
        pit: PitState::default(),
        clock: ClockState::default(),
    })
    .expect("written");
}

const FULL: &str = r#"name = "web"
kernel = "/proc/self/exe"
initrd = 'i'
cmdline = "a=b"
cpus = 2
memory = "512MiB"
console = "file=out.log"
no-reboot = true
pin = [0, 1]
rng-seed = 18446744073709551615
boot = 'pvh'
acpi = false
hugepages = false
virtio-console = true
realtime = 5
api = '/tmp/a'
log-level = 'warn'
[[disk]]
path = "root.img"
readonly = true
[[disk]]
path = '/d'
id = "data"
engine = "threads"
direct = true
[[net]]
tap = "tap0"
mac = "52:54:00:12:34:56"
[[net]]
socket = 's'
[vsock]
cid = 3
path = "v.sock"
"#;

const WRONG: &str = r#"memroy = "1GiB"
cpus = 99
memory = 512
kernel = [
"x"]
[[disk]]
id = "a,b"
[[net]]
mac = 3
[[net]]
tap = "a"
socket = "b"
"#;

const NOT_TOML: &str = "name = \"a\nkernel = = 3\n[[disk\n]\u{fffd}\u{2028}\n\t'''x";

const NUMBERS: &str = "cpus = 0x2
rng-seed = -1
pin = [0b1, 0o7, 1_0, []]
realtime = 1e3
memory = '1.5GiB'
name = 1979-05-27T07:32:00Z
";

const DEEP: &str = "a.b.c.d.e = [[[[[[{x = {y = [1]}}]]]]]]
[[disk]]
[disk.path]
[[net.tap]]
";

const QUOTES: &str = r#"name = '"'
cmdline = "\u0000\"\n"
kernel = "\t"
[[disk]]
path = "\\"
id = 'é'
"#;

const FLAGS: &str = "--name
web
--kernel=/proc/self/exe
--cmdline
quiet -- x
--cpus=2
--memory=1GiB
--disk
path=a,readonly,id=b,direct,engine=uring
--net
tap=t0,mac=52:54:00:00:00:01
--net=socket=/s
--vsock
cid=3,path=/v
--console=file=x
--pin=0,1
--acpi=false
--boot=linux64";

const WRONG_FLAGS: &str = "--disk=path=,,
--net=tap=a,socket=b
--vsock=cid=2
--pin=
--memory=-1";

pub(super) fn config() -> Vec<Seed> {
    let texts = [
        ("full", FULL),
        ("wrong", WRONG),
        ("not-toml", NOT_TOML),
        ("numbers", NUMBERS),
        ("deep", DEEP),
        ("quotes", QUOTES),
        ("flags", FLAGS),
        ("wrong-flags", WRONG_FLAGS),
    ];
    texts
        .map(|(name, text)| (name, text.as_bytes().to_vec()))
        .into()
}

pub(super) fn api() -> Vec<Seed> {
    let get = |path: &str| format!("GET {path} HTTP/1.1\r\nHost: x\r\n\r\n");
    let post = |path: &str, body: &str| {
        let len = body.len();
        format!("POST {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len}\r\n\r\n{body}")
    };
    let long = "x".repeat(5000);
    let reads = ["/api/v1/guest", "/api/v1/stats", "/api/v1/logs", "/metrics"];
    let changes = [
        post("/api/v1/pause", ""),
        post("/api/v1/resume", ""),
        post("/api/v1/stop", "{\"force\":true}"),
    ];
    let moves = [
        post("/api/v1/snapshot", "{\"directory\":\"/nowhere/s\"}"),
        post("/api/v1/migrate", "{\"to\":\"/nowhere/m\"}"),
    ];
    let wrong = [
        get("/nothing?a=%00"),
        get("/api/v1/stop"),
        post("/api/v1/stop", "{\"farce\":1}"),
    ];
    let texts = [
        ("reads", reads.map(get).concat()),
        ("moves", moves.concat()),
        ("description", get("/api/v1/openapi.json")),
        ("changes", changes.concat()),
        ("wrong", wrong.concat()),
        ("long-body", post("/api/v1/stop", &long)),
        (
            "long-head",
            format!("GET / HTTP/1.1\r\nX: {}", long.repeat(4)),
        ),
        (
            "chunks",
            "POST /api/v1/stop HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\
             Expect: 100-continue\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
                .into(),
        ),
        (
            "old",
            "HEAD /metrics HTTP/1.0\r\n\r\nOPTIONS * HTTP/1.1\r\n\r\n".into(),
        ),
        ("http2", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04".into()),
        (
            "upgrade",
            "GET /api/v1/guest HTTP/1.1\r\nConnection: upgrade\r\nUpgrade: websocket\r\n\r\nx"
                .into(),
        ),
        (
            "two-lengths",
            "POST /api/v1/pause HTTP/1.1\r\nContent-Length: 0\r\n\
             Content-Length: 18446744073709551616\r\n\r\n"
                .into(),
        ),
    ];
    texts
        .map(|(name, text): (_, String)| (name, text.into_bytes()))
        .into()
}

pub(super) fn kernel() -> Vec<Seed> {
    let input = |flags: u8, cmdline: &str, initrd: u16, image: &[u8]| {
        let mut bytes = vec![flags, cmdline.len() as u8];
        bytes.extend(cmdline.as_bytes());
        bytes.extend(initrd.to_le_bytes());
        bytes.extend(image);
        bytes
    };
    let (plain, pvh, bzimage) = (elf(false), elf(true), bzimage());
    let mut huge = plain.clone();
    huge[64 + 32..64 + 48].fill(0xff);
    vec![
        ("elf", input(0, "console=ttyS0", 0, &plain)),
        ("elf-by-pvh", input(1, "", 0, &plain)),
        ("pvh", input(8 | 16, "quiet", 20, &pvh)),
        ("pvh-by-linux64", input(2 | 4, "", 0, &pvh)),
        ("bzimage", input(8, "a=b", 3, &bzimage)),
        ("bzimage-large-initrd", input(4 | 8, "", 0xffff, &bzimage)),
        ("bzimage-cut", input(0, "", 0, &bzimage[..0x300])),
        ("elf-huge", input(0, "", 0, &huge)),
        ("script", input(0, "", 0, b"#!/bin/sh")),
        ("line-feed", input(0, "a\nb\0", 0, &plain)),
    ]
}

fn put(image: &mut [u8], at: usize, bytes: &[u8]) {
    image[at..at + bytes.len()].copy_from_slice(bytes);
}

/// An executable with one segment at 1 MiB, entered 16 bytes into it, with or without a PVH note.
fn elf(pvh: bool) -> Vec<u8> {
    let mut image = vec![0x90; 0x300];
    image[..0x200].fill(0);
    put(&mut image, 0, b"\x7fELF\x02\x01\x01");
    put(&mut image, 16, &[2, 0, 62, 0, 1]);
    put(&mut image, 24, &0x10_0010u64.to_le_bytes());
    put(&mut image, 32, &64u64.to_le_bytes());
    put(&mut image, 54, &[56, 0, 1 + u8::from(pvh), 0]);
    program_header(&mut image, 64, 1, [0x200, 0x100, 0x3000]);
    program_header(&mut image, 120, 4, [0x100, 20, 20]);
    put(&mut image, 0x100, &[4, 0, 0, 0, 4, 0, 0, 0, 18, 0, 0, 0]);
    put(&mut image, 0x10c, b"Xen\0\x20\0\x10\0");
    image
}

fn program_header(image: &mut [u8], at: usize, kind: u8, [offset, file, memory]: [u64; 3]) {
    image[at] = kind;
    for (field, value) in [(8, offset), (24, 0x10_0000), (32, file), (40, memory)] {
        put(image, at + field, &value.to_le_bytes());
    }
}

/// A bzImage with one setup sector and a kernel of 1 KiB that prefers 16 MiB.
fn bzimage() -> Vec<u8> {
    let mut image = vec![0; 0x800];
    image[0x1f1] = 1;
    put(&mut image, 0x1f4, &(0x400u32 / 16).to_le_bytes());
    put(&mut image, 0x1fe, &[0x55, 0xaa, 0xeb, 0x6a]);
    put(&mut image, 0x202, b"HdrS\x0f\x02");
    image[0x211] = 1;
    put(&mut image, 0x22c, &0x7fff_ffffu32.to_le_bytes());
    image[0x234] = 1;
    put(&mut image, 0x236, &[0x7f, 0]);
    put(&mut image, 0x238, &255u32.to_le_bytes());
    put(&mut image, 0x258, &(16u64 << 20).to_le_bytes());
    put(&mut image, 0x260, &0x10_0000u32.to_le_bytes());
    image[0x400..].fill(0xcc);
    image
}
