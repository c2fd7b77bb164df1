"""The server's own Batch API.

`batches` has the calls, `uploads` the way of a file up, `wire` the format, and `records`
what comes back.
"""
