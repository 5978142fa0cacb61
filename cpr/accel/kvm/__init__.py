"""The accelerator of a host with KVM; `state` has the order in which its state is set."""

from cpr.accel.kvm.accelerator import KvmAccelerator

__all__ = ["KvmAccelerator"]
