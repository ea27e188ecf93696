//! What the host's kernel knows about network interfaces.
#![allow(unsafe_code)]
// UNSAFETY: interfaces are looked at and configured by ioctls, which take plain structures by
// address.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use libc::{c_int, c_ulong, ifreq};
use rustix::net::{AddressFamily, SocketFlags, SocketType, socket_with};

use super::NAME_MAX;
use crate::virtio::net::{HEADER_SIZE, Offloads};

pub(super) fn interface_index(name: &str) -> Option<u32> {
    let name = CString::new(name).ok()?;
    // SAFETY: the name is a valid C string for the call.
    match unsafe { libc::if_nametoindex(name.as_ptr()) } {
        0 => None,
        index => Some(index),
    }
}

/// A request about the interface `name`, whose length was checked.
fn request(name: &str) -> ifreq {
    // SAFETY: all zero is a valid `ifreq`.
    let mut request: ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(NAME_MAX)) {
        *to = from as libc::c_char;
    }
    request
}

/// Issues an ioctl whose argument is a structure by address.
fn ioctl_ref<T>(fd: BorrowedFd<'_>, number: c_ulong, argument: &mut T) -> io::Result<()> {
    // SAFETY: callers pair each number with the structure that it reads or writes.
    match unsafe { libc::ioctl(fd.as_raw_fd(), number, std::ptr::from_mut(argument)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

pub(super) fn attach(file: &File, name: &str) -> io::Result<()> {
    let mut request = request(name);
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    ioctl_ref(file.as_fd(), libc::TUNSETIFF, &mut request)
}

pub(super) fn set_header_size(file: &File) -> io::Result<()> {
    let mut size = HEADER_SIZE as c_int;
    ioctl_ref(file.as_fd(), libc::TUNSETVNETHDRSZ, &mut size)
}

/// Says what the host may leave undone in frames to the guest.
pub(super) fn set_offloads(file: &File, offloads: Offloads) -> io::Result<()> {
    let flags = [
        (Offloads::CHECKSUM, libc::TUN_F_CSUM),
        (Offloads::TSO4, libc::TUN_F_TSO4),
        (Offloads::TSO6, libc::TUN_F_TSO6),
        (Offloads::ECN, libc::TUN_F_TSO_ECN),
    ]
    .iter()
    .filter(|(offload, _)| offloads.contains(*offload))
    .fold(0, |all, (_, flag)| all | flag);
    // SAFETY: this ioctl takes its argument by value.
    match unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETOFFLOAD, c_ulong::from(flags)) } {
        -1 => Err(io::Error::last_os_error()),
        _ => Ok(()),
    }
}

pub(super) fn control_socket() -> io::Result<OwnedFd> {
    Ok(socket_with(
        AddressFamily::INET,
        SocketType::DGRAM,
        SocketFlags::CLOEXEC,
        None,
    )?)
}

pub(super) fn interface_flags(control: &OwnedFd, name: &str) -> io::Result<c_int> {
    let mut request = request(name);
    ioctl_ref(control.as_fd(), libc::SIOCGIFFLAGS, &mut request)?;
    // SAFETY: the host filled in the flags.
    Ok(c_int::from(unsafe { request.ifr_ifru.ifru_flags }))
}

pub(super) fn take_up(control: &OwnedFd, name: &str) -> io::Result<()> {
    let mut request = request(name);
    let flags = interface_flags(control, name)? | libc::IFF_UP;
    request.ifr_ifru.ifru_flags = flags as libc::c_short;
    ioctl_ref(control.as_fd(), libc::SIOCSIFFLAGS, &mut request)
}

pub(super) fn interface_mtu(control: &OwnedFd, name: &str) -> io::Result<usize> {
    let mut request = request(name);
    ioctl_ref(control.as_fd(), libc::SIOCGIFMTU, &mut request)?;
    // SAFETY: the host filled in the MTU.
    Ok(usize::try_from(unsafe { request.ifr_ifru.ifru_mtu }).unwrap_or(0))
}

/// `ETHTOOL_GDRVINFO` and what it fills in.
const ETHTOOL_GDRVINFO: u32 = 3;

#[repr(C)]
struct EthtoolDriverInfo {
    command: u32,
    driver: [u8; 32],
    version: [u8; 32],
    firmware: [u8; 32],
    bus: [u8; 32],
    others: [u8; 64],
}

/// The driver of an interface and what it says of the bus: for tun, its mode.
pub(super) fn interface_driver(control: &OwnedFd, name: &str) -> io::Result<(String, String)> {
    let mut info = EthtoolDriverInfo {
        command: ETHTOOL_GDRVINFO,
        driver: [0; 32],
        version: [0; 32],
        firmware: [0; 32],
        bus: [0; 32],
        others: [0; 64],
    };
    let mut request = request(name);
    request.ifr_ifru.ifru_data = std::ptr::from_mut(&mut info).cast();
    ioctl_ref(control.as_fd(), libc::SIOCETHTOOL, &mut request)?;
    let text = |bytes: &[u8]| {
        let end = bytes.iter().position(|b| *b == 0).unwrap_or(bytes.len());
        String::from_utf8_lossy(&bytes[..end]).into_owned()
    };
    Ok((text(&info.driver), text(&info.bus)))
}
