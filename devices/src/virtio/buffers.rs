//! A scattered stretch of guest memory: one side of a request.
#![allow(unsafe_code)]
// UNSAFETY: guest memory is shared with running vCPUs, so it is reached through raw pointers and
// volatile copies, never through references. Every pointer was checked against guest memory when
// it was added, and the memory is kept mapped by the `Arc` beside it.

use std::io;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::ptr;
use std::sync::Arc;

use libc::iovec;
use smallvec::SmallVec;
use vm_memory::bitmap::Bitmap;
use vm_memory::{Address, GuestAddress, GuestMemoryBackend as _, GuestMemoryRegion, VolatileSlice};

use crate::GuestMemory;

/// Segments kept without a heap allocation.
const INLINE_SEGMENTS: usize = 4;

/// Most segments that the host takes in one call (`IOV_MAX`).
pub const IOVECS_MAX: usize = 1024;

/// Segments of a spilling read kept without a heap allocation.
const SPILL_SEGMENTS: usize = 64;

/// Scattered guest memory, in order. Keeps the memory mapped.
#[derive(Clone)]
pub struct Buffers {
    mem: Arc<GuestMemory>,
    segments: SmallVec<[iovec; INLINE_SEGMENTS]>,
    addresses: SmallVec<[GuestAddress; INLINE_SEGMENTS]>,
    len: usize,
}

// SAFETY: the pointers lead into a mapping that every thread of the process may access and that
// `mem` keeps alive; access is by volatile copies or by the host kernel.
unsafe impl Send for Buffers {}

impl Buffers {
    /// No memory yet.
    pub fn new(mem: &Arc<GuestMemory>) -> Self {
        Self {
            mem: Arc::clone(mem),
            segments: SmallVec::new(),
            addresses: SmallVec::new(),
            len: 0,
        }
    }

    /// Appends `len` bytes at `addr`; false if they are not guest memory or the total overflows.
    #[must_use]
    pub fn push(&mut self, addr: GuestAddress, len: usize) -> bool {
        if len == 0 {
            return true;
        }
        let Some(total) = self.len.checked_add(len) else {
            return false;
        };
        let Ok(slice) = self.mem.get_slice(addr, len) else {
            return false;
        };
        let base = slice.ptr_guard_mut().as_ptr();
        self.segments.push(iovec {
            iov_base: base.cast(),
            iov_len: len,
        });
        self.addresses.push(addr);
        self.len = total;
        true
    }

