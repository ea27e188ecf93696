use std::time::Duration;

use ratatui::Terminal;
use ratatui::backend::TestBackend;
use tandem_ft::runtime::status::Role;
use tandem_vmm::control::{MachineState, VcpuStats};

use super::*;
use crate::top::model::Key;
use crate::top::sample::{Device, Sample};
use crate::top::testing::{busy_sample, counters, protected_sample, sample};

const SECOND: Duration = Duration::from_secs(1);

/// What the screen shows, and how far a page can be scrolled.
fn screen(model: &Model, width: u16, height: u16) -> (TestBackend, usize) {
    let mut terminal = Terminal::new(TestBackend::new(width, height)).expect("a terminal");
    let mut above = 0;
    let drawn = terminal.draw(|frame| above = draw(model, frame));
    drawn.expect("a screen");
    (terminal.backend().clone(), above)
}

/// A guest that answers for a while, each second.
fn run(model: &mut Model, name: &str, sample: impl Fn(u64, u64) -> Sample) {
    let mut count = 1_000;
    for second in 1..=45 {
        count += 97 * ((second * 7 + 4) % 15) + 3;
        model.heard(name, Ok(sample(second * 1_000, count)));
    }
}

fn model(only: Option<&str>) -> Model {
    let mut model = Model::new(SECOND, only.map(str::to_owned));
    let names = ["copy", "db", "gone", "hangs", "new", "web"].map(str::to_owned);
    match only {
        Some(name) => model.found(SECOND, &[name.to_owned()]),
        None => model.found(SECOND, &names),
    }
    model
}

/// Guests of all kinds.
fn some_guests() -> Model {
    let mut model = model(None);
    run(&mut model, "db", busy_sample);
    run(&mut model, "web", protected_sample);
    run(&mut model, "copy", |at, count| {
        let mut sample = protected_sample(at, count);
        sample.protection.role = Role::Secondary;
        sample
    });
    model.heard("gone", Ok(sample(1_000)));
    model.heard("hangs", Ok(sample(1_000)));
    model.heard("hangs", Err("no answer from `api.sock` within 1 s".into()));
    let names = ["copy", "db", "hangs", "new", "web"].map(str::to_owned);
    model.found(46 * SECOND, &names);
    model
}

#[test]
fn the_list_on_the_smallest_usual_terminal() {
    let mut model = some_guests();
    model.press(Key::Down);
    insta::assert_snapshot!(screen(&model, 80, 24).0);
}

#[test]
fn the_list_on_a_wide_terminal() {
    let mut model = some_guests();
    for _ in 0..5 {
        model.press(Key::Down);
    }
    model.press(Key::Sort);
    insta::assert_snapshot!(screen(&model, 120, 30).0);
}

#[test]
fn no_guests() {
    let model = Model::new(SECOND, None);
    insta::assert_snapshot!(screen(&model, 80, 8).0);
}

#[test]
fn the_page_of_a_protected_guest() {
    let mut model = model(Some("web"));
    run(&mut model, "web", protected_sample);
    insta::assert_snapshot!("page_80x24", screen(&model, 80, 24).0);
    model.press(Key::Down);
    let above = screen(&model, 80, 24).1;
    (0..above).for_each(|_| _ = model.press(Key::Down));
    insta::assert_snapshot!("page_80x24_end", screen(&model, 80, 24).0);
    insta::assert_snapshot!("page_120x50", screen(&model, 120, 50).0);
}

#[test]
fn the_page_of_a_guest_with_devices_of_all_kinds() {
    let mut model = model(Some("db"));
    run(&mut model, "db", |at, count| {
        let mut sample = busy_sample(at, count);
        sample.state = MachineState::Paused;
        let exits = counters([("io_in", 7)]);
        sample.vcpus.push(VcpuStats { index: 1, exits });
        let pacing = [
            ("pace_back_offs", 2),
            ("pace_early_halted", count / 2),
            ("pace_early_kick", 0),
            ("pace_immediate", 3),
            ("pace_mature", count / 3),
            ("pace_saved_us", count * 400),
            ("pace_waiting", 1),
        ];
        let disk = &mut sample.devices[0];
        disk.pace = Some("hdd".into());
        disk.counters.extend(counters(pacing));
        disk.counters.insert("zero_ops".into(), 2);
        // Of a newer VMM.
        disk.counters.insert("merged_ops".into(), count);
        let serial = counters([("rx_bytes", 0), ("tx_bytes", count * 10)]);
        sample.devices.push(Device {
            id: "serial".into(),
            kind: "serial".into(),
            pace: None,
            counters: serial,
        });
        sample
    });
    insta::assert_snapshot!(screen(&model, 80, 40).0);
}

#[test]
fn the_page_of_a_guest_that_is_silent() {
    let mut model = model(Some("web"));
    insta::assert_snapshot!("page_asked", screen(&model, 80, 10).0);
    model.heard(
        "web",
        Err("cannot reach the guest's API at `api.sock`: refused".into()),
    );
    insta::assert_snapshot!("page_silent", screen(&model, 80, 10).0);
    run(&mut model, "web", busy_sample);
    model.found(50 * SECOND, &[]);
    insta::assert_snapshot!("page_ended", screen(&model, 80, 24).0);
}

#[test]
fn long_reasons_are_wrapped() {
    let mut model = model(Some("web"));
    run(&mut model, "web", |at, count| {
        let mut sample = protected_sample(at, count);
        let status = &mut sample.protection;
        status.protected = false;
        status.reason =
            "no secondary: cannot connect to 10.0.0.2:7000: no route to host (os error 113)".into();
        status.peer = None;
        status.looking_at = Some("10.0.0.2:7000".into());
        status.next_try_ms = Some(516);
        sample
    });
    insta::assert_snapshot!(screen(&model, 80, 36).0);
}

#[test]
fn the_help_fits_on_the_smallest_usual_terminal() {
    let mut model = some_guests();
    model.press(Key::Help);
    insta::assert_snapshot!(screen(&model, 80, 24).0);
}

#[test]
fn the_chosen_guest_is_seen_among_many() {
    let mut model = Model::new(SECOND, None);
    let names: Vec<String> = (0..100).map(|n| format!("guest{n:02}")).collect();
    model.found(SECOND, &names);
    (0..70).for_each(|_| _ = model.press(Key::Down));
    let screen = screen(&model, 80, 24).0.to_string();
    assert!(screen.contains("guest70 "), "{screen}");
}

#[test]
fn any_size_can_be_drawn() {
    let list = some_guests();
    let mut page = some_guests();
    page.press(Key::Enter);
    let mut help = some_guests();
    help.press(Key::Help);
    for width in (1..130).step_by(7) {
        for height in 1..40 {
            for model in [&list, &page, &help] {
                let text = screen(model, width, height).0.to_string();
                assert_eq!(
                    text.contains("needed"),
                    width >= 20 && (width < 40 || height < 8)
                );
            }
        }
    }
}

/// Text from a VMM is shown, and does not command the terminal.
#[test]
fn control_characters_are_not_drawn() {
    let mut model = model(Some("web"));
    model.heard("web", Err("\x1b[2Jred\x07".into()));
    let screen = screen(&model, 80, 24).0.to_string();
    assert!(screen.contains("red"));
    assert!(!screen.contains(['\x1b', '\x07']), "{screen:?}");
}
