"""The measures of separation agree with their definitions, and one call gives them for every layer and module."""

import math
import sys
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from rssnet import CrossAttentionConfig, LocalPathwayConfig, RSSNet, RSSNetConfig
from rssnet.diagnostics import (
    ClassScatter,
    LayerDiagnostics,
    class_counts,
    diagnose,
    draw_diagnostics,
    format_diagnostics,
    high_frequency_share,
    region_cosine,
    token_cosine,
)

CONFIG = RSSNetConfig(
    backbone="vit_tiny_patch16_224", backbone_options={"depth": 3}, num_classes=4, image_size=64, decoder_width=32
)


def batches(count=2, classes=4, size=64):
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        labels = torch.randint(0, classes, (2, 4, 4), generator=generator)
        labels = labels.repeat_interleave(size // 4, 1).repeat_interleave(size // 4, 2)
        labels[:, :5] = 255
        yield torch.randn(2, 3, size, size, generator=generator), labels


def built(**changes):
    torch.manual_seed(0)
    return RSSNet(replace(CONFIG, **changes))


def test_token_cosine_is_the_mean_over_all_pairs():
    torch.manual_seed(0)
    features = torch.randn(2, 5, 3, 4) + 0.5
    for image, value in zip(features, token_cosine(features), strict=True):
        tokens = image.flatten(1).T
        pairs = [F.cosine_similarity(tokens[i], tokens[j], dim=0) for i in range(12) for j in range(12) if i != j]
        assert value.item() == pytest.approx(torch.stack(pairs).mean().item(), abs=1e-6)


def test_token_cosine_is_one_when_all_tokens_are_alike_and_nan_for_one_token():
    assert token_cosine(torch.randn(1, 7, 1, 1).expand(1, 7, 6, 6)).item() == pytest.approx(1)
    assert token_cosine(torch.randn(1, 7, 1, 1)).isnan().all()


def test_high_frequency_share_is_that_of_the_waves_a_map_is_made_of():
    rows, columns = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    slow = torch.cos(2 * math.pi * rows * 3 / 16)  # 0.19 cycles per token
    fast = torch.cos(2 * math.pi * (rows * 1 / 16 + columns * 6 / 16))  # 0.38 along the columns
    for weight in (0.0, 0.5, 2.0):
        features = (5 + slow + weight * fast).expand(1, 3, 16, 16)
        assert high_frequency_share(features).item() == pytest.approx(weight**2 / (1 + weight**2), abs=1e-6)


def test_high_frequency_share_tells_noise_from_upsampled_noise():
    torch.manual_seed(0)
    noise = torch.randn(1, 8, 64, 64)
    upsampled = F.interpolate(noise, scale_factor=2, mode="bilinear")
    assert high_frequency_share(noise).item() == pytest.approx(0.75, abs=0.02)
    assert high_frequency_share(upsampled).item() < 0.1
    assert high_frequency_share(torch.ones(1, 2, 8, 8)).isnan().all()


def test_class_scatter_is_that_of_every_pixel_on_its_own():
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (2, 12, 8))
    labels[0, :4] = 255
    features = torch.randn(2, 5, 3, 4) + 10
    counts = class_counts(labels, (3, 4), 3)
    scatter = ClassScatter(3, 5)
    for image in range(2):  # in parts
        scatter.update(features[image].flatten(1).T, counts[image].flatten(0, 1))

    pixels = features.repeat_interleave(4, 2).repeat_interleave(2, 3).permute(0, 2, 3, 1).double()
    valid = labels != 255
    mean = pixels[valid].mean(0)
    between = within = 0.0
    for k in range(3):
        of_class = pixels[labels == k]
        between += len(of_class) * (of_class.mean(0) - mean).square().sum().item()
        within += (of_class - of_class.mean(0)).square().sum().item()
    assert scatter.ratio() == pytest.approx(between / within, rel=1e-9)


