//! Hostile rings: queues, chains and buffers under a device that does everything a device may do.

use std::collections::BTreeMap;

use tandem_devices::event::Poller;
use tandem_devices::state::{DeviceState, RestoreError, RngState, SaveError};
use tandem_devices::virtio::buffers::Buffers;
use tandem_devices::virtio::chain::Chain;
use tandem_devices::virtio::testing::{BUFFERS, Driver};
use tandem_devices::virtio::{Context, DeviceFault, DeviceKind, VirtioDevice};

use crate::hostile_driver::{Subject, drive};

/// Requests taken in one call.
const BATCH: usize = 256;
/// Most bytes of a request that are looked at.
const LOOK_MAX: usize = 0x1_0000;
/// What the device writes into the first byte of a request.
const MARK: u8 = 0xa5;

pub(crate) fn run(data: &[u8]) {
    drive(&mut Rings, data);
}

struct Rings;

impl Subject for Rings {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(Probe::default())
    }

    fn works(&mut self, driver: &mut Driver) {
        for queue in 0..driver.transport.queue_count() {
            driver.put(BUFFERS, &[1; 64]);
            driver.send(queue, 0, &[(BUFFERS, 32, false), (BUFFERS + 32, 32, true)]);
            assert_eq!(driver.take_used(queue), Some((0, 32)));
            assert_eq!(driver.bytes(BUFFERS + 32, 1), [MARK]);
        }
    }
}

/// A device with one queue for each way of returning requests.
#[derive(Default)]
struct Probe {
    /// Requests of the second queue that are returned together.
    kept: Vec<(u16, u32)>,
}

impl Probe {
    /// Returns requests one by one; every other one is first put back and taken again.
    fn one_by_one(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        loop {
            ctx.stop_kicks(0)?;
            for nth in 0..=BATCH {
                let Some(mut chain) = ctx.pop(0)? else { break };
                if nth == BATCH {
                    ctx.queues[0].undo_pop();
                    ctx.poller.again(0);
                    return Ok(());
                }
                if nth % 2 == 1 {
                    ctx.queues[0].undo_pop();
                    chain = ctx.pop(0)?.expect("what was put back is there");
                }
                let written = look(&chain);
                ctx.complete(0, chain.head, written)?;
            }
            if !ctx.want_kicks(0)? {
                return Ok(());
            }
        }
    }

    /// Takes all requests before it returns any.
    fn together(&mut self, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        while self.kept.len() < BATCH {
            let Some(chain) = ctx.pop(1)? else { break };
            self.kept.push((chain.head, look(&chain)));
        }
        let done = std::mem::take(&mut self.kept);
        ctx.complete_together(1, &done)?;
        ctx.want_kicks(1).map(drop)
    }
}

/// Reads and writes a request in all ways that there are; returns how much it has to write.
fn look(chain: &Chain) -> u32 {
    check(&chain.readable);
    check(&chain.writable);
    assert!(chain.writable.is_empty() || chain.writable.write_at(0, &[MARK]) == 1);
    chain.writable.mark_written(chain.writable.len());
    chain.writable.len() as u32
}

/// Buffers agree with themselves.
fn check(buffers: &Buffers) {
    let len: usize = buffers.iovecs().iter().map(|part| part.iov_len).sum();
    assert_eq!(len, buffers.len());
    let seen = len.min(LOOK_MAX);
    let mut bytes = vec![0; seen];
    assert_eq!(buffers.read_at(0, &mut bytes), seen);
    assert_eq!(buffers.slice(0, seen).to_vec(), bytes);
    let middle = len / 2;
    let mut rest = buffers.clone();
    rest.advance(middle);
    assert_eq!(rest.len(), len - middle);
    let mut whole = buffers.slice(0, middle);
    whole.append(&rest);
    assert_eq!(whole.len(), len);
    assert_eq!(whole.slice(0, seen).to_vec(), bytes);
    assert_eq!(buffers.read_at(len, &mut [0]), 0);
}

impl VirtioDevice for Probe {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Rng
    }

    fn queue_sizes(&self) -> &[u16] {
        &[256, 64]
    }

    fn features(&self) -> u64 {
        0
    }

    fn config(&self) -> &[u8] {
        b"configuration"
    }

    fn activate(&mut self, _features: u64, _ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        Ok(())
    }

    fn kick(&mut self, queue: usize, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        match queue {
            0 => self.one_by_one(ctx),
            _ => self.together(ctx),
        }
    }

    fn ready(&mut self, _token: u32, ctx: &mut Context<'_>) -> Result<(), DeviceFault> {
        self.one_by_one(ctx)?;
        self.together(ctx)
    }

    fn reset(&mut self, _poller: &mut dyn Poller) {
        self.kept.clear();
    }

    fn save(&self) -> Result<DeviceState, SaveError> {
        let (seed, position) = ([0; 32], 0);
        Ok(DeviceState::Rng(RngState { seed, position }))
    }

    fn restore(&mut self, _state: &DeviceState) -> Result<(), RestoreError> {
        Ok(())
    }

    fn counters(&self) -> BTreeMap<&'static str, u64> {
        BTreeMap::new()
    }
}
