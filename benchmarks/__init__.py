"""Benchmarks of clinfast: models against their peers (`harness`, `models`) and single ops (`ops`)."""
