//! A guest of a few instructions that computes in ring 3, asks the VMM for numbers and waits for
//! its local APIC's timer in ring 0, so that whatever is lost, repeated or changed changes its result.
#![allow(
    unsafe_code,
    clippy::unwrap_used,
    clippy::panic,
    reason = "test code fails by panicking"
)]
// UNSAFETY: the guest's code is assembled into the test program and read from there.

use std::arch::global_asm;
use std::cell::Cell;
use std::sync::Arc;

use kvm_bindings::{kvm_regs, kvm_segment};
use kvm_ioctls::{Kvm, VcpuExit, VcpuFd};
use tandem_devices::GuestMemory;
use tandem_devices::virtio::registers::RegisterBank;
use vm_memory::{Bytes, GuestAddress};

use crate::boot::Entry;
use crate::cpu::PlatformKind;
use crate::kvm::state::{KvmState, VcpuProbe, VcpuState, trap_may_be_on_its_way};
use crate::kvm::vm::{Vm, open_kvm};
use crate::snapshot::{Sections, Writer};
use crate::{cpu, memory};

/// Guest memory in bytes.
pub(super) const MEMORY: u64 = 8 << 20;

const GDT: u64 = 0x1000;
const IDT: u64 = 0x2000;
const TSS: u64 = 0x4000;
/// Bytes of the TSS before its I/O bitmap, and of the bitmap.
const TSS_SIZE: u64 = 0x68;
const BITMAP_SIZE: u64 = 8192;
const PAGE_TABLES: u64 = 0x1_0000;
const KERNEL_STACK: u64 = 0x2_0000;
/// Interrupts taken, then times that the timer was started.
const TICKS: u64 = 0x3_0000;
const STARTS: u64 = 0x3_0008;
/// Where the guest leaves its registers at the end.
const RESULT: u64 = 0x3_1000;
const RESULT_SIZE: usize = 64;
const CODE: u64 = 0x10_0000;
/// What it changes on the way.
const DATA: u64 = 0x40_0000;
/// Memory that nothing is in.
const OTHER_DATA: u64 = 0x60_0000;
const DATA_SIZE: usize = 256 << 10;

/// A number is read from here.
const PORT_NUMBER: u16 = 0xf1;
/// The end is written to here.
const PORT_END: u16 = 0xf0;

const TIMER_VECTOR: u64 = 0x40;
const BREAKPOINT_VECTOR: u64 = 3;
/// Timer counts: 60 us.
const TIMER_COUNT: u32 = 60_000;

// rcx: rounds to go. rax: the random number. xmm1, st(0): sums.
global_asm!(
    ".pushsection .rodata.moving_guest, \"a\"",
    ".globl moving_guest_user",
    "moving_guest_user:",
    "    mov r10, 6364136223846793005",
    "    mov r11, 1442695040888963407",
    "    xor eax, eax",
    "    xor r8d, r8d",
    "    fldz",
    "    pxor xmm1, xmm1",
    "2:  mov esi, 3000",
    "3:  imul rax, r10",
    "    add rax, r11",
    "    mov rdi, rax",
    "    shr rdi, 44",
    "    and edi, 0x3fff8",
    "    xor [rdi + 0x400000], rax",
    "    movq xmm0, rax",
    "    paddq xmm1, xmm0",
    "    fld1",
    "    faddp",
    "    dec esi",
    "    jnz 3b",
    "    mov rbx, rax",
    "    mov edx, 0xf1",
    "    in eax, dx",
    "    imul r8, r10",
    "    add r8, rax",
    "    mov rax, rbx",
    "    int3",
    "    dec rcx",
    "    jnz 2b",
    "    mov [0x31000], rax",
    "    mov [0x31008], r8",
    "    movdqu [0x31010], xmm1",
    "    fstp qword ptr [0x31020]",
    "    mov edx, 0xf0",
    "    out dx, al",
    "4:  jmp 4b",
    ".globl moving_guest_breakpoint",
    "moving_guest_breakpoint:",
    "    push rax",
    "    inc qword ptr [0x30008]",
    "    mov eax, 0xfee00380",
    "    mov dword ptr [rax], 60000",
    "5:  mov rax, [0x30000]",
    "    cmp rax, [0x30008]",
    "    jae 6f",
    "    sti",
    "    hlt",
    "    cli",
    "    jmp 5b",
    "6:  pop rax",
    "    iretq",
    ".globl moving_guest_timer",
    "moving_guest_timer:",
    "    push rax",
    "    inc qword ptr [0x30000]",
    "    mov eax, 0xfee000b0",
    "    mov dword ptr [rax], 0",
    "    pop rax",
    "    iretq",
    ".globl moving_guest_end",
    "moving_guest_end:",
    ".popsection",
);

