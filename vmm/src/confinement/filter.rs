//! Tables as programs of the kernel's filter machine.

use std::collections::BTreeMap;
use std::env::consts::ARCH;

use seccompiler::{
    BackendError, BpfProgram, SeccompAction, SeccompCmpArgLen, SeccompCmpOp, SeccompCondition,
    SeccompFilter, SeccompRule, TargetArch,
};

use super::rules::{Condition, Rule};
use super::{ConfinementError, Enforcement, ThreadKind, tables};

/// The architecture whose system calls the tables name.
const TABLES_FOR: &str = "x86_64";

/// Whether the tables are for this machine.
pub(super) fn check_architecture() -> Result<(), ConfinementError> {
    if ARCH == TABLES_FOR {
        return Ok(());
    }
    Err(ConfinementError::Architecture { found: ARCH })
}

/// The filter of `kind`.
pub(super) fn compile(
    kind: ThreadKind,
    enforcement: Enforcement,
) -> Result<BpfProgram, ConfinementError> {
    let mismatch = match enforcement {
        Enforcement::On => SeccompAction::Trap,
        Enforcement::Log | Enforcement::Off => SeccompAction::Log,
    };
    let compiled = || -> Result<BpfProgram, BackendError> {
        let mut rules = chains(kind.rules())?;
        if kind.starts_threads() {
            // Answered by the filter of missing system calls.
            let missing = tables::MISSING.iter().map(|call| i64::from(call.id()));
            rules.extend(missing.map(|number| (number, Vec::new())));
        }
        SeccompFilter::new(rules, mismatch, SeccompAction::Allow, TargetArch::x86_64)?.try_into()
    };
    compiled().map_err(|error| ConfinementError::Filter {
        action: "make",
        source: error.into(),
    })
}

/// Rules by system call; an empty list allows the call with any arguments.
fn chains<'a>(
    rules: impl Iterator<Item = &'a Rule>,
) -> Result<BTreeMap<i64, Vec<SeccompRule>>, BackendError> {
    let mut chains: BTreeMap<i64, Vec<SeccompRule>> = BTreeMap::new();
    let mut unconditional = Vec::new();
    for rule in rules {
        let number = i64::from(rule.call.id());
        let chain = chains.entry(number).or_default();
        if rule.when.is_empty() {
            unconditional.push(number);
        } else {
            let conditions = rule.when.iter().map(|c| condition(*c));
            chain.push(SeccompRule::new(conditions.collect::<Result<_, _>>()?)?);
        }
    }
    for number in unconditional {
        chains.insert(number, Vec::new());
    }
    Ok(chains)
}

fn condition(condition: Condition) -> Result<SeccompCondition, BackendError> {
    let (argument, operator, value) = match condition {
        Condition::Is(argument, value) => (argument, SeccompCmpOp::Eq, value),
        Condition::OwnProcess(argument) => (argument, SeccompCmpOp::Eq, std::process::id()),
        Condition::Lacks(argument, bits) => (argument, SeccompCmpOp::MaskedEq(bits.into()), 0),
        Condition::Has(argument, bits) => (argument, SeccompCmpOp::MaskedEq(bits.into()), bits),
    };
    SeccompCondition::new(argument, SeccompCmpArgLen::Dword, operator, value.into())
}

/// The filter that says which system calls do not exist.
pub(super) fn compile_missing() -> Result<BpfProgram, ConfinementError> {
    let compiled = || -> Result<BpfProgram, BackendError> {
        let calls = tables::MISSING.iter();
        let rules = calls.map(|call| (i64::from(call.id()), Vec::new()));
        let missing = SeccompAction::Errno(libc::ENOSYS.unsigned_abs());
        let other = SeccompAction::Allow;
        SeccompFilter::new(rules.collect(), other, missing, TargetArch::x86_64)?.try_into()
    };
    compiled().map_err(|error| ConfinementError::Filter {
        action: "make",
        source: error.into(),
    })
}

/// Confines the calling thread by `program`, and all threads that it starts from now on.
pub(super) fn install(program: &BpfProgram) -> Result<(), ConfinementError> {
    seccompiler::apply_filter(program).map_err(|source| ConfinementError::Filter {
        action: "install",
        source,
    })
}
