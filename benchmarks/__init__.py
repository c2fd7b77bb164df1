"""How fast the client is, beside others. See README.md; ``python -m benchmarks``."""
