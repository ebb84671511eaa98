"""Every command of the READMEs composes; every make target, path and package they name exists."""

import itertools
import re
import shlex
from pathlib import Path

import pytest

from vgr import command

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md"]
PAGES += sorted(p for d in ("experiments", "benchmarks") for p in (ROOT / d).rglob("README.md"))


def _commands():
    for page in PAGES:
        for block in re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield pytest.param(words, id=" ".join(words)[:60])


@pytest.mark.parametrize("words", _commands())
def test_command_is_true(words):
    name, *rest = words
    if name == "make":
        assert re.search(rf"^{rest[0]}:", (ROOT / "Makefile").read_text(), re.MULTILINE)
    elif name == "python":
        assert rest[0] == "-m"
        assert (ROOT / (rest[1].replace(".", "/") + ".py")).is_file()
        source = (ROOT / (rest[1].replace(".", "/") + ".py")).read_text()
        assert all(f'"{flag}"' in source for flag in rest if flag.startswith("--"))
    else:
        assert name.startswith("vgr-")
        if rest[0] == "-m":  # a sweep: each of its jobs
            choices = [[f"{key}={value}" for value in values.split(",")] for key, _, values in
                       (word.partition("=") for word in rest[1:])]  # fmt: skip
            for job in itertools.product(*choices):
                command.compose(name.removeprefix("vgr-"), job)
        elif rest != ["--list"]:
            command.compose(name.removeprefix("vgr-"), rest)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target