    /// Bytes in all.
    pub fn len(&self) -> usize {
        self.len
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The segments for `readv`, `writev` or io_uring. Valid while `self` lives. Whoever lets the
    /// host write through them calls [`Buffers::mark_written`] afterwards.
    pub fn iovecs(&self) -> &[iovec] {
        &self.segments
    }

    /// Copies out of the guest from `offset` on; returns how many bytes there were.
    pub fn read_at(&self, offset: usize, into: &mut [u8]) -> usize {
        let mut done = 0;
        self.for_each_part(offset, into.len(), |at, len, _| {
            // SAFETY: `at` is `len` bytes of mapped guest memory, `into` has that much room left.
            unsafe { ptr::copy_nonoverlapping(at, into[done..].as_mut_ptr(), len) };
            done += len;
        });
        done
    }

    /// Copies into the guest from `offset` on and marks the pages; returns how many bytes fitted.
    pub fn write_at(&self, offset: usize, from: &[u8]) -> usize {
        let mut done = 0;
        self.for_each_part(offset, from.len(), |at, len, addr| {
            // SAFETY: `at` is `len` bytes of mapped guest memory, `from` has that much left.
            unsafe { ptr::copy_nonoverlapping(from[done..].as_ptr(), at, len) };
            self.mark(addr, len);
            done += len;
        });
        done
    }

    /// The first `len` bytes were written by the host: marks their pages.
    pub fn mark_written(&self, len: usize) {
        self.for_each_part(0, len, |_, len, addr| self.mark(addr, len));
    }

    /// The part from `offset` on, `len` bytes at most.
    #[must_use]
    pub fn slice(&self, offset: usize, len: usize) -> Self {
        let mut part = Self::new(&self.mem);
        self.for_each_part(offset, len, |at, len, addr| {
            part.segments.push(iovec {
                iov_base: at.cast(),
                iov_len: len,
            });
            part.addresses.push(addr);
            part.len += len;
        });
        part
    }

    /// Appends the segments of `other`, which must be of the same guest.
    pub fn append(&mut self, other: &Self) {
        debug_assert!(Arc::ptr_eq(&self.mem, &other.mem), "buffers of two guests");
        self.segments.extend_from_slice(&other.segments);
        self.addresses.extend_from_slice(&other.addresses);
        self.len += other.len;
    }

    /// Drops the first `len` bytes, or everything if there are fewer.
    pub fn advance(&mut self, len: usize) {
        let mut skip = len.min(self.len);
        self.len -= skip;
        let whole = self
            .segments
            .iter()
            .take_while(|s| {
                let inside = s.iov_len <= skip;
                skip -= if inside { s.iov_len } else { 0 };
                inside
            })
            .count();
        self.segments.drain(..whole);
        self.addresses.drain(..whole);
        if let (Some(segment), Some(addr)) = (self.segments.first_mut(), self.addresses.first_mut())
        {
            // SAFETY: `skip` is less than the segment's length.
            segment.iov_base = unsafe { segment.iov_base.cast::<u8>().add(skip) }.cast();
            segment.iov_len -= skip;
            *addr = addr.unchecked_add(skip as u64);
        }
    }

    /// Fills the buffers from `fd` with one `readv` and marks the pages; returns how many bytes.
    /// Only the first [`IOVECS_MAX`] segments take part.
    ///
    /// # Errors
    /// Those of `readv`.
    pub fn read_from(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: the segments are mapped guest memory that `self.mem` keeps alive.
        let read = unsafe { libc::readv(fd.as_raw_fd(), self.segments.as_ptr(), self.iov_count()) };
        let len = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
        self.mark_written(len);
        Ok(len)
    }

    /// Like [`Buffers::read_from`]; what does not fit goes to `spill`.
    ///
    /// # Errors
    /// Those of `readv`.
    pub fn read_from_spilling(&self, fd: BorrowedFd<'_>, spill: &mut [u8]) -> io::Result<usize> {
        let mut iovecs = SmallVec::<[iovec; SPILL_SEGMENTS]>::from_slice(
            &self.segments[..self.segments.len().min(IOVECS_MAX - 1)],
        );
        iovecs.push(iovec {
            iov_base: spill.as_mut_ptr().cast(),
            iov_len: spill.len(),
        });
        // SAFETY: the segments are mapped guest memory that `self.mem` keeps alive, the last one
        // is borrowed for the call.
        let read = unsafe { libc::readv(fd.as_raw_fd(), iovecs.as_ptr(), iovecs.len() as _) };
        let len = usize::try_from(read).map_err(|_| io::Error::last_os_error())?;
        self.mark_written(len);
        Ok(len)
    }

    /// Writes the buffers to `fd` with one `writev`; returns how many bytes it took. Only the
    /// first [`IOVECS_MAX`] segments take part.
    ///
    /// # Errors
    /// Those of `writev`.
    pub fn write_to(&self, fd: BorrowedFd<'_>) -> io::Result<usize> {
        // SAFETY: the segments are mapped guest memory that `self.mem` keeps alive.
        let written =
            unsafe { libc::writev(fd.as_raw_fd(), self.segments.as_ptr(), self.iov_count()) };
        usize::try_from(written).map_err(|_| io::Error::last_os_error())
    }

    fn iov_count(&self) -> libc::c_int {
        self.segments.len().min(IOVECS_MAX) as libc::c_int
    }

    /// A copy of everything.
    pub fn to_vec(&self) -> Vec<u8> {
        let mut copy = vec![0; self.len];
        self.read_at(0, &mut copy);
        copy
    }

    /// Volatile slices of the segments, for crates that work on those.
    pub fn volatile_slices(&self) -> impl Iterator<Item = VolatileSlice<'_, ()>> {
        self.segments.iter().map(|s| {
            // SAFETY: the segment is mapped guest memory that `self.mem` keeps alive.
            unsafe { VolatileSlice::new(s.iov_base.cast(), s.iov_len) }
        })
    }

    fn mark(&self, addr: GuestAddress, len: usize) {
        if let Some(region) = self.mem.find_region(addr) {
            let offset = addr.unchecked_offset_from(region.start_addr());
            region.bitmap().mark_dirty(offset as usize, len);
        }
    }

    /// Calls `each` with (host address, length, guest address) of the stretches of
    /// `offset..offset + len`, as far as they exist.
    fn for_each_part(
        &self,
        offset: usize,
        len: usize,
        mut each: impl FnMut(*mut u8, usize, GuestAddress),
    ) {
        let mut skip = offset;
        let mut left = len;
        for (segment, addr) in self.segments.iter().zip(&self.addresses) {
            if left == 0 {
                return;
            }
            if skip >= segment.iov_len {
                skip -= segment.iov_len;
                continue;
            }
            let part = (segment.iov_len - skip).min(left);
            // SAFETY: `skip` is less than the segment's length.
            let at = unsafe { segment.iov_base.cast::<u8>().add(skip) };
            each(at, part, addr.unchecked_add(skip as u64));
            left -= part;
            skip = 0;
        }
    }
}

