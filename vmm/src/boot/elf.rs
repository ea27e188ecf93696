//! ELF kernels: 64-bit x86 executables, with or without the note that names a PVH entry.
//!
//! Everything is checked before a byte is loaded: headers and segments lie in the file, segments lie
//! in RAM above 1 MiB and do not overlap, and the entry lies in one of them. The parts of segments
//! beyond their bytes in the file are left as they are, so memory has to be zero.

use vm_memory::GuestMemoryBackend;

use super::BootError;
use super::image::{Image, number};
use super::layout::{KERNEL_START_MIN, Span};

const EHDR_LEN: usize = 64;
const PHDR_LEN: usize = 56;
/// Most program headers of a kernel; Linux has 5.
const PHDRS_MAX: u64 = 64;
/// Longest note segment that is searched for the PVH entry.
const NOTES_LEN_MAX: u64 = 64 << 10;
const PT_LOAD: u64 = 1;
const PT_NOTE: u64 = 4;
/// Note type of Xen's `XEN_ELFNOTE_PHYS32_ENTRY` (xen/include/public/elfnote.h).
const NOTE_PHYS32_ENTRY: u64 = 18;

/// An ELF kernel that passed the checks that need no guest memory.
#[derive(Debug)]
pub(super) struct ElfKernel {
    segments: Vec<Segment>,
    /// Guest-physical address of the 64-bit entry.
    entry64: u64,
    /// Guest-physical address of the PVH entry, if there is one.
    entry_pvh: Option<u32>,
}

#[derive(Clone, Copy, Debug)]
struct Segment {
    offset: u64,
    file_length: u64,
    memory: Span,
}

impl ElfKernel {
    /// Reads and checks the headers.
    pub(super) fn parse(image: &Image<'_>, head: &[u8]) -> Result<Self, BootError> {
        image.check_contains("its ELF header", 0, EHDR_LEN as u64)?;
        check_header(head)?;
        let (segments, notes) = read_program_headers(image, head)?;
        if segments.is_empty() {
            return Err(damaged("the number of loadable segments", 0, "at least 1"));
        }
        check_overlap(&segments)?;
        let mut entry_pvh = None;
        for (offset, length) in notes {
            image.check_contains("its notes", offset, length)?;
            let bytes = image.bytes(offset, length.min(NOTES_LEN_MAX) as usize)?;
            entry_pvh = entry_pvh.or(find_pvh_entry(&bytes)?);
        }
        Ok(Self {
            segments,
            entry64: number::<8>(head, 24),
            entry_pvh,
        })
    }

    /// The 64-bit entry.
    ///
    /// # Errors
    /// When it lies outside the image.
    pub(super) fn entry64(&self) -> Result<u64, BootError> {
        self.check_entry(self.entry64)?;
        Ok(self.entry64)
    }

    /// The PVH entry, if the image has one.
    ///
    /// # Errors
    /// When it lies outside the image.
    pub(super) fn entry_pvh(&self) -> Result<Option<u32>, BootError> {
        if let Some(entry) = self.entry_pvh {
            self.check_entry(entry.into())?;
        }
        Ok(self.entry_pvh)
    }

    /// Loads the segments and returns what they cover.
    pub(super) fn load<M: GuestMemoryBackend>(
        &self,
        image: &mut Image<'_>,
        mem: &M,
        low_ram: Span,
    ) -> Result<Span, BootError> {
        for segment in &self.segments {
            check_in_ram(segment.memory, low_ram)?;
        }
        for segment in &self.segments {
            image.load(
                mem,
                segment.offset,
                segment.memory.start,
                segment.file_length,
            )?;
        }
        let first = self
            .segments
            .iter()
            .map(|s| s.memory.start)
            .min()
            .unwrap_or(0);
        let end = self
            .segments
            .iter()
            .map(|s| s.memory.end)
            .max()
            .unwrap_or(0);
        Ok(Span { start: first, end })
    }

    fn check_entry(&self, entry: u64) -> Result<(), BootError> {
        let covered = |s: &Segment| s.memory.start <= entry && entry < s.memory.end;
        if !self.segments.iter().any(covered) {
            return Err(BootError::EntryOutsideKernel { entry });
        }
        Ok(())
    }
}

/// Checks that a kernel may lie at `wanted`: in low RAM, which all entry protocols reach, and above
/// what the machine keeps below 1 MiB.
pub(super) fn check_in_ram(wanted: Span, low_ram: Span) -> Result<(), BootError> {
    let allowed = Span {
        start: KERNEL_START_MIN,
        ..low_ram
    };
    if !allowed.contains(wanted) {
        return Err(BootError::KernelOutsideRam { wanted, allowed });
    }
    Ok(())
}

fn damaged(what: &'static str, value: u64, allowed: &'static str) -> BootError {
    BootError::KernelDamaged {
        what,
        value,
        allowed,
    }
}

fn check_header(head: &[u8]) -> Result<(), BootError> {
    let fields: [(&str, u64, &[u64], &str); 5] = [
        ("the ELF class", number::<1>(head, 4), &[2], "2 (64 bits)"),
        (
            "the ELF byte order",
            number::<1>(head, 5),
            &[1],
            "1 (little endian)",
        ),
        (
            "the ELF type",
            number::<2>(head, 16),
            &[2, 3],
            "2 (executable) or 3 (shared)",
        ),
        (
            "the ELF machine",
            number::<2>(head, 18),
            &[62],
            "0x3e (x86-64)",
        ),
        (
            "the size of an ELF program header",
            number::<2>(head, 54),
            &[PHDR_LEN as u64],
            "0x38",
        ),
    ];
    for (what, value, allowed, text) in fields {
        if !allowed.contains(&value) {
            return Err(damaged(what, value, text));
        }
    }
    Ok(())
}

