"""The μ²Tokenizer: what must hold for every kind of attention, selection and pooling."""

import itertools

import pytest
import torch
from small_models import GRID, scatter, text, tokenizer, visual

from mu2llm.errors import UserError
from mu2llm.model import Mu2TokenizerConfig
from mu2llm.model.initialisation import initialise
from mu2llm.settings.model import ModelConfig

ATTENTIONS = ["absolute", "relative_1d", "relative_3d", "rotary_1d", "rotary_3d"]
KINDS = [
    {"attention": attention, "selection": selection, "pooling": pooling, "gate": "mlp"}
    for attention, (selection, pooling) in itertools.product(
        ATTENTIONS, [("differentiable", "dynamic"), ("top_k", "static")]
    )
]


@pytest.fixture(params=KINDS, ids=lambda kind: "-".join(kind.values()))
def module(request):
    return tokenizer(**request.param)


def test_gives_the_configured_number_of_tokens_for_any_scales():
    for scales in ((1,), (1, 2, 4), (2, 3), (4, 8, 16)):
        made = tokenizer(scales=scales)
        assert made(visual(), text()).tokens.shape == (2, 5, 24)
        selected = made.select(made.significance(visual()))
        assert made.pooling(selected.tokens)[0].shape[1] == made.config.multiscale_tokens


def test_a_batch_gives_what_its_scans_give_alone(module):
    together = module(visual(3), text(3)).tokens
    alone = torch.cat([module(visual(3)[i : i + 1], text(3)[i : i + 1]).tokens for i in range(3)])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)


def test_padded_chunks_and_padded_text_change_nothing(module):
    plain = module(visual(2, chunks=2), text(2, length=3)).tokens
    chunk_mask, text_mask = torch.tensor([[True, True, False]] * 2), torch.tensor([[True] * 3 + [False] * 2] * 2)
    longer_scan = torch.cat([visual(2, chunks=2), torch.full((2, 1, 12, 24), 7.0)], dim=1)
    longer_text = torch.cat([text(2, length=3), torch.full((2, 2, 24), 7.0)], dim=1)
    padded = module(longer_scan, longer_text, chunk_mask, text_mask).tokens
    torch.testing.assert_close(padded, plain, atol=1e-5, rtol=1e-4)


def test_the_order_of_the_chunks_matters(module):
    swapped = visual()[:, [1, 0, 2]]
    assert (module(visual(), text()).tokens - module(swapped, text()).tokens).abs().max() > 1e-3


def test_gradients_reach_every_parameter_and_the_inputs(module):
    scan, question = visual().double().requires_grad_(), text().double().requires_grad_()
    reached = gradients(module, scan, question)
    assert reached.pop("aggregation.key.bias") < 1e-12  # adds the same to all that a softmax sees
    assert min(reached.values()) > FLOOR, min(reached, key=reached.get)
    assert scan.grad.norm() > FLOOR and question.grad.norm() > FLOOR


FLOOR = 1e-6  # of a gradient's norm relative to the largest: rounding is 1e-16 in float64


def gradients(module, scan, question):
    """Norms of the parameters' gradients, relative to the largest, in float64."""
    scatter(module).double()(scan, question).tokens.square().mean().backward()
    norms = {name: 0.0 if p.grad is None else float(p.grad.norm()) for name, p in module.named_parameters()}
    return {name: norm / max(norms.values()) for name, norm in norms.items()}


@pytest.mark.parametrize("scales", [(1, 2, 4), (1, 8), (2, 4)])
def test_the_gate_learns_and_the_published_one_cannot(scales):
    """Every scale divides k = 8: the mean of the pooled tokens is the same at all of them."""
    learns = {}
    for gate in ("mlp", "mean"):
        reached = gradients(tokenizer(gate=gate, scales=scales), visual().double(), text().double())
        learns[gate] = max(norm for name, norm in reached.items() if "gate" in name)
    assert learns["mlp"] > 1e-3 and learns["mean"] < 1e-12


def test_the_scales_weigh_the_same_at_first_and_then_by_what_differs_between_them():
    pooling, tokens = tokenizer(gate="mlp").pooling, torch.randn(2, 8, 24)
    assert pooling(tokens)[2].std(1).min() > 1e-3
    valid = torch.tensor([[True] * 4 + [False] * 4] * 2)
    padded = pooling(tokens.masked_fill(~valid[..., None], 0), valid)[2]
    torch.testing.assert_close(padded, pooling(tokens[:, :4])[2])
    pooling.apply(initialise)
    torch.testing.assert_close(pooling(tokens)[2], torch.full((2, 3), 1 / 3))


def test_a_checkpoint_that_does_not_say_has_the_published_gate(tmp_path):
    config = Mu2TokenizerConfig(hidden_size=24).to_dict()
    del config["gate"]
    assert Mu2TokenizerConfig(**config).gate == "mean"
    assert ModelConfig().tokenizer.gate == "mlp"
    assert ModelConfig.model_validate({"face": "reference"}).tokenizer.gate == "mean"


def test_checkpointed_gradients_are_the_same(module):
    def gradient():
        module.zero_grad()
        module(visual(), text()).tokens.square().mean().backward()
        return [p.grad.clone() for p in module.parameters()]

    module.train()
    plain = gradient()
    for layer in [*module.layers, *module.aggregation_layers]:
        layer.gradient_checkpointing = True
        layer._gradient_checkpointing_func = lambda f, *a: torch.utils.checkpoint.checkpoint(f, *a, use_reentrant=False)
    for given, expected in zip(gradient(), plain, strict=True):
        torch.testing.assert_close(given, expected)


