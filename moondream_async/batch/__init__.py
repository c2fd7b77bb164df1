"""The server's own Batch API.

`batches` has the calls, `uploads` sends files, `wire` has the format, `records` the results.
"""
