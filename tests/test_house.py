"""The layout: imports run one way, functions fit a screen, published names are where code expects them."""

import ast
import importlib
import inspect
from pathlib import Path

import pytest

import utils
from tests.conftest import ROOT

SCRIPTS = {path.stem for path in ROOT.glob("*.py")} - {"vision_transformer", "utils"}
SUPPORT = sorted((ROOT / "support").glob("*.py"))
SOURCES = [*sorted(ROOT.glob("*.py")), *SUPPORT]


def imported(path: Path) -> set[str]:
    """First names of all modules that a file imports, anywhere in it."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split(".")[0])
    return names


@pytest.mark.parametrize("path", SUPPORT, ids=lambda path: path.name)
def test_support_does_not_know_the_method(path):
    assert not imported(path) & (SCRIPTS | {"utils"})


def test_the_method_does_not_know_the_scripts():
    assert not imported(ROOT / "vision_transformer.py") & (SCRIPTS | {"utils", "support"})
    assert not imported(ROOT / "utils.py") & SCRIPTS


def test_scripts_do_not_know_who_submits_them():
    for path in ROOT.glob("*.py"):
        assert "run_with_submitit" not in imported(path)


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_functions_fit_a_screen(path):
    functions = [
        node
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef) and "parser" not in node.name
    ]
    lengths = [(node.name, node.lineno, node.end_lineno - node.lineno + 1) for node in functions]
    assert [each for each in lengths if each[2] > 65] == []


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_text_is_utf8_whatever_the_system_takes(path):
    calls = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call)]
    texts = [call for call in calls if getattr(call.func, "attr", "") in ("read_text", "write_text")]
    assert [call.lineno for call in texts if "utf-8" not in ast.unparse(call)] == []


def test_the_published_names_are_in_utils_and_take_the_published_arguments():
    published = {
        "MultiCropWrapper": ["backbone", "head"],
        "DINOHead": ["in_dim", "out_dim", "use_bn", "norm_last_layer", "nlayers", "hidden_dim",
                     "bottleneck_dim"],
        "DINOLoss": ["out_dim", "ncrops", "warmup_teacher_temp", "teacher_temp", "warmup_teacher_temp_epochs",
                     "nepochs", "student_temp", "center_momentum"],
        "DataAugmentationDINO": ["global_crops_scale", "local_crops_scale", "local_crops_number"],
        "GaussianBlur": ["p", "radius_min", "radius_max"],
        "Solarization": ["p"],
        "LARS": ["params", "lr", "weight_decay", "momentum", "eta"],
        "MetricLogger": ["delimiter"],
        "SmoothedValue": ["window_size", "fmt"],
        "bool_flag": [None],
        "cancel_gradients_last_layer": ["epoch", "model", "freeze_last_layer"],
        "clip_gradients": ["model", "clip"],
        "cosine_scheduler": ["base_value", "final_value", "epochs", "niter_per_ep", "warmup_epochs",
                             "start_warmup_value"],
        "fix_random_seeds": ["seed"],
        "get_params_groups": ["model"],
        "get_rank": [], "get_world_size": [], "is_main_process": [], "has_batchnorms": ["model"],
        "init_distributed_mode": [None],
    }  # fmt: skip
    for name, arguments in published.items():
        ours = list(inspect.signature(getattr(utils, name)).parameters)
        for position, argument in enumerate(arguments):
            assert argument in (None, ours[position]), name


SEVERAL = {"use_cuda": True, "num_workers": 10, "dist_url": "env://", "local_rank": 0}
PUBLISHED_FLAGS = {
    "eval_knn": SEVERAL | {
        "batch_size_per_gpu": 128, "nb_knn": [10, 20, 100, 200], "temperature": 0.07,
        "dump_features": None, "load_features": None,
    },
    "eval_copy_detection": SEVERAL | {
        "imsize": 320, "batch_size_per_gpu": 16, "data_path": "", "whitening_path": "",
        "distractors_path": "",
    },
    "eval_image_retrieval": SEVERAL | {
        "dataset": "roxford5k", "multiscale": False, "imsize": 224, "data_path": "", "crop_queries": False,
    },
    "eval_video_segmentation": {
        "output_dir": ".", "data_path": "", "n_last_frames": 7, "size_mask_neighborhood": 12, "topk": 5,
        "bs": 6,
    },
    "visualize_attention": {
        "image_path": None, "image_size": (480, 480), "threshold": None,
        "output_dir": "attention",  # published: ".", where it overwrote the user's files
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED_FLAGS)
def test_published_flags_and_defaults(name):
    """Those of main_dino.py, eval_linear.py and run_with_submitit.py are in their own files."""
    parse, published = importlib.import_module(name).parse_args, PUBLISHED_FLAGS[name]
    args = vars(parse([]))
    assert {flag: args[flag] for flag in published} == published and args["pretrained_weights"] == ""
    weights = {"arch": "vit_small", "patch_size": 16, "checkpoint_key": "teacher"}
    assert all(args[flag] is None for flag in weights)  # as the weights say
    replayed = vars(parse([f"--{flag}={value}" for flag, value in weights.items()]))
    assert {flag: replayed[flag] for flag in weights} == weights
