//! The volume: format it or continue with it, and know what each block must hold.

use alloc::boxed::Box;
use alloc::vec::Vec;

use disk_format::floors::Floors;
use disk_format::layout::Layout;
use disk_format::superblock::{PLACES, Superblock};
use disk_format::{BLOCK_BYTES, data};
use rt::println;
use rt::virtio::blk::{Blk, Block, Completion, Operation};

use crate::pipeline::{self, Next, Request, Work};
use crate::report::Report;

/// What is known about a data block.
#[derive(Clone, Copy)]
pub(crate) struct Expected {
    /// Its generation, or the least that it may have.
    pub(crate) generation: u64,
    /// Whether it has exactly this generation.
    pub(crate) exact: bool,
}

/// A volume in use.
pub(crate) struct Volume {
    pub(crate) superblock: Superblock,
    pub(crate) layout: Layout,
    pub(crate) expected: Vec<Expected>,
    floors: Floors,
}

impl Volume {
    /// Continues with the volume on the disk, or formats the disk if it has another one.
    pub(crate) fn open(
        device: &mut Blk,
        layout: Layout,
        seed: u64,
        depth: usize,
        report: &mut Report,
    ) -> Self {
        let places: Vec<_> = (0..PLACES)
            .map(|place| pipeline::read(device, place))
            .collect();
        match Superblock::newest(&places) {
            Some(found) if found.volume == seed && found.blocks == layout.blocks() => {
                Self::continue_with(device, layout, found, report)
            }
            _ => Self::format(device, layout, seed, depth),
        }
    }

    fn continue_with(
        device: &mut Blk,
        layout: Layout,
        found: Superblock,
        report: &mut Report,
    ) -> Self {
        let superblock = Superblock {
            epoch: found.epoch + 1,
            ..found
        };
        let mut floors = Floors::new(found.volume, found.blocks, 0);
        for index in 0..layout.tables() {
            let table = pipeline::read(device, layout.table(index));
            if let Err(flaw) = floors.load(index, &table) {
                report.flaw("CORRUPT", format_args!("table {index}: {flaw}"));
            }
        }
        let known = |number| Expected {
            generation: floors.get(number),
            exact: false,
        };
        let expected = (0..found.blocks).map(known).collect();
        start_epoch(device, superblock);
        println!(
            "disk: continued epoch={} errors={}",
            superblock.epoch,
            report.errors()
        );
        Self {
            superblock,
            layout,
            expected,
            floors,
        }
    }

    /// Writes every data block once; the superblock comes last, so that an interrupted
    /// format is begun again.
    fn format(device: &mut Blk, layout: Layout, seed: u64, depth: usize) -> Self {
        let superblock = Superblock {
            volume: seed,
            blocks: layout.blocks(),
            epoch: 1,
        };
        let generation = superblock.first_generation();
        for place in 0..PLACES {
            require(pipeline::write(device, place, &[0; BLOCK_BYTES]));
        }
        require(pipeline::flush(device));
        let mut fill = Fill {
            layout,
            seed,
            generation,
            next: 0,
            free: Vec::new(),
        };
        pipeline::run(device, depth, &mut fill);
        let mut floors = Floors::new(seed, layout.blocks(), generation);
        write_floors(device, layout, &mut floors);
        require(pipeline::flush(device));
        start_epoch(device, superblock);
        println!("disk: formatted blocks={}", layout.blocks());
        let expected = alloc::vec![Expected { generation, exact: true }; layout.blocks() as usize];
        Self {
            superblock,
            layout,
            expected,
            floors,
        }
    }

    /// Reads every data block and compares it with what must be there.
    pub(crate) fn verify(&mut self, device: &mut Blk, depth: usize, report: &mut Report) {
        let before = report.errors();
        pipeline::run(
            device,
            depth,
            &mut Scan {
                volume: self,
                report,
                next: 0,
                free: Vec::new(),
            },
        );
        let errors = report.errors() - before;
        println!(
            "disk: verified blocks={} errors={errors}",
            self.layout.blocks()
        );
    }

    /// Compares a block that was read with what is known, and learns from it. Returns its
    /// generation, 0 if it has none.
    pub(crate) fn check(&mut self, number: u64, block: &Block, report: &mut Report) -> u64 {
        let expected = &mut self.expected[number as usize];
        let Expected {
            generation: known,
            exact,
        } = *expected;
        match data::read(&block.0, self.superblock.volume, number) {
            Err(flaw) => {
                report.flaw("CORRUPT", format_args!("block {number}: {flaw}"));
                0
            }
            Ok(found) => {
                if found < known || exact && found != known {
                    let bound = if exact { "exactly" } else { "at least" };
                    report.flaw(
                        "CORRUPT",
                        format_args!(
                            "block {number}: generation {found:#x}, not {bound} {known:#x}"
                        ),
                    );
                }
                *expected = Expected {
                    generation: found,
                    exact: true,
                };
                found
            }
        }
    }

    /// Makes the given writes (block, generation) count: they were completed before.
    pub(crate) fn commit(&mut self, device: &mut Blk, writes: &mut Vec<(u64, u64)>) {
        require(pipeline::flush(device));
        for (number, generation) in writes.drain(..) {
            self.floors.raise(number, generation);
        }
        write_floors(device, self.layout, &mut self.floors);
    }
}

/// The volume's own blocks must be written, or nothing that follows means anything.
fn require(worked: bool) {
    assert!(
        worked,
        "The disk refuses to write or to flush the volume's own blocks."
    );
}

fn start_epoch(device: &mut Blk, superblock: Superblock) {
    require(pipeline::write(
        device,
        superblock.place(),
        &superblock.to_bytes(),
    ));
    require(pipeline::flush(device));
}

fn write_floors(device: &mut Blk, layout: Layout, floors: &mut Floors) {
    while let Some((index, table)) = floors.take_changed() {
        require(pipeline::write(device, layout.table(index), &table));
    }
}

/// Writes all data blocks.
struct Fill {
    layout: Layout,
    seed: u64,
    generation: u64,
    next: u64,
    free: Vec<Box<[Block]>>,
}

impl Work for Fill {
    fn next(&mut self) -> Next {
        if self.next == self.layout.blocks() {
            return Next::Done;
        }
        let number = self.next;
        self.next += 1;
        let mut buffer = self.free.pop().unwrap_or_else(pipeline::new_buffer);
        data::write(&mut buffer[0].0, self.seed, number, self.generation);
        let place = self.layout.data(number);
        Next::Submit(Request {
            operation: Operation::Write,
            place,
            buffer,
            tag: number,
        })
    }

    fn completed(&mut self, completion: Completion) {
        require(completion.ok);
        self.free.push(completion.buffer);
    }
}

/// Reads all data blocks.
struct Scan<'a> {
    volume: &'a mut Volume,
    report: &'a mut Report,
    next: u64,
    free: Vec<Box<[Block]>>,
}

impl Work for Scan<'_> {
    fn next(&mut self) -> Next {
        if self.next == self.volume.layout.blocks() {
            return Next::Done;
        }
        let number = self.next;
        self.next += 1;
        let buffer = self.free.pop().unwrap_or_else(pipeline::new_buffer);
        let place = self.volume.layout.data(number);
        Next::Submit(Request {
            operation: Operation::Read,
            place,
            buffer,
            tag: number,
        })
    }

    fn completed(&mut self, completion: Completion) {
        let number = completion.tag;
        if completion.ok {
            self.volume
                .check(number, &completion.buffer[0], self.report);
        } else {
            self.report
                .flaw("FAILED", format_args!("read of block {number}"));
        }
        self.free.push(completion.buffer);
    }
}