def test_bfloat16_says_the_same_as_float32(module):
    """The outputs' directions agree; hard top-k may pick another of two nearly equal tokens."""
    exact = module(visual(), text()).tokens
    rough = module.bfloat16()(visual().bfloat16(), text().bfloat16()).tokens.float()
    cosine = torch.nn.functional.cosine_similarity(exact, rough, dim=-1)
    assert cosine.median() > 0.99


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "training"),
    [
        *((kind, False) for i, kind in enumerate(KINDS) if i % 2 == i // 2 % 2),  # each attention, selections in turn
        ({"standardise": True, "temperature_mode": "annealed"}, True),
    ],
)
def test_compiles_without_a_graph_break(kind, training):
    torch._dynamo.reset()
    chunk_mask, text_mask = torch.ones(2, 3, dtype=torch.bool), torch.ones(2, 4, dtype=torch.bool)
    arguments = (visual(), text(), chunk_mask, text_mask)
    plain, module = (tokenizer(**kind).train(training) for _ in range(2))
    compiled = torch.compile(module, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(*arguments).tokens, plain(*arguments).tokens)
    for name, buffer in module.named_buffers():
        torch.testing.assert_close(buffer, plain.get_buffer(name))


@pytest.mark.parametrize("kind", [{}, {"selection": "top_k", "pooling": "static"}, {"scales": (2, 3)}])
def test_selection_is_the_linear_combination_that_the_tokens_are(kind):
    """Without attention layers a token is Σ weight · patch, head by head; averaged over heads: the map."""
    module = tokenizer(num_layers=0, residual=False, positions=False, num_heads=1, **kind)
    scan, mask = visual(), torch.tensor([[True, True, True], [True, True, False]])
    out = module(scan, text(), mask, return_selection=True)
    assert out.selection.shape == (2, 5, 3, *GRID)
    combined = torch.einsum("bqn,bne->bqe", out.selection.flatten(2), scan.flatten(1, 2))
    scale = (out.tokens * combined).sum(-1, keepdim=True) / combined.square().sum(-1, keepdim=True)
    torch.testing.assert_close(out.tokens, combined * scale, atol=1e-4, rtol=1e-3)


def test_selection_sums_to_one_and_leaves_padding_out(module):
    mask = torch.tensor([[True, True, True], [True, True, False]])
    selection = module(visual(), text(), mask, return_selection=True).selection
    torch.testing.assert_close(selection.sum((2, 3, 4, 5)), torch.ones(2, 5))
    assert selection[1, :, 2].abs().max() == 0


def test_metrics_tell_a_collapse():
    module = tokenizer()
    spread = module(visual(), text(), return_selection=True)
    module.selection.score.weight.data.zero_()
    collapsed = module(visual(), text(), return_selection=True)
    assert collapsed.entropy > 0.999 and collapsed.similarity > 0.999
    assert spread.entropy < 0.95 and spread.similarity < 0.9


def test_temperature_is_fixed_learned_or_annealed():
    learned = tokenizer(temperature_mode="learned", temperature=0.5)
    learned.selection.log_temperature.data.fill_(torch.tensor(0.25).log())
    assert float(learned.selection.temperature().detach()) == pytest.approx(0.25)
    annealed = tokenizer(temperature_mode="annealed", temperature=1.0, temperature_end=0.25, annealing_steps=4)
    annealed.train()
    seen = []
    for _ in range(6):
        annealed(visual(), text())
        seen.append(round(float(annealed.selection.temperature()), 4))
    assert seen == [0.7071, 0.5, 0.3536, 0.25, 0.25, 0.25]
    annealed.eval()(visual(), text())
    assert int(annealed.selection.step) == 6


def test_lower_temperature_selects_more_sharply():
    entropy = [tokenizer(temperature=t)(visual(), text(), return_selection=True).entropy for t in (4, 1, 0.25)]
    assert entropy[0] > entropy[1] > entropy[2]


def test_a_question_changes_the_tokens_only_where_they_are_conditioned_on_it():
    for conditioned in (True, False):
        module = tokenizer(text_conditioned=conditioned)
        change = (module(visual(), text(seed=1)).tokens - module(visual(), text(seed=2)).tokens).abs().max()
        assert (change > 1e-3) == conditioned


def test_standardised_tokens_follow_running_statistics_and_stay_batch_invariant():
    module = tokenizer(standardise=True).train()
    for seed in range(60):
        module(visual(8, seed=seed), text(8, seed=seed))
    out = module.eval()(visual(64, seed=999), text(64, seed=999)).tokens
    assert out.mean((0, 1)).abs().max() < 0.5 and ((out.std((0, 1)) - 1).abs() < 0.5).all()
    before = module.standardise.mean.clone()
    module(visual(), text())
    assert torch.equal(before, module.standardise.mean)


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"num_heads": 5}, "num_heads 5"),
        ({"scales": ()}, "scales"),
        ({"attention": "rotary_1d", "hidden_size": 15, "num_heads": 5}, "even head size"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(fields, said):
    with pytest.raises(ValueError, match=said):
        Mu2TokenizerConfig(**{"hidden_size": 24, **fields})


def test_more_hard_picks_than_tokens_are_refused_by_number():
    with pytest.raises(UserError, match="top_k 99 is more than the 36"):
        tokenizer(selection="top_k", top_k=99)(visual(), text())
