//! Words of an inline command, with the quotes that `redis-cli` and people at a terminal use:
//! `"..."` with `\n`, `\r`, `\t`, `\a`, `\b`, `\xHH` and `\` before any other octet; `'...'` with
//! `\'` only.

use alloc::vec::Vec;

use crate::parser::{ARGUMENTS_MAX, ProtocolError, Span};

/// Splits `line` into words: their text goes to `unquoted`, their places in it to `spans`.
///
/// # Errors
/// [`ProtocolError::UnbalancedQuotes`], [`ProtocolError::BadCount`] for too many words,
/// [`ProtocolError::NoMemory`].
pub(crate) fn split(
    line: &[u8],
    unquoted: &mut Vec<u8>,
    spans: &mut Vec<Span>,
) -> Result<(), ProtocolError> {
    // No word is longer than its spelling, so nothing below allocates for text.
    unquoted
        .try_reserve(line.len())
        .map_err(|_| ProtocolError::NoMemory)?;
    let mut rest = line;
    loop {
        rest = rest.trim_ascii_start();
        if rest.is_empty() {
            return Ok(());
        }
        if spans.len() == ARGUMENTS_MAX {
            return Err(ProtocolError::BadCount);
        }
        let start = unquoted.len();
        rest = word(rest, unquoted)?;
        spans.try_reserve(1).map_err(|_| ProtocolError::NoMemory)?;
        spans.push(Span {
            start,
            end: unquoted.len(),
        });
    }
}

/// Reads one word; gives what is behind it.
fn word<'a>(mut rest: &'a [u8], unquoted: &mut Vec<u8>) -> Result<&'a [u8], ProtocolError> {
    loop {
        rest = match rest {
            [] => return Ok(rest),
            [space, ..] if space.is_ascii_whitespace() => return Ok(rest),
            [quote @ (b'"' | b'\''), quoted @ ..] => return closed(quoted, *quote, unquoted),
            [octet, after @ ..] => {
                unquoted.push(*octet);
                after
            }
        };
    }
}

/// Reads up to the closing `quote`, which must end the word.
fn closed<'a>(
    mut rest: &'a [u8],
    quote: u8,
    unquoted: &mut Vec<u8>,
) -> Result<&'a [u8], ProtocolError> {
    loop {
        rest = match rest {
            [] => return Err(ProtocolError::UnbalancedQuotes),
            [octet, after @ ..] if *octet == quote => return ends_word(after),
            [b'\\', b'\'', after @ ..] if quote == b'\'' => {
                unquoted.push(b'\'');
                after
            }
            [b'\\', escaped @ ..] if quote == b'"' && !escaped.is_empty() => {
                let (octet, after) = escape(escaped);
                unquoted.push(octet);
                after
            }
            [octet, after @ ..] => {
                unquoted.push(*octet);
                after
            }
        };
    }
}

fn ends_word(rest: &[u8]) -> Result<&[u8], ProtocolError> {
    match rest.first() {
        Some(octet) if !octet.is_ascii_whitespace() => Err(ProtocolError::UnbalancedQuotes),
        _ => Ok(rest),
    }
}

/// Resolves what stands behind a backslash; `text` is not empty.
fn escape(text: &[u8]) -> (u8, &[u8]) {
    if let [b'x', high, low, after @ ..] = text
        && let (Some(high), Some(low)) = (hex(*high), hex(*low))
    {
        return (high << 4 | low, after);
    }
    let octet = match text[0] {
        b'n' => b'\n',
        b'r' => b'\r',
        b't' => b'\t',
        b'a' => 7,
        b'b' => 8,
        other => other,
    };
    (octet, &text[1..])
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit)
        .to_digit(16)
        .and_then(|value| u8::try_from(value).ok())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(line: &str) -> Result<Vec<Vec<u8>>, ProtocolError> {
        let (mut text, mut spans) = (Vec::new(), Vec::new());
        split(line.as_bytes(), &mut text, &mut spans)?;
        Ok(spans
            .iter()
            .map(|span| text[span.start..span.end].to_vec())
            .collect())
    }

    #[test]
    fn splits_at_white_space() {
        assert_eq!(
            words("  set  a\tb "),
            Ok(vec![b"set".into(), b"a".into(), b"b".into()])
        );
        assert_eq!(words(""), Ok(vec![]));
    }

    #[test]
    fn resolves_quotes_and_escapes() {
        assert_eq!(
            words(r#""a b" 'c d' """#),
            Ok(vec![b"a b".into(), b"c d".into(), vec![]])
        );
        assert_eq!(words(r#""\x41\n\q\xzz""#), Ok(vec![b"A\nqxzz".into()]));
        assert_eq!(words(r#"'it\'s \n'"#), Ok(vec![br"it's \n".into()]));
    }

    #[test]
    fn refuses_open_quotes() {
        for line in [r#""abc"#, r#"'abc"#, r#""a"b"#, r#""a\"#, r#""a\""#] {
            assert_eq!(words(line), Err(ProtocolError::UnbalancedQuotes), "{line}");
        }
    }

    #[test]
    fn bounds_the_number_of_words() {
        let line = "a ".repeat(ARGUMENTS_MAX + 1);
        assert_eq!(words(&line), Err(ProtocolError::BadCount));
    }
}
