//! The request side of RESP2, incremental and bounded.
//!
//! [`Parser::step`] is given the octets from the start of a command and either finds the command
//! complete or remembers how far it came, so that a command that arrives in many pieces is read
//! once. How the stream was cut never changes what is found: every refusal is decided by octets at
//! fixed places of the command, not by how many of them had arrived.

use alloc::vec::Vec;

use crate::inline;
use crate::number::parse_i64;

/// The longest argument (and so the longest value), in octets.
pub const ARGUMENT_BYTES_MAX: usize = 512 * 1024;
/// The most arguments that a command may have, its name included.
pub const ARGUMENTS_MAX: usize = 16 * 1024;
/// The longest inline command, in octets, its line end included.
pub const INLINE_BYTES_MAX: usize = 64 * 1024;
/// The longest command, in octets, everything included.
pub const COMMAND_BYTES_MAX: usize = 4 * 1024 * 1024;
/// The longest `*N` or `$N` line, in octets, its line end included.
const HEADER_BYTES_MAX: usize = 32;
/// Argument places kept between commands; more are given back.
const SPANS_KEPT_MAX: usize = 256;

/// Octets that are not a request. The connection has to be closed: where the next command starts
/// is not known any more.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ProtocolError {
    /// An inline command exceeds [`INLINE_BYTES_MAX`].
    #[error("too big inline request")]
    InlineTooLong,
    /// A `*N` line exceeds its bound.
    #[error("too big mbulk count string")]
    CountTooLong,
    /// A `$N` line exceeds its bound.
    #[error("too big bulk count string")]
    LengthTooLong,
    /// N of a `*N` line is not a number or exceeds [`ARGUMENTS_MAX`].
    #[error("invalid multibulk length")]
    BadCount,
    /// N of a `$N` line is not a number, negative, or exceeds [`ARGUMENT_BYTES_MAX`].
    #[error("invalid bulk length")]
    BadLength,
    /// An argument does not start with `$`.
    #[error("expected '$', got '{}'", .0.escape_ascii())]
    ExpectedLength(u8),
    /// An argument is not followed by CR LF.
    #[error("expected CRLF after an argument")]
    ExpectedLineEnd,
    /// The command exceeds [`COMMAND_BYTES_MAX`].
    #[error("too big command")]
    CommandTooLong,
    /// A quote of an inline command is not closed, or is followed by more than a space.
    #[error("unbalanced quotes in request")]
    UnbalancedQuotes,
    /// There is no memory for the list of arguments.
    #[error("no memory for the arguments")]
    NoMemory,
}

/// What [`Parser::step`] found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Progress {
    /// The command is not complete; call again with the same octets and more behind them.
    NeedMore,
    /// The command is complete and takes this many octets. It has no arguments if the line was
    /// empty.
    Ready(usize),
}

/// Where an argument lies.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Span {
    pub(crate) start: usize,
    pub(crate) end: usize,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
enum State {
    /// At the first octet of a command.
    #[default]
    Start,
    /// Inside an inline command: no line end up to the position.
    Inline,
    /// At the `$` of an argument; this many are missing.
    Length(usize),
    /// At the first octet of an argument of `length` octets; `missing` are, this one included.
    Argument { missing: usize, length: usize },
}

/// The state of one connection's request stream, within one command.
#[derive(Debug, Default)]
pub struct Parser {
    state: State,
    position: usize,
    spans: Vec<Span>,
    /// The arguments of an inline command, with quotes and escapes resolved.
    unquoted: Vec<u8>,
    inline: bool,
}

impl Parser {
    /// Reads on in `input`, which starts where the current command starts.
    ///
    /// # Errors
    /// [`ProtocolError`] if this is not a request.
    pub fn step(&mut self, input: &[u8]) -> Result<Progress, ProtocolError> {
        loop {
            let advanced = match self.state {
                State::Start => self.start(input)?,
                State::Inline => return self.inline(input),
                State::Length(0) => return Ok(Progress::Ready(self.position)),
                State::Length(missing) => self.length(input, missing)?,
                State::Argument { missing, length } => self.argument(input, missing, length)?,
            };
            if !advanced {
                return Ok(Progress::NeedMore);
            }
        }
    }

    /// The arguments of the complete command, whose octets are `input`.
    pub fn arguments<'a>(&'a self, input: &'a [u8]) -> Arguments<'a> {
        let text = if self.inline {
            &self.unquoted[..]
        } else {
            input
        };
        Arguments {
            text,
            spans: &self.spans,
        }
    }

    /// Octets that the command must have before another step can get anywhere: a hint for
    /// buffering.
    pub fn wanted(&self) -> usize {
        match self.state {
            State::Argument { length, .. } => self.position + length + 2,
            _ => self.position + 1,
        }
    }

    /// Forgets the command and starts with the next one.
    pub fn restart(&mut self) {
        self.state = State::Start;
        self.position = 0;
        self.inline = false;
        self.spans.clear();
        if self.spans.capacity() > SPANS_KEPT_MAX {
            self.spans = Vec::new();
        }
        if self.unquoted.capacity() > 0 {
            self.unquoted = Vec::new();
        }
    }

