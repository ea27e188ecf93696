//! Keeps a number of requests in flight until some work is done.

use alloc::boxed::Box;

use disk_format::Bytes;
use rt::virtio::blk::{BLOCK_BYTES, Blk, Block, Completion, Operation, SECTOR_BYTES};

/// A request for one block.
pub(crate) struct Request {
    pub(crate) operation: Operation,
    /// Block of the disk.
    pub(crate) place: u64,
    pub(crate) buffer: Box<[Block]>,
    /// What the work knows the request by.
    pub(crate) tag: u64,
}

/// What a work wants next.
pub(crate) enum Next {
    /// Start this.
    Submit(Request),
    /// Wait for one of the requests in flight.
    Wait,
    /// Finish what is in flight and return.
    Done,
}

/// Something that consists of requests.
pub(crate) trait Work {
    /// The next request.
    fn next(&mut self) -> Next;
    /// Takes a request back.
    fn completed(&mut self, completion: Completion);
}

/// Does a work with up to `depth` requests in flight; nothing is in flight afterwards.
pub(crate) fn run(device: &mut Blk, depth: usize, work: &mut impl Work) {
    let mut done = false;
    loop {
        while !done && device.in_flight() < depth {
            match work.next() {
                Next::Submit(request) => submit(device, request),
                Next::Wait => break,
                Next::Done => done = true,
            }
        }
        device.kick();
        if done && device.in_flight() == 0 {
            return;
        }
        complete_some(device, work);
    }
}

fn submit(device: &mut Blk, request: Request) {
    let Request {
        operation,
        place,
        buffer,
        tag,
    } = request;
    let sector = place * (BLOCK_BYTES as u64 / SECTOR_BYTES);
    assert!(
        device.submit(operation, sector, buffer, tag).is_ok(),
        "The queue is full below its depth."
    );
}

/// Takes back what is complete, and at least one.
fn complete_some(device: &mut Blk, work: &mut impl Work) {
    assert!(
        device.in_flight() > 0,
        "Nothing is in flight that could be waited for."
    );
    let mut any = false;
    while !any {
        while let Some(completion) = device.poll() {
            work.completed(completion);
            any = true;
        }
        if !any {
            device.wait(None);
        }
    }
}

/// One request, from start to end. Returns its buffer, or `None` if it failed.
pub(crate) fn single(device: &mut Blk, request: Request) -> Option<Box<[Block]>> {
    let mut work = Single {
        request: Some(request),
        result: None,
    };
    run(device, 1, &mut work);
    work.result
}

struct Single {
    request: Option<Request>,
    result: Option<Box<[Block]>>,
}

impl Work for Single {
    fn next(&mut self) -> Next {
        self.request.take().map_or(Next::Done, Next::Submit)
    }

    fn completed(&mut self, completion: Completion) {
        self.result = completion.ok.then_some(completion.buffer);
    }
}

/// Makes all completed writes durable. Returns whether the device says so.
pub(crate) fn flush(device: &mut Blk) -> bool {
    if !device.has_flush() {
        return true;
    }
    let operation = Operation::Flush;
    single(
        device,
        Request {
            operation,
            place: 0,
            buffer: Box::default(),
            tag: 0,
        },
    )
    .is_some()
}

/// Writes one block. Returns whether it worked.
pub(crate) fn write(device: &mut Blk, place: u64, bytes: &Bytes) -> bool {
    let buffer: Box<[Block]> = Box::new([Block(*bytes)]);
    single(
        device,
        Request {
            operation: Operation::Write,
            place,
            buffer,
            tag: 0,
        },
    )
    .is_some()
}

/// Reads one block; zeroes if it fails, which no checksum accepts.
pub(crate) fn read(device: &mut Blk, place: u64) -> Bytes {
    let buffer = new_buffer();
    let read = single(
        device,
        Request {
            operation: Operation::Read,
            place,
            buffer,
            tag: 0,
        },
    );
    read.map_or([0; BLOCK_BYTES], |buffer| buffer[0].0)
}

/// Memory for a block.
pub(crate) fn new_buffer() -> Box<[Block]> {
    Box::new([Block([0; BLOCK_BYTES])])
}
