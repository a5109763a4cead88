"""What the tests of `lastlayer compare` share."""

import pytest


@pytest.fixture(scope="session")
def story(tmp_path_factory):
    """After `saw the` four words are as likely as one another, and `topk-softmax` takes three of 13 classes."""
    path = tmp_path_factory.mktemp("story") / "story.txt"
    lines = (f"the {a} saw the {b} and ran" for a in ("cat", "dog", "owl") for b in ("hen", "fox", "bee", "ant"))
    path.write_text("\n".join(list(lines) * 30), encoding="utf-8")
    return path
