//! The ELF kernel inside a bzImage (Linux' Documentation/arch/x86/boot.rst, protocol 2.08).

use anyhow::{Context, Result, bail};

/// Offset of the number of 512-byte sectors of setup code after the first.
const SETUP_SECTORS: usize = 0x1f1;
/// Offset of the mark "HdrS".
const HEADER_MARK: usize = 0x202;
/// Offset of the payload's offset from the protected-mode code.
const PAYLOAD_OFFSET: usize = 0x248;
/// Offset of the payload's length.
const PAYLOAD_LENGTH: usize = 0x24c;
/// Mark of LZ4's legacy frame.
const LZ4_LEGACY: [u8; 4] = [0x02, 0x21, 0x4c, 0x18];
/// Most bytes that one block of a legacy frame unpacks to.
const LZ4_BLOCK_MAX: usize = 8 << 20;
/// The kernel's build puts the unpacked size behind the packed payload.
const SIZE_TRAILER: usize = 4;

/// Unpacks the kernel. Debian's cloud kernels are packed by LZ4, the only kind understood here.
pub(super) fn unpack(image: &[u8]) -> Result<Vec<u8>> {
    let payload = payload(image)?;
    let Some(mut rest) = payload.strip_prefix(LZ4_LEGACY.as_slice()) else {
        bail!("the kernel is not packed by LZ4, which is the only packing understood");
    };
    rest = &rest[..rest.len().saturating_sub(SIZE_TRAILER)];
    let mut kernel = Vec::new();
    let mut block = vec![0; LZ4_BLOCK_MAX];
    while !rest.is_empty() {
        let length = dword(rest, 0)?;
        let packed = rest
            .get(4..4 + length)
            .context("a packed block is longer than the payload")?;
        let size = lz4_flex::block::decompress_into(packed, &mut block)?;
        kernel.extend_from_slice(&block[..size]);
        rest = &rest[4 + length..];
    }
    if !kernel.starts_with(b"\x7fELF") {
        bail!("the payload is no ELF file");
    }
    Ok(kernel)
}

fn payload(image: &[u8]) -> Result<&[u8]> {
    if image.get(HEADER_MARK..HEADER_MARK + 4) != Some(b"HdrS".as_slice()) {
        bail!("the file is no bzImage: it lacks the mark HdrS");
    }
    let setup_sectors = usize::from(image[SETUP_SECTORS]).max(1);
    let start = (setup_sectors + 1) * 512 + dword(image, PAYLOAD_OFFSET)?;
    image
        .get(start..start + dword(image, PAYLOAD_LENGTH)?)
        .context("the payload is beyond the end of the bzImage")
}

fn dword(bytes: &[u8], at: usize) -> Result<usize> {
    let field = bytes
        .get(at..at + 4)
        .and_then(|field| field.try_into().ok())
        .context("the bzImage is cut short")?;
    Ok(u32::from_le_bytes(field) as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A bzImage with one setup sector whose payload is `kernel`, packed.
    fn bzimage(kernel: &[u8]) -> Vec<u8> {
        let packed = lz4_flex::block::compress(kernel);
        let mut payload = LZ4_LEGACY.to_vec();
        payload.extend(u32::try_from(packed.len()).expect("small").to_le_bytes());
        payload.extend(packed);
        payload.extend(u32::try_from(kernel.len()).expect("small").to_le_bytes());
        let mut image = vec![0; 1024];
        image[SETUP_SECTORS] = 1;
        image[HEADER_MARK..HEADER_MARK + 4].copy_from_slice(b"HdrS");
        let length = u32::try_from(payload.len()).expect("small").to_le_bytes();
        image[PAYLOAD_LENGTH..PAYLOAD_LENGTH + 4].copy_from_slice(&length);
        image.extend(payload);
        image
    }

    #[test]
    fn the_kernel_comes_out() {
        let kernel = [b"\x7fELF".as_slice(), &[7; 5000]].concat();
        assert_eq!(unpack(&bzimage(&kernel)).expect("unpacked"), kernel);
    }

    #[test]
    fn what_is_cut_or_foreign_is_refused() {
        let image = bzimage(b"\x7fELF and so on");
        for length in 0..image.len() {
            assert!(unpack(&image[..length]).is_err(), "cut to {length}");
        }
        assert!(unpack(&bzimage(b"no kernel at all")).is_err());
    }
}
