from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fanfold.backends.core.errors import ConfigurationError
from fanfold.backends.discovery.sources import expand_slurm, hosts_to_specs, parse_pbs


def test_pbs_repeats_are_dropped_in_order() -> None:
    assert parse_pbs("b.x\na.x\n\nb.x\r\na.x\n") == ["b.x", "a.x"]


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("login1", ["login1"]),
        ("nid[001-003,010]", ["nid001", "nid002", "nid003", "nid010"]),
        ("gpu-[a,b]7,login1", ["gpu-a7", "gpu-b7", "login1"]),
        ("r[1-2]n[08-10]x", [f"r{r}n{n}x" for r in "12" for n in ("08", "09", "10")]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("a,a", ["a"]),
    ],
)
def test_slurm_lists_are_expanded(text: str, hosts: list[str]) -> None:
    assert expand_slurm(text) == hosts


@pytest.mark.parametrize("text", ["", "n[1-", "n1]", "n[]", "n[3-1]", "a,,b", "n[0-9999999]"])
def test_broken_lists_are_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="node list"):
        expand_slurm(text)


def test_crossed_ranges_cannot_fill_the_memory() -> None:
    with pytest.raises(ConfigurationError, match="the limit is"):
        expand_slurm("a[0-9999]b[0-9999]")


@given(st.lists(st.from_regex(r"[a-z]{1,4}[0-9]{0,3}", fullmatch=True), min_size=1, unique=True))
def test_plain_lists_are_themselves(hosts: list[str]) -> None:
    assert expand_slurm(",".join(hosts)) == hosts


def test_hosts_become_endpoints() -> None:
    specs = hosts_to_specs(["x1.host.example"], 8000, per_host=2, suffix=".hsn.example")
    assert [s.url for s in specs] == ["http://x1.hsn.example:8000", "http://x1.hsn.example:8001"]
