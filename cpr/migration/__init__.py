"""Migration: the state machine, its channels, and the CPR modes."""