impl std::fmt::Debug for Buffers {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Buffers")
            .field("addresses", &self.addresses)
            .field("len", &self.len)
            .finish()
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

    use std::fs::File;
    use std::io::{Read, Seek, Write};
    use std::os::fd::AsFd;

    use proptest::prelude::{Just, Strategy, prop_assert_eq, proptest};
    use vm_memory::Bytes;
    use vm_memory::bitmap::Bitmap;

    use super::*;
    use crate::virtio::testing::memory;

    /// Guest address of the first segment; each has 8 KiB of its own.
    const BASE: u64 = 0x10_0000;

    /// Segments of these lengths, and their content.
    fn scattered(lengths: &[usize]) -> (Buffers, Vec<u8>) {
        let mem = memory();
        let mut buffers = Buffers::new(&mem);
        let mut content = Vec::new();
        for (nth, len) in lengths.iter().enumerate() {
            let addr = GuestAddress(BASE + nth as u64 * 0x2000);
            let bytes: Vec<u8> = (0..*len).map(|i| (i * 31 + nth) as u8).collect();
            mem.write_slice(&bytes, addr).unwrap();
            assert!(buffers.push(addr, *len));
            content.extend(bytes);
        }
        (buffers, content)
    }

    fn lengths() -> impl Strategy<Value = Vec<usize>> {
        proptest::collection::vec(0usize..5000, 0..12)
    }

    fn lengths_and_place() -> impl Strategy<Value = (Vec<usize>, usize)> {
        lengths().prop_flat_map(|l| {
            let total: usize = l.iter().sum();
            (Just(l), 0..total + 10)
        })
    }

    proptest! {
        #[test]
        fn advancing_drops_the_front((lengths, skip) in lengths_and_place()) {
            let (mut buffers, content) = scattered(&lengths);
            buffers.advance(skip);
            let rest = content.get(skip..).unwrap_or_default();
            prop_assert_eq!(buffers.len(), rest.len());
            prop_assert_eq!(buffers.to_vec(), rest);
        }

        #[test]
        fn a_slice_is_the_part_it_names((lengths, at) in lengths_and_place(), len in 0usize..9000) {
            let (buffers, content) = scattered(&lengths);
            let rest = content.get(at..).unwrap_or_default();
            let part = buffers.slice(at, len);
            prop_assert_eq!(part.to_vec(), &rest[..len.min(rest.len())]);
        }

        #[test]
        fn files_are_read_and_written_through_the_segments(lengths in lengths()) {
            let (buffers, content) = scattered(&lengths);
            let mut file = tempfile::tempfile().unwrap();
            prop_assert_eq!(buffers.write_to(file.as_fd()).unwrap(), content.len());
            file.rewind().unwrap();
            let (copy, _) = scattered(&lengths);
            copy.write_at(0, &vec![0; content.len()]);
            prop_assert_eq!(copy.read_from(file.as_fd()).unwrap(), content.len());
            prop_assert_eq!(copy.to_vec(), content);
        }
    }

    fn file_of(bytes: &[u8]) -> File {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        file.rewind().unwrap();
        file
    }

    #[test]
    fn what_does_not_fit_is_spilled() {
        let (buffers, _) = scattered(&[3, 4]);
        let mut spill = [0; 8];
        let read = buffers.read_from_spilling(file_of(b"0123456789").as_fd(), &mut spill);
        assert_eq!(read.unwrap(), 10);
        assert_eq!(buffers.to_vec(), b"0123456");
        assert_eq!(&spill, b"789\0\0\0\0\0");
    }

    #[test]
    fn more_segments_than_the_host_takes_are_read_in_part() {
        let (mut buffers, _) = scattered(&[1]);
        let one = buffers.clone();
        (0..IOVECS_MAX + 10).for_each(|_| buffers.append(&one));
        let file = file_of(&[7; IOVECS_MAX + 100]);
        assert_eq!(buffers.read_from(file.as_fd()).unwrap(), IOVECS_MAX);
        let mut rest = Vec::new();
        (&file).read_to_end(&mut rest).unwrap();
        assert_eq!(rest.len(), 100);
    }

    #[test]
    fn pages_written_by_the_host_are_marked_and_no_others() {
        let mem = memory();
        let mut buffers = Buffers::new(&mem);
        for segment in 0..3 {
            assert!(buffers.push(GuestAddress(BASE + segment * 0x2000), 100));
        }
        let region = mem.find_region(GuestAddress(0)).unwrap();
        buffers.read_from(file_of(&[1; 150]).as_fd()).unwrap();
        let dirty = |segment: u64| region.bitmap().dirty_at((BASE + segment * 0x2000) as usize);
        assert_eq!([dirty(0), dirty(1), dirty(2)], [true, true, false]);
    }
}
