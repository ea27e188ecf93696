//! Guest that writes and verifies random blocks of a disk, can be killed at any moment, and
//! finds out at its next start whether the disk kept its promises.
#![no_std]
#![no_main]

extern crate alloc;

mod pipeline;
mod report;
mod volume;
mod workload;

use disk_format::layout::Layout;
use rt::virtio::blk::{BLOCK_BYTES, Blk, SECTOR_BYTES};
use rt::{args, clock, println};

use report::Report;
use volume::Volume;
use workload::Settings;

rt::entry!(main);

fn main() {
    println!("disk: start");
    let settings = Settings::from_command_line();
    let mut device = open();
    let layout = layout_for(&device);
    let depth = settings.depth.min(device.depth());
    let mut report = Report::new(args().flag("bench"));
    let mut volume = Volume::open(&mut device, layout, settings.seed, depth, &mut report);
    if args().flag("verify") {
        volume.verify(&mut device, depth, &mut report);
    }
    println!("disk: ready depth={depth} blocks={}", layout.blocks());
    workload::run(&mut device, &mut volume, &settings, depth, &mut report);
    report.done();
    while args().flag("stay") {
        clock::wait_until(None);
    }
}

fn open() -> Blk {
    match Blk::open(args().get("disk", 0)) {
        Ok(device) if device.is_read_only() => panic!("The disk is read-only."),
        Ok(device) => device,
        Err(error) => panic!("{error}"),
    }
}

fn layout_for(device: &Blk) -> Layout {
    let disk_blocks = device.sectors() * SECTOR_BYTES / BLOCK_BYTES as u64;
    match Layout::new(args().get("blocks", 4096), disk_blocks) {
        Ok(layout) => layout,
        Err(error) => panic!("{error}"),
    }
}
