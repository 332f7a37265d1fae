"""Answers of a local HF model: batched, greedy, of like length together. GREEN-RadLlama2-7b and its kin."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import cached_file

from mu2llm.errors import UserError
from mu2llm.green.prompted import Unanswered

Tensor = torch.Tensor


class LocalWriter:
    """A causal language model by name or path, on the GPU if there is one, from safetensors alone."""

    def __init__(self, name: str, batch_size: int, max_new_tokens: int) -> None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = torch.bfloat16 if device == "cuda" else torch.float32
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(name, padding_side="left")
            model: Any = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, use_safetensors=True)
        except (OSError, ValueError) as error:
            raise UserError(f"judge hf:{name}: {str(error).splitlines()[0]}; give a model's name or folder") from error
        self._model = model.to(device).eval()
        self._batch_size, self._max_new_tokens = batch_size, max_new_tokens
        if self._tokenizer.pad_token_id is None:
            self._tokenizer.pad_token = self._tokenizer.eos_token
        self._identity = identity(name, max_new_tokens)

    @property
    def identity(self) -> str:
        return self._identity

    def answers(self, prompts: list[str]) -> Iterator[tuple[int, str | Unanswered]]:
        """Longest prompts first, so that a batch holds little padding and what doesn't fit shows at once."""
        encoded = [self._encode(prompt) for prompt in prompts]
        room = getattr(self._model.config, "max_position_embeddings", None) or 10**9
        order = []
        for i in sorted(range(len(prompts)), key=lambda i: -len(encoded[i])):
            if len(encoded[i]) + self._max_new_tokens <= room:
                order.append(i)
                continue
            why = f"the prompt's {len(encoded[i])} tokens leave no room for an answer in the judge's {room}"
            yield i, Unanswered(why)
        for start in range(0, len(order), self._batch_size):
            batch = order[start : start + self._batch_size]
            yield from zip(batch, self._generate([encoded[i] for i in batch]), strict=True)

    def _encode(self, prompt: str) -> list[int]:
        text = self._chat(prompt)
        starts = bool(self._tokenizer.bos_token) and text.startswith(self._tokenizer.bos_token)
        return list(self._tokenizer(text, add_special_tokens=not starts)["input_ids"])

    def _chat(self, prompt: str) -> str:
        if not self._tokenizer.chat_template:  # GREEN's models were published without theirs
            return f"<|user|>\n{prompt}{self._tokenizer.eos_token or ''}\n<|assistant|>\n"
        turn = {"role": "user", "content": prompt, "from": "human", "value": prompt}
        return str(self._tokenizer.apply_chat_template([turn], tokenize=False, add_generation_prompt=True))

    @torch.inference_mode()
    def _generate(self, batch: list[list[int]]) -> list[str]:
        inputs = self._tokenizer.pad({"input_ids": batch}, padding=True, return_tensors="pt").to(self._model.device)
        written: Any = self._model.generate(
            **inputs,
            max_new_tokens=self._max_new_tokens,
            do_sample=False,
            num_beams=1,
            temperature=None,
            top_p=None,
            top_k=None,
            pad_token_id=self._tokenizer.pad_token_id,
        )
        new = written[:, inputs["input_ids"].shape[1] :]
        return list(self._tokenizer.batch_decode(new, skip_special_tokens=True))


def identity(name: str, max_new_tokens: int) -> str:
    """What verdicts of a model depend on: name, weights, decoding. A UserError where there is no such model."""
    return f"hf:{name.rstrip('/').rsplit('/', 1)[-1]}@{_weights(name)}, greedy {max_new_tokens}"


def _weights(name: str) -> str:
    """Twelve hex digits over every stored tensor's name, shape and ends: cheap, and another for other weights.

    The files are those that would be loaded; none of them is.
    """
    digest = hashlib.sha256()
    for file in _files(name):
        with safe_open(file, "pt") as tensors:
            for key in sorted(tensors.keys()):
                part = tensors.get_slice(key)
                shape = part.get_shape()
                rows = [part[:1], part[-1:]] if shape else [tensors.get_tensor(key)]
                first, last = rows[0].flatten()[:16], rows[-1].flatten()[-16:]
                digest.update(f"{key}{tuple(shape)}".encode() + torch.cat([first, last]).float().numpy().tobytes())
    return digest.hexdigest()[:12]


def _files(name: str) -> list[str]:
    """The safetensors files of a model by name or folder, in order."""
    try:
        if whole := cached_file(name, "model.safetensors", _raise_exceptions_for_missing_entries=False):
            return [whole]
        index = cached_file(name, "model.safetensors.index.json")
        names = sorted(set(json.loads(Path(str(index)).read_text())["weight_map"].values()))
        return [str(cached_file(name, each)) for each in names]
    except (OSError, ValueError) as error:
        raise UserError(f"judge hf:{name}: {str(error).splitlines()[0]}; give a model's name or folder") from error
