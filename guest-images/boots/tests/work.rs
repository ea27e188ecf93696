//! `spin` and `dirty`: the same results everywhere, and time that passes as it should.

use std::time::Duration;

use boots::{Boot, accelerators, fastest};

#[test]
fn results_do_not_depend_on_what_executes_them() {
    let results: Vec<_> = accelerators()
        .into_iter()
        .map(|kind| {
            let spin = Boot::new("spin", "iters=50 report=20", kind).run().output;
            let dirty = Boot::new("dirty", "rounds=20 report=5 period_ms=1 bytes=64", kind).run();
            (spin, dirty.output)
        })
        .collect();
    let Some((spin, dirty)) = results.first() else {
        return;
    };
    assert_eq!(
        spin.lines().filter(|line| line.contains(" sum ")).count(),
        3,
        "{spin}"
    );
    assert_eq!(
        dirty
            .lines()
            .filter(|line| line.starts_with("dirty: round"))
            .count(),
        4,
        "{dirty}"
    );
    assert!(
        results.iter().all(|result| result == &results[0]),
        "{results:#?}"
    );
}

#[test]
fn the_seed_decides_the_sum() {
    let Some(kind) = fastest() else { return };
    let sum = |words| {
        Boot::new("spin", words, kind)
            .run()
            .line("spin: done")
            .to_owned()
    };
    assert_eq!(sum("iters=10 seed=5"), sum("iters=10 seed=5 report=1"));
    assert_ne!(sum("iters=10 seed=5"), sum("iters=10 seed=6"));
}

#[test]
fn periods_take_their_time() {
    for kind in accelerators() {
        let ended = Boot::new("dirty", "rounds=51 period_ms=20", kind).run();
        ended.line("dirty: done rounds=51 ");
        assert!(
            ended.elapsed >= Duration::from_secs(1),
            "{kind:?} {:?}",
            ended.elapsed
        );
    }
}
