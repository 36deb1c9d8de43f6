"""Samples, images, and parts that are too long, over an endpoint of Globus Compute."""

from __future__ import annotations

import pytest

from fanfold.tests.integration.workers.globus.endpoint import UserEndpoint
from fanfold.tests.integration.workers.globus.globus_run import LabOf
from fanfold.tests.integration.workers.long_parts import assert_same_pieces_on
from fanfold.tests.integration.workers.samples_images import assert_same_on

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("shared", [True, False], ids=["shared folder", "records in results"])
async def test_the_same_as_in_this_process(
    lab_over: LabOf, endpoint: UserEndpoint, shared: bool
) -> None:
    async with lab_over(endpoint, ttft_s=0.0, shared_folder=shared) as lab:
        await assert_same_on(lab, lab.config.pop("backend"))


@pytest.mark.parametrize("shared", [True, False], ids=["shared folder", "records in results"])
async def test_parts_that_are_too_long(
    lab_over: LabOf, endpoint: UserEndpoint, shared: bool
) -> None:
    async with lab_over(endpoint, ttft_s=0.0, shared_folder=shared) as lab:
        await assert_same_pieces_on(lab, lab.config.pop("backend"))
