//! The initial RAM disk: as high in low RAM as the kernel allows.

use vm_memory::GuestMemoryBackend;

use super::BootError;
use super::image::Image;
use super::layout::Span;

const PAGE: u64 = 4096;

/// Loads the initial RAM disk behind `kernel`, below `address_max` (inclusive), and returns where.
pub(super) fn load<M: GuestMemoryBackend>(
    image: &mut Image<'_>,
    mem: &M,
    low_ram: Span,
    kernel: Span,
    address_max: u64,
) -> Result<Span, BootError> {
    let span = place(image.length(), low_ram, kernel, address_max)?;
    image.load(mem, 0, span.start, span.len())?;
    Ok(span)
}

fn place(size: u64, low_ram: Span, kernel: Span, address_max: u64) -> Result<Span, BootError> {
    if size == 0 {
        return Err(BootError::InitrdEmpty);
    }
    let end = low_ram.end.min(address_max.saturating_add(1));
    let floor = kernel.end.next_multiple_of(PAGE);
    let room = end.saturating_sub(floor);
    let start = end.saturating_sub(size) & !(PAGE - 1);
    if size > room || start < floor {
        return Err(BootError::InitrdTooBig { size, room });
    }
    Ok(Span {
        start,
        end: start + size,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn span(start: u64, end: u64) -> Span {
        Span { start, end }
    }

    #[test]
    fn goes_to_the_top_on_a_page() {
        let at = place(5000, span(0, 64 * MIB), span(16 * MIB, 20 * MIB), u64::MAX).unwrap();
        assert_eq!(at, span(64 * MIB - 8192, 64 * MIB - 8192 + 5000));
    }

    #[test]
    fn stays_below_what_the_kernel_allows() {
        let at = place(
            4096,
            span(0, 64 * MIB),
            span(16 * MIB, 20 * MIB),
            0x1ff_ffff,
        )
        .unwrap();
        assert_eq!(at.end, 32 * MIB);
    }

    #[test]
    fn empty_and_too_big_are_refused() {
        let (ram, kernel) = (span(0, 64 * MIB), span(16 * MIB, 20 * MIB));
        assert!(matches!(
            place(0, ram, kernel, u64::MAX),
            Err(BootError::InitrdEmpty)
        ));
        let err = place(44 * MIB + 1, ram, kernel, u64::MAX)
            .unwrap_err()
            .to_string();
        assert!(err.contains("at most 46137344 bytes"), "{err}");
        assert!(place(44 * MIB, ram, kernel, u64::MAX).is_ok());
        assert!(place(u64::MAX, ram, kernel, u64::MAX).is_err());
    }
}
