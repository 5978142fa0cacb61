"""A userspace reimplementation of QEMU's CPR (live update) modes around a mini-VMM."""
