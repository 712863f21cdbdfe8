"""Every test runs offline, on one thread, with sockets blocked."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.pop("OPENBOOK_DATA", None)

import socket

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that opens a connection to anywhere fails."""

    def refuse(self: socket.socket, address: object, *rest: object) -> None:
        raise OSError(f"this test tried to reach {address!r}; the suite runs offline")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket.socket, "connect_ex", refuse)
