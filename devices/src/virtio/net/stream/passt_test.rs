//! The backend with passt itself, where it is installed.
#![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

use std::fs::{Permissions, set_permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::Duration;

use super::*;
use crate::virtio::net::{HEADER_SIZE, Net, NetSettings, RECEIVE_QUEUE, TRANSMIT_QUEUE};
use crate::virtio::testing::{BUFFERS, Driver, skip};

const GUEST_MAC: [u8; 6] = [2, 0, 0, 0, 0, 3];
const OUTGOING: u64 = BUFFERS + 0x10_0000;
const BUFFER_SIZE: u64 = 4096;

/// A running passt that ends with the test.
struct Passt(Child);

impl Passt {
    /// Starts passt; none if it is not installed or does not work here.
    fn start(socket: &Path) -> Option<Self> {
        let child = Command::new("passt")
            .args(["--foreground", "--quiet", "--socket"])
            .arg(socket)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn();
        let mut passt = match child {
            Ok(child) => Self(child),
            Err(error) => {
                skip(&format!("cannot start passt ({error})"));
                return None;
            }
        };
        for _ in 0..100 {
            if socket.exists() {
                return Some(passt);
            }
            if let Ok(Some(status)) = passt.0.try_wait() {
                skip(&format!("passt does not work here ({status})"));
                return None;
            }
            thread::sleep(Duration::from_millis(20));
        }
        skip("passt made no socket");
        None
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A broadcast DHCPDISCOVER (RFC 2131) in UDP, IPv4 and Ethernet.
fn discover() -> Vec<u8> {
    let mut dhcp = vec![1, 1, 6, 0, 1, 2, 3, 4];
    dhcp.resize(28, 0);
    dhcp.extend(GUEST_MAC);
    dhcp.resize(236, 0);
    dhcp.extend([99, 130, 83, 99, 53, 1, 1, 255]);
    dhcp.resize(300, 0);
    let udp_len = 8 + dhcp.len() as u16;
    let mut frame = [&[0xff; 6][..], &GUEST_MAC, &[8, 0, 0x45, 0]].concat();
    frame.extend((20 + udp_len).to_be_bytes());
    frame.extend([0, 0, 0, 0, 64, 17]);
    frame.extend(checksum_of_header(20 + udp_len).to_be_bytes());
    frame.extend([0, 0, 0, 0, 255, 255, 255, 255]);
    frame.extend([0, 68, 0, 67]);
    frame.extend(udp_len.to_be_bytes());
    frame.extend([0, 0]);
    frame.extend(dhcp);
    frame
}

/// Checksum of the IPv4 header in [`discover`].
fn checksum_of_header(total: u16) -> u16 {
    let sum = 0x4500 + u32::from(total) + 0x4011 + 0xffff + 0xffff;
    !((sum & 0xffff) + (sum >> 16)) as u16
}

#[test]
fn passt_offers_an_address() {
    let dir = tempfile::tempdir().unwrap();
    // passt gives up being root before it makes its socket.
    set_permissions(dir.path(), Permissions::from_mode(0o777)).unwrap();
    let socket = dir.path().join("passt.sock");
    let Some(_passt) = Passt::start(&socket) else {
        return;
    };
    let backend = StreamBackend::connect(&socket).unwrap();
    let settings = NetSettings {
        mac: GUEST_MAC,
        mtu: None,
    };
    let mut driver = Driver::started(Box::new(Net::new(Box::new(backend), settings)), 0);
    for head in 0..64 {
        let at = BUFFERS + u64::from(head) * BUFFER_SIZE;
        driver.write_chain(RECEIVE_QUEUE, head, &[(at, BUFFER_SIZE as u32, true)]);
        driver.offer(RECEIVE_QUEUE, head);
    }
    let discover = discover();
    driver.put(OUTGOING, &[0; HEADER_SIZE]);
    driver.put(OUTGOING + HEADER_SIZE as u64, &discover);
    let len = (HEADER_SIZE + discover.len()) as u32;
    driver.send(TRANSMIT_QUEUE, 0, &[(OUTGOING, len, false)]);
    assert_eq!(driver.take_used(TRANSMIT_QUEUE), Some((0, 0)));
    for _ in 0..100 {
        driver.ready(0);
        while let Some((head, len)) = driver.take_used(RECEIVE_QUEUE) {
            let frame = driver.bytes(BUFFERS + u64::from(head) * BUFFER_SIZE, len as usize);
            if is_offer(&frame[HEADER_SIZE..]) {
                return;
            }
        }
        thread::sleep(Duration::from_millis(20));
    }
    panic!("passt did not answer");
}

/// Whether a frame goes from a DHCP server to a client and answers our request.
fn is_offer(frame: &[u8]) -> bool {
    frame.get(34..38) == Some(&[0, 67, 0, 68])
        && frame.get(42..50) == Some(&[2, 1, 6, 0, 1, 2, 3, 4])
        && frame.get(70..76) == Some(&GUEST_MAC)
}
