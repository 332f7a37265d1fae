"""A small checkpoint in the published layout → ours: every key finds its place, and the numbers stay."""

import json
import re

import pytest
import torch
from safetensors.torch import save_file
from small_models import TEXTS, scans
from transformers import Qwen3Config, Qwen3ForCausalLM

from mu2llm.artefacts import open_checkpoint
from mu2llm.errors import Failure, UserError
from mu2llm.model import convert, load, load_vision
from mu2llm.model.published import model_rules, names
from mu2llm.weights import train_tokenizer

WIDTH, VISION, LAYERS, HEADS, TOP_K, QUERIES = 32, 64, 2, 2, 8, 4
CHUNK, PATCH = (4, 16, 16), (1, 4, 4)
SETTINGS = {
    "model_type": "u2Qwen3",
    "architectures": ["u2Qwen3ForCausalLM"],
    "auto_map": {"AutoConfig": "configuration_u2.u2Config"},
    "enable_u2tokenizer": True,
    "u2t_num_heads": HEADS,
    "u2t_num_layers": LAYERS,
    "u2t_top_k": TOP_K,
    "num_3d_query_token": QUERIES,
    "use_multi_scale": True,
    "enable_diffts": True,
    "enable_dmtp": True,
    "attn_type": "rma",
    "mm_projector_type": "spp",
    "mm_hidden_size": VISION,
    "proj_layer_num": 2,
    "proj_layer_type": "mlp",
    "proj_pooling_size": 2,
    "proj_pooling_type": "spatial",
    "vision_tower": "vit3d",
    "vision_select_layer": -1,
    "image_channel": 1,
    "image_size": list(CHUNK),
    "patch_size": list(PATCH),
}


def attention(name, projections=("wq", "wk", "wv", "dense")):
    for projection in projections:
        yield f"{name}.{projection}.weight", (WIDTH, WIDTH)
        yield f"{name}.{projection}.bias", (WIDTH,)


def tokenizer_shapes():
    yield "query_tokens", (1, QUERIES, WIDTH)
    for i in range(LAYERS):
        for kind in ("spatial", "temporal"):
            name = f"svt_module.attention_network.layers.{i}.{kind}_attention"
            yield from attention(name)
            yield f"{name}.relative_bias", (1023, HEADS)
        layer = f"tta_module.layers_vt.{i}"
        for kind in ("self", "visual_cross", "text_cross"):
            yield from attention(f"{layer}.{kind}_attention")
        yield f"{layer}.self_attention.relative_bias", (1023, HEADS)
        for norm in ("norm_self", "norm_cross_v", "norm_cross_t"):
            yield f"{layer}.{norm}.weight", (WIDTH,)
            yield f"{layer}.{norm}.bias", (WIDTH,)
    yield "svt_module.token_selection.score_net.weight", (TOP_K, WIDTH)
    yield "svt_module.token_selection.score_net.bias", (TOP_K,)
    yield "svt_module.dynamic_pool.gate_fc.weight", (1, WIDTH)
    yield "svt_module.dynamic_pool.gate_fc.bias", (1,)
    yield from attention("tta_module.layer_linagg.linear_aggregator")


def vision_shapes(channels=1):
    yield "cls_token", (1, 1, VISION)
    yield "patch_embedding.position_embeddings", (1, 64, VISION)
    yield "patch_embedding.patch_embeddings.1.weight", (VISION, 16 * channels)
    yield "patch_embedding.patch_embeddings.1.bias", (VISION,)
    for name, shape in (
        ("norm1.weight", (VISION,)),
        ("norm1.bias", (VISION,)),
        ("norm2.weight", (VISION,)),
        ("norm2.bias", (VISION,)),
        ("attn.qkv.weight", (3 * VISION, VISION)),
        ("attn.out_proj.weight", (VISION, VISION)),
        ("attn.out_proj.bias", (VISION,)),
        ("mlp.linear1.weight", (48, VISION)),
        ("mlp.linear1.bias", (48,)),
        ("mlp.linear2.weight", (VISION, 48)),
        ("mlp.linear2.bias", (VISION,)),
    ):
        yield f"blocks.0.{name}", shape
    yield "norm.weight", (VISION,)
    yield "norm.bias", (VISION,)


def random(shapes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) * 0.2 for name, shape in shapes}


@pytest.fixture
def published():
    """(settings, language model, weights) of a small published checkpoint."""
    words = train_tokenizer(TEXTS, 300)
    words.add_special_tokens({"extra_special_tokens": ["<im_patch>"]}, replace_extra_special_tokens=False)
    torch.manual_seed(0)
    config = Qwen3Config(
        **{"vocab_size": len(words), "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2},
        **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "tie_word_embeddings": False},
    )
    language = Qwen3ForCausalLM(config).eval()
    weights = dict(language.state_dict())
    weights |= {f"model.u2tokenizer.{name}": t for name, t in random(tokenizer_shapes()).items()}
    weights |= {f"model.vision_tower.vision_tower.{name}": t for name, t in random(vision_shapes()).items()}
    projector = [
        ("0.weight", (WIDTH, VISION)),
        ("0.bias", (WIDTH,)),
        ("2.weight", (WIDTH, WIDTH)),
        ("2.bias", (WIDTH,)),
    ]
    weights |= {f"model.mm_projector.projector.{name}": t for name, t in random(projector).items()}
    return {**config.to_dict(), **SETTINGS}, language, weights, words


