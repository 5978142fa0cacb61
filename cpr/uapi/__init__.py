"""The only callers of the kernel's ioctls."""
