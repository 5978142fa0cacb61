"""Tests of VFIO, IOMMUFD and KVM on the real kernel interfaces, inside a VM that has them."""
