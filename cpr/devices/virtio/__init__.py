"""Virtio devices over PCI (virtio 1.2, modern only), for guests with an operating system."""
