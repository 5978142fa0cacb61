"""Names of CPUID's feature bits, for messages; those that QEMU's `-cpu` has.

Each word's bits from 0 on, "-" for one without a name.
"""

from __future__ import annotations

NAMES = {
    (0x1, 0, "ecx"): (
        "pni pclmulqdq dtes64 monitor ds-cpl vmx smx est tm2 ssse3 cid - fma cx16 xtpr pdcm "
        "- pcid dca sse4.1 sse4.2 x2apic movbe popcnt tsc-deadline aes xsave osxsave avx f16c "
        "rdrand hypervisor"
    ),
    (0x1, 0, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic - sep mtrr pge mca cmov pat pse36 pn clflush - "
        "ds acpi mmx fxsr sse sse2 ss ht tm ia64 pbe"
    ),
    (0x6, 0, "eax"): "- - arat",
    (0x7, 0, "ebx"): (
        "fsgsbase tsc-adjust sgx bmi1 hle avx2 fdp-excptn-only smep bmi2 erms invpcid rtm - "
        "zero-fcs-fds mpx - avx512f avx512dq rdseed adx smap avx512ifma pcommit clflushopt clwb "
        "intel-pt avx512pf avx512er avx512cd sha-ni avx512bw avx512vl"
    ),
    (0x7, 0, "ecx"): (
        "- avx512vbmi umip pku ospke waitpkg avx512vbmi2 - gfni vaes vpclmulqdq avx512vnni "
        "avx512bitalg - avx512-vpopcntdq - la57 - - - - - rdpid - bus-lock-detect cldemote - "
        "movdiri movdir64b - sgxlc pks"
    ),
    (0x7, 0, "edx"): (
        "- sgx-keys avx512-4vnniw avx512-4fmaps fsrm - - - avx512-vp2intersect - md-clear - - - "
        "serialize - tsx-ldtrk - - arch-lbr - - amx-bf16 avx512-fp16 amx-tile amx-int8 spec-ctrl "
        "stibp flush-l1d arch-capabilities core-capability ssbd"
    ),
    (0x7, 1, "eax"): (
        "sha512 sm3 sm4 - avx-vnni avx512-bf16 - cmpccxadd - - fzrm fsrs fsrc - - - - fred lkgs "
        "wrmsrns - amx-fp16 - avx-ifma - - lam"
    ),
    (0xD, 1, "eax"): "xsaveopt xsavec xgetbv1 xsaves xfd",
    (0x40000001, 0, "eax"): (
        "kvmclock kvm-nopiodelay kvm-mmu kvmclock2 kvm-asyncpf kvm-steal-time kvm-pv-eoi "
        "kvm-pv-unhalt - kvm-pv-tlb-flush kvm-asyncpf-vmexit kvm-pv-ipi kvm-poll-control "
        "kvm-pv-sched-yield kvm-asyncpf-int kvm-msi-ext-dest-id - - - - - - - - "
        "kvmclock-stable-bit"
    ),
    (0x80000001, 0, "ecx"): (
        "lahf-lm cmp-legacy svm extapic cr8legacy abm sse4a misalignsse 3dnowprefetch osvw ibs xop "
        "skinit wdt - lwp fma4 tce - nodeid-msr - tbm topoext perfctr-core perfctr-nb"
    ),
    (0x80000001, 0, "edx"): (
        "fpu vme de pse tsc msr pae mce cx8 apic - syscall mtrr pge mca cmov pat pse36 - - nx - "
        "mmxext mmx fxsr fxsr-opt pdpe1gb rdtscp - lm 3dnowext 3dnow"
    ),
    (0x80000007, 0, "edx"): "- - - - - - - - invtsc",
    (0x80000008, 0, "ebx"): (
        "clzero - xsaveerptr - - - - - - wbnoinvd - - ibpb - ibrs amd-stibp - stibp-always-on - - "
        "- - - amd-ssbd virt-ssbd amd-no-ssb - - amd-psfd"
    ),
    (0x8000000A, 0, "edx"): (
        "npt lbrv svm-lock nrip-save tsc-scale vmcb-clean flushbyasid decodeassists - - "
        "pause-filter - pfthreshold avic - v-vmsave-vmload vgif"
    ),
    (0x80000021, 0, "eax"): (
        "no-nested-data-bp fs-gs-base-ns lfence-always-serializing - - - null-sel-clr-base - "
        "auto-ibrs"
    ),
}
