//! Guest that says hello and powers off, or does one of the simple things a test asks for.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;

use rt::virtio::console::Console;
use rt::virtio::rng::Rng;
use rt::virtio::vsock::{Event, Stream, Vsock};
use rt::{args, clock, console, fault, irq, power, println};

rt::entry!(main);

/// Random bytes that `rng` prints.
const RANDOM_BYTES: usize = 32;

fn main() {
    println!("hello: start");
    for line in 0..args().get("lines", 0u64) {
        println!("hello: line {line}");
    }
    if args().flag("rng") {
        print_random();
    }
    println!("hello: ready");
    finish();
    println!("hello: bye");
}

/// Does what the command line asks for once ready.
fn finish() {
    let asked = |key| args().flag(key);
    if asked("vsock") || asked("vsock-connect") {
        echo_vsock();
    } else if asked("vconsole") {
        echo_virtio();
    } else if asked("echo") {
        echo_serial();
    } else if asked("stay") {
        stay();
    } else if asked("panic") {
        panic!("The command line asked for it.");
    } else if asked("fault") {
        fault::provoke();
    } else if asked("reboot") {
        power::reboot();
    } else if asked("triple") {
        power::triple_fault();
    }
}

fn stay() -> ! {
    loop {
        clock::wait_until(None);
    }
}

fn print_random() {
    let mut bytes = [0; RANDOM_BYTES];
    match Rng::open() {
        Ok(mut source) => source.fill(&mut bytes),
        Err(error) => panic!("{error}"),
    }
    rt::print!("hello: random ");
    for byte in bytes {
        rt::print!("{byte:02x}");
    }
    println!();
}

fn echo_serial() -> ! {
    let line = irq::enable(console::IRQ);
    console::enable_input_interrupt();
    loop {
        line.take();
        while let Some(byte) = console::read_byte() {
            console::write_bytes(&[byte.to_ascii_uppercase()]);
        }
        clock::wait_until(None);
    }
}

fn echo_virtio() -> ! {
    let mut console = match Console::open() {
        Ok(console) => console,
        Err(error) => panic!("{error}"),
    };
    console.write(b"hello: virtio console\n");
    loop {
        let mut bytes = console.read();
        bytes.make_ascii_uppercase();
        console.write(&bytes);
        console.wait(None);
    }
}

/// Sends back what arrives over vsock, in upper case: on connections to port `vsock=`, and on
/// one to the host's port `vsock-connect=`, which begins with a greeting.
fn echo_vsock() -> ! {
    let mut vsock = match Vsock::open() {
        Ok(vsock) => vsock,
        Err(error) => panic!("{error}"),
    };
    if let Some(port) = port_of("vsock") {
        vsock.listen(port);
    }
    let greeted = port_of("vsock-connect").and_then(|port| vsock.connect(port));
    let mut pending = Pending::default();
    loop {
        while let Some(event) = vsock.poll() {
            match event {
                Event::Open(stream) if Some(stream) == greeted => {
                    pending.push(stream, b"hello: vsock\n");
                }
                Event::Data(stream, mut bytes) => {
                    bytes.make_ascii_uppercase();
                    pending.push(stream, &bytes);
                }
                Event::Closed(stream) => pending.forget(stream),
                Event::Open(_) | Event::Room(_) => {}
            }
        }
        pending.send(&mut vsock);
        vsock.kick();
        vsock.wait(None);
    }
}

fn port_of(key: &str) -> Option<u32> {
    args().value(key).map(|_| args().get(key, 0))
}

/// What is still to be sent, by connection.
#[derive(Default)]
struct Pending(Vec<(Stream, Vec<u8>)>);

impl Pending {
    fn push(&mut self, stream: Stream, bytes: &[u8]) {
        match self.0.iter_mut().find(|(other, _)| *other == stream) {
            Some((_, waiting)) => waiting.extend(bytes),
            None => self.0.push((stream, bytes.to_vec())),
        }
    }

    fn forget(&mut self, stream: Stream) {
        self.0.retain(|(other, _)| *other != stream);
    }

    fn send(&mut self, vsock: &mut Vsock) {
        for (stream, waiting) in &mut self.0 {
            let sent = vsock.send(*stream, waiting);
            waiting.drain(..sent);
        }
        self.0.retain(|(_, waiting)| !waiting.is_empty());
    }
}
