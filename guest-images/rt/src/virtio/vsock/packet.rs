//! Packet headers (VIRTIO 1.2, section 5.10.6).

/// Bytes of a header.
pub(crate) const HEADER_BYTES: usize = 44;
/// `VIRTIO_VSOCK_TYPE_STREAM`.
const TYPE_STREAM: u16 = 1;

/// What a packet is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Operation {
    Request = 1,
    Response = 2,
    Reset = 3,
    Shutdown = 4,
    Data = 5,
    CreditUpdate = 6,
    CreditRequest = 7,
}

impl Operation {
    fn from_number(number: u16) -> Option<Self> {
        use Operation::{CreditRequest, CreditUpdate, Data, Request, Reset, Response, Shutdown};
        let all = [
            Request,
            Response,
            Reset,
            Shutdown,
            Data,
            CreditUpdate,
            CreditRequest,
        ];
        all.into_iter()
            .find(|operation| *operation as u16 == number)
    }
}

/// An address: context id and port.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address {
    pub(crate) cid: u64,
    pub(crate) port: u32,
}

/// A packet's header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Header {
    pub(crate) from: Address,
    pub(crate) to: Address,
    pub(crate) operation: Operation,
    /// Bytes of data that follow.
    pub(crate) len: u32,
    /// With [`Operation::Shutdown`]: bit 0, the sender receives no more; bit 1, sends no more.
    pub(crate) flags: u32,
    /// Bytes that the sender can hold, in all.
    pub(crate) buffer: u32,
    /// Bytes that the sender has consumed so far, modulo 2^32.
    pub(crate) consumed: u32,
}

impl Header {
    /// The header at the start of `bytes`; `None` if it is cut, or not of a stream.
    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let u16_at = |at: usize| Some(u16::from_le_bytes(bytes.get(at..at + 2)?.try_into().ok()?));
        let u32_at = |at: usize| Some(u32::from_le_bytes(bytes.get(at..at + 4)?.try_into().ok()?));
        let u64_at = |at: usize| Some(u64::from_le_bytes(bytes.get(at..at + 8)?.try_into().ok()?));
        if u16_at(28)? != TYPE_STREAM {
            return None;
        }
        Some(Self {
            from: Address {
                cid: u64_at(0)?,
                port: u32_at(16)?,
            },
            to: Address {
                cid: u64_at(8)?,
                port: u32_at(20)?,
            },
            operation: Operation::from_number(u16_at(30)?)?,
            len: u32_at(24)?,
            flags: u32_at(32)?,
            buffer: u32_at(36)?,
            consumed: u32_at(40)?,
        })
    }

    /// The header as it goes over the queue.
    pub(crate) fn to_bytes(self) -> [u8; HEADER_BYTES] {
        let mut bytes = [0; HEADER_BYTES];
        bytes[0..8].copy_from_slice(&self.from.cid.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.to.cid.to_le_bytes());
        bytes[16..20].copy_from_slice(&self.from.port.to_le_bytes());
        bytes[20..24].copy_from_slice(&self.to.port.to_le_bytes());
        bytes[24..28].copy_from_slice(&self.len.to_le_bytes());
        bytes[28..30].copy_from_slice(&TYPE_STREAM.to_le_bytes());
        bytes[30..32].copy_from_slice(&(self.operation as u16).to_le_bytes());
        bytes[32..36].copy_from_slice(&self.flags.to_le_bytes());
        bytes[36..40].copy_from_slice(&self.buffer.to_le_bytes());
        bytes[40..44].copy_from_slice(&self.consumed.to_le_bytes());
        bytes
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn fields_are_where_the_standard_puts_them() {
        let header = Header {
            from: Address {
                cid: 3,
                port: 0x1122_3344,
            },
            to: Address { cid: 2, port: 1024 },
            operation: Operation::Data,
            len: 5,
            flags: 3,
            buffer: 0x1_0000,
            consumed: 7,
        };
        let expected = [
            &[3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0][..],
            &[0x44, 0x33, 0x22, 0x11, 0, 4, 0, 0, 5, 0, 0, 0, 1, 0, 5, 0],
            &[3, 0, 0, 0, 0, 0, 1, 0, 7, 0, 0, 0],
        ];
        assert_eq!(header.to_bytes()[..], expected.concat());
    }

    proptest! {
        /// Whatever arrives is refused or means exactly what it says.
        #[test]
        fn what_is_read_is_what_is_written(
            mut bytes in proptest::collection::vec(any::<u8>(), HEADER_BYTES),
            operation in 0..9u16,
            cut in 0..HEADER_BYTES,
        ) {
            bytes[28..32].copy_from_slice(&[1, 0, operation as u8, 0]);
            let header = Header::read(&bytes);
            prop_assert_eq!(header.is_some(), (1..=7).contains(&operation));
            if let Some(header) = header {
                prop_assert_eq!(&header.to_bytes()[..], &bytes[..]);
            }
            prop_assert_eq!(Header::read(&bytes[..cut]), None);
            bytes[28] = 2;
            prop_assert_eq!(Header::read(&bytes), None);
        }
    }
}
