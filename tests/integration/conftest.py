"""What integration tests share."""

from fanfold.tests.integration.dev_server import dev_server, plain_server

__all__ = ["dev_server", "plain_server"]
