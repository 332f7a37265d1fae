"""Scans and text → the model's inputs: the CT side by a PreprocessSpec, the text by the backbone's chat format."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import BatchFeature, PreTrainedTokenizerBase, ProcessorMixin

from mu2llm import ct
from mu2llm.errors import UserError
from mu2llm.records import PreprocessSpec

VOLUME_TOKEN = "<volume>"
PROMPT_DATE = "2024-07-26"  # what Llama-3.2's template writes where it knows no date
_NOW = re.compile(r"strftime_now\(\s*(['\"])(.*?)\1\s*\)")  # transformers lets no function of ours take its place
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


class Mu2Processor(ProcessorMixin):
    """Scans by the spec, text by the chat template, in which one `<volume>` stands for all visual tokens.

    What a template takes beside the messages is fixed and saved, so that a checkpoint reads the same prompt every day:
    `prompt_date` (ISO) is its today (Llama-3.2's writes it), `template_variables` all else.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        chat_template: str | None = None,
        preprocess: dict[str, Any] | None = None,
        queries: int = 256,
        max_text_tokens: int = 512,
        volume_token: str = VOLUME_TOKEN,
        prompt_date: str = PROMPT_DATE,
        template_variables: dict[str, Any] | None = None,
    ) -> None:
        self.preprocess, self.queries = preprocess, queries
        self.max_text_tokens, self.volume_token = max_text_tokens, volume_token
        self.prompt_date, self.template_variables = prompt_date, template_variables or {}
        super().__init__(tokenizer, chat_template=chat_template)

    @property
    def spec(self) -> PreprocessSpec:
        """What scans must be prepared by."""
        return PreprocessSpec.model_validate(self.preprocess)

    def prepare(self, volumes: Any, accept: Sequence[str] = ()) -> dict[str, Tensor]:
        """Scans → `volumes` (B, T, C, K, H, W) and `chunk_mask` (B, T).

        Each scan is a path, URI or bytes, a CTVolume, a ModelInput, or voxels (T, C, K, H, W) that were prepared
        by this very spec; or a list of paths, URIs, bytes or CTVolumes, the series of one examination. A Rejection says
        why a scan cannot be read; `accept` lets in codes, such as not_hu. A ModelInput of another spec is a UserError.
        """
        scans = [_prepare_scan(volume, self.spec, accept) for volume in _as_list(volumes)]
        return {
            "volumes": torch.stack([voxels for voxels, _ in scans]),
            "chunk_mask": torch.stack([mask for _, mask in scans]),
        }

    def prompt(self, question: str) -> str:
        """The chat-formatted instruction with its `<volume>`, up to where the answer begins."""
        return self._render([{"role": "user", "content": f"{self.volume_token}{question}"}])

    @property
    def prompt_hash(self) -> str:
        """Twelve hex digits of a rendered prompt, as text and as ids: template, its variables and the tokenizer."""
        prompt = self.prompt("Write the report.")
        return hashlib.sha256(json.dumps([prompt, self._prompt_ids(prompt)]).encode()).hexdigest()[:12]

    def token_ids(self, question: str, answer: str | None = None) -> tuple[list[int], list[int]]:
        """The prompt's ids, with all placeholders, and the answer's with its end; UserError if too long together."""
        prompt, end = self._prompt_ids(self.prompt(question)), [] if answer is None else self._answer_ids(answer)
        self._check_length(len(prompt) - self.queries + len(end))
        return prompt, end

    def text_tokens(self, question: str, answer: str | None = None) -> int:
        """The tokens of a question, or of it and its answer, that count against `max_text_tokens`."""
        answered = [] if answer is None else self._answer_ids(answer)
        return len(self._prompt_ids(self.prompt(question))) - self.queries + len(answered)

    def encode(
        self, questions: Sequence[str], answers: Sequence[str] | None = None, padding_side: str | None = None
    ) -> dict[str, Tensor]:
        """input_ids, attention_mask, labels, question_ids, question_mask, each (B, L).

        Labels are the answer and its end, −100 elsewhere; without `answers` there are none. Pads on the right
        for training and on the left for generation, or on `padding_side`. Raises UserError where a text is too long.
        """
        pairs = zip(questions, answers if answers is not None else [None] * len(questions), strict=True)
        rows = [self.token_ids(question, answer) for question, answer in pairs]
        side = padding_side or ("right" if answers is not None else "left")
        batch = self._pad_inputs([prompt + end for prompt, end in rows], side)
        if answers is not None:
            batch["labels"] = self._pad([[-100] * len(prompt) + end for prompt, end in rows], -100, side)
        return batch | self._encode_questions(questions)

    def __call__(
        self,
        text: str | Sequence[Any] | None = None,
        volumes: Any = None,
        images: Any = None,
        questions: str | Sequence[str] | None = None,
        accept: Sequence[str] = (),
        **kwargs: Any,
    ) -> BatchFeature:
        """Model inputs for generation from scans and from questions, chats, or texts that hold one `<volume>`.

        `text` may be a prompt, a chat (a list of messages), or a list of either; `images` is another name for
        `volumes`; `accept` is as in `prepare`.
        """
        volumes = images if volumes is None else volumes
        data: dict[str, Tensor] = {} if volumes is None else self.prepare(volumes, accept)
        if questions is not None:
            data |= self.encode([questions] if isinstance(questions, str) else list(questions))
        elif text is not None:
            data |= self._encode_prompts(_as_prompts(text), needs_volume=volumes is not None)
        return BatchFeature(data)

    def _encode_prompts(self, texts: list[Any], needs_volume: bool) -> dict[str, Tensor]:
        prompts = [text if isinstance(text, str) else self._render(text) for text in texts]
        ids = [self._prompt_ids(prompt, expected=(1,) if needs_volume else (0, 1)) for prompt in prompts]
        for row in ids:
            self._check_length(len(row) - self.queries)
        batch = self._pad_inputs(ids, "left")
        return batch | self._encode_questions([self._question(text) for text in texts])

    def apply_chat_template(  # type: ignore[override]
        self, conversation: Any, tokenize: bool = False, volumes: Any = None, **kwargs: Any
    ) -> Any:
        """A chat, or a list of chats, as text; with `tokenize` as model inputs, with those of `volumes`.

        Parts of type volume or image in a message's content become the placeholder.
        """
        if tokenize:
            return self(text=conversation, volumes=volumes)
        texts = [self._render(chat, **kwargs) for chat in _as_prompts(conversation)]
        return texts[0] if isinstance(conversation[0], dict) else texts

    def _render(self, messages: Any, add_generation_prompt: bool = True, **kwargs: Any) -> str:
        template = kwargs.pop("chat_template", None) or self.chat_template or self.tokenizer.chat_template
        dated = _NOW.sub(lambda call: repr(self._today().strftime(call[2])), str(template or PLAIN_TEMPLATE))
        fixed = {"date_string": self._today().strftime("%d %b %Y"), **self.template_variables}
        return str(
            self.tokenizer.apply_chat_template(
                [{**message, "content": self._content(message)} for message in messages],
                chat_template=dated,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                **{**fixed, **kwargs},
            )
        )

    def _today(self) -> date:
        return date.fromisoformat(self.prompt_date)

    def _content(self, message: dict[str, Any]) -> str:
        """A message's content as text; parts of type volume or image become the placeholder."""
        content = message["content"]
        if isinstance(content, str):
            return content
        return "".join(part["text"] if part["type"] == "text" else self.volume_token for part in content)

    def _question(self, text: Any) -> str:
        """What is asked: the last user message of a chat, or the text without its special tokens."""
        if not isinstance(text, str):
            users = [message for message in text if message["role"] == "user"]
            return self._content(users[-1] if users else text[-1]).replace(self.volume_token, "").strip()
        ids = self.tokenizer(text.replace(self.volume_token, ""), add_special_tokens=False).input_ids
        return str(self.tokenizer.decode(ids, skip_special_tokens=True)).strip()

    def _prompt_ids(self, prompt: str, expected: tuple[int, ...] = (1,)) -> list[int]:
        found = prompt.count(self.volume_token)
        if found not in expected:
            raise UserError(f"a text has {found} placeholders {self.volume_token}, expected 1: {prompt!r:.80}")
        expanded = prompt.replace(self.volume_token, self.volume_token * self.queries)
        return list(self.tokenizer(expanded, add_special_tokens=False).input_ids)

    def _plain_ids(self, text: str) -> list[int]:
        """What a person wrote: no special token can be spelt out in it."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids)

    def _answer_ids(self, answer: str) -> list[int]:
        return [*self._plain_ids(answer), self.tokenizer.eos_token_id]

    def _encode_questions(self, questions: Sequence[str]) -> dict[str, Tensor]:
        ids = [self._plain_ids(question or " ") for question in questions]
        return {
            "question_ids": self._pad(ids, self.tokenizer.pad_token_id, "right"),
            "question_mask": self._pad([[1] * len(row) for row in ids], 0, "right").bool(),
        }

    def _check_length(self, tokens: int) -> None:
        if tokens > self.max_text_tokens:
            raise UserError(
                f"a text of {tokens} tokens; the model takes {self.max_text_tokens} beside the scan: "
                "shorten it or raise model.max_text_tokens"
            )

    def _pad_inputs(self, rows: list[list[int]], side: str) -> dict[str, Tensor]:
        return {
            "input_ids": self._pad(rows, self.tokenizer.pad_token_id, side),
            "attention_mask": self._pad([[1] * len(row) for row in rows], 0, side),
        }

    @staticmethod
    def _pad(rows: list[list[int]], value: int, side: str) -> Tensor:
        longest = max(len(row) for row in rows)
        fill = [[value] * (longest - len(row)) for row in rows]
        padded = [row + f if side == "right" else f + row for row, f in zip(rows, fill, strict=True)]
        return torch.tensor(padded, dtype=torch.long)

    @property
    def model_input_names(self) -> list[str]:
        return ["input_ids", "attention_mask", "volumes", "chunk_mask", "question_ids", "question_mask"]


def _prepare_scan(volume: Any, spec: PreprocessSpec, accept: Sequence[str]) -> tuple[Tensor, Tensor]:
    several = volume if isinstance(volume, list | tuple) else [volume]
    if all(isinstance(each, str | Path | bytes | ct.CTVolume) for each in several):
        read = (each if isinstance(each, ct.CTVolume) else ct.read(each, accept=accept) for each in several)
        volume = ct.prepare([ct.admit(each, accept) for each in read], spec)
    if isinstance(volume, ct.ModelInput):
        if volume.spec_hash != spec.hash:
            raise UserError(
                f"a scan prepared by spec {volume.spec_hash}; the checkpoint expects {spec.title}: "
                "prepare it by the processor's own spec"
            )
        return torch.as_tensor(volume.voxels), torch.as_tensor(volume.chunk_mask)
    voxels = torch.as_tensor(np.asarray(volume))
    if tuple(voxels.shape) != spec.shape:
        raise UserError(f"voxels of shape {tuple(voxels.shape)}; spec {spec.name} has {spec.shape} (T, C, K, H, W)")
    return voxels, torch.ones(len(voxels), dtype=torch.bool)


def _as_list(volumes: Any) -> list[Any]:
    if isinstance(volumes, list | tuple):
        return list(volumes)
    if isinstance(volumes, np.ndarray | Tensor) and volumes.ndim == 6:
        return list(volumes)
    return [volumes]


def _as_prompts(text: Any) -> list[Any]:
    """One prompt, one chat, or a list of either → a list."""
    if isinstance(text, str) or (len(text) and isinstance(text[0], dict)):
        return [text]
    return list(text)
