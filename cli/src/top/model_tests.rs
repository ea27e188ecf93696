use proptest::prelude::*;

use super::*;
use crate::top::testing::{busy_sample, sample};

const SECOND: Duration = Duration::from_secs(1);

fn names(names: &[&str]) -> Vec<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

fn listed(model: &Model) -> Vec<&str> {
    let guests = model.guests().into_iter();
    guests.map(|guest| guest.name.as_str()).collect()
}

fn chosen(model: &Model) -> Option<&str> {
    model.chosen().map(|guest| guest.name.as_str())
}

/// Three guests that were asked.
fn model() -> Model {
    let mut model = Model::new(SECOND, None);
    model.found(SECOND, &names(&["a", "b", "c"]));
    model
}

#[test]
fn arrows_stay_in_the_list() {
    let mut model = model();
    assert_eq!(chosen(&model), Some("a"));
    model.press(Key::Up);
    assert_eq!(chosen(&model), Some("a"));
    for wanted in ["b", "c", "c"] {
        model.press(Key::Down);
        assert_eq!(chosen(&model), Some(wanted));
    }
    model.press(Key::Up);
    assert_eq!(chosen(&model), Some("b"));
}

#[test]
fn enter_and_escape_go_to_a_page_and_back() {
    let mut model = model();
    model.press(Key::Down);
    model.press(Key::Enter);
    assert_eq!(model.view, View::Page(0));
    model.press(Key::Down);
    model.press(Key::Down);
    assert_eq!((model.view, chosen(&model)), (View::Page(2), Some("b")));
    model.limit_scroll(1);
    assert_eq!(model.view, View::Page(1));
    model.press(Key::Escape);
    assert_eq!((model.view, chosen(&model)), (View::List, Some("b")));
}

#[test]
fn nothing_has_no_page() {
    let mut model = Model::new(SECOND, None);
    for key in [Key::Enter, Key::Up, Key::Down, Key::Sort] {
        assert_eq!(model.press(key), Step::On);
        assert_eq!((model.view, chosen(&model)), (View::List, None));
    }
    assert_eq!(model.press(Key::Quit), Step::Over);
}

#[test]
fn help_hides_what_other_keys_do() {
    let mut model = model();
    model.press(Key::Help);
    model.press(Key::Down);
    model.press(Key::Sort);
    assert_eq!((model.help, chosen(&model)), (true, Some("a")));
    assert_eq!(model.order, Order::Name);
    model.press(Key::Escape);
    assert!(!model.help);
    model.press(Key::Help);
    assert_eq!(model.press(Key::Quit), Step::Over);
}

#[test]
fn guests_that_do_more_come_first_and_stay_chosen() {
    let mut model = model();
    for (name, count) in [("a", 10), ("b", 1_000), ("c", 100)] {
        model.heard(name, Ok(busy_sample(1_000, 0)));
        model.heard(name, Ok(busy_sample(2_000, count)));
    }
    model.press(Key::Sort);
    assert_eq!(
        (model.order, listed(&model)),
        (Order::Cpu, vec!["b", "c", "a"])
    );
    assert_eq!((chosen(&model), model.position()), (Some("a"), Some(2)));
    // What nothing is known of comes last.
    model.heard("b", Err("no answer".into()));
    assert_eq!(listed(&model), ["c", "a", "b"]);
    for _ in 0..5 {
        model.press(Key::Sort);
    }
    assert_eq!(
        (model.order, listed(&model)),
        (Order::Name, vec!["a", "b", "c"])
    );
}

#[test]
fn a_guest_that_ended_is_listed_a_while() {
    let mut model = model();
    model.heard("a", Ok(sample(1_000)));
    model.found(2 * SECOND, &names(&["b", "c"]));
    // The answer to what it was asked before.
    model.heard("a", Ok(sample(2_000)));
    let ended = model.chosen().expect("a guest");
    assert_eq!(
        (ended.name.as_str(), ended.state_word()),
        ("a", "ended".into())
    );
    model.found(2 * SECOND + ENDED_SHOWN, &names(&["b", "c"]));
    assert_eq!(
        (listed(&model), chosen(&model)),
        (vec!["b", "c"], Some("b"))
    );
    model.heard("a", Ok(sample(3_000)));
    assert_eq!(listed(&model), ["b", "c"]);
}

#[test]
fn a_guest_whose_page_is_shown_stays_and_comes_back() {
    let mut model = Model::new(SECOND, Some("a".into()));
    model.found(SECOND, &names(&["a"]));
    model.heard("a", Ok(sample(1_000)));
    model.found(2 * SECOND, &[]);
    model.found(100 * SECOND, &[]);
    let guest = model.chosen().expect("a guest");
    assert_eq!(guest.contact, Contact::Ended(2 * SECOND));
    model.found(101 * SECOND, &names(&["a"]));
    let mut started = sample(101_500);
    started.pid += 1;
    model.heard("a", Ok(started));
    let guest = model.chosen().expect("a guest");
    assert_eq!(
        (guest.state_word(), guest.rates.is_none()),
        ("running".into(), true)
    );
}

#[test]
fn a_silent_guest_has_a_reason_and_no_rates() {
    let mut model = model();
    model.heard("a", Ok(busy_sample(1_000, 0)));
    model.heard("a", Ok(busy_sample(2_000, 10)));
    assert!(model.chosen().is_some_and(|guest| guest.totals().is_some()));
    model.heard("a", Err("no answer".into()));
    let guest = model.chosen().expect("a guest");
    assert_eq!(guest.contact, Contact::Silent("no answer".into()));
    assert_eq!(
        (guest.totals(), guest.state_word()),
        (None, "silent".into())
    );
    // What it did while it was silent is known once it answers.
    model.heard("a", Ok(busy_sample(4_000, 110)));
    let totals = model.chosen().and_then(Guest::totals).expect("figures");
    assert_eq!(totals.net_frames, 50.0);
}

fn some_key() -> impl Strategy<Value = Key> {
    prop_oneof![
        Just(Key::Up),
        Just(Key::Down),
        Just(Key::Enter),
        Just(Key::Escape),
        Just(Key::Sort),
        Just(Key::Help),
    ]
}

proptest! {
    /// Whatever is pressed and whoever comes and goes: if there are guests, one of them is chosen.
    #[test]
    fn one_is_always_chosen(
        steps in prop::collection::vec((some_key(), prop::collection::vec(any::<bool>(), 4), 0u64..8), 1..40),
    ) {
        let mut model = Model::new(SECOND, None);
        let mut now = Duration::ZERO;
        for (key, run, seconds) in steps {
            now += Duration::from_secs(seconds);
            let all = ["a", "b", "c", "d"].iter().zip(&run);
            let running: Vec<&str> = all.filter(|(_, run)| **run).map(|(name, _)| *name).collect();
            model.found(now, &names(&running));
            for name in running {
                model.heard(name, Ok(busy_sample(now.as_millis() as u64, seconds)));
            }
            prop_assert_eq!(model.press(key), Step::On);
            prop_assert_eq!(model.position().is_some(), !model.guests().is_empty());
        }
    }
}
