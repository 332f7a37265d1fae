"""The μ²LLM as a native transformers model. Importing this registers it with the Auto classes."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageTextToText,
    AutoModelForMultimodalLM,
    AutoProcessor,
)

from mu2llm.model.building import (
    add_lora,
    add_prior,
    build,
    build_contrastive,
    build_processor,
    configuration,
    load,
    load_contrastive,
    load_lora,
    load_processor,
    load_tokenizer,
    load_vision,
    merge_lora,
    save_text_encoder,
)
from mu2llm.model.configuration import Mu2Config, Mu2ContrastiveConfig, Mu2TokenizerConfig, Mu2VisionConfig
from mu2llm.model.contrastive import Mu2ForContrastive
from mu2llm.model.familiarity import Familiarity
from mu2llm.model.modeling import Mu2ForConditionalGeneration, Mu2Model
from mu2llm.model.mu2_tokenizer import Mu2Tokenizer, VisualTokens
from mu2llm.model.processing import VOLUME_TOKEN, Mu2Processor

AutoConfig.register("mu2llm", Mu2Config)
AutoConfig.register("mu2llm_contrastive", Mu2ContrastiveConfig)
AutoModel.register(Mu2Config, Mu2Model)
AutoModel.register(Mu2ContrastiveConfig, Mu2ForContrastive)
AutoModelForCausalLM.register(Mu2Config, Mu2ForConditionalGeneration)
AutoModelForImageTextToText.register(Mu2Config, Mu2ForConditionalGeneration)
AutoModelForMultimodalLM.register(Mu2Config, Mu2ForConditionalGeneration)
AutoProcessor.register(Mu2Config, Mu2Processor)

__all__ = [
    "VOLUME_TOKEN",
    "Familiarity",
    "Mu2Config",
    "Mu2ContrastiveConfig",
    "Mu2ForConditionalGeneration",
    "Mu2ForContrastive",
    "Mu2Model",
    "Mu2Processor",
    "Mu2Tokenizer",
    "Mu2TokenizerConfig",
    "Mu2VisionConfig",
    "VisualTokens",
    "add_lora",
    "add_prior",
    "build",
    "build_contrastive",
    "build_processor",
    "configuration",
    "load",
    "load_contrastive",
    "load_lora",
    "load_processor",
    "load_tokenizer",
    "load_vision",
    "merge_lora",
    "save_text_encoder",
]
