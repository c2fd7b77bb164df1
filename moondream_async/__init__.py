"""Asyncio-first streaming client for the Moondream vision API."""
