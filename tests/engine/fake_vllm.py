"""A server with as much of vLLM's API as is asked of it: it loads what `mu2llm export lm` wrote, checks the embeddings
as vLLM does (renderers/embed_utils.py) and writes greedily (entrypoints/openai/completion)."""

import base64
import contextlib
import io
import json
import threading
import time

import torch
import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from transformers import AutoModelForCausalLM, AutoTokenizer

PATIENCE_S = 60


class FakeVllm:
    """`asked` has what came (without the embeddings), `shapes` what those were; `mode` is how it fails: 4xx or 5xx as a
    status, "silent", "early" (after two tokens) or "error"; `left` counts the clients that left before the end."""

    def __init__(self, folder, name, key=""):
        self.model, self.name, self.key = AutoModelForCausalLM.from_pretrained(folder).eval(), name, key
        self.tokenizer = AutoTokenizer.from_pretrained(folder)
        self.asked, self.shapes, self.mode, self.left, self.modes = [], [], None, 0, []
        self.app = FastAPI()
        self.app.get("/v1/models")(self.models)
        self.app.post("/v1/completions")(self.completions)

    def models(self, request: Request):
        return self.refused(request) or {"object": "list", "data": [{"id": self.name, "object": "model"}]}

    def refused(self, request):
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return None

    async def completions(self, request: Request):
        asked = await request.json()
        mode = self.modes.pop(0) if self.modes else self.mode
        if refused := self.refused(request):
            return refused
        if isinstance(mode, int):
            return JSONResponse({"error": {"message": "no", "code": mode}}, mode)
        if asked["model"] != self.name:
            return JSONResponse({"error": {"message": "The model does not exist", "code": 404}}, 404)
        embeddings = self.loaded(asked.pop("prompt_embeds"))
        self.asked.append(asked)
        self.shapes.append((tuple(embeddings.shape), embeddings.dtype))
        assert asked["stream"] and asked["return_token_ids"] and "prompt" not in asked and "messages" not in asked
        return StreamingResponse(self.events(request, asked, embeddings, mode), media_type="text/event-stream")

    def loaded(self, data):
        tensor = torch.load(io.BytesIO(base64.b64decode(data, validate=True)), weights_only=True, map_location="cpu")
        assert isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and tensor.is_floating_point()
        assert tensor.dim() == 2 and tensor.shape[1] == self.model.config.hidden_size
        return tensor

    async def events(self, request, asked, embeddings, mode):
        if mode == "silent":
            while not await request.is_disconnected():
                time.sleep(0.01)
            self.left += 1
            return
        for number, (token, reason) in enumerate(self.written(embeddings, asked)):
            if await request.is_disconnected():
                self.left += 1
                return
            if number == 2 and mode == "early":
                return
            if number == 2 and mode == "error":
                yield self.event({"error": {"message": "the engine died", "code": 500}})
                break
            text = "" if reason == "stop" else self.tokenizer.decode([token])
            choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": reason, "stop_reason": None}
            yield self.event({"object": "text_completion", "choices": [{**choice, "token_ids": [token]}]})
        yield "data: [DONE]\n\n"

    @staticmethod
    def event(value):
        return f"data: {json.dumps(value)}\n\n"

    def written(self, embeddings, asked):
        """(token, finish reason) greedily, one after the other."""
        assert asked["temperature"] == 0 or "seed" in asked
        new, past = {"inputs_embeds": embeddings[None].to(self.model.dtype)}, None
        for number in range(asked["max_tokens"]):
            with torch.inference_mode():
                told = self.model(**new, past_key_values=past, use_cache=True)
            token, past = int(told.logits[0, -1].argmax()), told.past_key_values
            new = {"input_ids": torch.tensor([[token]])}
            stopped = token in asked["stop_token_ids"]
            yield token, "stop" if stopped else "length" if number + 1 == asked["max_tokens"] else None
            if stopped:
                return


@contextlib.contextmanager
def serving(fake, port):
    """Its URL, as long as the block lasts."""
    server = uvicorn.Server(uvicorn.Config(fake.app, host="127.0.0.1", port=port, log_level="error"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + PATIENCE_S
    while not server.started:
        assert thread.is_alive() and time.monotonic() < deadline
        time.sleep(0.01)
    try:
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        server.should_exit = True
        thread.join()
