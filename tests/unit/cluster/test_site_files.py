from __future__ import annotations

from pathlib import Path

import pytest

from fanfold.backends.core.errors import ConfigurationError
from fanfold.configs.site import fill, load_site, site_names


def test_the_four_sites_load_and_say_that_nobody_ran_them() -> None:
    assert site_names() == ["aurora", "frontier", "perlmutter", "polaris"]
    for name in site_names():
        site = load_site(name)
        assert site.name == name
        assert site.tested == "not run on that machine"
        assert site.facts
        assert "account" in site.required
        assert site.accelerators is not None
        assert "{nodes}" in site.launcher
        assert site.broadcast is not None


@pytest.mark.parametrize(
    ("name", "scheduler", "variable", "per_node"),
    [
        ("aurora", "pbs", "ZE_AFFINITY_MASK", 12),
        ("polaris", "pbs", "CUDA_VISIBLE_DEVICES", 4),
        ("perlmutter", "slurm", "CUDA_VISIBLE_DEVICES", 4),
        ("frontier", "slurm", "ROCR_VISIBLE_DEVICES", 8),
    ],
)
def test_accelerators(name: str, scheduler: str, variable: str, per_node: int) -> None:
    site = load_site(name)
    assert site.scheduler == scheduler
    assert site.accelerators is not None
    assert (site.accelerators.variable, site.accelerators.per_node) == (variable, per_node)


def test_a_file_of_ones_own_is_like_a_site_but_untested(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("like: aurora\nname: mine\nfilesystems: home:flare:daos_user\n")
    site = load_site(str(file))
    assert (site.name, site.filesystems) == ("mine", "home:flare:daos_user")
    assert site.launcher == load_site("aurora").launcher
    assert site.tested == "not run on that machine"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("name: x\nscheduler: lsf\nlauncher: a\n", "scheduler"),
        ("name: x\nscheduler: pbs\n", "the key 'launcher' is missing"),
        ("name: x\nscheduler: pbs\nlauncher: a\nlaunchr: b\n", "did you mean 'launcher'"),
        ("name: x\nscheduler: pbs\nlauncher: a {hosts}\n", "{hosts} is not filled in"),
        ("name: x\nscheduler: pbs\nlauncher: a\nenvironment: {'a b': c}\n", "not a name of an env"),
        ('name: x\nscheduler: pbs\nlauncher: a\nmodules: ["a\\nb"]\n', "modules.0"),
        ("like: auroa\n", "did you mean 'aurora'"),
    ],
)
def test_what_does_not_fit_is_said(tmp_path: Path, text: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(text)
    with pytest.raises(ConfigurationError) as caught:
        load_site(str(file))
    assert message in caught.value.message
    assert "mine.yaml" in caught.value.message


def test_an_unknown_site_is_named() -> None:
    with pytest.raises(ConfigurationError, match=r"--site 'auroa'.*did you mean 'aurora'"):
        load_site("auroa")


def test_other_braces_are_the_shells() -> None:
    assert fill("a ${HOME} {nodes} {x}", {"nodes": 3}) == "a ${HOME} 3 {x}"
