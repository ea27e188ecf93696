//! Guest that touches a number of pages per period, to exercise dirty tracking.
#![no_std]
#![no_main]

extern crate alloc;

use alloc::vec::Vec;

use rt::{args, clock, println};

rt::entry!(main);

/// Words of a page.
const WORDS: usize = 512;
/// Pages of one allocation: memory has a hole below 4 GiB, so the span is in pieces.
const PIECE: usize = 4096;
/// Step between pages of one round: odd and large, so that neighbours are not touched
/// together.
const STRIDE: usize = 40_503;

#[derive(Clone)]
#[repr(C, align(4096))]
struct Page([u64; WORDS]);

/// The pages that are touched.
struct Span {
    pieces: Vec<Vec<Page>>,
    pages: usize,
}

impl Span {
    /// Allocates and writes `pages` pages.
    fn new(pages: usize) -> Self {
        let piece = |first: usize| alloc::vec![Page([1; WORDS]); PIECE.min(pages - first)];
        Self {
            pieces: (0..pages).step_by(PIECE).map(piece).collect(),
            pages,
        }
    }

    fn page(&mut self, index: usize) -> &mut Page {
        &mut self.pieces[index / PIECE][index % PIECE]
    }
}

struct Settings {
    /// Pages touched per round.
    pages: usize,
    /// Microseconds from one round to the next, 0 for no pause.
    period_us: u64,
    /// Whether pages are touched at random, rather than all before one is touched again.
    random: bool,
    /// Words changed in each touched page.
    words: usize,
    /// Rounds between two lines.
    report: u64,
    /// Rounds until the end, 0 for no end.
    rounds: u64,
}

fn main() {
    println!("dirty: start");
    let span = args().get("span", 4096usize).max(1);
    let settings = Settings {
        pages: args().get("pages", 256usize).min(span),
        period_us: args().get("period_ms", 10u64).saturating_mul(1000),
        random: args().flag("random"),
        words: args().get("bytes", 8usize).div_ceil(8).clamp(1, WORDS),
        report: args().get("report", 100u64).max(1),
        rounds: args().get("rounds", 0u64),
    };
    let mut memory = Span::new(span);
    println!(
        "dirty: ready pages={} span={span} bytes={}",
        settings.pages,
        settings.words * 8
    );
    run(&settings, &mut memory);
}

fn run(settings: &Settings, memory: &mut Span) {
    let (mut place, mut sum) = (0, 0u64);
    let mut random = Random(1);
    let mut next = clock::now();
    for round in 1.. {
        for _ in 0..settings.pages {
            place = match settings.random {
                true => random.below(memory.pages),
                false => (place + STRIDE) % memory.pages,
            };
            sum = touch(memory.page(place), settings.words, sum, round);
        }
        if round % settings.report == 0 {
            println!("dirty: round {round} sum {sum:016x}");
        }
        if round == settings.rounds {
            println!("dirty: done rounds={round} sum={sum:016x}");
            return;
        }
        if settings.period_us > 0 {
            next += settings.period_us;
            clock::sleep_until(next);
        }
    }
}

/// The same numbers each time (Marsaglia's xorshift).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        (self.0 % end as u64) as usize
    }
}

/// Changes the first `words` words of a page and adds what was there to the sum.
fn touch(page: &mut Page, words: usize, mut sum: u64, round: u64) -> u64 {
    for word in &mut page.0[..words] {
        sum = sum.rotate_left(7).wrapping_add(*word);
        *word = word.wrapping_add(sum ^ round);
    }
    sum
}
