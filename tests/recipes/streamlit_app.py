"""A caption as it is written, in Streamlit; its stop button closes the stream.

streamlit run streamlit_app.py
"""

import streamlit as st

import moondream_async as md


async def describe(picture):
    """Give the pieces; Streamlit runs each script, and so this, in a loop of its own."""
    async with md.MoondreamClient() as client, client.caption(picture, stream=True) as stream:
        async for piece in stream.chunk:
            yield piece


picture = st.file_uploader("A picture")
if picture is not None:
    try:
        st.write_stream(describe(picture.getvalue()))
    except md.MoondreamError as error:
        st.error(str(error))