unsafe extern "C" {
    #[link_name = "moving_guest_user"]
    static USER: u8;
    #[link_name = "moving_guest_breakpoint"]
    static BREAKPOINT: u8;
    #[link_name = "moving_guest_timer"]
    static TIMER: u8;
    #[link_name = "moving_guest_end"]
    static END: u8;
}

/// The code, and where the handlers of breakpoint and timer are in it.
fn code() -> (&'static [u8], u64, u64) {
    let (start, end) = (&raw const USER, &raw const END);
    let offset = |of: *const u8| of as u64 - start as u64;
    // SAFETY: the symbols bound one piece of the program's read-only data.
    let bytes = unsafe { std::slice::from_raw_parts(start, offset(end) as usize) };
    (
        bytes,
        offset(&raw const BREAKPOINT),
        offset(&raw const TIMER),
    )
}

/// How the local APIC's timer counts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Counting {
    /// Once for each start.
    Once,
    /// Again and again.
    Periodically,
}

/// A virtual machine with its only vCPU.
pub(super) struct Machine {
    pub(super) kvm: Kvm,
    pub(super) memory: Arc<GuestMemory>,
    pub(super) vcpu: VcpuFd,
    pub(super) probe: Option<VcpuProbe>,
    pub(super) vm: Vm,
    /// Where the data is.
    data_at: Cell<u64>,
}

/// A guest as it stood.
pub(super) struct Checkpoint {
    pub(super) kvm: KvmState,
    pub(super) vcpu: VcpuState,
    memory: Vec<u8>,
    data_at: u64,
}

impl Checkpoint {
    /// Has the data elsewhere in memory, and page tables that lead there.
    pub(super) fn move_data(&mut self) {
        let (from, to) = (self.data_at, DATA + OTHER_DATA - self.data_at);
        self.memory
            .copy_within(from as usize..from as usize + DATA_SIZE, to as usize);
        self.memory[from as usize..][..DATA_SIZE].fill(0xee);
        let entry = (PAGE_TABLES + 0x2000 + (DATA >> 21) * 8) as usize;
        self.memory[entry..entry + 8].copy_from_slice(&(to | 0x87).to_le_bytes());
        self.data_at = to;
    }
}

/// What a run of the guest came to.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Outcome {
    pub(super) registers: Vec<u8>,
    pub(super) data: Vec<u8>,
    pub(super) starts: u64,
    pub(super) ticks: u64,
}

/// Why the vCPU came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Stop {
    Kick,
    Number,
    End,
}

impl Machine {
    /// A virtual machine that never ran; none where there is no KVM.
    pub(super) fn empty() -> Option<Self> {
        let kvm = open_kvm().ok()?;
        let memory = memory::allocate(MEMORY, false).unwrap();
        let registers = RegisterBank::new(1).unwrap();
        let vm = Vm::new(&kvm, &memory, &registers).unwrap();
        let vcpu = vm.create_vcpu(0).unwrap();
        Some(Self {
            kvm,
            memory,
            vcpu,
            probe: None,
            vm,
            data_at: Cell::new(DATA),
        })
    }

    /// A guest about to compute `rounds` rounds.
    pub(super) fn started(rounds: u64, counting: Counting) -> Option<Self> {
        let machine = Self::empty()?;
        let entry = Entry::Pvh(CODE as u32);
        cpu::set_up(
            &machine.kvm,
            std::slice::from_ref(&machine.vcpu),
            &machine.memory,
            entry,
        )
        .unwrap();
        machine.write_tables();
        machine.set_registers(rounds);
        machine.set_timer(counting);
        Some(machine)
    }

    fn put(&self, at: u64, value: u64) {
        self.memory.write_obj(value, GuestAddress(at)).unwrap();
    }

