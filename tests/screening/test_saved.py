"""Screens on disk: the same results after a round trip, and an error for every bad file."""

import hashlib
import json

import pytest
import torch
from torch import nn

from lastlayer import (
    PLIF,
    Int4Preview,
    Int8Preview,
    LogitMap,
    MonotoneNetwork,
    ScreenedSoftmax,
    Sigsoftmax,
    SoftCap,
    SVDPreview,
)
from lastlayer.screening.saved import sealed


def head():
    generator = torch.Generator().manual_seed(8)
    weight, bias, hidden = (torch.randn(shape, generator=generator) for shape in ((300, 12), (300,), (40, 12)))
    return weight, bias, hidden


def previews():
    hidden = head()[2]
    return [
        Int8Preview(),
        Int4Preview(),
        Int4Preview(calibration=hidden),
        SVDPreview(3),
        SVDPreview(4, calibration=hidden, storage="bfloat16"),
    ]


@pytest.mark.parametrize("number", range(len(previews())))
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


def test_json_too_deep(tmp_path):
    path, _ = saved(tmp_path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="does not hold a saved screen"):
        ScreenedSoftmax.load(tmp_path)


def test_tensors_that_are_none(tmp_path):
    """With a fingerprint that is right."""
    path, tensors = saved(tmp_path)
    tensors.write_bytes(b"no tensors")
    digest = hashlib.sha256(b"no tensors").hexdigest()
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | {"tensors_sha256": digest})))
    with pytest.raises(ValueError, match="does not hold tensors"):
        ScreenedSoftmax.load(tmp_path)


def test_what_is_given_beside_the_folder(tmp_path):
    saved(tmp_path)
    weight, bias, _ = head()
    with pytest.raises(ValueError, match="bias was given without the weight"):
        ScreenedSoftmax.load(tmp_path, bias=bias)
    for given, message in (
        ((nn.Linear(12, 300),), "weight must be a Tensor, got Linear"),
        ((weight, [1.0]), "bias"),
    ):
        with pytest.raises(TypeError, match=message):
            ScreenedSoftmax.load(tmp_path, *given)


def test_a_save_that_fails_leaves_no_part(tmp_path):
    (tmp_path / "screen.json").mkdir()
    with pytest.raises(IsADirectoryError):
        saved(tmp_path)
    assert not list(tmp_path.glob("*.partial"))


SVD = {"kind": "SVDPreview", "window": 4, "storage": None, "calibration_rows": 40}


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("format version 99", {"version": 99}),
        ("does not describe a saved screen", {"format": "other"}),
        ("candidates must be a whole number", {"candidates": "many"}),
        ("candidates must be at least 1", {"candidates": 0}),
        ("exact must be true or false", {"exact": None}),
        ("preview must be one of .*; got 'Unknown'", {"preview": {"kind": "Unknown"}}),
        ("does not describe a screen.*calibration_rows", {"preview": {"kind": "SVDPreview"}}),
        ("window must be between 1 and the weight's width 12", {"preview": SVD | {"window": 99}}),
        ("storage must be one of", {"preview": SVD | {"storage": "x"}}),
        ("does not describe a screen.*tail_correction", {"preview": SVD | {"tail_correction": 1.0}}),
        ("fingerprint differs", {"weight_sha256": "0" * 64}),
        ("does not describe a screen", {"logit_map": "SoftCap"}),
        (
            "logit_map must be one of 'MonotoneNetwork', 'PLIF',.* 'Sigsoftmax', 'SoftCap'",
            {"logit_map": {"kind": "eval"}},
        ),
        ("does not describe a screen.*settings", {"logit_map": {"kind": "SoftCap"}}),
        ("cap must be positive and finite", {"logit_map": {"kind": "SoftCap", "settings": {"cap": -1.0}}}),
        ("unexpected keyword", {"logit_map": {"kind": "SoftCap", "settings": {"cap": 1.0, "cup": 2}}}),
        ("does not describe a screen", {"logit_map": {"kind": "PLIF", "settings": {"num_knots": 10**12}}}),
    ],
)
def test_settings_that_do_not_fit(tmp_path, message, change):
    """Sealed again, so that what is looked at is the setting itself."""
    path, _ = saved(tmp_path)
    path.write_text(json.dumps(sealed(json.loads(path.read_text()) | change)))
    with pytest.raises(ValueError, match=message):
        ScreenedSoftmax.load(tmp_path)