type Notes = Vec<(u64, u64)>;

/// Loadable segments, and offset and length of each note segment.
fn read_program_headers(
    image: &Image<'_>,
    head: &[u8],
) -> Result<(Vec<Segment>, Notes), BootError> {
    let (offset, count) = (number::<8>(head, 32), number::<2>(head, 56));
    if !(1..=PHDRS_MAX).contains(&count) {
        return Err(damaged(
            "the number of ELF program headers",
            count,
            "1 to 0x40",
        ));
    }
    let length = count * PHDR_LEN as u64;
    image.check_contains("its ELF program headers", offset, length)?;
    let (mut segments, mut notes) = (Vec::new(), Vec::new());
    for header in image.bytes(offset, length as usize)?.chunks_exact(PHDR_LEN) {
        match number::<4>(header, 0) {
            PT_LOAD => segments.extend(read_segment(image, header)?),
            PT_NOTE => notes.push((number::<8>(header, 8), number::<8>(header, 32))),
            _ => {}
        }
    }
    Ok((segments, notes))
}

/// A loadable segment, or `None` when it has no bytes.
fn read_segment(image: &Image<'_>, header: &[u8]) -> Result<Option<Segment>, BootError> {
    let (offset, address) = (number::<8>(header, 8), number::<8>(header, 24));
    let (file_length, length) = (number::<8>(header, 32), number::<8>(header, 40));
    if file_length > length {
        return Err(damaged(
            "the size of a segment in the file",
            file_length,
            "at most its size in memory",
        ));
    }
    if length == 0 {
        return Ok(None);
    }
    image.check_contains("an ELF segment", offset, file_length)?;
    let memory = Span::new(address, length).ok_or_else(|| {
        damaged(
            "the address of a segment",
            address,
            "at most 2^64 minus its size",
        )
    })?;
    Ok(Some(Segment {
        offset,
        file_length,
        memory,
    }))
}

fn check_overlap(segments: &[Segment]) -> Result<(), BootError> {
    let mut spans: Vec<Span> = segments.iter().map(|s| s.memory).collect();
    spans.sort_by_key(|s| s.start);
    for pair in spans.windows(2) {
        if pair[0].overlaps(pair[1]) {
            return Err(BootError::SegmentsOverlap {
                first: pair[0],
                second: pair[1],
            });
        }
    }
    Ok(())
}

/// Searches a note segment (ELF gABI: name and descriptor are padded to 4 bytes) for the PVH entry.
fn find_pvh_entry(mut notes: &[u8]) -> Result<Option<u32>, BootError> {
    while notes.len() >= 12 {
        let (name_len, desc_len) = (
            number::<4>(notes, 0) as usize,
            number::<4>(notes, 4) as usize,
        );
        let kind = number::<4>(notes, 8);
        let body = &notes[12..];
        let desc_start = name_len.next_multiple_of(4);
        let Some(after_name) = body.get(desc_start..) else {
            break;
        };
        if kind == NOTE_PHYS32_ENTRY && body[..name_len] == *b"Xen\0" {
            return pvh_entry(after_name, desc_len).map(Some);
        }
        let Some(rest) = after_name.get(desc_len.next_multiple_of(4)..) else {
            break;
        };
        notes = rest;
    }
    Ok(None)
}

fn pvh_entry(desc: &[u8], desc_len: usize) -> Result<u32, BootError> {
    if desc_len < 4 || desc.len() < 4 {
        return Err(damaged(
            "the size of the PVH note",
            desc_len as u64,
            "4 or 8",
        ));
    }
    Ok(number::<4>(desc, 0) as u32)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend((name.len() as u32).to_le_bytes());
        bytes.extend((desc.len() as u32).to_le_bytes());
        bytes.extend(kind.to_le_bytes());
        for part in [name, desc] {
            bytes.extend(part);
            bytes.resize(bytes.len().next_multiple_of(4), 0);
        }
        bytes
    }

    #[test]
    fn pvh_note_is_found_among_others() {
        let mut notes = note(b"GNU\0", 3, &[1; 20]);
        notes.extend(note(b"Linux\0", 18, &[0]));
        notes.extend(note(b"Xen\0", 19, &[0; 12]));
        assert_eq!(find_pvh_entry(&notes).unwrap(), None);
        notes.extend(note(b"Xen\0", 18, &0x0100_0000u64.to_le_bytes()));
        assert_eq!(find_pvh_entry(&notes).unwrap(), Some(0x0100_0000));
    }

    #[test]
    fn short_pvh_note_is_an_error() {
        assert!(find_pvh_entry(&note(b"Xen\0", 18, &[1, 2])).is_err());
    }

    #[test]
    fn notes_with_huge_lengths_end_the_search() {
        let mut notes = note(b"GNU\0", 3, &[]);
        notes[4..8].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(find_pvh_entry(&notes).unwrap(), None);
        notes[0..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert_eq!(find_pvh_entry(&notes).unwrap(), None);
    }
}
