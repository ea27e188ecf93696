//! A hostile driver at the virtio console.

use tandem_devices::virtio::VirtioDevice;
use tandem_devices::virtio::console::memory::MemoryBackend;
use tandem_devices::virtio::console::{Console, INPUT_QUEUE, OUTPUT_QUEUE, WindowSize};
use tandem_devices::virtio::testing::{BUFFERS, Driver};

use crate::hostile_driver::{Subject, drive};

/// The window at first.
const WINDOW: WindowSize = WindowSize {
    columns: 80,
    rows: 25,
};
/// Most bytes typed ahead.
const TYPED_MAX: usize = 0x4000;

pub(crate) fn run(data: &[u8]) {
    drive(&mut Screen::new(), data);
}

/// A console in memory.
pub(crate) struct Screen {
    backend: MemoryBackend,
}

impl Screen {
    pub(crate) fn new() -> Self {
        let backend = MemoryBackend::with_room(usize::MAX);
        backend.screen().window = Some(WINDOW);
        Self { backend }
    }
}

impl Subject for Screen {
    fn device(&mut self) -> Box<dyn VirtioDevice> {
        Box::new(Console::new(Box::new(self.backend.clone())))
    }

    fn host(&mut self, what: u8, value: u32, driver: &mut Driver) {
        let mut screen = self.backend.screen();
        match what % 3 {
            0 => screen.room = value as usize % 0x4_0000,
            1 => {
                let (columns, rows) = (value as u16, (value >> 16) as u16);
                screen.window = Some(WindowSize { columns, rows });
            }
            _ => {
                let len = value as usize % TYPED_MAX;
                screen.input.resize(len, b'x');
            }
        }
        drop(screen);
        driver.ready(0);
    }

    fn forget(&mut self) {
        self.backend.screen().output.clear();
    }

    fn calm(&mut self) {
        let mut screen = self.backend.screen();
        screen.room = usize::MAX;
        screen.window = Some(WINDOW);
        screen.input.clear();
    }

    fn works(&mut self, driver: &mut Driver) {
        driver.put(BUFFERS, b"to the screen");
        driver.send(OUTPUT_QUEUE, 0, &[(BUFFERS, 13, false)]);
        assert_eq!(driver.take_used(OUTPUT_QUEUE), Some((0, 0)));
        assert_eq!(self.backend.screen().output, b"to the screen");
        self.backend.screen().input = b"typed".to_vec();
        driver.send(INPUT_QUEUE, 0, &[(BUFFERS, 64, true)]);
        driver.ready(0);
        assert_eq!(driver.take_used(INPUT_QUEUE), Some((0, 5)));
        assert_eq!(driver.bytes(BUFFERS, 5), b"typed");
    }
}
