"""A caption as it is written, in Gradio; its stop button closes the stream.

python gradio_app.py PORT
"""

import sys

import gradio as gr

import moondream_async as md

client = md.MoondreamClient()  # one for all browsers; it makes its connections when it is used


async def describe(picture):
    said = ""
    try:
        async with client.caption(picture, stream=True) as stream:
            async for piece in stream.chunk:
                said += piece
                yield said
    except md.MoondreamError as error:
        raise gr.Error(str(error)) from error


with gr.Blocks() as app:
    picture = gr.Image(type="filepath", label="A picture")
    said = gr.Markdown()
    asking = picture.upload(describe, picture, said)
    gr.Button("Stop").click(None, cancels=asking)

if __name__ == "__main__":
    app.launch(server_name="127.0.0.1", server_port=int(sys.argv[1]))
