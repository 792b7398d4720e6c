import importlib
import pickle
import re
import subprocess
import sys
import types

import numpy as np
import pytest
import torch

import hubconf
from support.checkpoints import PUBLISHED
from support.errors import UserError
from support.pixels import eval_transform
from tests.conftest import ROOT, picture
from tests.test_house import SCRIPTS, imported
from vision_transformer import VisionTransformer, vit_nano

NINE = {
    "dino_vits16", "dino_vits8", "dino_vitb16", "dino_vitb8", "dino_xcit_small_12_p16",
    "dino_xcit_small_12_p8", "dino_xcit_medium_24_p16", "dino_xcit_medium_24_p8", "dino_resnet50",
}  # fmt: skip


def load(name: str, **kwargs):
    return torch.hub.load(str(ROOT), name, source="local", **kwargs)


def test_the_published_names_are_there():
    assert NINE <= set(PUBLISHED)
    entries = {name for name in vars(hubconf) if callable(getattr(hubconf, name)) and name[0] != "_"}
    assert entries == NINE | {"dino"}  # what torch.hub.list shows


def test_hubconf_imports_neither_the_method_nor_a_script():
    assert not imported(ROOT / "hubconf.py") & ((SCRIPTS | {"utils"}) - {"hubconf"})


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(3)
    network = vit_nano(8, img_size=32)
    normalization = {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.2, 0.3)}
    entries = {"teacher": network.state_dict(), "args": {"arch": "vit_nano", "patch_size": 8}}
    torch.save(entries | {"normalization": normalization}, tmp_path / "checkpoint.pth")
    return tmp_path / "checkpoint.pth", network.eval()


def test_any_file_of_weights_loads(weights):
    path, expected = weights
    network = load("dino", weights=path)
    assert isinstance(network, VisionTransformer)  # in this project, the class is the project's own
    assert not network.training and all(parameter.requires_grad for parameter in network.parameters())
    pixels = network.transform(picture())
    assert torch.equal(pixels, eval_transform(32, (0.5, 0.4, 0.3), (0.2, 0.2, 0.3))(picture()))
    assert torch.equal(network(pixels[None]), expected(pixels[None]))
    assert len(pickle.dumps(network.transform)) < 2000  # data-loading workers get it without the network
    with pytest.raises(UserError, match="no such file"):
        load("dino", weights="absent.pth")


@pytest.mark.parametrize(("name", "width"), [("dino_vits8", 384), ("dino_resnet50", 2048)])
def test_published_networks_with_random_weights(name, width):
    network = load(name, pretrained=False)
    assert network(torch.randn(1, 3, 32, 32)).shape == (1, width)
    if name == "dino_vits8":
        assert network.patch_embed.patch_size == 8


@pytest.mark.parametrize("name", sorted(NINE))
def test_published_networks_are_what_their_descriptions_say(name, capsys):
    with torch.device("meta"):
        network = load(name, pretrained=False)
        features = network(torch.zeros(1, 3, 224, 224)).shape[1]
    words = getattr(hubconf, name).__doc__
    said, millions = re.search(r": (\d+) features, ([\d.]+) M parameters", words).groups()
    count = sum(parameter.numel() for parameter in network.parameters()) / 1e6
    assert features == int(said) and f"{count:.{len(millions.partition('.')[2])}f}" == millions
    if name != "dino_resnet50":
        assert network.patch_embed.patch_size == int(re.search(r"\d+$", name)[0])
    assert capsys.readouterr().out == ""  # as no flag without effect was given


def test_published_weights_are_read_from_torch_hubs_folder(tmp_path, monkeypatch):
    """As after a download."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    network = hubconf.dino("random", arch="vit_small")
    file = tmp_path / "hub" / "checkpoints" / "dino_deitsmall16_pretrain.pth"
    file.parent.mkdir(parents=True)
    torch.save(network.state_dict(), file)
    x = torch.randn(1, 3, 32, 32)
    assert torch.equal(load("dino_vits16")(x), network(x))


@pytest.fixture
def foreign(tmp_path):
    """A project whose modules are called as ours are."""
    (tmp_path / "support").mkdir()
    for name in ("support/__init__.py", "support/weights.py", "vision_transformer.py", "utils.py"):
        (tmp_path / name).write_text("OWNER = 'foreign'\n")
    return tmp_path


def test_the_callers_modules_stay_in_their_place(foreign, monkeypatch, weights):
    names = ("support", "vision_transformer", "utils")
    for name in [name for name in sys.modules if name.partition(".")[0] in names]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(foreign))
    own = importlib.import_module("support.weights")
    path, expected = weights
    network = load("dino", weights=path)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(x), expected(x))
    assert sys.modules["support.weights"] is own and own.OWNER == "foreign"
    assert "support.pixels" not in sys.modules
    assert importlib.import_module("vision_transformer").OWNER == "foreign"  # only imported now
    assert network.transform(picture()).shape == (3, 32, 32)


FOREIGN = """
import pickle, sys
import torch
import utils
network = torch.hub.load(sys.argv[1], "dino", source="local", weights=sys.argv[2])
print(tuple(network(torch.zeros(2, 3, 32, 32)).shape), utils.OWNER)
if "foreign" in sys.argv:
    import support.weights, vision_transformer
    print(support.weights.OWNER, vision_transformer.OWNER)
