"""The documentation's links lead somewhere, and its commands and flags are the scripts' own."""

import contextlib
import functools
import importlib
import re
import shlex
from pathlib import Path

import pytest

from tests.conftest import ROOT

PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES += sorted((ROOT / "docs").glob("*.md"))
SCRIPTS = [
    importlib.import_module(path.stem) for path in ROOT.glob("*.py") if "get_args_parser" in path.read_text()
]
OTHER_FLAGS = {
    "torchrun": "--nproc_per_node --nnodes --rdzv_backend --rdzv_endpoint --max_restarts "
    "--signals-to-handle --shutdown-timeout --local-addr",
    "docker run": "--init --shm-size",
    "sbatch, srun, squeue": "--nodes --ntasks-per-node --gpus-per-node --cpus-per-task --signal --requeue "
    "--open-mode --me",
    "pip": "--index-url",
    "tar, zip": "--dereference --symlinks",
    "pytest": "--dist --gpu-device",
    "mlflow": "--backend-store-uri",
    "python -m tests.*": "--rounds --quick --only --device --images --compare --sweeps --seeds",
    "every parser": "--help",
}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)


@functools.cache
def anchors(page: Path) -> set[str]:
    """Those that GitHub makes of a page's headings."""
    headings = re.findall(r"^#+ (.*)", without_code(page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@every_page
def test_links_lead_to_files_and_headings_that_exist(page):
    text = without_code(page.read_text())
    links = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    assert links
    for link in links:
        if link.startswith(("https://", "http://")):
            continue
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


@every_page
def test_flags_exist(page):
    known = set(" ".join(OTHER_FLAGS.values()).split())
    for script in SCRIPTS:
        known.update(script.get_args_parser()._option_string_actions)
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", page.read_text())) - known == set()


def commands(text: str) -> list[list[str]]:
    """The words of each shell command in code blocks and in inline code."""
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.M | re.S)
    blocks += re.findall(r"`([^`\n]+)`", without_code(text))
    found: list[list[str]] = []
    for line in "\n".join(blocks).replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=";&|")
        words.whitespace_split = True
        found.append([])
        with contextlib.suppress(ValueError):  # inline code that is no command
            for word in words:
                if set(word) <= set(";&|"):
                    found.append([])
                else:
                    found[-1].append(word)
    return [command for command in found if command]


def test_commands_are_found():
    block = "```sh\ncd x; torchrun --nnodes=2 \\\n  main_dino.py --seed 1  # a trial\n```\n"
    torchrun = ["torchrun", "--nnodes=2", "main_dino.py", "--seed", "1"]
    assert commands(block + "`eval_knn.py --demo`") == [["cd", "x"], torchrun, ["eval_knn.py", "--demo"]]


@every_page
def test_the_scripts_accept_the_commands(page, monkeypatch):
    monkeypatch.chdir(ROOT)  # for @recipes/...
    for words in commands(page.read_text()):
        for script in SCRIPTS:
            name = f"{script.__name__}.py"
            if name not in words:
                continue
            flags = words[words.index(name) + 1 :]
            if {"--help", "..."} & set(flags):
                continue
            flags = [word for word in flags if not word.startswith("@runs/")]  # a run writes it
            script.parse_args(["0" if word == "N" else word for word in flags])


@every_page
def test_the_projects_files_that_a_page_names_exist(page):
    for path in re.findall(r"`((?:support|docs|tests|recipes)/[\w/.]*)`", page.read_text()):
        assert (ROOT / path).exists(), path


def test_the_readme_lists_the_files():
    section = re.search(r"^## Files\n(.*?)^## ", (ROOT / "README.md").read_text(), re.M | re.S)[1]
    listed = set(re.findall(r"`([\w/]+\.py)`", section))
    for path in listed:
        assert (ROOT / path).is_file(), path
    there = {str(path.relative_to(ROOT)) for path in [*ROOT.glob("*.py"), *ROOT.glob("support/*.py")]}
    assert there - listed == {"support/__init__.py"}


def test_the_readme_is_short_and_begins_its_test_command_with_a_clean_environment():
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 220
    # .ci/run takes the first such line and runs it in a fresh clone.
    command = next(line for line in text.splitlines() if "python -m pytest -n" in line)
    assert command.startswith("python3 -m venv .venv && ")


def test_the_stations_of_a_run_exist():
    page = (ROOT / "docs" / "how-a-run-flows.md").read_text()
    names = re.findall(r"`((?:support|utils|main_dino|vision_transformer)\.[\w.]+)`", page)
    assert len(names) > 15
    for name in names:
        parts = name.split(".")
        length = 2 if parts[0] == "support" else 1
        found = importlib.import_module(".".join(parts[:length]))
        for part in parts[length:]:
            assert hasattr(found, part), name
            found = getattr(found, part)


def test_the_oldest_versions_are_those_of_the_requirements():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    bounds = dict(line.split(">=") for line in lines if not line.startswith("#"))
    lines = (ROOT / "tests" / "oldest.txt").read_text().splitlines()
    pinned = dict(line.split("==") for line in lines if not line.startswith("#"))
    assert pinned.keys() == bounds.keys()
    for name, bound in bounds.items():
        assert f"{pinned[name]}.".startswith(f"{bound}."), name
