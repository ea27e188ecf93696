//! Real clients talk to servers in guests.
#![allow(clippy::unwrap_used, reason = "tests fail by panicking")]

use std::io::{Read, Write};
use std::process::{Child, Stdio};
use std::time::{Duration, Instant};

use tandem_tests::guest::{Guest, GuestBuilder, Life, PATIENCE};
use tandem_tests::network::{CMDLINE, GUEST, GUEST6, Network};
use tandem_tests::skip::{Need, must_skip};
use tandem_tests::{in_each_life, in_every_life};

/// Exit code of a resource that is missing or taken.
const RESOURCE: i32 = 11;

fn cannot_run(programs: &[&'static str]) -> bool {
    let mut needs = vec![Need::Kvm, Need::Root, Need::Program("ip")];
    needs.extend(programs.iter().map(|name| Need::Program(name)));
    must_skip(&needs)
}

in_every_life!(
    redis_clients_work_against_the_key_value_guest,
    web_clients_get_pages_of_any_size,
    echo_and_ping_over_both_protocols,
);

in_each_life!(
    a_thousand_connections_one_after_the_other,
    connections_survive_a_pause,
    a_guest_without_privileges_is_reached_by_way_of_passt,
);

fn serve(image: &str, network: &Network, life: Life) -> Guest {
    GuestBuilder::image(image, CMDLINE)
        .in_network(network)
        .live(life, &format!("{image}: ready"))
}

fn redis_clients_work_against_the_key_value_guest(life: Life) {
    if cannot_run(&["redis-cli", "redis-benchmark"]) {
        return;
    }
    let network = Network::new();
    let _guest = serve("kv", &network, life);
    let redis = |arguments: &[&str]| {
        let all: Vec<_> = ["-h", GUEST].iter().chain(arguments).copied().collect();
        network.run("redis-cli", &all).trim().to_owned()
    };
    assert_eq!(redis(&["PING"]), "PONG");
    assert_eq!(redis(&["SET", "key", "value"]), "OK");
    assert_eq!(redis(&["GET", "key"]), "value");
    assert_eq!(redis(&["INCR", "counter"]), "1");
    assert_eq!(redis(&["MSET", "a", "1", "b", "2"]), "OK");
    assert_eq!(redis(&["MGET", "a", "b", "none"]), "1\n2");
    assert_eq!(redis(&["DEL", "a", "none"]), "1");
    assert_eq!(redis(&["EXISTS", "b"]), "1");
    for pipeline in ["1", "16"] {
        let arguments = [
            "-h", GUEST, "-t", "set,get", "-n", "20000", "-c", "50", "-P", pipeline, "--csv",
        ];
        let table = network.run("redis-benchmark", &arguments);
        assert_eq!(
            table.lines().filter(|l| l.contains("ET\"")).count(),
            2,
            "{table}"
        );
    }
    assert_eq!(redis(&["DBSIZE"]), "4");
}

fn web_clients_get_pages_of_any_size(life: Life) {
    if cannot_run(&["curl"]) {
        return;
    }
    let network = Network::new();
    let _guest = serve("http", &network, life);
    for size in [0usize, 1, 1000, 65_536, 5_000_000] {
        let url = format!("http://{GUEST}/size/{size}");
        let page = network.run("curl", &["-sS", "--fail", "--max-time", "20", &url]);
        assert_eq!(page.len(), size);
        let url = format!("http://[{GUEST6}]/size/{size}");
        let same = network.run("curl", &["-sS", "--fail", "--max-time", "20", &url]);
        assert!(
            same == page,
            "IPv4 and IPv6 give different pages of {size} bytes"
        );
    }
    let url = format!("http://{GUEST}/no-such-page");
    let code = network.run(
        "curl",
        &["-s", "-o", "/dev/null", "-w", "%{http_code}", &url],
    );
    assert_eq!(code, "404");
}

fn echo_and_ping_over_both_protocols(life: Life) {
    if cannot_run(&["socat", "ping"]) {
        return;
    }
    let network = Network::new();
    let _guest = serve("net-echo", &network, life);
    network.run("ping", &["-c", "3", "-i", "0.2", "-W", "2", GUEST]);
    network.run("ping", &["-6", "-c", "3", "-i", "0.2", "-W", "2", GUEST6]);
    for address in [
        format!("TCP4:{GUEST}:7"),
        format!("TCP6:[{GUEST6}]:7"),
        format!("UDP4:{GUEST}:7"),
    ] {
        let text = "the same bytes come back ".repeat(50);
        assert_eq!(echo(&network, &address, &text), text, "{address}");
    }
}

fn echo(network: &Network, address: &str, text: &str) -> String {
    let mut socat = network.command("socat");
    let mut child = socat
        .args(["-t", "1", "-", address])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    child
        .stdin
        .take()
        .unwrap()
        .write_all(text.as_bytes())
        .unwrap();
    let mut back = String::new();
    child
        .stdout
        .take()
        .unwrap()
        .read_to_string(&mut back)
        .unwrap();
    child.wait().unwrap();
    back
}

fn a_thousand_connections_one_after_the_other(life: Life) {
    if cannot_run(&["redis-benchmark"]) {
        return;
    }
    let network = Network::new();
    let _guest = serve("kv", &network, life);
    // -k 0: a new connection for each request.
    let arguments = [
        "-h", GUEST, "-t", "get", "-n", "1000", "-c", "4", "-k", "0", "--csv",
    ];
    assert!(network.run("redis-benchmark", &arguments).contains("GET"));
}

fn connections_survive_a_pause(life: Life) {
    if cannot_run(&["redis-cli"]) {
        return;
    }
    let network = Network::new();
    let guest = serve("kv", &network, life);
    let mut client = network
        .command("redis-cli")
        .args(["-h", GUEST])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut input = client.stdin.take().unwrap();
    let mut output = std::io::BufReader::new(client.stdout.take().unwrap());
    let mut ask = |text: &str| {
        writeln!(input, "{text}").unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut output, &mut line).unwrap();
        line.trim().to_owned()
    };
    assert_eq!(ask("SET k v"), "OK");
    for _ in 0..5 {
        assert!(guest.tandem(&["pause", "guest"]).status.success());
        assert!(guest.tandem(&["resume", "guest"]).status.success());
        assert_eq!(ask("GET k"), "v");
    }
    drop(input);
    client.wait().unwrap();
}

