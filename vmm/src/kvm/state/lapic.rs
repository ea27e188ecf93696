//! The local APIC's timer in a saved register page (Intel SDM volume 3, 12.5.4).

/// Bytes of the register page that KVM saves (KVM_APIC_REG_SIZE, KVM API 4.57).
pub(super) const LAPIC_SIZE: usize = 1024;

const LVT_TIMER: usize = 0x320;
const INITIAL_COUNT: usize = 0x380;
const CURRENT_COUNT: usize = 0x390;
const DIVIDE: usize = 0x3e0;
/// A bus cycle of KVM's local APIC in ns.
const BUS_CYCLE_NS: u64 = 1;

/// How the timer counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum TimerMode {
    OneShot,
    Periodic,
    /// KVM keeps the deadline in an MSR until the interrupt is injected: nothing to settle.
    TscDeadline,
}

/// The timer of a local APIC whose page has [`LAPIC_SIZE`] bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Timer {
    pub(super) mode: TimerMode,
    initial: u32,
    current: u32,
    divide: u64,
}

impl Timer {
    /// Reads it.
    pub(super) fn of(page: &[u8; LAPIC_SIZE]) -> Self {
        let mode = match register(page, LVT_TIMER) >> 17 & 3 {
            0 => TimerMode::OneShot,
            1 => TimerMode::Periodic,
            _ => TimerMode::TscDeadline,
        };
        Self {
            mode,
            initial: register(page, INITIAL_COUNT),
            current: register(page, CURRENT_COUNT),
            divide: divisor(register(page, DIVIDE)),
        }
    }

    /// Whether it was started and not stopped, even if it expired since.
    pub(super) fn was_started(self) -> bool {
        self.initial != 0 && self.mode != TimerMode::TscDeadline
    }

    /// Whether it expired and will not begin anew.
    pub(super) fn has_expired(self) -> bool {
        self.was_started() && self.mode == TimerMode::OneShot && self.current == 0
    }

    /// How long ago a periodic timer began its present period, in ns.
    pub(super) fn period_age_ns(self) -> u64 {
        u64::from(self.initial.saturating_sub(self.current)) * self.divide * BUS_CYCLE_NS
    }
}

/// Stops an expired timer, so that it does not begin anew where the page is restored.
pub(super) fn stop_timer(page: &mut [u8; LAPIC_SIZE]) {
    page[INITIAL_COUNT..INITIAL_COUNT + 4].fill(0);
}

fn register(page: &[u8; LAPIC_SIZE], at: usize) -> u32 {
    u32::from_le_bytes([page[at], page[at + 1], page[at + 2], page[at + 3]])
}

/// What the divide configuration means: bits 0, 1 and 3 are a power of two less one, modulo 8.
fn divisor(configuration: u32) -> u64 {
    let power = ((configuration & 3 | configuration >> 1 & 4) + 1) & 7;
    1 << power
}

#[cfg(test)]
mod tests {
    use super::*;

    fn page(lvt: u32, initial: u32, current: u32, divide: u32) -> [u8; LAPIC_SIZE] {
        let mut page = [0; LAPIC_SIZE];
        for (at, value) in [
            (LVT_TIMER, lvt),
            (INITIAL_COUNT, initial),
            (CURRENT_COUNT, current),
            (DIVIDE, divide),
        ] {
            page[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        page
    }

    #[test]
    fn divisors_are_those_of_the_manual() {
        let manual = [
            (0, 2),
            (1, 4),
            (2, 8),
            (3, 16),
            (8, 32),
            (9, 64),
            (10, 128),
            (11, 1),
        ];
        for (configuration, expected) in manual {
            assert_eq!(divisor(configuration), expected);
        }
    }

    #[test]
    fn only_a_one_shot_timer_expires() {
        assert!(Timer::of(&page(0x40, 1000, 0, 11)).has_expired());
        assert!(!Timer::of(&page(0x40, 1000, 1, 11)).has_expired());
        assert!(!Timer::of(&page(0x40, 0, 0, 11)).has_expired());
        assert!(!Timer::of(&page(0x40 | 1 << 17, 1000, 0, 11)).has_expired());
        assert!(!Timer::of(&page(0x40 | 2 << 17, 1000, 0, 11)).was_started());
        let mut expired = page(0x40, 1000, 0, 11);
        stop_timer(&mut expired);
        assert_eq!(expired, page(0x40, 0, 0, 11));
    }

    #[test]
    fn a_period_has_an_age() {
        let timer = Timer::of(&page(0x40 | 1 << 17, 1000, 900, 1));
        assert_eq!(timer.period_age_ns(), 400);
    }
}
