"""Pause, RAM copy and brown-out of an update, measured from outside the VMM."""
