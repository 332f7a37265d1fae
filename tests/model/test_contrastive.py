"""The contrastive model: losses by their definitions, many workers as one, text encoder within or without."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from small_models import TEXTS, experiment, scans, unreached
from transformers import AutoModel

from mu2llm import weights
from mu2llm.errors import UserError
from mu2llm.model import Mu2ForContrastive, build_contrastive
from mu2llm.model.contrastive import fit_temperature

OWNER = torch.tensor([0, 0, 1, 2, 3, 3])


def make(loss="sigmoid", text_encoder=None, **sections):
    settings = experiment(**sections)
    contrastive = settings.contrastive.model_copy(update={"loss": loss})
    width = text_encoder.width if text_encoder else 16
    return build_contrastive(settings.model, settings.data.spec, contrastive, width, None, 0, text_encoder).eval()


def inputs(count=4):
    return {
        "volumes": scans(count),
        "chunk_mask": torch.ones(count, 2, dtype=torch.bool),
        "text_embeddings": F.normalize(torch.randn(len(OWNER), 16, generator=torch.Generator().manual_seed(3)), dim=-1),
    }


def test_logits_are_of_every_text_with_every_scan():
    model, given = make(), inputs()
    scores = model.score(**given)
    assert scores.shape == (6, 4)
    one = model.score(given["volumes"][2:3], given["chunk_mask"][2:3], given["text_embeddings"][4:5])
    torch.testing.assert_close(scores[4:5, 2:3], one)


def test_padded_chunks_change_nothing():
    model, given = make(), inputs()
    given["chunk_mask"][:, 1] = False
    other = given["volumes"].clone()
    other[:, 1] = 255
    torch.testing.assert_close(model.score(**given), model.score(**{**given, "volumes": other}))


def test_sigmoid_is_one_yes_or_no_for_each_pair():
    model, given = make("sigmoid"), inputs()
    out = model(**given, owner=OWNER)
    belongs = F.one_hot(OWNER, 4).double()
    probability = model.score(**given).double().sigmoid()
    expected = -(belongs * probability.log() + (1 - belongs) * (1 - probability).log()).mean()
    torch.testing.assert_close(out.loss.double(), expected, atol=1e-6, rtol=1e-5)


def test_infonce_is_the_cross_entropy_both_ways():
    model, given = make("infonce"), inputs()
    given["text_embeddings"] = given["text_embeddings"][:4]
    logits = model.score(**given)
    right = torch.arange(4)
    expected = (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2
    torch.testing.assert_close(model(**given, owner=right).loss, expected)


@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
def test_a_text_that_two_scans_share_is_a_positive_of_both_and_counts_once(loss):
    model, given = make(loss), inputs()
    shared = given["text_embeddings"].clone()
    shared[2] = shared[0]  # scans 0 and 1 say the same
    keys = torch.tensor([0, 1, 0, 2, 3, 4])
    doubled = model(**{**given, "text_embeddings": shared}, owner=OWNER, text_keys=keys)
    assert len(doubled.targets) == 5 and doubled.targets[0].tolist() == [True, True, False, False]
    kept = [0, 1, 3, 4, 5]
    targets = F.one_hot(OWNER, 4).bool()
    targets[0, 1] = True
    once = model(**{**given, "text_embeddings": shared[kept]}, targets=targets[kept])
    torch.testing.assert_close(doubled.loss, once.loss)


@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
def test_bf16_keeps_the_positives_of_fp32(loss):
    """Under autocast no product of two bf16 embeddings reaches 1: texts are known by their keys."""
    model, given = make(loss), inputs()
    given["text_embeddings"][2] = given["text_embeddings"][0]
    given |= {"owner": OWNER, "text_keys": torch.tensor([0, 1, 0, 2, 3, 4])}
    exact = model(**given)
    with torch.autocast("cpu", torch.bfloat16):
        rough = model(**given)
    assert torch.equal(rough.targets, exact.targets) and exact.targets.any(1).all()
    assert rough.positives == exact.positives == 6
    torch.testing.assert_close(rough.loss.float(), exact.loss, rtol=0.03, atol=0)


@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
def test_ten_steps_in_bf16_lose_as_much_as_in_fp32(loss):
    losses = {dtype: learn(loss, dtype) for dtype in (torch.float32, torch.bfloat16)}
    assert losses[torch.float32][-1] < 0.9 * losses[torch.float32][0]
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.03)


def learn(loss, dtype, steps=10):
    model, given = make(loss, vision={"stem": "conv"}).train(), inputs()
    optimiser, losses = torch.optim.AdamW(model.parameters(), lr=1e-3), []
    for _ in range(steps):
        with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
            out = model(**given, owner=OWNER, text_keys=torch.arange(6))
        losses.append(float(out.loss.detach()))
        optimiser.zero_grad()
        out.loss.backward()
        optimiser.step()
    return losses


def test_infonce_refuses_a_text_that_no_scan_has():
    targets = F.one_hot(OWNER, 4).bool()
    targets[3] = False
    with pytest.raises(UserError, match="1 of 6 texts are of no scan"):
        make("infonce")(**inputs(), targets=targets)


@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
def test_two_workers_with_gathered_texts_are_one(loss):
    """The mean of the workers' losses and of their gradients are the whole batch's; unequal numbers of texts and scans,
    a text that both have; each scores its own scans alone."""
    given = {name: x.double() if x.is_floating_point() else x for name, x in inputs().items()}
    given["text_embeddings"][4] = given["text_embeddings"][1]
    given["text_embeddings"].requires_grad_()
    keys = torch.tensor([0, 1, 2, 3, 1, 5])
    model = make(loss).double()
    whole = model(**given, owner=OWNER, text_keys=keys)
    whole.loss.backward()
    expected = {name: p.grad.clone() for name, p in model.named_parameters()}
    texts = given.pop("text_embeddings")
    of_text, texts.grad = texts.grad, None
    parts = [
        {name: x[:3] for name, x in given.items()} | of_texts(texts, keys, slice(0, 4)),
        {name: x[3:] for name, x in given.items()} | of_texts(texts, keys, slice(4, 6), first=3),
    ]
    outputs, gradients = run_workers(model, parts)
    assert [tuple(each.logits.shape) for each in outputs] == [(5, 3), (5, 1)]
    assert [int(each.positives) for each in outputs] == [int(whole.positives)] * 2 == [6, 6]
    torch.testing.assert_close(sum(each.loss for each in outputs) / 2, whole.loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected[name], atol=1e-12, rtol=1e-10)
    torch.testing.assert_close(texts.grad, of_text, atol=1e-12, rtol=1e-10)


def of_texts(texts, keys, some, first=0):
    return {"text_embeddings": texts[some], "text_keys": keys[some], "owner": OWNER[some] - first}


def test_several_workers_texts_need_keys():
    with pytest.raises(UserError, match="give text_keys"):
        make()(**inputs(), owner=OWNER, gather=lambda x: x)


def run_workers(model, parts):
    """Each part in a thread of its own; what they gather is the one's rows and then the other's."""
    meet, slots = threading.Barrier(len(parts)), [None] * len(parts)

    def work(rank):
        def gather(tensor):
            slots[rank] = tensor
            meet.wait(60)
            together = torch.cat(slots)
            meet.wait(60)
            return together

        return model(**parts[rank], gather=gather)

    with ThreadPoolExecutor(len(parts)) as threads:
        outputs = list(threads.map(work, range(len(parts))))
    model.zero_grad()
    (sum(each.loss for each in outputs) / len(outputs)).backward()
    return outputs, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_a_text_encoder_from_scratch_is_trained_with_it(tmp_path):
    encoder = weights.text_encoder("small", TEXTS)
    model = make(text_encoder=encoder).train()
    words = encoder.tokenizer(TEXTS, padding=True, return_tensors="pt")
    given = {name: tensor for name, tensor in inputs(2).items() if name != "text_embeddings"}
    out = model(**given, text_ids=words.input_ids, text_mask=words.attention_mask, owner=torch.tensor([0, 1]))
    out.loss.backward()
    largest = max(p.grad.abs().max() for p in model.parameters() if p.grad is not None)
    of_words = model.text_encoder.embeddings.word_embeddings.weight.grad.abs().amax(-1)
    assert (of_words[words.input_ids[words.attention_mask.bool()].unique()] > 1e-6 * largest).all()
    model.save_pretrained(tmp_path)
    read = Mu2ForContrastive.from_pretrained(tmp_path)
    embeddings = [m.eval().embed_texts(text_ids=words.input_ids, text_mask=words.attention_mask) for m in (model, read)]
    torch.testing.assert_close(*embeddings)


def test_saved_and_loaded(tmp_path):
    model = make(vision={"stem": "conv", "standardise_input": True}).train()
    model(**inputs(), owner=OWNER)
    model.eval().save_pretrained(tmp_path)
    read = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(read, Mu2ForContrastive)
    torch.testing.assert_close(read.score(**inputs()), model.score(**inputs()))


def test_as_a_clip_it_keeps_its_whitening_and_its_temperature(tmp_path):
    model = make()
    centre, axes = torch.randn(24), torch.randn(24, 16)
    model.keep_whitening(centre, axes)
    model.head.temperature.fill_(2.0)
    model.save_pretrained(tmp_path)
    read = Mu2ForContrastive.from_pretrained(tmp_path).eval()
    embedded, scan = torch.randn(5, 24), {name: inputs()[name] for name in ("volumes", "chunk_mask")}
    texts = read.whiten(embedded)
    torch.testing.assert_close(texts, (embedded - centre) @ axes)
    torch.testing.assert_close(
        read.zero_shot(**scan, text_embeddings=texts), (read.score(**scan, text_embeddings=texts) / 2).sigmoid()
    )
    features = read.encode_vision(**scan)
    cached = read.zero_shot(None, scan["chunk_mask"], texts, features)
    torch.testing.assert_close(cached, read.zero_shot(**scan, text_embeddings=texts))


def test_images_and_texts_have_embeddings_of_their_own():
    """Of a text that looks everywhere alike the score is their product: that is what they are the embeddings of."""
    model, given = make(), inputs()
    given["chunk_mask"][0, 1] = False
    with torch.no_grad():
        model.head.look.weight.zero_()
        model.head.look.bias.zero_()
    texts, image = model.get_text_features(given["text_embeddings"]), {n: given[n] for n in ("volumes", "chunk_mask")}
    product = texts @ model.get_image_features(**image).T + model.head.bias
    torch.testing.assert_close(product, model.score(**given))


@pytest.mark.parametrize("true", [0.25, 1.0, 4.0])
def test_the_temperature_makes_probabilities_of_logits(true):
    logits = torch.randn(200, 200, generator=torch.Generator().manual_seed(0)) * 3
    targets = torch.rand(200, 200, generator=torch.Generator().manual_seed(1)) < (logits / true).sigmoid()
    assert fit_temperature(logits, targets, "sigmoid") == pytest.approx(true, rel=0.1)


@pytest.mark.parametrize("loss", ["sigmoid", "infonce"])
def test_gradients_reach_every_parameter(loss):
    model = make(loss, vision={"stem": "conv"}).double().train()
    given = {name: tensor.double() if tensor.is_floating_point() else tensor for name, tensor in inputs().items()}
    model(**given, owner=OWNER).loss.backward()
    # a norm takes the mean away, a softmax over keys what all have in common, and InfoNCE what all logits have
    effectless = {"vision.tower.stem.patches.bias", "vision.tower.stem.neighbours.bias", "head.key.bias"}
    # the loss itself is taken in fp32, whose noise is 1e-8
    assert set(unreached(model, floor=1e-6)) == effectless | ({"head.bias"} if loss == "infonce" else set())


def test_no_texts_at_all_is_refused():
    given = {name: tensor for name, tensor in inputs().items() if name != "text_embeddings"}
    with pytest.raises(UserError, match="give text_embeddings"):
        make()(**given, owner=OWNER)


def test_whole_on_the_meta_device():
    with torch.device("meta"):
        model = make(loss="sigmoid")
        given = {name: torch.empty_like(tensor, device="meta") for name, tensor in inputs().items()}
        assert model.to("meta").score(**given).shape == (6, 4)