    fn get(&self, at: u64) -> u64 {
        self.memory.read_obj(GuestAddress(at)).unwrap()
    }

    /// Four identity-mapped GiB for everybody, segments, gates, and all ports for ring 3.
    fn write_tables(&self) {
        const TABLE: u64 = 0x1000;
        self.put(PAGE_TABLES, (PAGE_TABLES + TABLE) | 7);
        for gib in 0..4 {
            let directory = PAGE_TABLES + (2 + gib) * TABLE;
            self.put(PAGE_TABLES + TABLE + gib * 8, directory | 7);
            for entry in 0..512 {
                self.put(directory + entry * 8, ((gib << 30) + (entry << 21)) | 0x87);
            }
        }
        let (code, breakpoint, timer) = code();
        self.memory.write_slice(code, GuestAddress(CODE)).unwrap();
        for (vector, handler, gate) in [
            (BREAKPOINT_VECTOR, CODE + breakpoint, 0xee00),
            (TIMER_VECTOR, CODE + timer, 0x8e00),
        ] {
            let low = handler & 0xffff | 8 << 16 | gate << 32 | (handler >> 16 & 0xffff) << 48;
            self.put(IDT + vector * 16, low);
        }
        let limit = TSS_SIZE + BITMAP_SIZE;
        let descriptors = [
            0x00af_9b00_0000_ffff,
            0x00cf_9300_0000_ffff,
            0x00af_fb00_0000_ffff,
            0x00cf_f300_0000_ffff,
            limit | TSS << 16 | 0x89 << 40,
        ];
        for (descriptor, at) in descriptors.into_iter().zip((GDT + 8..).step_by(8)) {
            self.put(at, descriptor);
        }
        self.put(TSS + 4, KERNEL_STACK);
        self.memory
            .write_obj(TSS_SIZE as u16, GuestAddress(TSS + 102))
            .unwrap();
        self.memory
            .write_obj(0xffu8, GuestAddress(TSS + limit))
            .unwrap();
    }

    fn set_registers(&self, rounds: u64) {
        let mut sregs = self.vcpu.get_sregs().unwrap();
        let segment = |selector, type_, l| kvm_segment {
            limit: u32::MAX,
            selector,
            type_,
            present: 1,
            dpl: 3,
            db: 1 - l,
            s: 1,
            l,
            g: 1,
            ..Default::default()
        };
        sregs.cs = segment(0x1b, 11, 1);
        for register in [
            &mut sregs.ds,
            &mut sregs.es,
            &mut sregs.fs,
            &mut sregs.gs,
            &mut sregs.ss,
        ] {
            *register = segment(0x23, 3, 0);
        }
        sregs.tr = kvm_segment {
            base: TSS,
            limit: (TSS_SIZE + BITMAP_SIZE) as u32,
            selector: 0x28,
            type_: 11,
            present: 1,
            ..Default::default()
        };
        (sregs.gdt.base, sregs.gdt.limit) = (GDT, 0x37);
        (sregs.idt.base, sregs.idt.limit) = (IDT, 0xfff);
        (sregs.cr0, sregs.cr3, sregs.cr4, sregs.efer) = (0x8001_0033, PAGE_TABLES, 0x620, 0x501);
        self.vcpu.set_sregs(&sregs).unwrap();
        let regs = kvm_regs {
            rip: CODE,
            rcx: rounds,
            rflags: 0x202,
            ..Default::default()
        };
        self.vcpu.set_regs(&regs).unwrap();
    }

    fn set_timer(&self, counting: Counting) {
        let mut lapic = self.vcpu.get_lapic().unwrap();
        let (mode, count) = match counting {
            Counting::Once => (0, 0),
            Counting::Periodically => (1 << 17, TIMER_COUNT * 10),
        };
        for (register, value) in [
            (0xf0, 0x1ff),
            (0x320, TIMER_VECTOR as u32 | mode),
            (0x3e0, 11),
            (0x380, count),
        ] {
            let bytes = u32::to_le_bytes(value).map(u8::cast_signed);
            lapic.regs[register..register + 4].copy_from_slice(&bytes);
        }
        self.vcpu.set_lapic(&lapic).unwrap();
    }

