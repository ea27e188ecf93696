//! What is wrong with a description of a guest, and where.

use std::fmt;
use std::path::Path;

/// Where a value was given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub enum Origin {
    /// Nowhere: it is the default, or it is missing.
    #[default]
    Absent,
    /// In the file, at this line and column, both from 1.
    File {
        /// Line.
        line: usize,
        /// Column, in characters.
        column: usize,
    },
    /// On the command line.
    Flag,
}

/// One thing that is wrong.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// Where.
    pub at: Origin,
    /// Key in the file, such as `disk.path`; empty if no key is concerned.
    pub key: String,
    /// What is wrong and what is allowed.
    pub message: String,
}

impl Problem {
    /// A problem with `key`.
    pub fn new(at: Origin, key: impl Into<String>, message: impl Into<String>) -> Self {
        Self {
            at,
            key: key.into(),
            message: message.into(),
        }
    }

    /// The problem as one line; `file` is the file that was read, if any.
    pub fn display<'a>(&'a self, file: Option<&'a Path>) -> impl fmt::Display + 'a {
        Line {
            problem: self,
            file,
        }
    }
}

struct Line<'a> {
    problem: &'a Problem,
    file: Option<&'a Path>,
}

impl fmt::Display for Line<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Problem { at, key, message } = self.problem;
        let in_file = *at != Origin::Flag && self.file.is_some();
        if let Some(file) = self.file.filter(|_| in_file) {
            write!(f, "{}:", file.display())?;
            if let Origin::File { line, column } = at {
                write!(f, "{line}:{column}:")?;
            }
            write!(f, " ")?;
        }
        match (key.as_str(), in_file) {
            ("", _) => {}
            (key, true) => write!(f, "key `{key}`: ")?,
            (key, false) => write!(f, "--{}: ", key.split('.').next().unwrap_or(key))?,
        }
        f.write_str(message)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_names_place_key_and_message() {
        let at = Origin::File { line: 3, column: 7 };
        let problem = Problem::new(at, "disk.id", "too long");
        let file = Some(Path::new("vm.toml"));
        assert_eq!(
            problem.display(file).to_string(),
            "vm.toml:3:7: key `disk.id`: too long"
        );
        let problem = Problem::new(Origin::Flag, "disk.id", "too long");
        assert_eq!(problem.display(file).to_string(), "--disk: too long");
        let problem = Problem::new(Origin::Absent, "kernel", "missing");
        assert_eq!(problem.display(None).to_string(), "--kernel: missing");
        assert_eq!(
            problem.display(file).to_string(),
            "vm.toml: key `kernel`: missing"
        );
    }
}
