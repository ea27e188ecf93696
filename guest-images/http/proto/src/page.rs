//! The pages. Their content follows from their name and the place in them.

/// The longest page, in octets.
pub const PAGE_BYTES_MAX: u64 = 16 * 1024 * 1024;
/// What precedes the length in the name of a page of chosen length.
const SIZED_PREFIX: &[u8] = b"/size/";
/// Digits of the longest length, and a few for leading zeros.
const LENGTH_DIGITS_MAX: usize = 12;

const INDEX: &[u8] = b"<!doctype html>\n<title>http guest</title>\n<p>This guest serves /size/N: \
N octets of text, up to 16777216.\n";

/// Octets of a line of a page of chosen length.
const LINE_BYTES: usize = 64;
/// Such a line; its first octets are replaced by its place in the page.
const LINE: &[u8; LINE_BYTES] =
    b"0000000000000000 abcdefghijklmnopqrstuvwxyz ABCDEFGHIJKLMNOPQRS\n";
/// Hexadecimal digits of the place.
const PLACE_DIGITS: usize = 16;

/// A page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Page {
    /// `/` and `/index.html`.
    Index,
    /// `/size/N`: lines of 64 octets that start with their place in hexadecimal; the last may be
    /// cut.
    Sized(u64),
    /// A line of text, which no name leads to.
    Text(&'static str),
}

impl Page {
    /// The page with this path, if there is one.
    pub fn find(path: &[u8]) -> Option<Self> {
        if path == b"/" || path == b"/index.html" {
            return Some(Self::Index);
        }
        let digits = path.strip_prefix(SIZED_PREFIX)?;
        if digits.is_empty() || digits.len() > LENGTH_DIGITS_MAX {
            return None;
        }
        let mut length = 0;
        for digit in digits {
            length = length * 10 + u64::from(char::from(*digit).to_digit(10)?);
        }
        (length <= PAGE_BYTES_MAX).then_some(Self::Sized(length))
    }

    /// Octets of the page.
    pub fn len(self) -> u64 {
        match self {
            Self::Index => INDEX.len() as u64,
            Self::Sized(length) => length,
            Self::Text(text) => text.len() as u64,
        }
    }

    /// Whether the page is empty.
    pub fn is_empty(self) -> bool {
        self.len() == 0
    }

    /// Its media type.
    pub(crate) fn media_type(self) -> &'static str {
        match self {
            Self::Index => "text/html",
            Self::Sized(_) | Self::Text(_) => "text/plain",
        }
    }

    /// Writes what the page has from `offset` on to `room`; gives how many octets that are.
    pub fn read(self, offset: u64, room: &mut [u8]) -> usize {
        let rest = usize::try_from(self.len().saturating_sub(offset)).unwrap_or(usize::MAX);
        let count = rest.min(room.len());
        let room = &mut room[..count];
        match self {
            Self::Index => copy(INDEX, offset, room),
            Self::Text(text) => copy(text.as_bytes(), offset, room),
            Self::Sized(_) => lines(offset, room),
        }
        count
    }
}

fn copy(text: &[u8], offset: u64, room: &mut [u8]) {
    let start = offset as usize;
    room.copy_from_slice(&text[start..start + room.len()]);
}

/// Fills `room` with the lines from `offset` on.
fn lines(offset: u64, mut room: &mut [u8]) {
    let skipped = (offset % LINE_BYTES as u64) as usize;
    let mut place = offset - skipped as u64;
    let mut first = skipped;
    while !room.is_empty() {
        let text = line(place);
        let count = (LINE_BYTES - first).min(room.len());
        let (now, later) = room.split_at_mut(count);
        now.copy_from_slice(&text[first..first + count]);
        room = later;
        place += LINE_BYTES as u64;
        first = 0;
    }
}

fn line(place: u64) -> [u8; LINE_BYTES] {
    let mut text = *LINE;
    for (index, digit) in text[..PLACE_DIGITS].iter_mut().enumerate() {
        let nibble = place >> (4 * (PLACE_DIGITS - 1 - index)) & 0xf;
        *digit = b"0123456789abcdef"[nibble as usize];
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn finds_what_there_is() {
        assert_eq!(Page::find(b"/"), Some(Page::Index));
        assert_eq!(Page::find(b"/index.html"), Some(Page::Index));
        assert_eq!(Page::find(b"/size/0"), Some(Page::Sized(0)));
        assert_eq!(
            Page::find(b"/size/16777216"),
            Some(Page::Sized(PAGE_BYTES_MAX))
        );
    }

    #[test]
    fn finds_nothing_else() {
        let names = [
            "",
            "/x",
            "/size/",
            "/size/16777217",
            "/size/-1",
            "/size/1x",
            "/size/0000000000001",
        ];
        for name in names {
            assert_eq!(Page::find(name.as_bytes()), None, "{name}");
        }
    }

    #[test]
    fn lines_tell_their_place() {
        let mut text = [0; 130];
        assert_eq!(Page::Sized(130).read(0, &mut text), 130);
        assert!(text.starts_with(b"0000000000000000 abc"));
        assert!(text[64..].starts_with(b"0000000000000040 abc"));
        assert_eq!(&text[128..], b"00");
    }

    proptest! {
        #[test]
        fn pieces_make_the_page(length in 0..3000u64, piece in 1..200usize) {
            let page = Page::Sized(length);
            let mut whole = vec![0; length as usize];
            prop_assert_eq!(page.read(0, &mut whole), whole.len());
            let mut pieces = Vec::new();
            loop {
                let mut room = vec![0; piece];
                let count = page.read(pieces.len() as u64, &mut room);
                if count == 0 {
                    break;
                }
                pieces.extend_from_slice(&room[..count]);
            }
            prop_assert_eq!(pieces, whole);
        }
    }
}
