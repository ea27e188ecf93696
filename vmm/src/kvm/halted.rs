//! Whether a vCPU is halted, without taking it out of the guest: KVM's binary statistics of a vCPU say
//! so (KVM API 4.134, KVM_GET_STATS_FD; the statistic `blocking`).
//!
//! Cost: one `pread` of eight bytes, half a microsecond. A vCPU that KVM still polls for an interrupt
//! (`halt_poll_ns`) is not halted yet; KVM polls only while no other thread wants the CPU.
#![allow(unsafe_code)]
// UNSAFETY: a request of KVM that no crate wraps gives a new descriptor.

use std::fs::File;
use std::io;
use std::mem::offset_of;
use std::os::fd::{AsRawFd, FromRawFd};
use std::os::unix::fs::FileExt;

use kvm_bindings::{KVMIO, kvm_stats_desc, kvm_stats_header};
use vmm_sys_util::ioctl::{_IOC_NONE, ioctl, ioctl_expr};

/// The request's number (linux/kvm.h).
const GET_STATS_FD: libc::c_ulong = ioctl_expr(_IOC_NONE, KVMIO, 0xce, 0);

/// The statistic's name.
const NAME: &[u8] = b"blocking";
/// Statistics of a vCPU at most, and length of their names in bytes at most, that are believed.
const STATISTICS_MAX: u32 = 1024;
const NAME_MAX: u32 = 256;

/// Tells whether one vCPU is halted.
#[derive(Debug)]
pub struct HaltedProbe {
    statistics: File,
    /// Where in them it stands.
    at: u64,
}

impl HaltedProbe {
    /// A probe of `vcpu`, which keeps it open.
    ///
    /// # Errors
    /// When this KVM keeps no such statistic, or the host has no descriptors left.
    pub fn new(vcpu: &impl AsRawFd) -> io::Result<Self> {
        // SAFETY: the request takes no argument; what it returns is a descriptor of ours, or an error.
        let statistics = unsafe {
            let fd = ioctl(vcpu, GET_STATS_FD);
            if fd < 0 {
                return Err(io::Error::last_os_error());
            }
            File::from_raw_fd(fd)
        };
        let at = find(&statistics, NAME)?;
        Ok(Self { statistics, at })
    }

    /// Whether the vCPU is halted now; false if KVM does not tell.
    pub fn is_halted(&self) -> bool {
        let mut value = [0; 8];
        let read = self.statistics.read_exact_at(&mut value, self.at);
        read.is_ok() && u64::from_ne_bytes(value) != 0
    }
}

/// Where the value of the statistic `name` stands.
fn find(statistics: &File, name: &[u8]) -> io::Result<u64> {
    let header = |field: usize| read_u32(statistics, field as u64);
    let name_size = header(offset_of!(kvm_stats_header, name_size))?;
    let count = header(offset_of!(kvm_stats_header, num_desc))?;
    let descriptions = header(offset_of!(kvm_stats_header, desc_offset))?;
    let data = header(offset_of!(kvm_stats_header, data_offset))?;
    if count > STATISTICS_MAX || name_size > NAME_MAX {
        return Err(io::ErrorKind::InvalidData.into());
    }
    let fixed = size_of::<kvm_stats_desc>() as u64;
    let mut found = vec![0; name_size as usize];
    for index in 0..u64::from(count) {
        let description = u64::from(descriptions) + index * (fixed + u64::from(name_size));
        statistics.read_exact_at(&mut found, description + fixed)?;
        if found.split(|&byte| byte == 0).next() == Some(name) {
            let offset = description + offset_of!(kvm_stats_desc, offset) as u64;
            return Ok(u64::from(data) + u64::from(read_u32(statistics, offset)?));
        }
    }
    Err(io::ErrorKind::Unsupported.into())
}

fn read_u32(file: &File, at: u64) -> io::Result<u32> {
    let mut value = [0; 4];
    file.read_exact_at(&mut value, at)?;
    Ok(u32::from_ne_bytes(value))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "test code fails by panicking")]

    use std::io::Write;

    use kvm_ioctls::Kvm;

    use super::*;

    #[test]
    fn a_vcpu_that_never_ran_is_not_halted() {
        let Ok(kvm) = Kvm::new() else {
            println!("skipped: there is no KVM");
            return;
        };
        let vm = kvm.create_vm().unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        assert!(!HaltedProbe::new(&vcpu).unwrap().is_halted());
    }

    /// What KVM would show: a header, descriptions of `statistics` with their offsets, values.
    fn statistics(statistics: &[(&[u8], u32)], count: u32, values: &[u8]) -> File {
        const NAME_SIZE: usize = 16;
        let mut bytes = Vec::new();
        let header = size_of::<kvm_stats_header>() as u32;
        let description = (size_of::<kvm_stats_desc>() + NAME_SIZE) as u32;
        let data = header + description * statistics.len() as u32;
        for field in [0, NAME_SIZE as u32, count, 0, header, data] {
            bytes.extend(field.to_ne_bytes());
        }
        for (name, offset) in statistics {
            bytes.extend([0; offset_of!(kvm_stats_desc, offset)]);
            bytes.extend(offset.to_ne_bytes());
            bytes.extend([0; 4]);
            let mut padded = name.to_vec();
            padded.resize(NAME_SIZE, 0);
            bytes.extend(padded);
        }
        bytes.extend(values);
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(&bytes).unwrap();
        file
    }

    #[test]
    fn a_statistic_is_found_by_its_whole_name() {
        let list: [(&[u8], u32); 3] = [(b"blocking_time", 0), (b"block", 8), (b"blocking", 16)];
        let values = [[1; 8], [2; 8], [3; 8]].concat();
        let file = statistics(&list, 3, &values);
        let at = find(&file, NAME).unwrap();
        let mut value = [0; 8];
        file.read_exact_at(&mut value, at).unwrap();
        assert_eq!(value, [3; 8]);
        assert!(
            HaltedProbe {
                statistics: file,
                at
            }
            .is_halted()
        );
    }

    #[test]
    fn statistics_that_cannot_be_are_refused() {
        let lacks = statistics(&[(b"exits", 0)], 1, &[0; 8]);
        assert_eq!(
            find(&lacks, NAME).unwrap_err().kind(),
            io::ErrorKind::Unsupported
        );
        let many = statistics(&[(b"exits", 0)], u32::MAX, &[0; 8]);
        assert_eq!(
            find(&many, NAME).unwrap_err().kind(),
            io::ErrorKind::InvalidData
        );
        let short = statistics(&[(b"exits", 0)], 2, &[]);
        assert_eq!(
            find(&short, NAME).unwrap_err().kind(),
            io::ErrorKind::UnexpectedEof
        );
    }
}