@pytest.mark.parametrize("change", [{"candidates": 10}, {"exact": True}, {"preview": {"kind": "Int8Preview"}}])
def test_tampered_settings(tmp_path, change):
    """What would be a good setting, but is not the one that was saved."""
    path, _ = saved(tmp_path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(ValueError, match="changed after the screen was saved"):
        ScreenedSoftmax.load(tmp_path)


@pytest.mark.parametrize("which", ["screen.json", "screen.safetensors"])
def test_files_of_two_saves(tmp_path, which):
    """A save that was killed over an earlier one."""
    saved(tmp_path / "old")
    weight, bias, _ = head()
    ScreenedSoftmax(2 * weight, bias, preview=Int8Preview(), candidates=5).save(tmp_path / "new")
    (tmp_path / "new" / which).replace(tmp_path / "old" / which)
    with pytest.raises(ValueError, match="truncated or was changed"):
        ScreenedSoftmax.load(tmp_path / "old")


def maps():
    torch.manual_seed(1)
    network = MonotoneNetwork(4)
    with torch.no_grad():
        network.raw_rates.add_(torch.randn(4))
    return [
        SoftCap(5.0),
        Sigsoftmax(),
        PLIF(50, 10.0, init_std=1.0),
        PLIF(7, init_std=1.0, frozen=True).double(),
        network,
    ]


@pytest.mark.parametrize("number", range(5))
def test_logit_maps(tmp_path, number):
    """Maps of the library come back with their settings and parameters."""
    weight, bias, hidden = head()
    logit_map = maps()[number]
    settings = {"preview": SVDPreview(4), "candidates": 20}
    screen = ScreenedSoftmax(weight, bias, logit_map=logit_map, **settings)
    screen.save(tmp_path)
    again = ScreenedSoftmax.load(tmp_path)
    assert repr(again.logit_map) == repr(logit_map)
    assert torch.equal(again.log_prob(hidden), screen.log_prob(hidden))
    plain = ScreenedSoftmax(weight, bias, **settings)
    assert not torch.allclose(again.log_prob(hidden), plain.log_prob(hidden))
    for mine, theirs in zip(again.logit_map.parameters(), logit_map.parameters(), strict=True):
        assert (mine.dtype, mine.requires_grad, mine.device) == (theirs.dtype, theirs.requires_grad, theirs.device)


class Own(LogitMap):
    """A map of the user's."""

    def forward(self, logits):
        return 2 * logits


class Heir(SoftCap):
    """The user's child of the library's."""


@pytest.mark.parametrize("logit_map", [Own(), Heir(5.0)])
def test_what_cannot_be_saved(tmp_path, logit_map):
    weight, bias, _ = head()
    screen = ScreenedSoftmax(weight, bias, preview=Int8Preview(), candidates=9, logit_map=logit_map)
    with pytest.raises(TypeError, match=f"{type(logit_map).__name__} of your own as logit_map"):
        screen.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_loaded_weight_is_the_one_given(tmp_path):
    linear = nn.Linear(12, 300)
    ScreenedSoftmax.from_linear(linear, preview=Int8Preview(), candidates=9).save(tmp_path, include_weight=False)
    assert ScreenedSoftmax.load(tmp_path, linear.weight, linear.bias).weight is linear.weight


def test_a_planted_link_is_not_written_through(tmp_path):
    """In a folder that others can write to, under the names that a save uses."""
    mine = tmp_path / "mine"
    mine.write_text("precious")
    folder = tmp_path / "screen"
    folder.mkdir()
    for name in ("screen.safetensors", "screen.json"):
        (folder / f".{name}.partial").symlink_to(mine)
        (folder / name).symlink_to(mine)
    ScreenedSoftmax(torch.randn(50, 4), preview=Int8Preview(), candidates=5).save(folder)
    assert mine.read_text() == "precious"
    assert ScreenedSoftmax.load(folder).out_features == 50
