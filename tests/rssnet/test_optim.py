"""Parameter groups reach every trainable parameter once, and the schedule is the recipe's."""

from dataclasses import replace

import pytest
import torch
from timm.utils.model_ema import ModelEmaV3
from torch import nn

from rssnet import RSSNet, RSSNetConfig
from rssnet.optim import parameter_groups, poly_with_warmup

CONFIG = RSSNetConfig(
    backbone="vit_tiny_patch16_224", backbone_options={"depth": 3}, num_classes=4, image_size=64, decoder_width=32
)
BACKBONES = {
    "vit_tiny_patch16_224": {"depth": 3},
    "beit_base_patch16_224": {"depth": 2},
    "eva02_tiny_patch14_224": {"depth": 2},
    "swinv2_cr_tiny_224": {"depths": (1, 1, 1, 1)},
    "pvt_v2_b0": {},
    "convnext_atto": {"depths": (1, 1, 1, 1)},
    "hrnet_w18_small": {},
}


def built(**changes):
    torch.manual_seed(0)
    return RSSNet(replace(CONFIG, **changes))


def settings_of(model, groups):
    """Learning rate and weight decay of every parameter, by its name."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return {names[id(p)]: (group["lr"], group["weight_decay"]) for group in groups for p in group["params"]}


@pytest.mark.parametrize("backbone", BACKBONES)
def test_every_trainable_parameter_is_in_exactly_one_group(backbone):
    size = 56 if "patch14" in backbone else 224 if "swinv2" in backbone else 64
    model = built(backbone=backbone, backbone_options=BACKBONES[backbone], image_size=size)
    groups = parameter_groups(model, lr=1e-4, layer_decay=0.9)
    grouped = [id(parameter) for group in groups for parameter in group["params"]]
    assert sorted(grouped) == sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad)
    torch.optim.AdamW(groups)  # which refuses a parameter that it gets twice


@pytest.mark.parametrize("head", ["rssnet", "linear", "upernet"])
def test_frozen_parameters_are_in_no_group(head):
    model = built(head=head, freeze_backbone=True)
    groups = parameter_groups(model, lr=1e-4)
    assert set(settings_of(model, groups)) == {f"decoder.{name}" for name, _ in model.decoder.named_parameters()}


def test_lower_layers_learn_slower_and_the_decoder_faster():
    model = built()
    rates = {n: lr for n, (lr, _) in settings_of(model, parameter_groups(model, 1e-4, layer_decay=0.5)).items()}
    blocks = [rates[f"backbone.body.blocks.{i}.attn.qkv.weight"] for i in range(3)]
    assert blocks == pytest.approx([1e-4 / 4, 1e-4 / 2, 1e-4])
    assert rates["backbone.body.patch_embed.proj.weight"] == pytest.approx(1e-4 / 8)
    assert all(rate == pytest.approx(1e-3) for name, rate in rates.items() if name.startswith("decoder."))


def test_only_weights_of_layers_decay():
    model = built(backbone="beit_base_patch16_224", backbone_options={"depth": 1})
    decay = {n: decay for n, (_, decay) in settings_of(model, parameter_groups(model, 1e-4, weight_decay=0.05)).items()}
    assert set(decay.values()) == {0.0, 0.05}
    modules = dict(model.decoder.named_modules())
    for name, value in decay.items():
        owner, _, leaf = name.rpartition(".")
        if leaf == "bias" or any(part in name for part in ("norm", "queries", "layer_scale", "gate_bias", "gamma")):
            assert value == 0.0, name
        elif isinstance(modules.get(owner.removeprefix("decoder.")), (nn.Linear, nn.Conv2d)):
            assert value == 0.05, name
    assert decay["decoder.cross_attention.queries"] == 0.0
    assert decay["decoder.local_pathway.blocks.0.layer_scale"] == 0.0  # of three dimensions
    assert decay["backbone.body.blocks.0.attn.relative_position_bias_table"] == 0.0  # the backbone's own wish
    assert decay["backbone.body.blocks.0.mlp.fc1.weight"] == 0.05


def test_a_step_moves_every_group():
    model = built().train()
    optimizer = torch.optim.AdamW(parameter_groups(model, lr=1e-3))
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert [name for name, p in model.named_parameters() if torch.equal(p, before[name])] == []


def test_a_parameter_outside_both_parts_is_refused():
    model = built()
    model.temperature = nn.Parameter(torch.ones(1))
    with pytest.raises(ValueError, match=r"\['temperature'\] are neither in model.backbone nor in model.decoder"):
        parameter_groups(model, lr=1e-4)


def scheduled(rates=(2e-5, 2e-4), **arguments):
    groups = [{"params": [nn.Parameter(torch.ones(1))], "lr": rate} for rate in rates]
    optimizer = torch.optim.SGD(groups)
    return optimizer, poly_with_warmup(optimizer, **arguments)


def rates_of(optimizer, scheduler, steps):
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    return torch.tensor(rates, dtype=torch.float64)


@pytest.mark.parametrize("power", [0.9, 1.0, 2.0])
def test_the_rate_warms_up_linearly_and_falls_as_a_polynomial(power):
    optimizer, scheduler = scheduled(iterations=100, warmup_iterations=20, warmup_lr=1e-6, power=power)
    rates = rates_of(optimizer, scheduler, 103)
    for group, highest in enumerate((2e-5, 2e-4)):
        warmup = [1e-6 + (highest - 1e-6) * t / 20 for t in range(20)]
        fall = [highest * (1 - t / 80) ** power for t in range(81)]
        assert rates[:, group].tolist() == pytest.approx(warmup + fall + [0, 0], abs=1e-15)


def test_warmup_never_starts_above_a_group_that_layer_decay_made_slow():
    optimizer, scheduler = scheduled(rates=(1e-8, 1e-4), iterations=10, warmup_iterations=5, warmup_lr=1e-6)
    rates = rates_of(optimizer, scheduler, 10)
    assert rates[:, 0].max() == pytest.approx(1e-8)
    assert rates[0].tolist() == pytest.approx([1e-8, 1e-6])


def test_without_warmup_the_first_rate_is_the_highest():
    optimizer, scheduler = scheduled(iterations=10, warmup_iterations=0)
    assert rates_of(optimizer, scheduler, 3)[:, 0].tolist() == pytest.approx([2e-5, 1.8e-5, 1.6e-5])


def test_a_restored_schedule_goes_on_where_it_was():
    arguments = {"iterations": 30, "warmup_iterations": 6}
    uninterrupted = rates_of(*scheduled(**arguments), 30)
    optimizer, scheduler = scheduled(**arguments)
    rates_of(optimizer, scheduler, 11)
    resumed_optimizer, resumed = scheduled(**arguments)
    resumed_optimizer.load_state_dict(optimizer.state_dict())
    resumed.load_state_dict(scheduler.state_dict())
    assert torch.equal(rates_of(resumed_optimizer, resumed, 19), uninterrupted[11:])


def test_the_moving_average_is_a_model_that_can_be_saved(tmp_path):
    model = built().train()
    ema = ModelEmaV3(model, decay=0.75)
    queries = model.decoder.get_parameter("cross_attention.queries")
    start = queries.detach().clone()
    with torch.no_grad():
        queries += 1
    ema.update(model)
    averaged = ema.module
    assert isinstance(averaged, RSSNet)
    averaged.save_pretrained(str(tmp_path))
    loaded = RSSNet.from_pretrained(str(tmp_path))
    assert torch.allclose(loaded.decoder.get_parameter("cross_attention.queries"), start + 0.25, atol=1e-6)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: parameter_groups(built(), lr=0), "lr must be above 0, got 0"),
        (lambda: parameter_groups(built(), lr=1e-4, weight_decay=-1), "weight_decay must be at least 0, got -1"),
        (lambda: parameter_groups(built(), lr=1e-4, layer_decay=1.2), "layer_decay must be above 0 and at most 1"),
        (lambda: parameter_groups(built(), lr=1e-4, decoder_lr_scale=0), "decoder_lr_scale must be above 0, got 0"),
        (lambda: scheduled(iterations=0), "iterations must be at least 1, got 0"),
        (lambda: scheduled(iterations=10, warmup_iterations=10), "warm-up of 10 iterations must be shorter"),
        (lambda: scheduled(iterations=10, warmup_iterations=-1), "warmup_iterations must be at least 0, got -1"),
        (lambda: scheduled(iterations=10, warmup_iterations=0, power=0), "power must be above 0, got 0"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ValueError, match=words):
        call()
