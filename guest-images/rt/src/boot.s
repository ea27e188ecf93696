# Entry in ring 0 and everything that stays there: descriptor tables, page tables, interrupt
# stubs and the idle stub. Intel syntax. All tables are complete in the image, so the way to
# ring 3 is some forty instructions; hosts that emulate ring 0 one instruction at a time
# would make users wait for more. No instruction here touches a vector or x87 register, and
# none needs a scratch register, so an interrupt costs three instructions.

.set LAPIC_EOI, -0x11fff50           # 0xfee000b0 through the alias at the top of the space
.set VECTORS, 64
.set FIRST_LINE, 32                  # vectors below are exceptions
.set VECTOR_SIZE, 32

# ---- Vector stubs: VECTORS of them, VECTOR_SIZE bytes each ------------------------------

.section .boot.vectors, "ax"
.balign 4096
.globl boot_vectors
boot_vectors:
.set vector, 0
.rept VECTORS
    .balign VECTOR_SIZE
    .if vector == 3
        # int3 from ring 3: halt unless an interrupt arrived since the caller last looked.
        # IF is clear here and `sti` holds interrupts back for one instruction, so none can
        # slip in between the test and the halt.
        cmp qword ptr [PENDING], 0
        jne 1f
        sti
        hlt
        cli
1:      iretq
    .elseif vector < FIRST_LINE
        .if vector != 8 && (vector < 10 || vector > 14) && vector != 17 && vector != 21
        push 0
        .endif
        push vector
        jmp exception
    .elseif vector == VECTORS - 1
        iretq                        # spurious: no end of interrupt
    .elseif vector == VECTORS - 2
        inc dword ptr [TIMER_EXPIRIES]
        or byte ptr [PENDING + (vector - FIRST_LINE) / 8], 1 << ((vector - FIRST_LINE) % 8)
        mov dword ptr [LAPIC_EOI], 0
        iretq
    .else
        or byte ptr [PENDING + (vector - FIRST_LINE) / 8], 1 << ((vector - FIRST_LINE) % 8)
        mov dword ptr [LAPIC_EOI], 0
        iretq
    .endif
    .set vector, vector + 1
.endr
.balign VECTOR_SIZE

# ---- Exceptions: note what happened, then report it from ring 3 -------------------------

.section .boot.text, "ax"
exception:
    pop qword ptr [FAULT]
    pop qword ptr [FAULT + 8]
    mov rax, [rsp]
    mov [FAULT + 16], rax
    mov rax, cr2
    mov [FAULT + 24], rax
    inc dword ptr [fault_count]
    cmp dword ptr [fault_count], 2
    jae 2f
    mov rsp, offset ring0_stack_top
    push 0x2b
    push offset ring3_stack_top - 8
    push 2
    push 0x33
    push offset {fault}
    iretq
2:  lidt [no_idt]                    # the report itself failed: only a triple fault is left
    ud2

# ---- PVH entry: 32-bit protected mode, no paging, ebx = start info ----------------------

.code32
.globl _start32
_start32:
    cld
    mov esi, ebx
    mov edi, 0
    lgdt [gdt_pointer]
    mov eax, 0x620                   # PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080              # EFER
    xor edx, edx
    mov eax, 0x101                   # SCE, LME
    wrmsr
    mov eax, 0x80010033              # PG, WP, NE, ET, MP, PE
    mov cr0, eax
    .byte 0xea                       # far jump to 64-bit code
    .long enter_ring3
    .word 8

# ---- Linux 64-bit entry: long mode, identity paging, rsi = boot parameters --------------

.code64
.globl _start64
_start64:
    cli
    cld
    mov edi, 1
    lgdt [gdt_pointer]
    mov eax, 0x620
    mov cr4, rax
    mov eax, offset pml4
    mov cr3, rax
    mov ecx, 0xc0000080
    xor edx, edx
    mov eax, 0x501                   # SCE, LME, LMA
    wrmsr
    mov eax, 0x80010033
    mov cr0, rax
    mov rsp, offset ring0_stack_top
    push 8
    push offset enter_ring3
    retfq

enter_ring3:                         # edi = protocol, esi = its structure
    mov eax, 0x2b
    mov ds, ax
    mov es, ax
    mov rsp, offset ring0_stack_top
    lidt [idt_pointer]
    mov al, 0xff                     # the 8259s stay masked: devices come through the IOAPIC
    out 0x21, al
    out 0xa1, al
    mov eax, 0x40
    ltr ax
    push 0x2b
    push offset ring3_stack_top
    push 0x202
    push 0x33
    push offset ring3
    iretq

# ---- First instructions of ring 3: from here on the machine runs at its own speed -------

ring3:
    mov r12d, edi
    mov r13d, esi
    mov edi, offset __bss_start      # loaders need not clear it, and a reset leaves it used
    mov ecx, offset __bss_end
    sub ecx, edi
    shr ecx, 3
    xor eax, eax
    rep stosq
    mov edi, r12d
    mov esi, r13d
    xor ebp, ebp
    call {main}
    ud2

# ---- Tables --------------------------------------------------------------------------

.section .boot.tables, "aw"

# Identity map of the first 4 GiB in 2 MiB pages: present, writable, user, and accessed and
# dirty from the start, so that the processor never writes to a table.
.balign 4096
.globl pml4
pml4:
    .quad pdpt + 0x27
    .skip 510 * 8
    .quad pdpt_top + 0x27
.globl pdpt
pdpt:
    .quad directories + 0x27
    .quad directories + 0x1027
    .quad directories + 0x2027
    .quad directories + 0x3027
    .skip 508 * 8
pdpt_top:                            # the last GiB below 4 GiB again, at the very top
    .skip 511 * 8
    .quad directories + 0x3027
directories:
.set page, 0
.rept 2048
    .quad page * 0x200000 + 0xe7
    .set page, page + 1
.endr

.globl boot_idt
boot_idt:
.set vector, 0
.rept VECTORS
    .if vector == 3
    .quad __gate + vector * VECTOR_SIZE + 0x600000000000   # DPL 3: int3 is how to idle
    .else
    .quad __gate + vector * VECTOR_SIZE
    .endif
    .quad 0
    .set vector, vector + 1
.endr

gdt:
    .quad 0
    .quad 0x00af9b000000ffff         # 08 ring 0 code
    .quad 0x00cf93000000ffff         # 10 ring 0 data
    .quad 0
    .quad 0x00cffb000000ffff         # 20 ring 3 32-bit code
    .quad 0x00cff3000000ffff         # 28 ring 3 data
    .quad 0x00affb000000ffff         # 30 ring 3 code
    .quad 0
    .quad __tss_descriptor           # 40 task state
    .quad 0
gdt_pointer:
    .word 0x4f
    .quad gdt
idt_pointer:
    .word VECTORS * 16 - 1
    .quad boot_idt
no_idt:
    .word 0
    .quad 0
fault_count:
    .long 0

.balign 16
.globl boot_tss
boot_tss:
    .long 0
    .quad ring0_stack_top            # rsp0
    .skip 102 - 12
    .word 104                        # I/O bitmap: all zero, every port open to ring 3
    .skip 8192
    .byte 0xff

# ---- Stacks: not cleared ----------------------------------------------------------------

.section .noinit, "aw", @nobits
.balign 4096
    .skip 4096
ring0_stack_top:
    .skip 262144
ring3_stack_top:

# ---- PVH note: XEN_ELFNOTE_PHYS32_ENTRY -------------------------------------------------

.section .note.pvh, "a", @note
.balign 4
    .long 4, 8, 18
    .asciz "Xen"
    .quad _start32

.text
