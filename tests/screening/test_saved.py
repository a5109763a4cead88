"""Screens on disk: the same answers after a round trip, and every bad file refused."""

import json

import pytest
import torch
from torch import nn

from lastlayer import Int8Preview, ScreenedSoftmax, SoftCap, SVDPreview


def head():
    generator = torch.Generator().manual_seed(8)
    weight, bias, hidden = (torch.randn(shape, generator=generator) for shape in ((300, 12), (300,), (40, 12)))
    return weight, bias, hidden


def previews():
    hidden = head()[2]
    return [
        Int8Preview(),
        SVDPreview(3),
        SVDPreview(4, calibration=hidden, storage="bfloat16", tail_correction=1.0),
    ]


@pytest.mark.parametrize("number", range(3))
@pytest.mark.parametrize("include_weight", [True, False])
@pytest.mark.parametrize("with_bias", [True, False])
def test_round_trip(tmp_path, number, include_weight, with_bias):
    weight, bias, hidden = head()
    bias = bias if with_bias else None
    screen = ScreenedSoftmax(weight, bias, preview=previews()[number], candidates=9, exact=True)
    screen.save(tmp_path / "deep" / "screen", include_weight=include_weight)
    given = () if include_weight else (weight, bias)
    again = ScreenedSoftmax.load(tmp_path / "deep" / "screen", *given)
    assert again.exact
    for mine, theirs in zip(again.topk(hidden[:5], 3), screen.topk(hidden[:5], 3), strict=True):
        assert torch.equal(mine, theirs)
    assert torch.equal(again.log_prob(hidden), screen.log_prob(hidden))


def test_half_precision_weight(tmp_path):
    weight, _, _ = head()
    screen = ScreenedSoftmax(weight.bfloat16(), preview=Int8Preview(), candidates=9)
    screen.save(tmp_path)
    assert torch.equal(ScreenedSoftmax.load(tmp_path).weight, weight.bfloat16())


def saved(folder, include_weight=True):
    weight, bias, hidden = head()
    preview = SVDPreview(4, calibration=hidden)
    ScreenedSoftmax(weight, bias, preview=preview, candidates=9).save(folder, include_weight=include_weight)
    return folder / "screen.json", folder / "screen.safetensors"


def test_other_weight_is_refused(tmp_path):
    saved(tmp_path, include_weight=False)
    weight, bias, _ = head()
    with pytest.raises(ValueError, match="without its weight"):
        ScreenedSoftmax.load(tmp_path)
    for other in (
        (weight + 1e-6, bias),
        (weight, None),
        (weight, bias + 1),
        (weight.double(), bias),
        (weight[:9], bias),
    ):
        with pytest.raises(ValueError, match="fingerprint differs"):
            ScreenedSoftmax.load(tmp_path, *other)


@pytest.mark.parametrize("damage", ["missing", "truncated", "changed", "empty"])
@pytest.mark.parametrize("which", [0, 1])
def test_damaged_files(tmp_path, damage, which):
    path = saved(tmp_path)[which]
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    else:
        middle = len(content) // 2
        changed = content[:middle] + bytes([content[middle] ^ 255]) + content[middle + 1 :]
        path.write_bytes({"truncated": content[:middle], "changed": changed, "empty": b""}[damage])
    with pytest.raises(ValueError, match="screen"):
        ScreenedSoftmax.load(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"version": 99},
        {"format": "other"},
        {"candidates": "many"},
        {"candidates": 0},
        {"exact": None},
        {"preview": {"kind": "Unknown"}},
        {"preview": {"kind": "SVDPreview"}},
        {
            "preview": {
                "kind": "SVDPreview",
                "window": 99,
                "storage": None,
                "tail_correction": 0,
                "calibration_rows": 40,
            }
        },
        {
            "preview": {
                "kind": "SVDPreview",
                "window": 3,
                "storage": "x",
                "tail_correction": 0,
                "calibration_rows": 40,
            }
        },
        {"weight_sha256": "0" * 64},
    ],
)
def test_tampered_settings(tmp_path, change):
    path, _ = saved(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError):
        ScreenedSoftmax.load(tmp_path)


def test_what_cannot_be_saved(tmp_path):
    weight, bias, _ = head()
    with pytest.raises(TypeError, match="logit_map"):
        ScreenedSoftmax(weight, bias, preview=Int8Preview(), candidates=9, logit_map=SoftCap(5.0)).save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_loaded_weight_is_the_one_given(tmp_path):
    linear = nn.Linear(12, 300)
    ScreenedSoftmax.from_linear(linear, preview=Int8Preview(), candidates=9).save(tmp_path, include_weight=False)
    assert ScreenedSoftmax.load(tmp_path, linear.weight, linear.bias).weight is linear.weight
