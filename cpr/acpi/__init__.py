"""ACPI: what the devices tell of themselves, as the tables that a guest reads."""