/// passt, stopped when dropped.
struct Passt(Child);

impl Drop for Passt {
    fn drop(&mut self) {
        drop(self.0.kill());
        drop(self.0.wait());
    }
}

fn a_guest_without_privileges_is_reached_by_way_of_passt(life: Life) {
    if cannot_run(&["passt", "redis-cli"]) {
        return;
    }
    // In a network of its own, so that ports and addresses are nobody else's.
    let network = Network::new();
    let directory = tempfile::tempdir().unwrap();
    std::fs::set_permissions(
        directory.path(),
        std::os::unix::fs::PermissionsExt::from_mode(0o777),
    )
    .unwrap();
    let socket = directory.path().join("passt.sock");
    let mut passt = network.command("passt");
    passt
        .args(["--foreground", "--quiet", "--socket"])
        .arg(&socket);
    passt.args([
        "--address",
        "10.99.0.2",
        "--netmask",
        "24",
        "--gateway",
        "10.99.0.1",
    ]);
    passt.args(["--interface", "tap0", "--tcp-ports", "6379"]);
    let mut passt = Passt(passt.stderr(Stdio::piped()).spawn().unwrap());
    let deadline = Instant::now() + PATIENCE;
    while !socket.exists() {
        if let Some(status) = passt.0.try_wait().unwrap() {
            let mut why = String::new();
            passt
                .0
                .stderr
                .take()
                .unwrap()
                .read_to_string(&mut why)
                .unwrap();
            panic!("passt ended with {status}: {why}");
        }
        assert!(Instant::now() < deadline, "passt makes no socket");
        std::thread::sleep(Duration::from_millis(10));
    }
    let _guest = GuestBuilder::image("kv", "ip=10.99.0.2/24 gw=10.99.0.1")
        .arg("--net")
        .arg(format!("socket={}", socket.display()))
        .live(life, "kv: ready");
    let pong = network.run("redis-cli", &["-h", "127.0.0.1", "PING"]);
    assert_eq!(pong.trim(), "PONG");
}

#[test]
fn a_tap_that_cannot_be_used_is_named_and_nothing_is_left() {
    if cannot_run(&[]) {
        return;
    }
    let network = Network::new();
    let links = || network.run("ip", &["link"]).matches("tap").count();
    let before = links();
    let _user = serve("net-echo", &network, Life::Booted);
    let busy = GuestBuilder::image("hello", "")
        .in_network(&network)
        .start()
        .wait();
    busy.assert_error(RESOURCE, &["tap0"]);
    let long = GuestBuilder::image("hello", "")
        .arg("--net")
        .arg("tap=a-name-that-is-too-long");
    let ended = long.start().wait();
    assert!(matches!(ended.code(), Some(2 | RESOURCE)), "{ended:#?}");
    assert!(
        ended
            .messages
            .join("\n")
            .contains("a-name-that-is-too-long"),
        "{ended:#?}"
    );
    let missing = GuestBuilder::image("hello", "")
        .arg("--net")
        .arg("socket=/nonexistent/socket");
    missing
        .start()
        .wait()
        .assert_error(RESOURCE, &["/nonexistent/socket"]);
    assert_eq!(links(), before);
}
