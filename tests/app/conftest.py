"""One page, served in this process for all tests of the folder, and a record of every address that was connected to."""

import socket
from types import SimpleNamespace

import pytest

pytest.importorskip("gradio")

from modeling_coca import CocaForConditionalGeneration
from modeling_coca.app import launch_app
from modeling_coca.inference import load_for_inference
from modeling_coca.retrieval import CocaIndex


@pytest.fixture(scope="session")
def connections():
    """Addresses that any socket of this process was connected to."""
    made, connect = [], socket.socket.connect

    def record(self, address):
        made.append(address)
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", record)
        yield made


@pytest.fixture(scope="session")
def served(model_folder, photos, tmp_path_factory, connections):
    """The page with an index, and with an environment that asks for more openness than the caller."""
    folder = tmp_path_factory.mktemp("app")
    index = CocaIndex.from_images(str(photos), model=str(model_folder), num_workers=0)
    index.save(folder / "photos.index")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("GRADIO_TEMP_DIR", str(folder / "uploads"))
        patch.setenv("GRADIO_SHARE", "True")
        tunnels = []
        patch.setattr("gradio.networking.setup_tunnel", lambda *args, **_: tunnels.append(args))
        patch.delenv("GRADIO_ANALYTICS_ENABLED", raising=False)
        page = launch_app(
            model_folder,
            folder / "photos.index",
            examples=sorted(photos.glob("*.png"))[:2],
            max_pixels=100_000,
            max_file_size=200_000,
        )
        model, processor = load_for_inference(model_folder, CocaForConditionalGeneration)
        yield SimpleNamespace(
            page=page,
            url=page.local_url.rstrip("/"),
            uploads=folder / "uploads",
            index=index,
            tunnels=tunnels,
            loaded={"model": model, "processor": processor},
        )
        page.close(verbose=False)