else:
    print(type(pickle.loads(pickle.dumps(network))) is type(network))
"""


SPAWNED = """
import sys
import torch
from torch.utils.data import DataLoader

class Images:
    def __init__(self, network):
        self.transform, self.read = network.transform, network.read
    def __len__(self):
        return 2
    def __getitem__(self, index):
        return self.transform(self.read("image.png"))

if __name__ == "__main__":
    network = torch.hub.load(sys.argv[1], "dino", source="local", weights=sys.argv[2])
    before = list(sys.path)
    loader = DataLoader(Images(network), num_workers=1, multiprocessing_context="spawn")
    expected = network.transform(network.read("image.png"))
    print(all(torch.equal(batch[0], expected) for batch in loader), sys.path == before)
"""


@pytest.mark.slow
@pytest.mark.parametrize("project", ["tmp_path", "foreign"])
def test_the_transform_works_in_workers_that_are_not_forked(weights, request, project):
    """As on macOS and Windows, and from Python 3.14 on."""
    folder = request.getfixturevalue(project)
    (folder / "main.py").write_text(SPAWNED)
    picture().save(folder / "image.png")
    command = [sys.executable, "main.py", str(ROOT), str(weights[0])]
    ended = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=600)
    assert (ended.returncode, ended.stdout) == (0, "True True\n"), ended.stderr


def test_what_was_assumed_is_said(tmp_path, capsys):
    network = vit_nano(8, img_size=32)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    loaded = load("dino", weights=tmp_path / "weights.pth", arch="vit_nano")
    assert "4 heads assumed" in loaded.description
    assert f"note: {loaded.description}\n" in capsys.readouterr().out
    torch.save({"of\nothers": network.state_dict()}, tmp_path / "weights.pth")
    load("dino", weights=tmp_path / "weights.pth", arch="vit_nano")
    assert r"weights.pth: of\nothers, vit_nano" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("has_all", [False, True])
def test_a_network_loads_in_a_project_whose_modules_have_our_names(foreign, weights, has_all):
    if not has_all:
        for name in ("support/__init__.py", "support/weights.py", "vision_transformer.py"):
            (foreign / name).unlink()
        (foreign / "support").rmdir()
    (foreign / "main.py").write_text(FOREIGN)
    command = [sys.executable, "main.py", str(ROOT), str(weights[0]), *["foreign"] * has_all]
    ended = subprocess.run(command, cwd=foreign, capture_output=True, text=True, timeout=600)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.splitlines() == ["(2, 128) foreign", "foreign foreign" if has_all else "True"]


def test_the_flags_of_the_scripts_are_arguments(tmp_path):
    torch.manual_seed(3)
    student, teacher = (vit_nano(8, img_size=32).eval() for _ in range(2))
    torch.save({"student": student.state_dict(), "teacher": teacher.state_dict()}, tmp_path / "x.pth")
    network = load("dino", weights=tmp_path / "x.pth", checkpoint_key="student", image_size=16)
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(network(x), student(x)) and not torch.equal(network(x), teacher(x))
    assert network.transform(picture()).shape == (3, 16, 16)
    other = load("dino", weights="random", arch="vit_nano", in_chans=2)
    assert other.patch_embed.proj.in_channels == 2
    np.save(tmp_path / "x.npy", np.arange(24, dtype=np.uint8).reshape(2, 3, 4))
    assert other.read(str(tmp_path / "x.npy")).flatten().tolist() == list(range(24))


def test_a_folder_whose_name_begins_as_ours_is_another_project():
    files = [ROOT / "support" / "__init__.py", ROOT.with_name(f"{ROOT.name}2") / "support" / "__init__.py"]
    assert [hubconf._is_ours(types.SimpleNamespace(__file__=str(file))) for file in files] == [True, False]
