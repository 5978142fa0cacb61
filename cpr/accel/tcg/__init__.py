"""The TCG accelerator: QEMU's translator as the library of PyPI's `unicorn`, where KVM is missing.

The library is loaded by cpr._native._tcg without the Python package around it, whose import takes
50 ms.  Each vCPU is an engine of its own; they take turns of about a millisecond, as in QEMU's
single-threaded TCG, because engines that share RAM have no atomic instructions between them.  What
unicorn leaves out (delivery of interrupts and exceptions, HLT, SYSCALL, a TSC that stands still
while the VM is stopped) is in cpr/_native/tcg.
"""

from cpr.accel.tcg.accelerator import TcgAccelerator
from cpr.accel.tcg.vcpu import TcgVCpu

__all__ = ["TcgAccelerator", "TcgVCpu"]
