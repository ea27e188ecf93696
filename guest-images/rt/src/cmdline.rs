//! The command line: words of the form `key` or `key=value`, separated by blanks.

use core::str::FromStr;

use crate::bootinfo;

/// The guest's command line.
pub fn args() -> Args<'static> {
    Args(bootinfo::command_line())
}

/// A command line, parsed on demand.
#[derive(Clone, Copy, Debug)]
pub struct Args<'a>(pub &'a str);

impl<'a> Args<'a> {
    /// All words with their values, in order; the value of a bare word is empty.
    pub fn iter(self) -> impl Iterator<Item = (&'a str, &'a str)> {
        self.0
            .split_ascii_whitespace()
            .map(|word| word.split_once('=').unwrap_or((word, "")))
    }

    /// Value of the last word with this key: later words override earlier ones.
    pub fn value(self, key: &str) -> Option<&'a str> {
        self.iter()
            .filter(|(name, _)| *name == key)
            .last()
            .map(|(_, value)| value)
    }

    /// Whether the word `key` occurs, with or without a value other than `0`.
    pub fn flag(self, key: &str) -> bool {
        self.value(key).is_some_and(|value| value != "0")
    }

    /// The value of `key`, or `default` where it does not occur.
    ///
    /// # Panics
    /// If the value does not parse: a guest with a mistyped key must not run on quietly.
    pub fn get<T: FromStr>(self, key: &str, default: T) -> T {
        let Some(text) = self.value(key) else {
            return default;
        };
        match text.parse() {
            Ok(value) => value,
            Err(_) => panic!("The command line's {key}={text} is not a valid value."),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn last_word_wins() {
        assert_eq!(Args("a=1 b a=2").get("a", 0), 2);
    }

    #[test]
    fn missing_key_gives_default() {
        assert_eq!(Args("console=ttyS0").get("lines", 7), 7);
    }

    #[test]
    fn flags_are_words_or_values() {
        let args = Args("stay bench=1 echo=0 x=y=z");
        assert!(args.flag("stay") && args.flag("bench"));
        assert!(!args.flag("echo") && !args.flag("reboot"));
        assert_eq!(args.value("x"), Some("y=z"));
    }

    #[test]
    #[should_panic(expected = "lines=many")]
    fn unparsable_value_panics() {
        Args("lines=many").get("lines", 1);
    }
}
