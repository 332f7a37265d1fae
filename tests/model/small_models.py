"""Models and tokenizers of the least size, with random weights that no defect can hide behind."""

import torch

from mu2llm import config
from mu2llm.model import Mu2Tokenizer, Mu2TokenizerConfig, build

TEXTS = [
    "Findings: There is a large left pleural effusion. The liver is normal.",
    "Findings: No pleural effusion. There is a right lung nodule of 12 mm. The heart is not enlarged.",
]
QUESTION = "Write the radiology report of this CT scan."
GRID = (2, 2, 3)


def experiment(**model):
    """Two chunks of 4 × 16 × 16 voxels in one window; `model` overrides sections of the model's settings."""
    sections = {
        "small": {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "mlp_dim": 64, "vocabulary": 320},
        "vision": {
            **{"hidden_size": 24, "num_layers": 1, "num_heads": 2, "mlp_dim": 32},
            **{"patch_size": [2, 4, 4], "class_token": False, "pooling": 2},
        },
        "tokenizer": {"num_layers": 1, "num_heads": 2, "queries": 4, "top_k": 6, "scales": [1, 2]},
        "max_text_tokens": 128,
    }
    for name, values in model.items():
        sections[name] = {**sections[name], **values} if isinstance(sections.get(name), dict) else values
    spec = {"name": "least", "windows": [[-1000, 400]], "grid": [8, 16, 16], "chunks": 2, "fit": "stretch"}
    return config.validate({"data": {"spec": spec}, "model": sections})


def make(seed=0, **model):
    """(model in evaluation mode, processor) with every parameter random."""
    settings = experiment(**model)
    made, processor = build(settings.model, settings.data.spec, TEXTS * 4, seed)
    scatter(made, seed)
    return made.eval(), processor


def scatter(module, seed=0):
    """Every parameter that starts as a constant (biases, tables, norms) gets a random part."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in module.parameters():
            if bool((parameter == parameter.flatten()[0]).all()):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return module


def scans(count, seed=0, chunks=2):
    """uint8 voxels (count, chunks, 1, 4, 16, 16)"""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, chunks, 1, 4, 16, 16), dtype=torch.uint8, generator=generator)


def tokenizer(**fields):
    """A μ²Tokenizer for 3 chunks of 2 × 2 × 3 tokens of width 24, with random weights."""
    torch.manual_seed(0)
    settings = {
        **{"hidden_size": 24, "chunks": 3, "grid": GRID, "num_layers": 2, "num_heads": 2},
        **{"queries": 5, "top_k": 8, "max_positions": 64, **fields},
    }
    module = Mu2Tokenizer(Mu2TokenizerConfig(**settings))
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.dim() == 2:
                parameter.copy_(torch.randn_like(parameter) * 2 * parameter.shape[1] ** -0.5)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.2)
    return module.eval()


def visual(count=2, chunks=3, seed=0):
    return torch.randn(count, chunks, 12, 24, generator=torch.Generator().manual_seed(seed))


def text(count=2, length=4, seed=1):
    return torch.randn(count, length, 24, generator=torch.Generator().manual_seed(seed))


def unreached(module, floor=1e-12):
    """Names of the parameters to which no gradient comes: of a model in float64, where rounding noise is below 1e-16
    of the largest gradient. Those of `aggregation.key.bias` (a softmax over keys is the same for any) and of the
    published gate (it reads the same mean at every scale that divides k) are noise by construction."""
    sizes = {name: 0.0 if p.grad is None else float(p.grad.abs().max()) for name, p in module.named_parameters()}
    assert all(p.dtype == torch.float64 for p in module.parameters())
    return [name for name, size in sizes.items() if not size > floor * max(sizes.values())]