def test_class_counts_hold_every_valid_pixel_once_at_any_ratio():
    torch.manual_seed(0)
    labels = torch.randint(0, 3, (2, 30, 41))
    labels[labels == 2] = 255
    counts = class_counts(labels, (7, 9), 3)
    assert counts.shape == (2, 7, 9, 3)
    for k in range(2):
        assert counts[..., k].sum((1, 2)).tolist() == (labels == k).sum((1, 2)).tolist()
    assert counts[..., 2].sum() == 0
    # Each token covers about its share of the image.
    assert class_counts(torch.zeros(1, 30, 41).long(), (7, 9), 2)[..., 0].unique().tolist() == [16, 20, 25]


def test_region_cosine_is_the_mean_over_pairs_of_different_classes():
    torch.manual_seed(0)
    regions, classes = torch.randn(9, 6) + 3, torch.tensor([0, 1, 2, 0, 3, 3, 1, 0, 2])
    centred = regions - regions.mean(0)
    pairs = [
        F.cosine_similarity(centred[i], centred[j], dim=0).item()
        for i in range(9)
        for j in range(9)
        if classes[i] != classes[j]
    ]
    assert region_cosine(regions, classes) == pytest.approx(sum(pairs) / len(pairs), abs=1e-6)


def test_regions_as_far_apart_as_can_be_have_the_least_cosine():
    assert region_cosine(torch.eye(5) + 7, torch.arange(5)) == pytest.approx(-1 / 4)
    assert math.isnan(region_cosine(torch.randn(3, 4), torch.tensor([2, 2, 2])))
    assert math.isnan(region_cosine(torch.zeros(0, 4), torch.zeros(0, dtype=torch.long)))


def test_one_call_measures_every_layer_and_both_sides_of_every_module():
    table = {row.layer: row for row in diagnose(built(), batches())}
    assert list(table) == [
        "backbone 0",
        "backbone 1",
        "backbone 2",
        "local map, before its blocks",
        "local map L, after its blocks",
        "deep map G, before SASM",
        "deep map G, upsampled bilinearly",
        "deep map S, after SASM",
        "fused map M, before DCA",
        "pixel embeddings E(M)",
        "queries Q, before DCA",
        "regions R, DCA layer 0",
        "regions R, DCA layer 1",
        "regions R, DCA layer 2",
    ]
    strides = [row.stride for row in table.values()]
    assert strides[:10] == [16, 16, 16, 8, 8, 16, 8, 8, 8, 4]
    for name, row in table.items():
        assert -1 <= row.region_cosine <= 1
        if "regions" in name or "queries" in name:
            assert all(
                math.isnan(v) for v in (row.stride, row.token_cosine, row.high_frequency_share, row.class_scatter)
            )
        else:
            assert -1 <= row.token_cosine <= 1
            assert 0 <= row.high_frequency_share <= 1
            assert row.class_scatter >= 0


def test_the_backbones_rows_are_its_own_features():
    model = built().eval()
    images, labels = next(batches(1))
    row = diagnose(model, [(images, labels)])[2]
    with torch.no_grad():
        features = model.backbone(images)[-1]  # the last block is what the decoder reads
    assert row.token_cosine == pytest.approx(token_cosine(features).mean().item(), abs=1e-6)
    assert row.high_frequency_share == pytest.approx(high_frequency_share(features).mean().item(), abs=1e-6)


def test_a_sasm_that_is_bilinear_reads_like_the_bilinear_row():
    model = built()
    with torch.no_grad():
        model.decoder.get_parameter("separation.gate_bias").fill_(-100)  # no repulsion; attraction starts as bilinear
    table = {row.layer: row for row in diagnose(model, batches())}
    bilinear, separated = table["deep map G, upsampled bilinearly"], table["deep map S, after SASM"]
    assert separated.high_frequency_share == pytest.approx(bilinear.high_frequency_share, abs=0.01)
    assert separated.token_cosine == pytest.approx(bilinear.token_cosine, abs=0.01)
    # Smaller than the map before it, whatever it holds: that is why there is a bilinear row.
    assert bilinear.high_frequency_share < table["deep map G, before SASM"].high_frequency_share


