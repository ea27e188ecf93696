//! General, system and debug registers.

use kvm_bindings::{kvm_debugregs, kvm_dtable, kvm_regs, kvm_segment, kvm_sregs};
use serde::{Deserialize, Serialize};

/// Defines a state whose fields are numbers of a structure of KVM, and the ways between them.
macro_rules! mirror {
    (
        $(#[$doc:meta])*
        $state:ident = $kvm:ident {
            $($(#[$field_doc:meta])* $field:ident: $type:ty = $kvm_field:ident),* $(,)?
        }
    ) => {
        $(#[$doc])*
        #[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(deny_unknown_fields)]
        pub struct $state {
            $($(#[$field_doc])* pub $field: $type,)*
        }

        impl From<$kvm> for $state {
            fn from(kvm: $kvm) -> Self {
                Self { $($field: kvm.$kvm_field,)* }
            }
        }

        impl From<$state> for $kvm {
            fn from(state: $state) -> Self {
                #[allow(clippy::needless_update, reason = "some structures have padding")]
                Self { $($kvm_field: state.$field,)* ..Default::default() }
            }
        }
    };
}
pub(super) use mirror;

mirror! {
    /// General registers.
    RegistersState = kvm_regs {
        /// RAX.
        rax: u64 = rax,
        /// RBX.
        rbx: u64 = rbx,
        /// RCX.
        rcx: u64 = rcx,
        /// RDX.
        rdx: u64 = rdx,
        /// RSI.
        rsi: u64 = rsi,
        /// RDI.
        rdi: u64 = rdi,
        /// RSP.
        rsp: u64 = rsp,
        /// RBP.
        rbp: u64 = rbp,
        /// R8.
        r8: u64 = r8,
        /// R9.
        r9: u64 = r9,
        /// R10.
        r10: u64 = r10,
        /// R11.
        r11: u64 = r11,
        /// R12.
        r12: u64 = r12,
        /// R13.
        r13: u64 = r13,
        /// R14.
        r14: u64 = r14,
        /// R15.
        r15: u64 = r15,
        /// Instruction pointer.
        rip: u64 = rip,
        /// Flags.
        rflags: u64 = rflags,
    }
}

mirror! {
    /// A segment register with its hidden part.
    SegmentState = kvm_segment {
        /// Base address.
        base: u64 = base,
        /// Limit in bytes.
        limit: u32 = limit,
        /// Selector.
        selector: u16 = selector,
        /// Type of the descriptor.
        kind: u8 = type_,
        /// Present.
        present: u8 = present,
        /// Privilege level.
        dpl: u8 = dpl,
        /// Default operation size.
        db: u8 = db,
        /// Code or data rather than system.
        s: u8 = s,
        /// 64-bit code.
        l: u8 = l,
        /// Granularity.
        g: u8 = g,
        /// Available to software.
        avl: u8 = avl,
        /// Not usable.
        unusable: u8 = unusable,
    }
}

mirror! {
    /// A descriptor table register.
    TableState = kvm_dtable {
        /// Base address.
        base: u64 = base,
        /// Limit in bytes.
        limit: u16 = limit,
    }
}

mirror! {
    /// Debug registers.
    DebugState = kvm_debugregs {
        /// Breakpoint addresses, DR0 to DR3.
        db: [u64; 4] = db,
        /// DR6.
        dr6: u64 = dr6,
        /// DR7.
        dr7: u64 = dr7,
    }
}

/// Segment, control and descriptor table registers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SystemState {
    /// Code segment.
    pub cs: SegmentState,
    /// Data segment.
    pub ds: SegmentState,
    /// Extra segment.
    pub es: SegmentState,
    /// FS.
    pub fs: SegmentState,
    /// GS.
    pub gs: SegmentState,
    /// Stack segment.
    pub ss: SegmentState,
    /// Task register.
    pub tr: SegmentState,
    /// Local descriptor table.
    pub ldt: SegmentState,
    /// Global descriptor table.
    pub gdt: TableState,
    /// Interrupt descriptor table.
    pub idt: TableState,
    /// CR0.
    pub cr0: u64,
    /// CR2.
    pub cr2: u64,
    /// CR3.
    pub cr3: u64,
    /// CR4.
    pub cr4: u64,
    /// CR8, the task priority.
    pub cr8: u64,
    /// IA32_EFER.
    pub efer: u64,
    /// IA32_APIC_BASE.
    pub apic_base: u64,
    /// The external interrupt that is being injected, as a bitmap.
    pub interrupt_bitmap: [u64; 4],
}

impl From<kvm_sregs> for SystemState {
    fn from(kvm: kvm_sregs) -> Self {
        Self {
            cs: kvm.cs.into(),
            ds: kvm.ds.into(),
            es: kvm.es.into(),
            fs: kvm.fs.into(),
            gs: kvm.gs.into(),
            ss: kvm.ss.into(),
            tr: kvm.tr.into(),
            ldt: kvm.ldt.into(),
            gdt: kvm.gdt.into(),
            idt: kvm.idt.into(),
            cr0: kvm.cr0,
            cr2: kvm.cr2,
            cr3: kvm.cr3,
            cr4: kvm.cr4,
            cr8: kvm.cr8,
            efer: kvm.efer,
            apic_base: kvm.apic_base,
            interrupt_bitmap: kvm.interrupt_bitmap,
        }
    }
}

impl From<SystemState> for kvm_sregs {
    fn from(state: SystemState) -> Self {
        Self {
            cs: state.cs.into(),
            ds: state.ds.into(),
            es: state.es.into(),
            fs: state.fs.into(),
            gs: state.gs.into(),
            ss: state.ss.into(),
            tr: state.tr.into(),
            ldt: state.ldt.into(),
            gdt: state.gdt.into(),
            idt: state.idt.into(),
            cr0: state.cr0,
            cr2: state.cr2,
            cr3: state.cr3,
            cr4: state.cr4,
            cr8: state.cr8,
            efer: state.efer,
            apic_base: state.apic_base,
            interrupt_bitmap: state.interrupt_bitmap,
        }
    }
}
