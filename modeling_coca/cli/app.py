"""`coca app`: all of it in the browser."""

import os
import signal
import sys
import tempfile
from typing import Annotated

import typer

from .options import Device, Dtype

PAGE, NETWORK = "Page", "Network"


def app(
    model: Annotated[
        str | None,
        typer.Option(
            "--model",
            "-m",
            envvar="COCA_MODEL",
            help="Folder of the model, or its id on the Hub. An index knows its own.",
        ),
    ] = None,
    index: Annotated[
        str | None,
        typer.Option(
            "--index",
            "-i",
            help="Pictures to search: a folder that `coca index` made, or its id on the Hub. Start the page where you "
            "made it, as it has the pictures' paths from there.",
            rich_help_panel=PAGE,
        ),
    ] = None,
    example: Annotated[
        list[str] | None,
        typer.Option(help="A picture to try things with. Can be given several times.", rich_help_panel=PAGE),
    ] = None,
    port: Annotated[
        int | None,
        typer.Option(min=1, max=65535, help="By default the first free one from 7860 on.", rich_help_panel=NETWORK),
    ] = None,
    host: Annotated[
        str | None,
        typer.Option(
            help="Address to listen on, by default 127.0.0.1: nobody but this computer. 0.0.0.0 lets in the whole network.",
            rich_help_panel=NETWORK,
        ),
    ] = None,
    share: Annotated[
        bool,
        typer.Option(
            "--share",
            help="Make the page public: a long address for a week, through gradio's servers. Whoever has it can use it.",
            rich_help_panel=NETWORK,
        ),
    ] = False,
    max_queue: Annotated[
        int,
        typer.Option(
            "--max_queue",
            min=1,
            help="Requests that may wait. Whoever comes then is told that the page is busy.",
            rich_help_panel=NETWORK,
        ),
    ] = 32,
    max_megabytes: Annotated[
        int, typer.Option("--max_megabytes", min=1, help="Largest picture to take.", rich_help_panel=NETWORK)
    ] = 20,
    device: Device = None,
    dtype: Dtype = None,
) -> None:
    """
    Open a page in the browser: captions with what the model looked at for each word, answers, labels, search.

    It runs on this computer, for this computer only, until Ctrl-C.

    - `coca app --model outputs/quickstart`
    - `coca app --model outputs/quickstart --index photos.index`
    """
    from modeling_coca.app import launch_app

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that uploads are deleted then, too
    with tempfile.TemporaryDirectory(prefix="coca-app-") as uploads:
        os.environ["GRADIO_TEMP_DIR"] = uploads
        page = launch_app(
            model,
            index,
            examples=example or (),
            host=host,
            port=port,
            share=share,
            max_queue=max_queue,
            max_file_size=max_megabytes * 2**20,
            device=device,
            dtype=dtype,
        )
        try:
            print(f"The page is at {page.local_url} (Ctrl-C ends it)", flush=True)
            if page.share_url:
                print(f"and public at {page.share_url}", flush=True)
            page.block_thread()
        finally:
            page.close(verbose=False)
