"""The published implementations of the towers with random weights, and what they make of a volume: run by itself.

`python published_towers.py NAME FOLDER` writes the weights as their packages save them, and features.safetensors with
`volume`, as each takes it, and `features`. In a process of its own: the packages bring torchvision, whose operators are
not built for every torch, and they are not installed beside the rest.
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
    # the backbone's names with its decoder, and the same places in order
    return {"volume": x, "plain": plain, "features": features.flatten(2).transpose(1, 2).contiguous()}


def ct_fm(folder):
    from lighter_zoo import SegResEncoder

    encoder = scattered(SegResEncoder(init_filters=4, blocks_down=(1, 2, 2, 4, 4)))
    torch.save({"state_dict": {f"encoder.{name}": t for name, t in encoder.state_dict().items()}}, folder / "model.pt")
    save_file(encoder.state_dict(), folder / "model.safetensors")
    x = volume(2, 1, 32, 16, 48)
    with torch.no_grad():
        return {"volume": x, "features": encoder(x)[-1].flatten(2).transpose(1, 2).contiguous()}


TOWERS = {"colipri": colipri, "ct_fm": ct_fm}

if __name__ == "__main__":
    name, folder = sys.argv[1], Path(sys.argv[2])
    without_operators()
    save_file(TOWERS[name](folder), folder / "features.safetensors")
