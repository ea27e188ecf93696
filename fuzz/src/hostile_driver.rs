//! A driver that does to a device whatever an input says, and then behaves: the device must have
//! survived it.

use tandem_devices::virtio::VirtioDevice;
use tandem_devices::virtio::registers::{REGISTER_BLOCK_SIZE, offset};
use tandem_devices::virtio::testing::{BUFFERS, Driver, MEMORY_SIZE};

use crate::input::Input;
use crate::step::{Step, place};

/// Most steps of one input.
pub(crate) const STEPS_MAX: usize = 256;
/// Indirect tables that a driver may write to.
const TABLES: u64 = BUFFERS + 0x1c_0000;
const TABLE_STRIDE: u64 = 0x1000;
const TABLES_MAX: u64 = 8;
/// Event index and indirect descriptors, among the features left out by a step.
const OPTIONAL: u64 = 3 << 28;

/// A device with its host side.
pub(crate) trait Subject {
    /// The device at power-on.
    fn device(&mut self) -> Box<dyn VirtioDevice>;

    /// Something happens at the host side.
    fn host(&mut self, what: u8, value: u32, driver: &mut Driver) {
        let _ = (what, value, driver);
    }

    /// A step is done: forgets what piles up at the host side.
    fn forget(&mut self) {}

    /// The host side as it was at first.
    fn calm(&mut self) {}

    /// A well-behaved driver, which has just started the device, uses it.
    fn works(&mut self, driver: &mut Driver);
}

/// Takes the steps in `data`, then resets the device and uses it as it is meant to be used.
pub(crate) fn drive(subject: &mut dyn Subject, data: &[u8]) {
    let mut driver = Driver::new(subject.device());
    let mut input = Input::new(data);
    for _ in 0..STEPS_MAX {
        let Some(step) = Step::read(&mut input) else {
            break;
        };
        take(subject, &mut driver, &step);
        subject.forget();
    }
    survive(subject, &mut driver);
}

/// Resets the device and uses it as it is meant to be used.
pub(crate) fn survive(subject: &mut dyn Subject, driver: &mut Driver) {
    subject.forget();
    subject.calm();
    // Once more for what a device learns of its host side only while it works.
    driver.set(offset::STATUS, 0);
    start(driver);
    driver.set(offset::STATUS, 0);
    let mut fresh = Driver::new(subject.device());
    assert!(
        registers(driver) == registers(&mut fresh),
        "a reset leads to power-on"
    );
    driver.poller.again.clear();
    start(driver);
    subject.works(driver);
}

fn start(driver: &mut Driver) {
    let offered = driver.offered();
    driver.start(offered);
    assert_eq!(driver.status(), 0xf, "the device starts again");
}

/// The register block. The configuration's generation survives a reset.
fn registers(driver: &mut Driver) -> Vec<u8> {
    let mut bytes = vec![0; REGISTER_BLOCK_SIZE];
    driver.transport.read(0, &mut bytes);
    let generation = offset::CONFIG_GENERATION as usize;
    bytes[generation..generation + 4].fill(0);
    bytes
}

fn take(subject: &mut dyn Subject, driver: &mut Driver, step: &Step) {
    let queue_of = |driver: &Driver, queue: u8| usize::from(queue) % driver.transport.queue_count();
    match step {
        Step::Start { without } => {
            let features = driver.offered() & !left_out(*without);
            driver.start(features);
        }
        Step::Negotiate { without } => {
            let features = driver.offered() & !left_out(*without);
            driver.negotiate(features);
        }
        Step::Rings {
            queue,
            descriptors,
            available,
            used,
        } => {
            let queue = queue_of(driver, *queue);
            driver.set_up_queue(queue, place(*descriptors), place(*available), place(*used));
        }
        Step::Register { at, value } => driver.set(u64::from(*at) * 4, *value),
        Step::Write { at, bytes } => {
            let at = u64::from(*at) % (REGISTER_BLOCK_SIZE as u64 + 16);
            driver.transport.write(at, bytes, &mut driver.poller);
        }
        Step::Read { at, len } => {
            let at = u64::from(*at) % (REGISTER_BLOCK_SIZE as u64 + 16);
            driver.transport.read(at, &mut vec![0; (*len).into()]);
        }
        Step::Descriptor { .. } => write_descriptor(driver, step),
        Step::Chain { queue, head, parts } => {
            let queue = queue_of(driver, *queue);
            let parts: Vec<_> = parts.iter().map(|part| part.descriptor()).collect();
            driver.send(queue, u16::from(*head) % 128, &parts);
        }
        Step::Offer { queue, head } => driver.offer(queue_of(driver, *queue), *head),
        Step::Kick { queue } => driver.set(offset::QUEUE_NOTIFY, (*queue).into()),
        Step::Poke { at, bytes } => {
            let room = MEMORY_SIZE - bytes.len();
            driver.put(u64::from(*at) % room as u64, bytes);
        }
        Step::Ready { token } => driver.ready((*token).into()),
        Step::Again => {
            for token in std::mem::take(&mut driver.poller.again) {
                driver.ready(token);
            }
        }
        Step::Host { what, value } => subject.host(*what, *value, driver),
        Step::Reset => driver.set(offset::STATUS, 0),
        Step::Pause => {
            driver.transport.quiesce(&mut driver.poller);
            driver.transport.kick_all(&mut driver.poller);
        }
        Step::Restore => restore(driver),
    }
    driver.poller.again.sort_unstable();
    driver.poller.again.dedup();
}

/// Features that the driver does not take: those of the device itself, and two of the queues.
fn left_out(without: u32) -> u64 {
    u64::from(without) & (0xff_ffff | OPTIONAL)
}

fn write_descriptor(driver: &Driver, step: &Step) {
    let Step::Descriptor {
        table,
        index,
        at,
        len,
        flags,
        next,
    } = step
    else {
        return;
    };
    let table = usize::from(*table);
    let table = if table < driver.transport.queue_count() {
        driver.desc(table)
    } else {
        TABLES + table as u64 % TABLES_MAX * TABLE_STRIDE
    };
    let flags = u16::from(flags & 7);
    driver.write_desc(
        table,
        (*index).into(),
        place(*at),
        *len,
        flags,
        (*next).into(),
    );
}

/// What was saved can be restored, in the same place as well. A device may say that it is busy.
fn restore(driver: &mut Driver) {
    driver.transport.quiesce(&mut driver.poller);
    let Ok((transport, device)) = driver.transport.save() else {
        return driver.transport.kick_all(&mut driver.poller);
    };
    let restored = driver
        .transport
        .restore(&transport, &device, &mut driver.poller);
    restored.expect("what was saved is restored");
    let (again, _) = driver.transport.save().expect("restored devices are saved");
    assert_eq!(again.queues, transport.queues, "saved again");
    driver.transport.kick_all(&mut driver.poller);
}
