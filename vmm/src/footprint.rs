//! Memory of the monitor itself: code that only its start needed is given back.
//!
//! The kernel maps a program's file in pieces of 16 pages around each that is touched, so parsing flags and files,
//! opening resources and setting up KVM leave most of the program mapped: 5 MiB of 9. A running guest needs a fraction of
//! that. What is given back stays in the page cache while the host has room, and comes back when it is used again.
//!
//! Cost: one call per segment, some 100 us in the thread that calls, and one minor fault (0.5-1 us) per piece that is
//! used again, each once.

#![allow(unsafe_code)]
// UNSAFETY: the loader tells of the program's segments through a callback with raw pointers, and the kernel is
// asked to drop pages of some of them: only of those that are mapped from the file and can never be written,
// so that what is dropped is read from the file again.

use std::ffi::{c_int, c_void};

use rustix::mm::{Advice, madvise};

/// Segments of a program that are considered, at most; linkers make two to four.
const SEGMENTS_MAX: usize = 16;

/// Start and length of a segment in memory.
type Segment = (usize, usize);

/// Gives the pages of the program's code and constants back to the kernel, which brings those back that are used again.
///
/// Call it when the guest runs. It cannot fail: a segment that the kernel keeps stays as it is.
pub fn release_program() {
    let page = rustix::param::page_size();
    for (start, len) in read_only_segments() {
        let end = (start + len) / page * page;
        let start = start.next_multiple_of(page);
        if start < end {
            // SAFETY: the pages are a private mapping of the program's file that no one may write, so they hold
            // what the file holds, and are read from it again when touched.
            let _ = unsafe { madvise(start as *mut c_void, end - start, Advice::LinuxDontNeed) };
        }
    }
}

/// Segments of the program that the loader maps without the right to write, in memory.
///
/// Those that it protects after relocation are writable segments in the file, and are not among them.
fn read_only_segments() -> Vec<Segment> {
    let mut segments = Vec::with_capacity(SEGMENTS_MAX);
    // SAFETY: the callback gets `segments` back as it is, and nothing else uses it meanwhile.
    unsafe { libc::dl_iterate_phdr(Some(first_object), (&raw mut segments).cast()) };
    segments
}

/// Collects from the first object, which is the program itself, and stops there.
unsafe extern "C" fn first_object(
    info: *mut libc::dl_phdr_info,
    _size: usize,
    segments: *mut c_void,
) -> c_int {
    // SAFETY: `read_only_segments` passes its vector, and the loader a description that is valid for the call.
    let (info, segments) = unsafe { (&*info, &mut *segments.cast::<Vec<Segment>>()) };
    // SAFETY: the loader's table has as many headers as it says.
    let headers = unsafe { std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()) };
    segments.extend(
        headers
            .iter()
            .filter(|h| h.p_type == libc::PT_LOAD && h.p_flags & libc::PF_W == 0)
            .map(|h| ((info.dlpi_addr + h.p_vaddr) as usize, h.p_memsz as usize))
            .take(SEGMENTS_MAX),
    );
    1
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Resident KiB of the mapping that holds `address`.
    fn resident_kib(address: usize) -> u64 {
        let smaps = std::fs::read_to_string("/proc/self/smaps").unwrap();
        let mut inside = false;
        for line in smaps.lines() {
            let first = line.split_whitespace().next().unwrap();
            if let Some((start, end)) = first.split_once('-') {
                let at = |text| usize::from_str_radix(text, 16).unwrap();
                inside = (at(start)..at(end)).contains(&address);
            } else if inside && first == "Rss:" {
                return line.split_whitespace().nth(1).unwrap().parse().unwrap();
            }
        }
        panic!("no mapping holds {address:#x}")
    }

    #[test]
    fn code_is_given_back_and_runs_on() {
        let code = resident_kib as fn(usize) -> u64 as usize;
        let segments = read_only_segments();
        assert!(
            segments
                .iter()
                .any(|&(start, len)| (start..start + len).contains(&code)),
            "{segments:x?} do not hold this test's code"
        );
        // All of it is there once it was read.
        let sum: usize = segments
            .iter()
            .flat_map(|&(start, len)| (start..start + len).step_by(4096))
            // SAFETY: the loader mapped the segment to be read.
            .map(|at| usize::from(unsafe { *(at as *const u8) }))
            .sum();
        assert!(sum > 0);
        let before = resident_kib(code);
        release_program();
        let after = resident_kib(code);
        assert!(after < before / 2, "{before} KiB before, {after} after");
    }
}