    /// Runs until something happens; the guest's request for a number is answered by `next`.
    pub(super) fn run(&mut self, next: &mut u32) -> Stop {
        match self.vcpu.run() {
            Ok(VcpuExit::IoIn(PORT_NUMBER, data)) => {
                *next += 1;
                data.copy_from_slice(&next.wrapping_mul(0x9e37_79b9).to_le_bytes());
                Stop::Number
            }
            Ok(VcpuExit::IoOut(PORT_END, _)) => Stop::End,
            Err(error) if error.errno() == libc::EINTR => Stop::Kick,
            exit => panic!("{exit:?}"),
        }
    }

    /// Lets KVM take the answer of the last exit.
    pub(super) fn complete(&mut self) {
        self.vcpu.set_kvm_immediate_exit(1);
        assert!(self.vcpu.run().is_err());
        self.vcpu.set_kvm_immediate_exit(0);
    }

    /// Whether all of the guest's state can be read.
    pub(super) fn is_complete(&self) -> bool {
        PlatformKind::detect() == PlatformKind::Hardware
            || !trap_may_be_on_its_way(&self.vcpu, &self.memory).unwrap()
    }

    pub(super) fn capture(&mut self) -> (KvmState, VcpuState) {
        let probe = self
            .probe
            .get_or_insert_with(|| VcpuProbe::new(&self.kvm, self.vm.fd(), &self.vcpu).unwrap());
        let kvm = KvmState::capture(self.vm.fd()).unwrap();
        (kvm, VcpuState::capture(&mut self.vcpu, probe).unwrap())
    }

    /// The guest in a new virtual machine, by way of bytes.
    pub(super) fn moved(&mut self) -> Self {
        let (kvm, vcpu) = self.capture();
        let mut writer = Writer::new(Vec::new()).unwrap();
        writer.kvm(&kvm).unwrap();
        writer.state(0, &vcpu).unwrap();
        let bytes = writer.finish().unwrap();
        let mut sections = Sections::read_all(&bytes[..]).unwrap();
        let (kvm, vcpu) = (sections.take_kvm().unwrap(), sections.take(0).unwrap());
        sections.finish().unwrap();
        self.restored(&kvm, &vcpu)
    }

    /// A new virtual machine with a copy of the memory and this state.
    pub(super) fn restored(&self, kvm: &KvmState, vcpu: &VcpuState) -> Self {
        let new = Self::empty().unwrap();
        let mut bytes = vec![0; MEMORY as usize];
        self.memory.read_slice(&mut bytes, GuestAddress(0)).unwrap();
        new.memory.write_slice(&bytes, GuestAddress(0)).unwrap();
        vcpu.check_host(&new.kvm, &new.vcpu).unwrap();
        kvm.restore(new.vm.fd()).unwrap();
        vcpu.restore(new.vm.fd(), &new.vcpu).unwrap();
        new
    }

    /// All of the guest as it stands.
    pub(super) fn checkpoint(&mut self) -> Checkpoint {
        let (kvm, vcpu) = self.capture();
        let mut memory = vec![0; MEMORY as usize];
        self.memory
            .read_slice(&mut memory, GuestAddress(0))
            .unwrap();
        Checkpoint {
            kvm,
            vcpu,
            memory,
            data_at: self.data_at.get(),
        }
    }

    /// Goes on from `checkpoint`, in the virtual machine that is there.
    pub(super) fn go_back(&self, checkpoint: &Checkpoint) {
        self.memory
            .write_slice(&checkpoint.memory, GuestAddress(0))
            .unwrap();
        self.vm.forget_page_tables().unwrap();
        self.data_at.set(checkpoint.data_at);
        checkpoint.kvm.restore(self.vm.fd()).unwrap();
        let vcpu = &checkpoint.vcpu;
        vcpu.restore_in_place(self.vm.fd(), &self.vcpu).unwrap();
    }

    /// What the guest has come to.
    pub(super) fn outcome(&self) -> Outcome {
        let bytes = |at, len| {
            let mut bytes = vec![0; len];
            self.memory
                .read_slice(&mut bytes, GuestAddress(at))
                .unwrap();
            bytes
        };
        Outcome {
            registers: bytes(RESULT, RESULT_SIZE),
            data: bytes(self.data_at.get(), DATA_SIZE),
            starts: self.get(STARTS),
            ticks: self.get(TICKS),
        }
    }
}
