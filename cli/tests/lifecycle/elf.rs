//! Guests of a few bytes: an ELF image with a PVH note, whose code prints a greeting on the serial
//! port and then does one thing.

/// Where the image is loaded.
const BASE: u32 = 0x10_0000;
const HEADER_LEN: usize = 64;
const PROGRAM_HEADER_LEN: usize = 56;
const NOTE_AT: usize = HEADER_LEN + 2 * PROGRAM_HEADER_LEN;
const NOTE_LEN: usize = 20;
const CODE_AT: usize = 0x100;

/// `1: hlt; jmp 1b`.
pub(crate) const HALT: &[u8] = &[0xf4, 0xeb, 0xfd];
/// `mov $0xfe, %al; out %al, $0x64; 1: hlt; jmp 1b`: the keyboard controller's reset line.
pub(crate) const RESET: &[u8] = &[0xb0, 0xfe, 0xe6, 0x64, 0xf4, 0xeb, 0xfd];
/// `ud2` without an interrupt table.
pub(crate) const TRIPLE_FAULT: &[u8] = &[0x0f, 0x0b];
/// `mov $0xe0000000, %eax; jmp *%eax`: executes where there is no memory, which KVM cannot emulate.
pub(crate) const NOWHERE: &[u8] = &[0xb8, 0, 0, 0, 0xe0, 0xff, 0xe0];

/// A kernel that prints `greeting` and goes on with the code `end`.
pub(crate) fn kernel(greeting: &str, end: &[u8]) -> Vec<u8> {
    let mut code = vec![0x66, 0xba, 0xf8, 0x03]; // mov $0x3f8, %dx
    for byte in greeting.bytes() {
        code.extend([0xb0, byte, 0xee]); // mov $byte, %al; out %al, %dx
    }
    code.extend(end);
    let mut image = header();
    let len = (CODE_AT + code.len()) as u64;
    image.extend(program_header(1, 0, len));
    image.extend(program_header(4, NOTE_AT as u64, NOTE_LEN as u64));
    image.extend(note(BASE + CODE_AT as u32));
    image.resize(CODE_AT, 0);
    image.extend(code);
    image
}

fn header() -> Vec<u8> {
    let mut header = vec![0x7f, b'E', b'L', b'F', 2, 1, 1];
    header.resize(16, 0);
    header.extend(2u16.to_le_bytes()); // executable
    header.extend(62u16.to_le_bytes()); // x86-64
    header.extend(1u32.to_le_bytes());
    header.extend(u64::from(BASE + CODE_AT as u32).to_le_bytes());
    header.extend((HEADER_LEN as u64).to_le_bytes()); // program headers
    header.extend(0u64.to_le_bytes()); // section headers
    header.extend(0u32.to_le_bytes());
    for half in [HEADER_LEN, PROGRAM_HEADER_LEN, 2, 0, 0, 0] {
        header.extend((half as u16).to_le_bytes());
    }
    header
}

fn program_header(kind: u32, offset: u64, len: u64) -> Vec<u8> {
    let address = u64::from(BASE) + offset;
    let mut header = Vec::new();
    header.extend(kind.to_le_bytes());
    header.extend(7u32.to_le_bytes()); // read, write, execute
    for word in [offset, address, address, len, len, 4] {
        header.extend(word.to_le_bytes());
    }
    header
}

/// The note that names the 32-bit entry point (type 18, owner `Xen`).
fn note(entry: u32) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [4, 4, 18] {
        note.extend(u32::to_le_bytes(word));
    }
    note.extend(b"Xen\0");
    note.extend(entry.to_le_bytes());
    note
}
