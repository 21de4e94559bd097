"""Scaffolded systems work before a line of them is changed."""

import subprocess
import sys

import pytest

from featherweight.cards import load_card
from featherweight.errors import UsageError
from featherweight.workflows.scaffold import next_steps, scaffold

CHECK = """
import sys, pytest, featherweight, featherweight.cards as cards
from pathlib import Path
root = Path(sys.argv[1])
for kind in ("models", "ops", "methods"):
    package = __import__(f"featherweight.{kind}", fromlist=["x"])
    package.__path__.append(str(root / "src" / "featherweight" / kind))
folder = root / "src" / "featherweight" / "models"
real = cards.all_cards
card = cards.load_card(folder / "tinynet.toml")
object.__setattr__(card, "path", folder / "tinynet.toml")
everything = {**real(), "tinynet": card}
import featherweight.registry as registry
registry.all_cards = lambda: everything
type(card).module_path = property(lambda self: folder / "tinynet.py")
from featherweight.measure.count import count
variant = card.variants["tinynet_s"]
counted = count(featherweight.create_model("tinynet_s").eval(), tuple(variant.input))
assert {"params": counted.params, "macs": counted.macs} == dict(variant.counted), counted
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--rootdir", str(root), str(root / "tests")]))
"""


@pytest.fixture
def root(tmp_path):
    (tmp_path / "src" / "featherweight").mkdir(parents=True)
    return tmp_path


def test_all_three_kinds_pass_their_own_tests(root):
    for kind, slug in (("model", "tinynet"), ("op", "tiny_op"), ("method", "tinymethod")):
        written = scaffold(kind, slug, root)
        assert [path.suffix for path in written] == [".py", ".toml", ".py"]
        assert load_card(written[1]).slug == slug
        assert len(next_steps(kind, slug).splitlines()) == 5
    done = subprocess.run(
        [sys.executable, "-c", CHECK, str(root)], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_nothing_is_overwritten(root):
    scaffold("op", "tinyop", root)
    before = (root / "src/featherweight/ops/tinyop.py").read_text()
    (root / "src/featherweight/ops/tinyop.toml").unlink()
    with pytest.raises(UsageError, match="Nothing was written"):
        scaffold("op", "tinyop", root)
    assert (root / "src/featherweight/ops/tinyop.py").read_text() == before
    assert not (root / "src/featherweight/ops/tinyop.toml").exists()


@pytest.mark.parametrize("slug", ["Tiny", "2net", "a-b", "../x", "class", "", "a__b", "é"])
def test_bad_slugs_are_refused(root, slug):
    with pytest.raises(UsageError, match="no slug"):
        scaffold("model", slug, root)


def test_existing_systems_and_unknown_kinds_are_refused(root, tmp_path):
    with pytest.raises(UsageError, match="exists already"):
        scaffold("model", "simplenet", root)
    with pytest.raises(UsageError, match="Did you mean model"):
        scaffold("modle", "tinynet", root)
    with pytest.raises(UsageError, match="no source checkout"):
        scaffold("model", "tinynet", tmp_path / "elsewhere")