def write(folder, settings, weights, words, binary=False):
    folder.mkdir()
    words.save_pretrained(folder)
    (folder / "config.json").write_text(json.dumps(settings))
    names = sorted(weights)
    halves = [names[: len(names) // 2], names[len(names) // 2 :]]
    for i, half in enumerate(halves, 1):
        part = {name: weights[name].clone() for name in half}
        if binary:
            torch.save(part, folder / f"pytorch_model-{i:05d}-of-00002.bin")
        else:
            save_file(part, folder / f"model-{i:05d}-of-00002.safetensors", metadata={"format": "pt"})
    return str(folder)


def below(weights, prefix):
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}


@pytest.mark.parametrize("binary", [False, True], ids=["sharded safetensors", "bin"])
def test_a_published_checkpoint_converts_with_no_key_left_and_says_the_same(published, tmp_path, binary):
    settings, language, weights, words = published
    source = write(tmp_path / "published", settings, weights, words, binary)
    report = convert.convert_reference(source, str(tmp_path / "ours"))
    assert report["missing"] == [] and report["unused"] == []
    assert all("linear_aggregator" in n or "score_net.bias" in n or "gate_fc.bias" in n for n in report["dropped"])
    checkpoint = open_checkpoint(str(tmp_path / "ours"))
    model, processor = load(str(tmp_path / "ours"))
    assert checkpoint.lineage.stage == "converted" and checkpoint.lineage.spec_hash == processor.spec.hash

    inputs = processor.encode(["Is there an effusion?"])
    volumes = torch.rand(1, 3, 1, *CHUNK)
    vision = convert.load_reference_vision(
        {f"vision.{n}": t for n, t in below(weights, "model.vision_tower.vision_tower.").items()}
        | {f"projector.{n}": t for n, t in below(weights, "model.mm_projector.").items()},
        **{"img_size": CHUNK, "patch_size": PATCH, "hidden_size": VISION, "mlp_dim": 48, "num_layers": 1},
        **{"num_heads": 1, "projector_out": WIDTH, "pooling": 2, "layers": 2},
    )
    tokenizer = convert.load_reference_tokenizer(
        below(weights, "model.u2tokenizer."),
        **{"attn_type": "rma", "enable_diffts": True, "enable_dmtp": True, "embed_size": WIDTH, "hidden_size": WIDTH},
        **{"num_heads": HEADS, "num_layers": LAYERS, "top_k": TOP_K, "num_3d_query_token": QUERIES},
    )
    with torch.no_grad():
        embed = language.get_input_embeddings()
        features = vision(volumes[0])[1][None]
        tokens = tokenizer(features, embed(inputs["question_ids"]))
        embeds = embed(inputs["input_ids"])
        embeds = torch.cat([embeds[:, :1], tokens, embeds[:, QUERIES + 1 :]], dim=1)
        expected = language(inputs_embeds=embeds).logits
        given = model(**inputs, volumes=volumes).logits
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-3)
    assert processor.prompt("Why?") == "<im_patch>Why?"


def test_a_missing_or_unknown_key_is_named_and_nothing_is_written(published, tmp_path):
    settings, _, weights, words = published
    del weights["model.u2tokenizer.query_tokens"]
    weights["model.seg_projector.0.weight"] = torch.zeros(3)
    source = write(tmp_path / "published", settings, weights, words)
    named = r"missing \['model.u2tokenizer.query_tokens'\], unused \['model.seg_projector.0.weight'\]"
    with pytest.raises(Failure, match=named):
        convert.convert_reference(source, str(tmp_path / "ours"))
    assert not (tmp_path / "ours").exists()


def test_what_a_checkpoint_must_hold_is_known_by_its_published_names(published, tmp_path):
    """All of it, but for the weights without effect: so what is missing is named as it was published."""
    settings, _, weights, words = published
    convert.convert_reference(write(tmp_path / "published", settings, weights, words), str(tmp_path / "ours"))
    model, _ = load(str(tmp_path / "ours"))
    effectless = re.compile(r"linear_aggregator\.(wv|dense)|(score_net|gate_fc)\.bias")
    expected = {name for name in weights if not effectless.search(name)}
    assert names(convert.own_names(model), model_rules(model.config.tokenizer)) == expected


@pytest.mark.parametrize(
    "name",
    [
        "model.embed_tokens.weight",
        "model.u2tokenizer.svt_module.token_selection.score_net.weight",
        "model.vision_tower.vision_tower.blocks.0.mlp.linear1.weight",
    ],
)
def test_a_missing_key_that_decides_sizes_is_named_too(published, tmp_path, name):
    settings, _, weights, words = published
    del weights[name]
    source = write(tmp_path / "published", settings, weights, words)
    with pytest.raises(Failure, match=rf"missing \['{name}'\]"):
        convert.convert_reference(source, str(tmp_path / "ours"))


