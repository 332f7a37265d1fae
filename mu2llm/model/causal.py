"""The language model of a checkpoint alone, as a plain causal model that other servers load."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from mu2llm.model.building import load
from mu2llm.model.modeling import Mu2ForConditionalGeneration
from mu2llm.model.processing import Mu2Processor


def causal(model: Mu2ForConditionalGeneration, processor: Mu2Processor) -> PreTrainedModel:
    """The same language model and head, without copies, as the class of transformers that its configuration names.

    For text without a scan its logits are the checkpoint's. Its table of embeddings has a row for `<volume>` still:
    a server that takes prompts as embeddings puts the visual tokens in its place.
    """
    config = copy.deepcopy(model.config.text)
    config.dtype = model.dtype
    with torch.device("meta"):
        alone = AutoModelForCausalLM.from_config(config)
    setattr(alone, alone.base_model_prefix, model.model.language_model)
    alone.set_output_embeddings(model.lm_head)
    alone.tie_weights()
    alone.generation_config = copy.deepcopy(model.generation_config)
    return alone.eval()


def save_causal(uri: str, folder: str | Path) -> PreTrainedModel:
    """A checkpoint's language model, generation settings and tokenizer with its chat template, as a folder that
    `AutoModelForCausalLM` and vLLM load; LoRA was merged when the checkpoint was saved. Raises UserError where the
    checkpoint writes no reports."""
    model, processor = load(uri)
    alone = causal(model, processor)
    alone.save_pretrained(folder)
    tokenizer = copy.deepcopy(processor.tokenizer)
    tokenizer.chat_template = processor.chat_template
    tokenizer.save_pretrained(folder)
    return alone
