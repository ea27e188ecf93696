//! The random operations.
//!
//! They are started in the plan's order, and none is started on a block that another one is
//! under way on, so what each of them sees does not depend on how fast the disk is.

use alloc::boxed::Box;
use alloc::vec::Vec;

use disk_format::data;
use disk_format::plan::{Plan, Step, sum_term};
use rt::args;
use rt::virtio::blk::{Blk, Block, Completion, Operation};

use crate::pipeline::{self, Next, Request, Work};
use crate::report::Report;
use crate::volume::{Expected, Volume};

/// Most requests in flight that may be asked for.
const DEPTH_MAX: usize = 128;

/// What the command line asks for.
pub(crate) struct Settings {
    pub(crate) seed: u64,
    pub(crate) depth: usize,
    /// Operations to do, 0 for no end.
    operations: u64,
    write_percent: u64,
    /// Writes between two flushes, 0 for none.
    flush: u64,
    /// Operations between two lines.
    report: u64,
}

impl Settings {
    pub(crate) fn from_command_line() -> Self {
        Self {
            seed: args().get("seed", 1),
            depth: args().get("depth", 8usize).clamp(1, DEPTH_MAX),
            operations: args().get("ops", 10_000),
            write_percent: args().get("write", 50u64).min(100),
            flush: args().get("flush", 64),
            report: args().get("report", 10_000u64).max(1),
        }
    }
}

/// Does the operations, in batches that end where a flush or a line is due.
pub(crate) fn run(
    device: &mut Blk,
    volume: &mut Volume,
    settings: &Settings,
    depth: usize,
    report: &mut Report,
) {
    let superblock = volume.superblock;
    let mut load = Load {
        plan: Plan::new(
            settings.seed,
            superblock.epoch,
            superblock.blocks,
            settings.write_percent,
        ),
        planned: None,
        started: 0,
        batch_end: 0,
        generation: superblock.first_generation(),
        busy: alloc::vec![false; superblock.blocks as usize],
        under_way: Vec::new(),
        free_tags: Vec::new(),
        writes_under_way: 0,
        unflushed: Vec::new(),
        flush: settings.flush as usize,
        free: Vec::new(),
        volume,
        report,
    };
    load.report.begin();
    while settings.operations == 0 || load.started < settings.operations {
        load.batch_end = next_multiple_after(load.started, settings.report);
        if settings.operations != 0 {
            load.batch_end = load.batch_end.min(settings.operations);
        }
        pipeline::run(device, depth, &mut load);
        if load.is_flush_due() {
            load.volume.commit(device, &mut load.unflushed);
        }
        if load.started.is_multiple_of(settings.report) {
            load.report.progress();
        }
    }
    load.volume.commit(device, &mut load.unflushed);
}

fn next_multiple_after(count: u64, step: u64) -> u64 {
    (count / step + 1).saturating_mul(step)
}

/// An operation under way.
#[derive(Clone, Copy)]
struct Started {
    index: u64,
    number: u64,
    /// Generation that is written, `None` for a read.
    writes: Option<u64>,
}

struct Load<'a> {
    volume: &'a mut Volume,
    report: &'a mut Report,
    plan: Plan,
    /// The next step, if it was looked at and could not be started.
    planned: Option<Step>,
    started: u64,
    batch_end: u64,
    generation: u64,
    /// Blocks that an operation is under way on.
    busy: Vec<bool>,
    /// Operations under way, by tag; `None` is a free tag.
    under_way: Vec<Option<Started>>,
    free_tags: Vec<usize>,
    writes_under_way: usize,
    /// Writes that were completed since the last flush.
    unflushed: Vec<(u64, u64)>,
    /// Writes between two flushes, 0 for none.
    flush: usize,
    free: Vec<Box<[Block]>>,
}

impl Load<'_> {
    /// Whether enough writes were completed, or are under way, for a flush.
    fn is_flush_due(&self) -> bool {
        self.flush != 0 && self.unflushed.len() + self.writes_under_way >= self.flush
    }

    fn start(&mut self, step: Step) -> Request {
        let Step { number, write } = step;
        let mut buffer = self.free.pop().unwrap_or_else(pipeline::new_buffer);
        let writes = write.then(|| {
            self.generation += 1;
            self.generation
        });
        if let Some(generation) = writes {
            data::write(
                &mut buffer[0].0,
                self.volume.superblock.volume,
                number,
                generation,
            );
        }
        self.busy[number as usize] = true;
        let tag = self.enter(Started {
            index: self.started,
            number,
            writes,
        });
        self.started += 1;
        let operation = if write {
            Operation::Write
        } else {
            Operation::Read
        };
        Request {
            operation,
            place: self.volume.layout.data(number),
            buffer,
            tag,
        }
    }

    /// Notes an operation, and returns its tag.
    fn enter(&mut self, operation: Started) -> u64 {
        self.writes_under_way += usize::from(operation.writes.is_some());
        let tag = self.free_tags.pop().unwrap_or_else(|| {
            self.under_way.push(None);
            self.under_way.len() - 1
        });
        self.under_way[tag] = Some(operation);
        tag as u64
    }

    /// Forgets the operation with this tag, and returns it.
    fn leave(&mut self, tag: u64) -> Started {
        let Some(operation) = self.under_way[tag as usize].take() else {
            panic!("The disk completed request {tag}, not in flight.");
        };
        self.writes_under_way -= usize::from(operation.writes.is_some());
        self.free_tags.push(tag as usize);
        operation
    }

    /// Generation that a completed operation saw or made, 0 if it failed.
    fn outcome(&mut self, operation: Started, completion: &Completion) -> u64 {
        let Started { number, writes, .. } = operation;
        let expected = &mut self.volume.expected[number as usize];
        match writes {
            _ if !completion.ok => {
                let kind = if writes.is_some() { "write" } else { "read" };
                expected.exact = false;
                self.report
                    .flaw("FAILED", format_args!("{kind} of block {number}"));
                0
            }
            None => self
                .volume
                .check(number, &completion.buffer[0], self.report),
            Some(generation) => {
                *expected = Expected {
                    generation,
                    exact: true,
                };
                // Without flushes there are no floors to raise.
                if self.flush != 0 {
                    self.unflushed.push((number, generation));
                }
                generation
            }
        }
    }
}

impl Work for Load<'_> {
    fn next(&mut self) -> Next {
        if self.started == self.batch_end || self.is_flush_due() {
            return Next::Done;
        }
        let step = self.planned.take().unwrap_or_else(|| self.plan.step());
        if self.busy[step.number as usize] {
            self.planned = Some(step);
            return Next::Wait;
        }
        Next::Submit(self.start(step))
    }

    fn completed(&mut self, completion: Completion) {
        let operation = self.leave(completion.tag);
        let generation = self.outcome(operation, &completion);
        self.busy[operation.number as usize] = false;
        self.report.operations += 1;
        let term = sum_term(operation.index, operation.number, generation);
        self.report.sum = self.report.sum.wrapping_add(term);
        self.free.push(completion.buffer);
    }
}
