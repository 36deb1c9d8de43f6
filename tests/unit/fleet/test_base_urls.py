"""Base URLs: which paths get a version, and what is stripped."""

from __future__ import annotations

import logging

import pytest

from fanfold.backends.fleet.endpoint import normalize_base_url


@pytest.mark.parametrize(
    ("path", "base"),
    [
        ("", "/v1"),
        ("/", "/v1"),
        ("/v1", "/v1"),
        ("/v1/", "/v1"),
        ("/V2", "/V2"),
        ("/v1beta/openai", "/v1beta/openai"),
        ("/v1beta/openai/", "/v1beta/openai"),
        ("/v1alpha3", "/v1alpha3"),
        ("/v2.1", "/v2.1"),
        ("/v1-preview/chat", "/v1-preview/chat"),
        ("/api/paas/v4", "/api/paas/v4"),
        ("/v1/projects/p/openapi", "/v1/projects/p/openapi"),
        ("/openai", "/openai/v1"),
        ("/v", "/v/v1"),
        ("/vllm2", "/vllm2/v1"),
        ("/v100-cluster", "/v100-cluster/v1"),
        ("/gpu-v1", "/gpu-v1/v1"),
        ("/v1/chat/completions", "/v1"),
        ("/v1/chat/completions/", "/v1"),
        ("/v1beta/openai/chat/completions", "/v1beta/openai"),
        ("/chat/completions", "/v1"),
    ],
)
def test_paths(path: str, base: str, caplog: pytest.LogCaptureFixture) -> None:
    host = f"http://h{abs(hash(path))}:8000"  # each URL is warned of once
    with caplog.at_level(logging.WARNING):
        assert normalize_base_url(host + path) == host + base
        assert normalize_base_url(host + path) == host + base
    warned = [one.getMessage() for one in caplog.records]
    assert len(warned) == path.rstrip("/").endswith("/chat/completions")
    assert all(f"{host}{path}: write the base URL" in text for text in warned)
