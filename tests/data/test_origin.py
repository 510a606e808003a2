"""What a path, a pattern or a URL of tars names, without looking into them."""

import os

import pytest

from ccmim_fast.data.index.origin import _expand_braces, find_origin
from ccmim_fast.data.index.storage import join


@pytest.mark.parametrize(
    "origin",
    ["s3://bucket-{0..1}/x.tar", "s3://b/p/{8..10}.tar", "s3://b/p//x.tar", "https://host//a/x.tar", "memory://x.tar"],
)
def test_urls_of_containers_stay_what_they_are(origin):
    """Also where they share the scheme alone, and with an empty part, which is one of a key of S3."""
    found = find_origin(origin, 3)
    assert [join(found.root, path) for path in found.containers] == _expand_braces(origin)


def test_a_root_with_two_slashes(tmp_path):
    (tmp_path / "x.tar").write_bytes(b"")
    found = find_origin(f"/{tmp_path}/x.tar", 3)
    assert [os.path.realpath(join(found.root, path)) for path in found.containers] == [str(tmp_path / "x.tar")]
