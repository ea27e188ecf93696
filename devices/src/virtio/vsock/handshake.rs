//! The line by which a host program asks for a port of the guest: `CONNECT <port>\n`.

/// Most bytes of the line, its end included.
pub const LINE_MAX: usize = 32;

/// What the bytes of a host program amount to so far.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Greeting {
    /// The line is not complete.
    Incomplete,
    /// It asks for this port; it is `len` bytes long.
    Connect {
        /// The guest's port.
        port: u32,
        /// Length of the line, its end included.
        len: usize,
    },
    /// It is something else.
    Invalid,
}

/// Reads the line at the start of `bytes`.
pub(super) fn parse(bytes: &[u8]) -> Greeting {
    let line = &bytes[..bytes.len().min(LINE_MAX)];
    let Some(end) = line.iter().position(|byte| *byte == b'\n') else {
        return match line.len() {
            LINE_MAX => Greeting::Invalid,
            _ => Greeting::Incomplete,
        };
    };
    match port_of(&line[..end]) {
        Some(port) => Greeting::Connect { port, len: end + 1 },
        None => Greeting::Invalid,
    }
}

fn port_of(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let verb = words.next()?;
    let port = words.next()?;
    let digits = port.bytes().all(|byte| byte.is_ascii_digit());
    if !verb.eq_ignore_ascii_case("connect") || !digits || words.next().is_some() {
        return None;
    }
    port.parse().ok()
}

/// The line that tells a host program that the guest accepted.
pub(super) fn accepted(host_port: u32) -> String {
    format!("OK {host_port}\n")
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn the_line_may_be_followed_by_data() {
        let expected = Greeting::Connect { port: 52, len: 11 };
        assert_eq!(parse(b"CONNECT 52\n"), expected);
        assert_eq!(parse(b"CONNECT 52\nCONNECT 53\n"), expected);
        assert_eq!(parse(b"connect 52\n\n"), expected);
    }

    #[test]
    fn a_line_in_pieces_is_waited_for() {
        let line = b"CONNECT 4294967295\n";
        for len in 0..line.len() {
            assert_eq!(parse(&line[..len]), Greeting::Incomplete);
        }
        let expected = Greeting::Connect {
            port: u32::MAX,
            len: line.len(),
        };
        assert_eq!(parse(line), expected);
    }

    #[test]
    fn anything_else_is_refused() {
        let lines = [
            "\n",
            "CONNECT\n",
            "CONNECT \n",
            "CONNECT x\n",
            "CONNECT -1\n",
            "CONNECT +1\n",
            "CONNECT 4294967296\n",
            "CONNECT 1 2\n",
            "CONNECT52\n",
            "GET / HTTP/1.1\r\n",
            "CONNECT                         52\n",
            "\u{fffd}\n",
        ];
        for line in lines {
            assert_eq!(parse(line.as_bytes()), Greeting::Invalid, "{line:?}");
        }
        assert_eq!(parse(&[b'C'; LINE_MAX]), Greeting::Invalid);
        assert_eq!(parse(b"\xff\xfe\n"), Greeting::Invalid);
    }

    proptest! {
        #[test]
        fn any_port_is_understood(port: u32) {
            let line = format!("CONNECT {port}\n");
            prop_assert_eq!(parse(line.as_bytes()), Greeting::Connect { port, len: line.len() });
        }

        #[test]
        fn any_bytes_do_no_harm(bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            if let Greeting::Connect { len, .. } = parse(&bytes) {
                prop_assert!(len <= bytes.len() && bytes[len - 1] == b'\n');
            }
        }
    }
}
