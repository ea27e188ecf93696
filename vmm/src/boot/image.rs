//! Reading image files: bounded, at offsets, and straight into guest memory.

use std::fs::File;
use std::io::{self, Seek, SeekFrom};
use std::os::unix::fs::FileExt;

use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use super::BootError;
use super::layout::Span;

/// Bytes at the start of a kernel image that tell its format: up to the end of a bzImage's setup
/// header, which is the longest.
pub(super) const HEAD_LEN: usize = 0x290;

/// An image file being loaded.
pub(super) struct Image<'a> {
    file: &'a mut File,
    what: &'static str,
    length: u64,
}

impl<'a> Image<'a> {
    /// Takes a file; `what` names it in errors.
    pub(super) fn new(file: &'a mut File, what: &'static str) -> Result<Self, BootError> {
        let meta = file
            .metadata()
            .map_err(|source| BootError::Read { what, source })?;
        if !meta.is_file() {
            return Err(BootError::NotAFile { what });
        }
        Ok(Self {
            file,
            what,
            length: meta.len(),
        })
    }

    /// Bytes in the file when it was opened.
    pub(super) fn length(&self) -> u64 {
        self.length
    }

    /// The first [`HEAD_LEN`] bytes, or fewer when the file is shorter.
    pub(super) fn head(&self) -> Result<Vec<u8>, BootError> {
        let length = self.length.min(HEAD_LEN as u64) as usize;
        self.bytes(0, length)
    }

    /// `length` bytes from `offset`; the caller has bounded `length`.
    pub(super) fn bytes(&self, offset: u64, length: usize) -> Result<Vec<u8>, BootError> {
        let mut buffer = vec![0; length];
        self.file
            .read_exact_at(&mut buffer, offset)
            .map_err(|e| self.read_error(e, offset, length as u64))?;
        Ok(buffer)
    }

    /// Checks that `part` of the image, named `what`, lies in the file.
    pub(super) fn check_contains(
        &self,
        what: &'static str,
        offset: u64,
        length: u64,
    ) -> Result<(), BootError> {
        let end = offset.saturating_add(length);
        if end > self.length {
            return Err(BootError::KernelTruncated {
                what,
                start: offset,
                end,
                length: self.length,
            });
        }
        Ok(())
    }

    /// Reads `length` bytes from `offset` into guest memory at `address`, without a copy between.
    /// The caller has checked that they fit.
    pub(super) fn load<M: GuestMemoryBackend>(
        &mut self,
        mem: &M,
        offset: u64,
        address: u64,
        length: u64,
    ) -> Result<(), BootError> {
        let read_error = |e| self.read_error(e, offset, length);
        (&*self.file)
            .seek(SeekFrom::Start(offset))
            .map_err(read_error)?;
        let count =
            usize::try_from(length).map_err(|_| read_error(io::ErrorKind::FileTooLarge.into()))?;
        mem.read_exact_volatile_from(GuestAddress(address), self.file, count)
            .map_err(|e| {
                self.memory_error(
                    e,
                    offset,
                    Span {
                        start: address,
                        end: address + length,
                    },
                )
            })
    }

    fn read_error(&self, error: io::Error, offset: u64, expected: u64) -> BootError {
        if error.kind() == io::ErrorKind::UnexpectedEof {
            return BootError::Shrunk {
                what: self.what,
                offset,
                expected,
            };
        }
        BootError::Read {
            what: self.what,
            source: error,
        }
    }

    fn memory_error(
        &self,
        error: vm_memory::GuestMemoryError,
        offset: u64,
        wanted: Span,
    ) -> BootError {
        match error {
            vm_memory::GuestMemoryError::IOError(e) => self.read_error(e, offset, wanted.len()),
            vm_memory::GuestMemoryError::PartialBuffer { .. } => BootError::Shrunk {
                what: self.what,
                offset,
                expected: wanted.len(),
            },
            _ => BootError::NoRoom {
                wanted,
                what: self.what,
            },
        }
    }
}

/// Formats of kernel images.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// Executable and Linkable Format.
    Elf,
    /// Compressed Linux kernel with a setup header.
    BzImage,
}

/// Tells the format of a kernel image from its first bytes.
pub(super) fn detect(head: &[u8]) -> Result<Format, BootError> {
    if head.starts_with(b"\x7fELF") {
        return Ok(Format::Elf);
    }
    if head.get(0x1fe..0x200) == Some(&[0x55, 0xaa]) && head.get(0x202..0x206) == Some(b"HdrS") {
        return Ok(Format::BzImage);
    }
    Err(BootError::NotAKernel {
        found: describe(head),
    })
}

fn describe(head: &[u8]) -> String {
    const KNOWN: [(&[u8], &str); 9] = [
        (b"\x1f\x8b", "is compressed with gzip (unpack it first)"),
        (
            b"\x28\xb5\x2f\xfd",
            "is compressed with zstd (unpack it first)",
        ),
        (b"\xfd7zXZ\x00", "is compressed with xz (unpack it first)"),
        (
            b"\x04\x22\x4d\x18",
            "is compressed with lz4 (unpack it first)",
        ),
        (
            b"\x02\x21\x4c\x18",
            "is compressed with lz4 (unpack it first)",
        ),
        (b"070701", "is a cpio archive, as initrds are"),
        (b"!<arch>", "is an archive, such as a Debian package"),
        (b"MZ", "is a PE executable without a Linux setup header"),
        (b"#!", "is a script"),
    ];
    if head.is_empty() {
        return "is empty".into();
    }
    for (magic, text) in KNOWN {
        if head.starts_with(magic) {
            return text.into();
        }
    }
    let bytes: Vec<String> = head.iter().take(8).map(|b| format!("{b:02x}")).collect();
    format!("begins with {}", bytes.join(" "))
}

/// Reads a little-endian number at `offset` of a header; zero beyond its end, so that callers check
/// lengths once.
pub(super) fn number<const N: usize>(bytes: &[u8], offset: usize) -> u64 {
    const { assert!(N <= 8) };
    let mut le = [0; 8];
    if let Some(field) = bytes.get(offset..offset.saturating_add(N)) {
        le[..N].copy_from_slice(field);
    }
    u64::from_le_bytes(le)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_no_kernel_is_named() {
        for (head, text) in [
            (&b""[..], "is empty"),
            (b"\x1f\x8b\x08", "gzip"),
            (b"070701", "cpio"),
            (b"hello", "begins with 68 65 6c 6c 6f"),
        ] {
            let err = detect(head).unwrap_err().to_string();
            assert!(err.contains(text), "{err}");
            assert!(err.contains("bzImage"), "{err}");
        }
    }

    #[test]
    fn numbers_are_little_endian_and_bounded() {
        assert_eq!(number::<4>(&[1, 2, 3, 4, 5], 1), 0x0504_0302);
        assert_eq!(number::<8>(&[1, 2], 0), 0);
        assert_eq!(number::<1>(&[], usize::MAX), 0);
    }

    #[test]
    fn a_directory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let mut file = File::open(dir.path()).unwrap();
        let err = Image::new(&mut file, "initrd").err().unwrap();
        assert_eq!(
            err.to_string(),
            "the initrd is not a regular file, and only regular files can be loaded"
        );
    }
}
