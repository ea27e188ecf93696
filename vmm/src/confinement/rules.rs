//! A rule: one system call that a thread may make, under which conditions, and why.

use syscalls::Sysno;

/// A system call that may be made.
#[derive(Clone, Copy, Debug)]
pub struct Rule {
    /// The system call.
    pub call: Sysno,
    /// What must hold for its arguments, all of it.
    pub when: &'static [Condition],
    /// What it is needed for.
    pub reason: &'static str,
    /// Why the tests' guests do not need it, if they do not.
    pub rare: Option<&'static str>,
}

/// What must hold for an argument; arguments count from 0. Only the lower 32 bits are looked at, as
/// the kernel does for all arguments that are looked at here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Condition {
    /// It is this.
    Is(u8, u32),
    /// None of these bits are set.
    Lacks(u8, u32),
    /// All of these bits are set.
    Has(u8, u32),
    /// It is this process.
    OwnProcess(u8),
}

impl Rule {
    /// Whether the rule allows `call` with `arguments` to the process `process`.
    pub fn allows(&self, call: Sysno, arguments: &[u64], process: u32) -> bool {
        self.call == call && self.when.iter().all(|c| c.holds(arguments, process))
    }

    /// With the reason why the tests' guests do not need the rule.
    pub const fn rare(mut self, why: &'static str) -> Self {
        self.rare = Some(why);
        self
    }
}

impl Condition {
    fn holds(self, arguments: &[u64], process: u32) -> bool {
        let argument = |index: u8| arguments.get(usize::from(index)).map(|a| *a as u32);
        match self {
            Self::Is(index, value) => argument(index) == Some(value),
            Self::Lacks(index, bits) => argument(index).is_some_and(|a| a & bits == 0),
            Self::Has(index, bits) => argument(index).is_some_and(|a| a & bits == bits),
            Self::OwnProcess(index) => argument(index) == Some(process),
        }
    }
}

/// A rule for `call` with any arguments.
pub const fn allow(call: Sysno, reason: &'static str) -> Rule {
    allow_if(call, &[], reason)
}

/// A rule for `call` under conditions.
pub const fn allow_if(call: Sysno, when: &'static [Condition], reason: &'static str) -> Rule {
    Rule {
        call,
        when,
        reason,
        rare: None,
    }
}
