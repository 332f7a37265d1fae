"""The published implementations of the towers with random weights, and what they make of a volume: run by itself.

`python published_towers.py NAME FOLDER` writes the weights as their packages save them, and features.safetensors with
`volume`, of 0…1, and `features`; of each NIfTI in the folder what the package's own transform makes of it. In a process
of its own: the packages bring torchvision, whose operators are not built for every torch, and they are not installed
beside the rest.
"""

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file


def without_operators():
    """torchvision's operators by name alone where it is built for another torch: nothing here calls them."""
    boxes = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", boxes)


def scattered(module, seed=0):
    """Random values for every parameter and running statistic, so that no defect hides behind a constant."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if not tensor.is_floating_point() or name.endswith(("periods", "pos_embed", "mask_token")):
                continue
            noise = torch.randn(tensor.shape, generator=generator)
            if name.endswith("running_var"):
                tensor.copy_(1 + 0.3 * noise.abs())
            elif tensor.dim() == 1:
                tensor.add_(0.1 * noise)
            else:
                tensor.copy_(noise * (tensor[0].numel() ** -0.5))
    return module.eval()


def volume(*shape):
    return torch.rand(shape, generator=torch.Generator().manual_seed(7))


def colipri(folder):
    from colipri.model.image import ImageEncoder
    from colipri.pooling import AttentionPool1D
    from dynamic_network_architectures.architectures.primus import Primus

    primus = Primus(
        **{"input_channels": 1, "num_classes": 1, "eva_depth": 2, "eva_numheads": 3, "embed_dim": 36},
        **{"patch_embed_size": (8, 8, 8), "input_shape": (32, 16, 24), "use_rot_pos_emb": True},
        **{"use_abs_pos_embed": False, "drop_path_rate": 0.2, "init_values": 0.1, "scale_attn_inner": True},
    )
    save_file(scattered(primus).state_dict(), folder / "primus.safetensors")
    x = volume(2, 1, 32, 16, 24)
    with torch.no_grad():
        plain = primus.eva(primus.down_projection(x * 2 - 1).flatten(2).transpose(1, 2))[0]
    encoder = scattered(ImageEncoder(primus, torch.nn.Conv3d(36, 24, 1), AttentionPool1D(24, 12)))
    weights = {f"image_encoder.{name}": tensor for name, tensor in encoder.state_dict().items()}
    save_file({**weights, "text_encoder.pooler.weight": torch.zeros(1)}, folder / "model.safetensors")
    with torch.no_grad():
        features = encoder(x * 2 - 1, project=True, pool=False, normalize=False)
    return {"volume": x, "plain": plain, "features": features.flatten(2).transpose(1, 2).contiguous()}


def ct_fm(folder):
    from lighter_zoo import SegResEncoder

    encoder = scattered(SegResEncoder(init_filters=4, blocks_down=(1, 2, 2, 4, 4)))
    torch.save({"state_dict": {f"encoder.{name}": t for name, t in encoder.state_dict().items()}}, folder / "model.pt")
    save_file(encoder.state_dict(), folder / "model.safetensors")
    x = volume(2, 1, 32, 16, 48)
    with torch.no_grad():
        return {"volume": x, "features": encoder(x)[-1].flatten(2).transpose(1, 2).contiguous()}


def merlin(folder):
    """The published module's last map before its pooling, and ours behind the converter: it needs the package too."""
    from merlin.models.i3res import I3ResNet
    from torchvision.models import resnet152

    published = scattered(I3ResNet(resnet152(weights=None), class_nb=1692, conv_class=True, return_skips=True))
    weights = {f"encode_image.i3_resnet.{name}": tensor for name, tensor in published.state_dict().items()}
    torch.save({**weights, "encode_text.linear_layer.bias": torch.zeros(1)}, folder / "model.pt")
    x = volume(1, 1, 64, 96, 32)
    with torch.no_grad():
        maps = published(x)[2][-1]
    return {
        "features": maps.flatten(2).transpose(1, 2).contiguous(),
        "ours": _ours("merlin", folder / "model.pt", x[:, None])[:, 0],
    }


def spectre(folder):
    """Of two scans that fill different blocks of the grid: the published tokens of their crops, and the scans' own."""
    from spectre import SpectreImageFeatureExtractor

    model = scattered(SpectreImageFeatureExtractor.from_pretrained("spectre-small", pretrained=False))
    parts = folder / "parts"
    parts.mkdir()
    torch.save(model.backbone.state_dict(), parts / "spectre_backbone.pt")
    torch.save(model.feature_combiner.state_dict(), parts / "spectre_combiner.pt")
    x, mask = volume(2, 4, 1, 128, 128, 64), torch.tensor([[True, True, False, False], [True, False, True, False]])
    with torch.no_grad():
        tokens = [model(x[0, mask[0]], grid_size=(1, 1, 2)), model(x[1, mask[1]], grid_size=(1, 2, 1))]
    features = torch.stack([torch.cat([each[1:], each[:1].expand(2, -1)], dim=-1) for each in tokens])
    ours = _ours("spectre", parts, x, mask, tiles=(1, 2, 2), sizes={"preset": "spectre-small"})
    return {"features": features, "ours": torch.stack([ours[row, mask[row], 0] for row in range(2)])}


def _ours(name, path, x, mask=None, tiles=None, sizes=None):
    from mu2llm.model.configuration import Mu2VisionConfig
    from mu2llm.model.towers import loading
    from mu2llm.model.vision import VisionEncoder
    from mu2llm.settings.towers import tower_spec

    spec = tower_spec(name, None, sizes)
    config = Mu2VisionConfig(
        **{"tower": name, "sizes": sizes, "tiles": tiles, "chunks": x.shape[1], "chunk_shape": tuple(x.shape[3:])},
        **{"hidden_size": spec.width, "patch_size": spec.stride, "class_token": False, "pooling": 1},
    )
    encoder = VisionEncoder(config).eval()
    encoder.load_state_dict(loading.find(name, path).tensors)  # none missing, none left over
    with torch.no_grad():
        return encoder(x, mask)


# ---- the published transforms


def colipri_volume(path):
    from colipri import get_processor

    return get_processor(image_only=True).process_images(path)[0].data[0]


def ct_fm_volume(path):
    """The model card's: the package has none."""
    from monai.transforms import Compose, CropForeground, EnsureType, LoadImage, Orientation, ScaleIntensityRange

    steps = [
        LoadImage(ensure_channel_first=True),
        EnsureType(),
        Orientation(axcodes="SPL"),
        ScaleIntensityRange(a_min=-1024, a_max=2048, b_min=0, b_max=1, clip=True),
        CropForeground(allow_smaller=True),
    ]
    return torch.as_tensor(Compose(steps)(path))[0]


def merlin_volume(path):
    from merlin.data.monai_transforms import ImageTransforms

    return torch.as_tensor(ImageTransforms({"image": path})["image"])[0]


def spectre_volume(path):
    """(crops, 128, 128, 64), the last axis of the grid counting fastest"""
    from spectre import load_and_window

    return load_and_window(path)[0][:, 0]


TOWERS = {"colipri": colipri, "ct_fm": ct_fm, "merlin": merlin, "spectre": spectre}
VOLUMES = {"colipri": colipri_volume, "ct_fm": ct_fm_volume, "merlin": merlin_volume, "spectre": spectre_volume}

if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    without_operators()
    for path in sorted(folder.glob("*.nii")):
        save_file({"volume": VOLUMES[name](str(path)).float().contiguous()}, path.with_suffix(".volume.safetensors"))
    save_file(TOWERS[name](folder), folder / "features.safetensors")
