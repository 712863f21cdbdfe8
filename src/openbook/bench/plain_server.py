"""What people write in ten lines: a transformers pipeline behind FastAPI, one request a call."""

from __future__ import annotations

import sys
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from transformers import pipeline


def app_of(folder: str) -> FastAPI:
    classify = pipeline("text-classification", model=folder, top_k=None, truncation=True)
    app = FastAPI()

    @app.get("/ready")
    def ready() -> str:
        return "ready"

    @app.post("/predict")
    def predict(asked: dict[str, Any]) -> Any:
        return classify(asked["texts"])

    return app


if __name__ == "__main__":
    torch.set_num_threads(int(sys.argv[3]))
    uvicorn.run(app_of(sys.argv[1]), host="127.0.0.1", port=int(sys.argv[2]), log_level="warning")
