"""The service's side of RabbitMQ: one connection, one thread, prefixed names.

Exchanges and queues carry a prefix of this service, so that several may share a broker. All
are gone after `close`; those of a service that was killed expire unused.
"""

from __future__ import annotations

import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

import pika  # type: ignore[import-untyped]  # ships no types

Channel = Any
Headers = dict[str, Any]
T = TypeVar("T")

KINDS = ("tasks", "results", "heartbeats")
EXPIRES = {"x-expires": 15 * 60 * 1000}
ANSWER_S = 30.0


class Broker:
    """A connection to RabbitMQ that declares, publishes and consumes for the service."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.prefix = f"fanfold-test.{uuid.uuid4().hex[:12]}"
        self.group_prefix = f"{self.prefix}.group."
        self._queues: set[str] = set()
        self._connection: Any = None
        self._channel: Channel = None
        self._thread = threading.Thread(target=self._consume, name="globus-broker", daemon=True)

    def unreachable(self) -> str | None:
        """Return why no connection to the broker can be opened, or None if one can."""
        try:
            pika.BlockingConnection(pika.URLParameters(self.url)).close()
        except (pika.exceptions.AMQPError, OSError) as error:
            return f"{type(error).__name__}: {error}"
        return None

    def has_queue(self, name: str) -> bool:
        """Say whether the broker holds a queue, over a connection for just that."""
        with pika.BlockingConnection(pika.URLParameters(self.url)) as connection:
            try:
                connection.channel().queue_declare(name, passive=True)
            except pika.exceptions.ChannelClosedByBroker:
                return False
        return True

    def start(
        self, on_result: Callable[[bytes], None], on_heartbeat: Callable[[bytes], None]
    ) -> None:
        """Connect, and hand what endpoints publish to these, on the broker's thread."""
        self._connection = pika.BlockingConnection(pika.URLParameters(self.url))
        self._channel = self._connection.channel()
        for kind in KINDS:
            self._channel.exchange_declare(self.exchange(kind), "topic", auto_delete=True)
        self._channel.basic_qos(prefetch_count=500)
        for kind, receive in (("results", on_result), ("heartbeats", on_heartbeat)):
            self._declare(self._channel, self.queue(kind))
            self._channel.basic_consume(self.queue(kind), _acknowledging(receive))
        self._thread.start()

    def close(self) -> None:
        """Delete every queue and exchange of this service and disconnect."""
        if self._thread.is_alive():
            self.call(self._delete_all)
            self._thread.join(ANSWER_S)

    def exchange(self, kind: str) -> str:
        """Name the exchange to which `kind` is published."""
        return f"{self.prefix}.{kind}"

    def queue(self, kind: str, endpoint_id: str | None = None) -> str:
        """Name the service's own queue of `kind`, or that of an endpoint."""
        return ".".join(part for part in (self.prefix, endpoint_id, kind) if part)

    def call(self, function: Callable[[Channel], T]) -> T:
        """Run `function(channel)` on the broker's thread and return its value."""
        if threading.current_thread() is self._thread:
            return function(self._channel)
        done: Future[T] = Future()

        def work() -> None:
            try:
                done.set_result(function(self._channel))
            except pika.exceptions.AMQPError as error:
                done.set_exception(error)

        self._connection.add_callback_threadsafe(work)
        return done.result(ANSWER_S)

    def open_endpoint(self, endpoint_id: str) -> None:
        """Declare the task queue of an endpoint, and listen to what it will publish."""

        def declare(channel: Channel) -> None:
            tasks = self.queue("tasks", endpoint_id)
            self._declare(channel, tasks)
            channel.queue_bind(tasks, self.exchange("tasks"), f"{endpoint_id}.tasks")
            for kind in ("results", "heartbeats"):
                channel.queue_bind(self.queue(kind), self.exchange(kind), f"{endpoint_id}.{kind}")

        self.call(declare)

    def open_group(self, group: str) -> None:
        """Declare the queue on which the SDK waits for the results of a task group."""
        self.call(lambda channel: self._declare(channel, self.group_prefix + group))

    def open_commands(self, endpoint_id: str) -> str:
        """Declare the queue on which a manager waits for commands, and return its name."""
        name = self.queue("commands", endpoint_id)
        self.call(lambda channel: self._declare(channel, name))
        return name

    def send_command(self, endpoint_id: str, body: bytes) -> None:
        """Give a manager a command, as of now: it refuses those of three minutes ago."""
        name = self.queue("commands", endpoint_id)
        properties = pika.BasicProperties(
            content_type="application/json", timestamp=int(time.time())
        )
        self.call(lambda channel: channel.basic_publish("", name, body, properties))

    def send_tasks(self, endpoint_id: str, messages: Iterable[tuple[bytes, Headers]]) -> None:
        """Publish packed tasks with their headers to an endpoint."""

        def publish(channel: Channel) -> None:
            for body, headers in messages:
                properties = pika.BasicProperties(headers=headers, delivery_mode=2)
                channel.basic_publish(
                    self.exchange("tasks"), f"{endpoint_id}.tasks", body, properties
                )

        self.call(publish)

    def send_result(self, group: str, body: bytes) -> None:
        """Forward a packed result to the queue of its group."""
        properties = pika.BasicProperties(timestamp=int(time.time()), headers={})
        self.call(lambda c: c.basic_publish("", self.group_prefix + group, body, properties))

    def _declare(self, channel: Channel, queue: str) -> None:
        channel.queue_declare(queue, durable=True, arguments=EXPIRES)
        self._queues.add(queue)

    def _delete_all(self, channel: Channel) -> None:
        channel.stop_consuming()  # here: the thread ends by itself once its queues are gone
        for queue in self._queues:
            channel.queue_delete(queue)
        for kind in KINDS:
            channel.exchange_delete(self.exchange(kind))

    def _consume(self) -> None:
        try:
            self._channel.start_consuming()
        finally:
            if self._connection.is_open:
                self._connection.close()


def _acknowledging(receive: Callable[[bytes], None]) -> Callable[..., None]:
    def consume(channel: Channel, deliver: Any, _: Any, body: bytes) -> None:
        receive(body)
        channel.basic_ack(deliver.delivery_tag)

    return consume