@pytest.mark.parametrize("binary", [False, True])
def test_a_damaged_file_is_named(published, tmp_path, binary):
    settings, _, weights, words = published
    source = write(tmp_path / "published", settings, weights, words, binary)
    file = sorted((tmp_path / "published").glob("*-00002-of-*"))[0]
    file.write_bytes(file.read_bytes()[:-100] if binary else b"version https://git-lfs.github.com/spec/v1\n")
    with pytest.raises(Failure, match=f"{file.name} of .* is damaged"):
        convert.convert_reference(source, str(tmp_path / "ours"))


def test_another_folder_is_refused(published, tmp_path):
    settings, _, weights, words = published
    with pytest.raises(UserError, match=r"no config\.json"):
        convert.convert_reference(str(tmp_path), str(tmp_path / "ours"))
    other = {key: value for key, value in settings.items() if key != "u2t_top_k"}
    with pytest.raises(UserError, match="not a checkpoint of the published"):
        convert.convert_reference(write(tmp_path / "a", other, weights, words), str(tmp_path / "ours"))
    less = {key: value for key, value in settings.items() if key not in ("patch_size", "u2t_num_heads")}
    with pytest.raises(UserError, match="lacks patch_size, u2t_num_heads"):
        convert.convert_reference(write(tmp_path / "c", less, weights, words), str(tmp_path / "ours"))
    (tmp_path / "c" / "config.json").write_text("{")
    with pytest.raises(UserError, match="not JSON"):
        convert.convert_reference(str(tmp_path / "c"), str(tmp_path / "ours"))
    strange = {**settings, "model_type": "u2mamba"}
    with pytest.raises(UserError, match="backbone 'u2mamba' is not known"):
        convert.convert_reference(write(tmp_path / "b", strange, weights, words), str(tmp_path / "ours"))


class Malicious:
    def __reduce__(self):
        return (print, ("code ran",))


def test_pickled_code_is_not_run(published, tmp_path, capsys):
    settings, _, weights, words = published
    source = write(tmp_path / "published", settings, weights, words, binary=True)
    torch.save({"evil": Malicious()}, tmp_path / "published" / "pytorch_model-00003-of-00003.bin")
    with pytest.raises(UserError, match="pickled code"):
        convert.convert_reference(source, str(tmp_path / "ours"))
    assert "code ran" not in capsys.readouterr().out


@pytest.mark.parametrize("channels", [1, 2])
def test_m3d_clip_vision_weights_load_whole(tmp_path, channels):
    """A scan that is the same in all windows gives what the one published channel gives."""
    windows = [[-1000, 400]] * channels
    sizes = {"hidden_size": VISION, "mlp_dim": 48, "patch_size": [1, 4, 4], "class_token": True, "num_heads": 1}
    model = vision_model(windows, sizes)
    weights = random(vision_shapes()) | {"blocks.0.norm_cross_attn.weight": torch.zeros(VISION)}
    torch.save(weights, tmp_path / "pretrained_ViT.bin")
    load_vision(model, str(tmp_path / "pretrained_ViT.bin"))
    reference = convert.load_reference_vision(
        {f"vision.{n}": t for n, t in weights.items()}
        | {f"projector.projector.{n}": t for n, t in random([("0.weight", (8, VISION)), ("0.bias", (8,))]).items()},
        **{"img_size": CHUNK, "patch_size": PATCH, "hidden_size": VISION, "mlp_dim": 48, "num_layers": 1},
        **{"num_heads": 1, "projector_out": 8, "pooling": 2, "layers": 1},
    )
    volume = scans(1)[0].float() / 255
    with torch.no_grad():
        expected = reference(volume)[0]
        given = model.model.vision.tower(volume.expand(-1, channels, -1, -1, -1))
    torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-3)
    clip = {f"vision_encoder.{name}": tensor for name, tensor in weights.items()}
    torch.save({**clip, "language_encoder.pooler.bias": torch.zeros(2)}, tmp_path / "clip.bin")
    other = vision_model(windows, sizes)
    load_vision(other, str(tmp_path / "clip.bin"))
    with torch.no_grad():
        assert torch.equal(other.model.vision.tower(volume.expand(-1, channels, -1, -1, -1)), given)
    torch.save({name: t for name, t in weights.items() if name != "norm.bias"}, tmp_path / "less.bin")
    with pytest.raises(UserError, match=r"does not fit.*tower\.norm\.bias"):
        load_vision(model, str(tmp_path / "less.bin"))


def vision_model(windows, sizes):
    from small_models import experiment

    from mu2llm import config
    from mu2llm.model import build

    settings = experiment(vision=sizes).model_dump(mode="json")
    settings["data"]["spec"]["windows"] = windows
    settings = config.validate(settings)
    return build(settings.model, settings.data.spec, TEXTS, 0)[0].eval()
