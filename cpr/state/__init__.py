"""Pure data: CPR state, vmstate fields and the migration stream."""
