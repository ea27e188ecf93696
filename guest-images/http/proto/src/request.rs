//! Heads of requests (RFC 9112), bounded. How the stream was cut never changes what is found:
//! a refusal is decided by octets at fixed places of the head.

/// The longest request line, in octets, its line end included.
pub const LINE_BYTES_MAX: usize = 4096;
/// The longest head, in octets, the empty line included.
pub const HEAD_BYTES_MAX: usize = 8192;
/// The most header fields.
pub const FIELDS_MAX: usize = 100;
/// The longest body that is skipped, in octets.
pub const BODY_BYTES_MAX: u64 = 64 * 1024;
/// Empty lines before a request that are skipped (RFC 9112, section 2.2, asks for one).
const EMPTY_LINES_MAX: usize = 4;

/// A request that is not served.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// It is not a request.
    #[error("400 Bad Request")]
    Malformed,
    /// Neither GET nor HEAD.
    #[error("405 Method Not Allowed")]
    Method,
    /// The body exceeds [`BODY_BYTES_MAX`].
    #[error("413 Content Too Large")]
    BodyTooLong,
    /// The request line exceeds [`LINE_BYTES_MAX`].
    #[error("414 URI Too Long")]
    LineTooLong,
    /// The head exceeds [`HEAD_BYTES_MAX`] or [`FIELDS_MAX`].
    #[error("431 Request Header Fields Too Large")]
    HeadTooLong,
    /// The body has a transfer coding.
    #[error("501 Not Implemented")]
    TransferCoding,
    /// Neither HTTP/1.0 nor HTTP/1.1.
    #[error("505 HTTP Version Not Supported")]
    Version,
}

/// What is asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// The page.
    Get,
    /// Only the head of the response.
    Head,
}

/// A request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Request<'a> {
    /// What is asked for.
    pub method: Method,
    /// The path, without scheme, authority and query.
    pub path: &'a [u8],
    /// Whether more requests may follow on the connection.
    pub keep_alive: bool,
    /// Whether the client is of HTTP/1.0, and has to be told if the connection stays.
    pub is_old: bool,
    /// Octets of the body, which has no meaning.
    pub body_bytes: u64,
}

/// What [`parse`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Parsed<'a> {
    /// The head is not complete; call again with the same octets and more behind them.
    NeedMore,
    /// A request whose head takes this many octets.
    Ready(Request<'a>, usize),
}

/// Reads the head of the request at the start of `input`.
///
/// # Errors
/// [`Refusal`], after which nothing more can be read from the connection.
pub fn parse(input: &[u8]) -> Result<Parsed<'_>, Refusal> {
    let mut position = 0;
    for _ in 0..EMPTY_LINES_MAX {
        match &input[position..] {
            [] | [b'\r'] => return Ok(Parsed::NeedMore),
            [b'\r', b'\n', ..] => position += 2,
            _ => break,
        }
    }
    let Some((line, mut next)) = line(input, position, LINE_BYTES_MAX, Refusal::LineTooLong)?
    else {
        return Ok(Parsed::NeedMore);
    };
    let mut head = Head::new(line)?;
    for _ in 0..=FIELDS_MAX {
        let room = HEAD_BYTES_MAX.saturating_sub(next - position);
        let Some((field, after)) = self::line(input, next, room, Refusal::HeadTooLong)? else {
            return Ok(Parsed::NeedMore);
        };
        next = after;
        if field.is_empty() {
            return Ok(Parsed::Ready(head.finish()?, next));
        }
        head.field(field)?;
    }
    Err(Refusal::HeadTooLong)
}

/// The line at `from`, without its end, and where the next one starts; nothing if its end has not
/// arrived.
fn line(
    input: &[u8],
    from: usize,
    bytes_max: usize,
    too_long: Refusal,
) -> Result<Option<(&[u8], usize)>, Refusal> {
    let rest = &input[from..];
    let within = &rest[..rest.len().min(bytes_max)];
    let Some(end) = within.iter().position(|&octet| octet == b'\n') else {
        return if within.len() == bytes_max {
            Err(too_long)
        } else {
            Ok(None)
        };
    };
    let text = within[..end]
        .strip_suffix(b"\r")
        .ok_or(Refusal::Malformed)?;
    Ok(Some((text, from + end + 1)))
}

/// A head while its fields are read.
struct Head<'a> {
    method: Result<Method, Refusal>,
    path: &'a [u8],
    is_old: bool,
    hosts: usize,
    close: bool,
    keep_alive: bool,
    body_bytes: Option<u64>,
    has_coding: bool,
}

