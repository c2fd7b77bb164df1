"""Runs the cells of a notebook in a kernel of its own, and tells what came out of each.

    python run_notebook.py NOTEBOOK FOLDER

A line a cell, as JSON: what it printed, and the name of its error; the last but one, which
streams, is run twice. A line on its standard input interrupts the cell that is running, as the
button does.
"""

import asyncio
import json
import sys


async def main(notebook, folder):
    import nbformat
    from nbclient import NotebookClient

    nb = nbformat.read(notebook, as_version=4)
    client = NotebookClient(nb, allow_errors=True, resources={"metadata": {"path": folder}})
    async with client.async_setup_kernel():
        interrupting = asyncio.ensure_future(interrupt(client))
        *before, streaming, last = enumerate(nb.cells)
        for index, cell in [*before, streaming, streaming, last]:
            await client.async_execute_cell(cell, index)
            outputs = cell.get("outputs", ())
            printed = "".join(each.get("text", "") for each in outputs)
            errors = [each["ename"] for each in outputs if each["output_type"] == "error"]
            print(json.dumps({"printed": printed, "errors": errors}), flush=True)  # noqa: T201 - a program
        interrupting.cancel()


async def interrupt(client):
    reader = asyncio.StreamReader()
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), sys.stdin)
    if await reader.readline():
        await client.km.interrupt_kernel()


if __name__ == "__main__":
    asyncio.run(main(*sys.argv[1:]))
