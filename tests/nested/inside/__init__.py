"""What runs inside the VM."""
