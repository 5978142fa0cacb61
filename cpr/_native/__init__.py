"""C parts, built by cffi in API mode: the vCPU run loop and the page copy path."""
