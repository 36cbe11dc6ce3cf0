import hashlib
import pickle
import urllib.error
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sd_vae.errors import UserError
from sd_vae.losses.backbones import BACKBONES, Backbone, find_backbone
from sd_vae.losses.config import PerceptualConfig
from sd_vae.losses.perceptual import LPIPS, choose_net


@pytest.fixture
def hub(tmp_path, monkeypatch) -> Path:
    """An empty torch hub cache."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    return tmp_path / "torch" / "hub" / "checkpoints"


def test_backbone_files_have_the_names_of_torchvision():
    from torchvision.models import get_weight

    for backbone in BACKBONES.values():
        assert get_weight(backbone.weights).url.endswith("/" + backbone.file_name)
        assert backbone.file_name.endswith(f"-{backbone.sha256[:8]}.pth")
        assert len(backbone.sha256) == 64


def test_backbone_missing_offline_names_file_hash_and_three_ways(hub):
    with pytest.raises(UserError) as caught:
        LPIPS("vgg")

    message = str(caught.value)
    assert "vgg16-397923af.pth (sha256 397923af8e79cdbb6a7127f12361acd7a2f83e06b05044ddf496e83de57a5bf0)" in message
    assert f"{hub}" in message
    assert "HF_HUB_OFFLINE forbids to download it" in message
    for way in ("copy it there", "set perceptual.backbone to a copy", "run once where the internet can be reached"):
        assert way in message


def test_backbone_download_failure_is_one_line(hub, monkeypatch):
    def refuse(*_, **__):
        raise urllib.error.URLError("no route to host")

    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)

    with pytest.raises(UserError, match=r"squeezenet1_1-b8a52dc0\.pth .* downloading http.* failed .*no route to host"):
        find_backbone("squeeze")


def test_backbone_is_downloaded_once_with_its_hash(hub, monkeypatch):
    content = b"the real file"
    digest = hashlib.sha256(content).hexdigest()
    calls = []

    def download(url, target, hash_prefix):
        calls.append((url, hash_prefix))
        Path(target).write_bytes(content)

    real = BACKBONES["alex"]
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(torch.hub, "download_url_to_file", download)
    monkeypatch.setitem(BACKBONES, "alex", Backbone(real.weights, real.file_name, digest))

    found = [find_backbone("alex") for _ in range(2)]

    assert found == [hub / "alexnet-owt-7be5be79.pth"] * 2
    assert calls == [("https://download.pytorch.org/models/alexnet-owt-7be5be79.pth", digest[:8])]


def test_backbone_in_cache_is_checked_against_its_name(hub):
    hub.mkdir(parents=True)
    (hub / "alexnet-owt-7be5be79.pth").write_bytes(b"half a file")

    with pytest.raises(UserError, match=r"7be5be79\.pth is damaged: its sha256 is [0-9a-f]{64}, .* promises 7be5be79"):
        LPIPS("alex")


def test_backbone_path_that_is_missing_is_named():
    with pytest.raises(UserError, match=r"there is no LPIPS backbone nowhere\.pth; check perceptual\.backbone"):
        LPIPS("alex", "nowhere.pth")


@pytest.mark.parametrize("form", ["whole.pth", "features.pth", "bare.pth", "features.safetensors"])
def test_backbone_file_may_have_any_form(tmp_path, form, features):
    features = features("squeeze")
    content = {
        "whole.pth": {**features, "classifier.1.weight": torch.zeros(1000, 512, 1, 1)},
        "bare.pth": {name.removeprefix("features."): tensor for name, tensor in features.items()},
    }.get(form, features)
    path = tmp_path / form
    (save_file if path.suffix == ".safetensors" else torch.save)(content, path)

    model = LPIPS("squeeze", str(path)).model

    torch.testing.assert_close(model.net.slice1[0].weight, features["features.0.weight"], rtol=0, atol=0)
    last = model.net.slice7[0].expand3x3.bias
    torch.testing.assert_close(last, features["features.12.expand3x3.bias"], rtol=0, atol=0)


def damage(features, case):
    match case:
        case "missing":
            del features["features.10.bias"]
        case "unexpected":
            features["features.99.weight"] = torch.zeros(1)
        case "shape":
            features["features.3.weight"] = torch.zeros(192, 64, 3, 3)
        case "nan":
            features["features.6.bias"][5] = torch.nan
        case "integers":
            features["features.0.bias"] = torch.zeros(64, dtype=torch.int64)
        case "not a tensor":
            features["features.0.bias"] = "zeros"
    return features


@pytest.mark.parametrize(
    ("case", "complaint"),
    [
        ("missing", r"features\.10\.bias is missing"),
        ("unexpected", r"features\.99\.weight is unexpected"),
        ("shape", r"features\.3\.weight is \(192, 64, 3, 3\) instead of \(192, 64, 5, 5\)"),
        ("nan", r"features\.6\.bias holds NaN or infinity"),
        ("integers", r"features\.0\.bias is int64, not float"),
        ("not a tensor", r"features\.0\.bias is missing"),
    ],
)
def test_backbone_with_a_wrong_tensor_is_fatal(tmp_path, case, complaint, features):
    torch.save(damage(features("alex"), case), tmp_path / "alex.pth")

    with pytest.raises(UserError, match=rf"alex\.pth does not hold the features .*alexnet \(1 problems: {complaint}\)"):
        LPIPS("alex", str(tmp_path / "alex.pth"))


def test_backbone_of_another_network_is_fatal(standin):
    with pytest.raises(UserError, match=r"does not hold the features of LPIPS' alexnet \(\d+ problems: .*; \.\.\.\)"):
        LPIPS("alex", str(standin("squeeze")))


@pytest.mark.parametrize("name", ["noise.pth", "noise.safetensors", "empty.pth"])
def test_backbone_that_is_no_checkpoint_is_one_line(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(b"" if name == "empty.pth" else bytes(range(256)) * 8)

    with pytest.raises(UserError, match=rf"{name} is not a checkpoint") as caught:
        LPIPS("alex", str(path))

    assert "\n" not in str(caught.value)


def test_backbone_cut_short_is_one_line(tmp_path, standin):
    whole = standin("alex").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(whole[: len(whole) // 2])

    with pytest.raises(UserError, match=r"cut\.safetensors is a damaged safetensors file"):
        LPIPS("alex", str(tmp_path / "cut.safetensors"))


class Exploit:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return (Path.touch, (self.marker,))


def test_backbone_never_runs_code_in_a_pickle(tmp_path):
    (tmp_path / "evil.pth").write_bytes(pickle.dumps({"features.0.weight": Exploit(tmp_path / "ran")}))

    with pytest.raises(UserError, match=r"evil\.pth"):
        LPIPS("alex", str(tmp_path / "evil.pth"))

    assert not (tmp_path / "ran").exists()


def test_backbone_half_precision_is_used_in_fp32(tmp_path, standin):
    features = {name: tensor.half() for name, tensor in load_file(standin("squeeze")).items()}
    save_file(features, tmp_path / "half.safetensors")

    model = LPIPS("squeeze", str(tmp_path / "half.safetensors"))

    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_without_lpips_the_default_is_distilled_and_says_so(hub, caplog):
    chosen = choose_net(PerceptualConfig(weight=0.3))

    assert chosen == PerceptualConfig(net="distilled", weight=0.3)
    (record,) = caplog.records
    assert record.levelname == "WARNING"
    assert "NOT LPIPS: the perceptual term is `distilled`" in record.message
    assert "vgg16-397923af.pth" in record.message
    assert "HF_HUB_OFFLINE forbids" in record.message


def test_where_lpips_is_there_the_default_is_vgg(hub, caplog):
    hub.mkdir(parents=True)
    (hub / BACKBONES["vgg"].file_name).touch()

    assert choose_net(PerceptualConfig()).net == "vgg"
    assert not caplog.records


@pytest.mark.parametrize("config", [PerceptualConfig(net="alex"), PerceptualConfig(weight=0.0)])
def test_what_is_named_or_not_wanted_stays(hub, caplog, config):
    assert choose_net(config) is config
    assert not caplog.records