def test_trained_regions_read_as_more_separate_than_equal_ones():
    model = built()
    apart = {row.layer: row for row in diagnose(model, batches())}["queries Q, before DCA"]
    with torch.no_grad():
        queries = model.decoder.get_parameter("cross_attention.queries")
        queries.copy_(queries.mean(0) + 1e-3 * torch.randn(1, 32) * torch.tensor([[1.0], [1.1], [1.2], [5.0]]))
    alike = {row.layer: row for row in diagnose(model, batches())}["queries Q, before DCA"]
    assert apart.region_cosine < alike.region_cosine


def test_batches_may_be_cut_anywhere():
    together = [(torch.cat(images), torch.cat(labels)) for images, labels in [zip(*batches(2), strict=True)]]
    one_by_one = [(image[None], label[None]) for image, label in zip(*together[0], strict=True)]
    for first, second in zip(diagnose(built(), together), diagnose(built(), one_by_one), strict=True):
        assert first.layer == second.layer
        for measure in ("token_cosine", "high_frequency_share", "class_scatter", "region_cosine"):
            assert getattr(first, measure) == pytest.approx(getattr(second, measure), abs=1e-4, nan_ok=True)


@pytest.mark.parametrize(
    ("changes", "absent"),
    [
        ({"head": "linear"}, ("map", "regions", "queries")),
        ({"head": "upernet"}, ("map", "regions", "queries")),
        ({"local_pathway": LocalPathwayConfig(enabled=False)}, ("local",)),
        ({"cross_attention": CrossAttentionConfig(enabled=False)}, ("regions", "queries")),
        ({"backbone": "swinv2_tiny_window8_256", "backbone_options": {"depths": (1, 1, 1, 1)}}, ()),
        ({"backbone": "convnext_atto", "backbone_options": {"depths": (1, 1, 1, 1)}}, ()),
    ],
)
def test_baselines_ablations_and_pyramids_have_the_rows_they_can(changes, absent):
    table = diagnose(built(**changes), batches(1))
    names = [row.layer for row in table]
    assert sum(name.startswith("backbone") for name in names) >= 3
    assert not [name for name in names if any(word in name for word in absent)]
    assert ("deep map S, after SASM" in names) == ("head" not in changes)


def test_the_model_is_left_as_it_was():
    model = built().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    diagnose(model, batches(1))
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_a_table_is_text_in_columns():
    nan = math.nan
    table = [
        LayerDiagnostics("backbone 0", 16.0, 0.28412, 0.4, 0.12, -0.05),
        LayerDiagnostics("queries Q, before DCA", nan, nan, nan, nan, -1 / 3),
    ]
    assert format_diagnostics(table).splitlines() == [
        "layer                  stride  token_cosine  high_frequency_share  class_scatter  region_cosine",
        "backbone 0                 16         0.284                 0.400          0.120         -0.050",
        "queries Q, before DCA       -             -                     -              -         -0.333",
    ]


def test_tables_are_drawn_one_line_per_model(tmp_path):
    tables = {"RSSNet": diagnose(built(), batches(1)), "linear": diagnose(built(head="linear"), batches(1))}
    figure = draw_diagnostics(tables)
    assert len(figure.axes) == 4
    assert figure.axes[0].get_legend_handles_labels()[1] == ["RSSNet", "linear"]
    assert [tick.get_text() for tick in figure.axes[-1].get_xticklabels()][-1] == "regions R, DCA layer 2"
    figure.savefig(tmp_path / "diagnostics.png")
    assert (tmp_path / "diagnostics.png").read_bytes().startswith(b"\x89PNG")


def test_drawing_without_matplotlib_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match="pip install matplotlib"):
        draw_diagnostics({})


def test_bad_input_is_named():
    images, labels = next(batches(1))
    with pytest.raises(ValueError, match="there are no batches"):
        diagnose(built(), [])
    with pytest.raises(ValueError, match="Labels 9 are out of range: they must be 0 to 3"):
        diagnose(built(), [(images, torch.full_like(labels, 9))])
    with pytest.raises(ValueError, match=r"must be \(2, 64, 64\), got \(2, 16, 16\)"):
        diagnose(built(), [(images, labels[:, ::4, ::4])])
