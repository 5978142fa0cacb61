"""Character device backends: the host's end of a serial port or a monitor."""