impl<'a> Head<'a> {
    /// Reads the request line.
    fn new(line: &'a [u8]) -> Result<Self, Refusal> {
        let mut words = line.split(|&octet| octet == b' ');
        let (Some(method), Some(target), Some(version), None) =
            (words.next(), words.next(), words.next(), words.next())
        else {
            return Err(Refusal::Malformed);
        };
        if method.is_empty() || !method.iter().all(|&octet| is_token(octet)) {
            return Err(Refusal::Malformed);
        }
        let is_old = match version {
            b"HTTP/1.1" => false,
            b"HTTP/1.0" => true,
            _ if version.starts_with(b"HTTP/") => return Err(Refusal::Version),
            _ => return Err(Refusal::Malformed),
        };
        let method = match method {
            b"GET" => Ok(Method::Get),
            b"HEAD" => Ok(Method::Head),
            _ => Err(Refusal::Method),
        };
        Ok(Self {
            path: if method.is_ok() {
                path(target)?
            } else {
                target
            },
            method,
            is_old,
            hosts: 0,
            close: false,
            keep_alive: false,
            body_bytes: None,
            has_coding: false,
        })
    }

    /// Reads a header field.
    fn field(&mut self, line: &[u8]) -> Result<(), Refusal> {
        let colon = line
            .iter()
            .position(|&octet| octet == b':')
            .ok_or(Refusal::Malformed)?;
        let (name, value) = (&line[..colon], line[colon + 1..].trim_ascii());
        if name.is_empty() || !name.iter().all(|&octet| is_token(octet)) {
            return Err(Refusal::Malformed);
        }
        if name.eq_ignore_ascii_case(b"host") {
            self.hosts += 1;
        } else if name.eq_ignore_ascii_case(b"connection") {
            for option in value.split(|&octet| octet == b',').map(<[u8]>::trim_ascii) {
                self.close |= option.eq_ignore_ascii_case(b"close");
                self.keep_alive |= option.eq_ignore_ascii_case(b"keep-alive");
            }
        } else if name.eq_ignore_ascii_case(b"content-length") {
            let length = decimal(value).ok_or(Refusal::Malformed)?;
            if self.body_bytes.is_some_and(|earlier| earlier != length) {
                return Err(Refusal::Malformed);
            }
            self.body_bytes = Some(length);
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") {
            self.has_coding = true;
        }
        Ok(())
    }

    /// Checks what the fields must be together.
    fn finish(self) -> Result<Request<'a>, Refusal> {
        let hosts_right = if self.is_old {
            self.hosts <= 1
        } else {
            self.hosts == 1
        };
        if !hosts_right {
            return Err(Refusal::Malformed);
        }
        let method = self.method?;
        if self.has_coding {
            return Err(Refusal::TransferCoding);
        }
        let body_bytes = self.body_bytes.unwrap_or(0);
        if body_bytes > BODY_BYTES_MAX {
            return Err(Refusal::BodyTooLong);
        }
        Ok(Request {
            method,
            path: self.path,
            keep_alive: !self.close && (!self.is_old || self.keep_alive),
            is_old: self.is_old,
            body_bytes,
        })
    }
}

/// The path of a target in origin or absolute form.
fn path(target: &[u8]) -> Result<&[u8], Refusal> {
    if !target.iter().all(u8::is_ascii_graphic) {
        return Err(Refusal::Malformed);
    }
    let local = match target.strip_prefix(b"http://") {
        Some(rest) => {
            let end = rest
                .iter()
                .position(|octet| b"/?".contains(octet))
                .unwrap_or(rest.len());
            &rest[end..]
        }
        None if target.starts_with(b"/") => target,
        None => return Err(Refusal::Malformed),
    };
    let end = local
        .iter()
        .position(|&octet| octet == b'?')
        .unwrap_or(local.len());
    Ok(if end == 0 { b"/" } else { &local[..end] })
}

/// Whether an octet may be in a method or a field name (RFC 9110, section 5.6.2).
fn is_token(octet: u8) -> bool {
    octet.is_ascii_alphanumeric() || b"!#$%&'*+-.^_`|~".contains(&octet)
}

/// A number without sign; too large ones count as the largest.
fn decimal(text: &[u8]) -> Option<u64> {
    if text.is_empty() {
        return None;
    }
    text.iter().try_fold(0u64, |number, &digit| {
        let digit = char::from(digit).to_digit(10)?;
        Some(number.saturating_mul(10).saturating_add(u64::from(digit)))
    })
}

#[cfg(test)]
#[path = "request_tests.rs"]
mod tests;
