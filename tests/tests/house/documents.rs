//! Rules about documents.

use crate::tree::Part;

/// Lines from the top within which a reader meets the commands.
const OPENING: usize = 40;
/// What a newcomer runs first.
const COMMANDS: &[&str] = &["cargo xtask demo", "cargo xtask test"];

/// Parts that the architecture document does not name by their path.
pub(crate) fn unnamed(architecture: &str, parts: &[Part]) -> Vec<String> {
    parts
        .iter()
        .filter(|part| !names(architecture, &part.path))
        .map(|part| format!("ARCHITECTURE.md does not name {}", part.path))
        .collect()
}

/// Whether `text` has `path`, and not only as the beginning of a longer one.
fn names(text: &str, path: &str) -> bool {
    let ends = |rest: &str| {
        let next = rest.trim_start_matches('/').chars().next();
        !next.is_some_and(|next| next.is_alphanumeric() || next == '_' || next == '-')
    };
    text.match_indices(path)
        .any(|(at, _)| ends(&text[at + path.len()..]))
}

/// Commands that the README does not show at its top.
pub(crate) fn readme_complaints(readme: &str) -> Vec<String> {
    let opening: Vec<&str> = readme.lines().take(OPENING).collect();
    COMMANDS
        .iter()
        .filter(|command| !opening.iter().any(|line| line.contains(*command)))
        .map(|command| format!("README.md does not show `{command}` in its first {OPENING} lines"))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn part(path: &str) -> Part {
        Part {
            path: path.to_owned(),
        }
    }

    #[test]
    fn a_part_is_named_by_its_whole_path() {
        let text = "`vmm/src/kvm` runs vCPUs, `ft/` protects.";
        assert!(unnamed(text, &[part("vmm/src/kvm"), part("ft")]).is_empty());
        assert_eq!(
            unnamed(text, &[part("vmm/src/k"), part("vmm"), part("cli")]).len(),
            3
        );
    }

    #[test]
    fn commands_further_down_do_not_count() {
        let readme = format!(
            "cargo xtask demo\n{}cargo xtask test\n",
            "\n".repeat(OPENING)
        );
        assert_eq!(readme_complaints(&readme).len(), 1);
    }
}
