//! Rules about source files.

use crate::tree::SourceFile;

/// Most lines of a file.
const LINES_MAX: usize = 900;
/// Names that say nothing of what is inside.
const EMPTY_NAMES: &[&str] = &["util", "utils", "common", "helper", "helpers", "misc"];
/// Marks of unfinished work, put together here so that this file does not carry them.
const UNFINISHED: &[&str] = &[
    concat!("TO", "DO"),
    concat!("FIX", "ME"),
    concat!("XX", "X:"),
];
/// Switches the lint against unsafe code off.
const UNSAFE_ALLOWED: &str = concat!("allow(unsafe", "_code");
/// Says why a module may do that.
const REASON: &str = "// UNSAFETY:";

/// What is wrong with a file.
pub(crate) fn complaints(file: &SourceFile) -> Vec<String> {
    let checks = [length(file), name(file), unfinished(file), reason(file)];
    checks
        .into_iter()
        .flatten()
        .map(|what| format!("{}: {what}", file.path))
        .collect()
}

fn length(file: &SourceFile) -> Option<String> {
    let lines = file.text.lines().count();
    (lines > LINES_MAX).then(|| format!("{lines} lines, at most {LINES_MAX} are allowed"))
}

fn name(file: &SourceFile) -> Option<String> {
    let stem = file.path.trim_end_matches(".rs");
    let empty = stem.split('/').find(|part| EMPTY_NAMES.contains(part))?;
    Some(format!("`{empty}` does not say what is inside"))
}

fn unfinished(file: &SourceFile) -> Option<String> {
    let (number, line) = file
        .text
        .lines()
        .enumerate()
        .find(|(_, line)| UNFINISHED.iter().any(|mark| line.contains(mark)))?;
    Some(format!(
        "line {} is unfinished: {}",
        number + 1,
        line.trim()
    ))
}

fn reason(file: &SourceFile) -> Option<String> {
    let silent = file.text.contains(UNSAFE_ALLOWED) && !file.text.contains(REASON);
    silent.then(|| format!("allows unsafe code without a line `{REASON} why`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn check(path: &str, text: &str) -> usize {
        complaints(&SourceFile {
            path: path.to_owned(),
            text: text.to_owned(),
        })
        .len()
    }

    #[test]
    fn a_plain_file_is_fine() {
        assert_eq!(
            check("devices/src/legacy/serial.rs", "//! Serial port.\n"),
            0
        );
    }

    #[test]
    fn long_files_are_found() {
        assert_eq!(check("a.rs", &"\n".repeat(LINES_MAX)), 0);
        assert_eq!(check("a.rs", &"\n".repeat(LINES_MAX + 1)), 1);
    }

    #[test]
    fn empty_names_are_found() {
        assert_eq!(check("vmm/src/util.rs", ""), 1);
        assert_eq!(check("vmm/src/common/mod.rs", ""), 1);
        assert_eq!(check("vmm/src/utility_power.rs", ""), 0);
    }

    #[test]
    fn unfinished_work_is_found() {
        for mark in UNFINISHED {
            assert_eq!(check("a.rs", &format!("// {mark} later")), 1, "{mark}");
        }
    }

    #[test]
    fn unsafe_code_needs_a_reason() {
        let allowed = format!("#![{UNSAFE_ALLOWED})]\n");
        assert_eq!(check("a.rs", &allowed), 1);
        assert_eq!(
            check("a.rs", &format!("{allowed}{REASON} maps memory\n")),
            0
        );
    }
}
