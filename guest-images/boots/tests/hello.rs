//! `hello`: boot, power, console and entropy on every kind of machine.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use boots::{Accelerator, Boot, accelerators, fastest};

/// Each accelerator with and without ACPI.
fn machines() -> Vec<(Accelerator, bool)> {
    accelerators()
        .into_iter()
        .flat_map(|kind| [(kind, false), (kind, true)])
        .collect()
}

#[test]
fn it_boots_prints_and_powers_off() {
    for (accelerator, acpi) in machines() {
        let ended = Boot::new("hello", "lines=2 console=ttyS0", accelerator)
            .acpi(acpi)
            .run();
        let expected = "hello: start\nhello: line 0\nhello: line 1\nhello: ready\nhello: bye\n";
        assert_eq!(ended.output, expected, "{accelerator:?} acpi={acpi}");
        assert!(ended.success);
    }
}

#[test]
fn further_processors_stay_parked() {
    for (accelerator, acpi) in machines() {
        let ended = Boot::new("hello", "", accelerator)
            .acpi(acpi)
            .with(&["-smp", "4"])
            .run();
        ended.line("hello: bye");
    }
}

#[test]
fn a_reset_ends_the_machine_without_a_farewell() {
    for (accelerator, acpi) in machines() {
        for words in ["reboot", "triple"] {
            let ended = Boot::new("hello", words, accelerator).acpi(acpi).run();
            assert_eq!(
                ended.output, "hello: start\nhello: ready\n",
                "{accelerator:?} {words}"
            );
        }
    }
}

#[test]
fn a_panic_is_a_line_and_the_end() {
    for (accelerator, acpi) in machines() {
        let ended = Boot::new("hello", "panic", accelerator).acpi(acpi).run();
        assert!(
            ended
                .line("PANIC:")
                .contains("The command line asked for it.")
        );
        let ended = Boot::new("hello", "lines=many", accelerator)
            .acpi(acpi)
            .run();
        assert!(
            ended
                .line("PANIC:")
                .contains("lines=many is not a valid value")
        );
    }
}

#[test]
fn an_exception_is_a_line_and_the_end() {
    for (accelerator, acpi) in machines() {
        let ended = Boot::new("hello", "fault", accelerator).acpi(acpi).run();
        let line = ended.line("PANIC: exception 14 ");
        assert!(line.ends_with("cr2 0x5ead00000000"), "{line}");
    }
}

#[test]
fn entropy_differs_between_runs() {
    for (accelerator, acpi) in machines() {
        let random = || {
            let boot = Boot::new("hello", "rng", accelerator).acpi(acpi);
            let ended = boot.with(&["-device", "virtio-rng-device"]).run();
            let line = ended.line("hello: random ").to_owned();
            assert_eq!(line.len(), "hello: random ".len() + 64, "{line}");
            line
        };
        assert_ne!(random(), random());
    }
}

#[test]
fn a_missing_device_is_named() {
    let Some(accelerator) = fastest() else { return };
    let ended = Boot::new("hello", "rng", accelerator).run();
    assert!(
        ended
            .line("PANIC:")
            .contains("no virtio device 0 of type Rng")
    );
}

#[test]
fn the_serial_console_echoes() {
    for (accelerator, acpi) in machines() {
        let mut guest = Boot::new("hello", "echo", accelerator).acpi(acpi).start();
        guest.wait_for("hello: ready\n");
        for text in ["one line\n", "and, after a pause, another\n"] {
            guest.type_in(text);
            guest.wait_for(&text.to_ascii_uppercase());
        }
    }
}

#[test]
fn the_virtio_console_echoes() {
    for (accelerator, acpi) in machines() {
        let directory = tempfile::tempdir().expect("a directory for the socket");
        let path = directory.path().join("console");
        let backend = format!("socket,id=c,server=on,wait=off,path={}", path.display());
        let device = [
            "-device",
            "virtio-serial-device",
            "-device",
            "virtconsole,chardev=c",
        ];
        let boot = Boot::new("hello", "vconsole", accelerator).acpi(acpi);
        let mut guest = boot.with(&["-chardev", &backend]).with(&device).start();
        guest.wait_for("hello: ready\n");
        let mut console = UnixStream::connect(path).expect("QEMU listens");
        console
            .set_read_timeout(Some(Duration::from_secs(10)))
            .expect("a timeout can be set");
        // More than one buffer, so that several are in flight.
        let text = "some text, ".repeat(100);
        console.write_all(text.as_bytes()).expect("QEMU reads");
        let mut echo = Vec::new();
        while !echo.ends_with(text.to_ascii_uppercase().as_bytes()) {
            let mut piece = [0; 4096];
            let got = console.read(&mut piece).expect("the guest answers");
            assert!(got > 0, "the console ended after {} bytes", echo.len());
            echo.extend(&piece[..got]);
        }
    }
}
