"""Tars are read to their end or refused in words, whatever their headers say."""

import contextlib
import io
import tarfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdjax.training.samples import DataError, Member, members
from sdjax.training.stored import Shards

FILES = {f"{key}.{kind}": f"{key} as {kind} ".encode() * 99 for key in range(3) for kind in ("png", "txt")}


def tar_of(pax=None) -> bytes:
    """The files in a tar, the third under a header that says what `pax` says too."""
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in FILES.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            member.pax_headers = (pax or {}) if name == "1.png" else {}
            tar.addfile(member, io.BytesIO(content))
    return file.getvalue()


def read(data: bytes) -> list[Member]:
    return list(members(io.BytesIO(data), "a.tar"))


TAR = tar_of()
WHOLE = read(TAR)
HEADERS = [member.start - tarfile.BLOCKSIZE for member in WHOLE]


def test_a_tars_files_are_found_where_they_lie():
    assert {name: TAR[start : start + size] for name, start, size in WHOLE} == FILES


@given(st.sampled_from(HEADERS), st.integers(0, 511), st.integers(1, 255))
def test_a_damaged_header_never_hides_what_follows_it(header, place, change):
    data = bytearray(TAR)
    data[header + place] ^= change
    try:
        assert read(data) == WHOLE  # a checksum's own blanks may be others
    except DataError as error:
        assert str(error) in ("a.tar is not a tar file", "a.tar is damaged or cut short")


@pytest.mark.parametrize("header", HEADERS)
def test_a_header_that_was_lost_is_no_end(header):
    with pytest.raises(DataError):
        read(TAR[:header] + bytes(512) + TAR[header + 512 :])


@given(st.integers(1, WHOLE[-1].start + WHOLE[-1].size))
def test_a_tar_that_is_cut_gives_no_part_of_a_file(length):
    found = []
    try:
        found += members(io.BytesIO(TAR[:length]), "a.tar")
    except DataError:
        assert length not in HEADERS  # where it ends between two files nobody can tell
    assert all(start + size <= length for _, start, size in found)


HOSTILE = [
    {"GNU.sparse.map": "x,y"},
    {"GNU.sparse.size": "abc"},
    {"GNU.sparse.realsize": "1" + "0" * 5000},
    {"GNU.sparse.realsize": "-1"},
    {"size": "-1536"},  # back to its own header
    {"size": str(2**62)},
    {"size": str(2**80)},
]


@pytest.mark.parametrize("pax", HOSTILE)
def test_a_header_that_tarfile_cannot_stand_is_damage(pax, tmp_path):
    with pytest.raises(DataError, match=r"a\.tar is damaged or cut short"):
        read(tar_of(pax))
    (tmp_path / "a.tar").write_bytes(tar_of(pax))
    with pytest.raises(DataError, match=r"a\.tar is damaged or cut short"):
        Shards(str(tmp_path / "a.tar"), 8)


@given(st.dictionaries(st.sampled_from(["GNU.sparse.size", "GNU.sparse.map", "size", "path"]), st.text(max_size=20)))
def test_any_header_gives_files_within_the_tar_or_a_data_error(pax):
    data = tar_of(pax)
    with contextlib.suppress(DataError):
        assert all(0 <= start <= start + size <= len(data) for _, start, size in read(data))
