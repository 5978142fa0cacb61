"""The VM itself: the devices, the IOMMU and KVM that the other tests need."""

from __future__ import annotations

import os

import pytest

from cpr.uapi import kvm

from .machine import E1000E, EDU, NVME, SECOND_EDU, TWINS, bind, driver, group, unbind

pytestmark = pytest.mark.nested_smoke


@pytest.mark.parametrize("address", [EDU, E1000E, NVME, SECOND_EDU])
def test_each_device_is_bound_in_a_group_of_its_own(address: str) -> None:
    unbind(address)
    bind(address)
    assert driver(address) == "vfio-pci"
    assert os.path.exists(f"/dev/vfio/{group(address)}")
    assert os.listdir(f"/sys/kernel/iommu_groups/{group(address)}/devices") == [address]


def test_the_two_functions_of_a_slot_share_a_group() -> None:
    assert group(TWINS[0]) == group(TWINS[1])
    assert len(os.listdir(f"/sys/kernel/iommu_groups/{group(TWINS[0])}/devices")) == 2


def test_kvm_has_what_the_vmm_needs() -> None:
    kvm.open_device().close()