    fn start(&mut self, input: &[u8]) -> Result<bool, ProtocolError> {
        match input.first() {
            None => Ok(false),
            Some(b'*') => self.count(input),
            Some(_) => {
                self.state = State::Inline;
                Ok(true)
            }
        }
    }

    /// Reads the `*N` line. A count below one is an empty command, as in Redis.
    fn count(&mut self, input: &[u8]) -> Result<bool, ProtocolError> {
        let Some((count, next)) = header(
            input,
            0,
            ProtocolError::CountTooLong,
            ProtocolError::BadCount,
        )?
        else {
            return Ok(false);
        };
        let count = usize::try_from(count.max(0)).map_err(|_| ProtocolError::BadCount)?;
        if count > ARGUMENTS_MAX {
            return Err(ProtocolError::BadCount);
        }
        self.position = next;
        self.state = State::Length(count);
        Ok(true)
    }

    /// Reads the `$N` line of an argument.
    fn length(&mut self, input: &[u8], missing: usize) -> Result<bool, ProtocolError> {
        match input.get(self.position) {
            None => return Ok(false),
            Some(b'$') => {}
            Some(other) => return Err(ProtocolError::ExpectedLength(*other)),
        }
        let (too_long, bad) = (ProtocolError::LengthTooLong, ProtocolError::BadLength);
        let Some((length, next)) = header(input, self.position, too_long, bad)? else {
            return Ok(false);
        };
        let length = usize::try_from(length).map_err(|_| ProtocolError::BadLength)?;
        if length > ARGUMENT_BYTES_MAX {
            return Err(ProtocolError::BadLength);
        }
        if next + length + 2 > COMMAND_BYTES_MAX {
            return Err(ProtocolError::CommandTooLong);
        }
        self.position = next;
        self.state = State::Argument { missing, length };
        Ok(true)
    }

    /// Reads an argument and the line end behind it.
    fn argument(
        &mut self,
        input: &[u8],
        missing: usize,
        length: usize,
    ) -> Result<bool, ProtocolError> {
        let end = self.position + length;
        let Some(line_end) = input.get(end..end + 2) else {
            return Ok(false);
        };
        if line_end != b"\r\n" {
            return Err(ProtocolError::ExpectedLineEnd);
        }
        self.spans
            .try_reserve(1)
            .map_err(|_| ProtocolError::NoMemory)?;
        self.spans.push(Span {
            start: self.position,
            end,
        });
        self.position = end + 2;
        self.state = State::Length(missing - 1);
        Ok(true)
    }

    /// Reads an inline command: words up to the line end.
    fn inline(&mut self, input: &[u8]) -> Result<Progress, ProtocolError> {
        let within = &input[..input.len().min(INLINE_BYTES_MAX)];
        let found = within[self.position..]
            .iter()
            .position(|&octet| octet == b'\n');
        let Some(offset) = found else {
            if within.len() == INLINE_BYTES_MAX {
                return Err(ProtocolError::InlineTooLong);
            }
            self.position = within.len();
            return Ok(Progress::NeedMore);
        };
        let line_end = self.position + offset;
        let line = input[..line_end]
            .strip_suffix(b"\r")
            .unwrap_or(&input[..line_end]);
        inline::split(line, &mut self.unquoted, &mut self.spans)?;
        self.inline = true;
        Ok(Progress::Ready(line_end + 1))
    }
}

/// Reads the number of a `*N` or `$N` line that starts at `from`; gives it and where the next
/// line starts, or nothing if the line is not complete.
fn header(
    input: &[u8],
    from: usize,
    too_long: ProtocolError,
    bad: ProtocolError,
) -> Result<Option<(i64, usize)>, ProtocolError> {
    let within = &input[from..input.len().min(from + HEADER_BYTES_MAX)];
    let Some(line_end) = within.iter().position(|&octet| octet == b'\n') else {
        return if within.len() == HEADER_BYTES_MAX {
            Err(too_long)
        } else {
            Ok(None)
        };
    };
    let digits = within[1..line_end].strip_suffix(b"\r").ok_or(bad)?;
    let number = parse_i64(digits).ok_or(bad)?;
    Ok(Some((number, from + line_end + 1)))
}

/// The arguments of a complete command, its name first.
#[derive(Clone, Copy, Debug)]
pub struct Arguments<'a> {
    text: &'a [u8],
    spans: &'a [Span],
}

impl<'a> Arguments<'a> {
    /// How many there are, the name included.
    pub fn len(&self) -> usize {
        self.spans.len()
    }

    /// Whether the command was an empty line.
    pub fn is_empty(&self) -> bool {
        self.spans.is_empty()
    }

    /// The argument at `index`; empty if there is none.
    pub fn get(&self, index: usize) -> &'a [u8] {
        self.spans
            .get(index)
            .map_or(&[], |span| &self.text[span.start..span.end])
    }

    /// The arguments from `first` on.
    pub fn from(&self, first: usize) -> impl ExactSizeIterator<Item = &'a [u8]> + use<'a> {
        let text = self.text;
        let spans = self.spans.get(first..).unwrap_or(&[]);
        spans.iter().map(move |span| &text[span.start..span.end])
    }
}

#[cfg(test)]
#[path = "parser_tests.rs"]
mod tests;
