"""VMM processes under test, and how they are talked to: for tests/ and benchmarks/."""
