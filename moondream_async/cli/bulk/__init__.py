"""The command ``bulk``.

`command` reads its options, `job` does the work, and `sources`, `journal`, `exports` and
`report` keep pictures and results on the disk.
"""
