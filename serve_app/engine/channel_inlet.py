"""The receiving end of the token channel: one bound socket, whoever sends."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable

import zmq

from serve_app.engine.address import Address
from serve_app.engine.channel import MAX_MESSAGE_BYTES, Message, unpack

logger = logging.getLogger("headrace.channel")

MESSAGES_IN_SOCKET = 1024
MESSAGES_PER_TURN = 32


class Inlet:
    """Receives for one process; on its event loop only."""

    def __init__(self, host: str, ports: range, on_message: Callable[[Message], None]) -> None:
        """Bind a free port of ``ports`` on ``host`` and begin to receive.

        Call it on the loop.

        Raises:
            OSError: no port of the range is free.
        """
        public_key, secret_key = zmq.curve_keypair()
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context(io_threads=1)
        self._socket = self._context.socket(zmq.PULL)
        self._socket.linger = 0
        self._socket.rcvhwm = MESSAGES_IN_SOCKET
        self._socket.maxmsgsize = MAX_MESSAGE_BYTES
        self._socket.curve_server = True
        self._socket.curve_secretkey = secret_key
        self.address = Address(_bind(self._socket, host, ports), public_key)
        self._on_message = on_message
        self._loop = asyncio.get_running_loop()
        self._descriptor = int(self._socket.getsockopt(zmq.FD))
        self._loop.add_reader(self._descriptor, self._receive)

    def close(self) -> None:
        """Stop receiving."""
        self._loop.remove_reader(self._descriptor)
        self._socket.close(linger=0)
        self._context.destroy(linger=0)

    def take(self, packed: bytes) -> None:
        """Hand one message on; what is none, or cannot be handled, is dropped and told of."""
        try:
            message = unpack(packed)
        except ValueError as error:
            # If it held frames, their streams will miss them, and say so when they end.
            logger.error("a message on the token channel was dropped: %s", error)
            return
        try:
            self._on_message(message)
        except Exception:
            # ZeroMQ's descriptor tells of what is new only: what is behind it has to be taken.
            logger.exception("a message on the token channel could not be handled")

    def _receive(self) -> None:
        """Take what has arrived, at most MESSAGES_PER_TURN messages at a time.

        ZeroMQ's descriptor tells of changes only, so what is left is asked for again.
        """
        for _ in range(MESSAGES_PER_TURN):
            try:
                packed = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            except zmq.ZMQError:  # closed meanwhile
                return
            self.take(packed)
        self._loop.call_soon(self._receive)


def _bind(socket: zmq.Socket[bytes], host: str, ports: range) -> str:
    """Bind the first free port of the range; return the endpoint."""
    for port in ports:
        endpoint = f"tcp://{host}:{port}"
        try:
            socket.bind(endpoint)
        except zmq.ZMQError as error:
            if error.errno != zmq.EADDRINUSE:
                raise OSError(f"the token channel cannot bind {endpoint}: {error}") from error
        else:
            return endpoint
    raise OSError(
        f"no port of {ports.start}-{ports.stop - 1} is free on {host}; "
        "set channel.ports to another range"
    )
