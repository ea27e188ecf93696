# The interrupt handler of an old driver, in ring 0. Intel syntax.
#
# It acknowledges, gives the device the next request at once, enables interrupts again, and then
# takes its time. The next completion that comes meanwhile nests.

.set LAPIC_EOI, -0x11fff50           # 0xfee000b0 through the alias at the top of the space
.set FRAME, 384                      # what it keeps on the stack

.section .boot.text, "ax"
.globl fragile_handler
fragile_handler:
    push rax
    push rcx
    push rdx
    sub rsp, FRAME
    cmp rsp, [{state} + {floor}]
    jb overflow
    inc qword ptr [{state} + {depth}]
    mov rax, [{state} + {depth}]
    cmp rax, [{state} + {deepest}]
    jbe 1f
    mov [{state} + {deepest}], rax
1:  inc qword ptr [{state} + {done}]
    mov rax, [{state} + {acknowledge}]
    mov dword ptr [rax], 3
    mov dword ptr [LAPIC_EOI], 0
    cmp qword ptr [{state} + {left}], 0
    je 2f
    dec qword ptr [{state} + {left}]
    mov rax, [{state} + {available}]
    inc word ptr [rax]
    mov rax, [{state} + {notify}]
    mov dword ptr [rax], 0
2:  sti
    rdtsc
    shl rdx, 32
    or rdx, rax
    mov rcx, rdx
    add rcx, [{state} + {service}]
3:  rdtsc
    shl rdx, 32
    or rdx, rax
    cmp rdx, rcx
    jb 3b
    cli
    dec qword ptr [{state} + {depth}]
    mov rax, [{state} + {line}]
    or [PENDING], rax
    add rsp, FRAME
    pop rdx
    pop rcx
    pop rax
    iretq

overflow:                            # the report runs in ring 3, with interrupts off
    mov rsp, qword ptr [boot_tss + 4]
    push 0x2b
    push qword ptr [{state} + {stack}]
    push 2
    push 0x33
    push offset {report}
    iretq

.text
