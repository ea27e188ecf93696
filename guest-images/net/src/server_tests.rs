use super::*;
use crate::testing::{World, lonely_request};
use smoltcp::socket::tcp::State;

fn small() -> Config {
    Config {
        connections_max: Some(8),
        buffer_bytes: 4096,
        ..Config::default()
    }
}

#[test]
fn answers_and_closes() {
    let mut world = World::new(&small());
    let handle = world.connect();
    assert_eq!(world.echo(handle, b"hello", 100), b"hello");
    world.socket(handle).close();
    world.run(100);
    assert_eq!(world.socket(handle).state(), State::TimeWait);
    assert_eq!(world.server.service.open, 0);
}

#[test]
fn a_request_and_its_answer_take_two_frames() {
    let mut world = World::new(&small());
    let handle = world.connect();
    world.echo(handle, b"first", 100);
    world.run(100);
    let before = world.log.len();
    assert_eq!(world.echo(handle, b"second", 100), b"second");
    assert_eq!(
        world.log.len() - before,
        1,
        "the answer carries the acknowledgement"
    );
}

#[test]
fn long_streams_pass_small_buffers() {
    let mut world = World::new(&small());
    let handle = world.connect();
    let octets: Vec<u8> = (0..300_000u32).map(|index| (index * 7 / 5) as u8).collect();
    assert!(world.echo(handle, &octets, 5000) == octets);
}

#[test]
fn all_connections_work_at_the_same_time() {
    let config = Config {
        connections_max: Some(64),
        buffer_bytes: 4096,
        ..Config::default()
    };
    let mut world = World::new(&config);
    let handles: Vec<_> = (0..64).map(|_| world.connect()).collect();
    world.run(50);
    assert_eq!(world.server.service.open, 64);
    for (index, handle) in handles.into_iter().enumerate() {
        let octets = format!("connection {index}");
        assert_eq!(
            world.echo(handle, octets.as_bytes(), 100),
            octets.as_bytes()
        );
    }
}

#[test]
fn a_thousand_connections_in_a_row() {
    let mut world = World::new(&small());
    for round in 0..1000 {
        let handle = world.connect();
        assert_eq!(world.echo(handle, b"x", 100), b"x", "connection {round}");
        world.socket(handle).close();
        world.run(3);
        world.sockets.remove(handle);
    }
    assert!(
        world.server.sockets.iter().count() <= 12,
        "sockets are used again"
    );
}

#[test]
fn peers_that_vanish_are_replaced() {
    let mut world = World::new(&small());
    for round in 0..100 {
        let handle = world.connect();
        assert_eq!(world.echo(handle, b"x", 100), b"x", "connection {round}");
        world.socket(handle).abort();
        world.run(3);
        world.sockets.remove(handle);
    }
    assert_eq!(world.server.service.open, 0);
}

#[test]
fn a_flood_of_requests_does_not_keep_others_out() {
    let mut world = World::new(&small());
    let first = world.connect();
    assert_eq!(world.echo(first, b"before", 100), b"before");
    for number in 0..5000 {
        world.inject(lonely_request(number));
        if number % 50 == 0 {
            world.run(1);
        }
    }
    assert_eq!(world.echo(first, b"during", 100), b"during");
    let second = world.connect();
    assert_eq!(world.echo(second, b"after", 3000), b"after");
}

#[test]
fn a_full_server_lets_new_peers_wait() {
    let mut world = World::new(&small());
    let mut handles = Vec::new();
    for _ in 0..12 {
        handles.push(world.connect());
        world.run(5);
    }
    assert_eq!(world.server.service.open, 12);
    let late = world.connect();
    world.run(50);
    assert_eq!(
        world.socket(late).state(),
        State::SynSent,
        "neither accepted nor refused"
    );
    world.socket(handles[0]).close();
    world.run(50);
    assert_eq!(world.echo(late, b"at last", 5000), b"at last");
}

#[test]
fn the_same_seed_gives_the_same_frames() {
    let run = |seed| {
        let mut world = World::new(&Config { seed, ..small() });
        for _ in 0..5 {
            let handle = world.connect();
            world.echo(handle, &[b'x'; 10_000], 200);
            world.socket(handle).close();
            world.run(10);
        }
        world.log
    };
    assert!(run(1) == run(1));
    assert!(run(1) != run(2));
}

#[test]
fn silent_peers_are_given_up() {
    let mut world = World::new(&small());
    let handle = world.connect();
    world.echo(handle, b"x", 100);
    world.sockets.remove(handle);
    // The client's side answers with resets once it is asked.
    world.run(300_000);
    assert_eq!(world.server.service.open, 0);
}

#[test]
fn an_idle_server_knows_when_to_wake() {
    let mut world = World::new(&small());
    world.run(10);
    assert_eq!(
        world.server.turn(world.now),
        Turn {
            busy: false,
            wake_at: None
        }
    );
    world.inject(lonely_request(1));
    world.run(1);
    let turn = world.server.turn(world.now);
    assert!(turn.wake_at.is_some_and(|at| at > world.now));
}

#[test]
fn link_local_addresses_follow_from_the_card() {
    let address = link_local(EthernetAddress([0x52, 0x54, 0, 0x12, 0x34, 0x56]));
    assert_eq!(
        address,
        "fe80::5054:ff:fe12:3456"
            .parse::<Ipv6Address>()
            .expect("an address")
    );
}
