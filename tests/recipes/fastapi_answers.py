"""A FastAPI backend with a typed answer: its page /docs shows what each answer consists of.

uvicorn fastapi_answers:app
"""

from contextlib import asynccontextmanager

from fastapi import FastAPI

import moondream_async as md


@asynccontextmanager
async def lifespan(app):
    async with md.MoondreamClient() as app.state.client:  # the key is in MOONDREAM_API_KEY
        yield


app = FastAPI(lifespan=lifespan)


@app.get("/detect")
async def detect(object: str) -> md.DetectResult:
    return await app.state.client.detect(md.SAMPLE_IMAGE, object)
