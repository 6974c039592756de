"""Run the application: bind, serve, and shut down cleanly."""

from __future__ import annotations

import asyncio
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
from starlette.applications import Starlette

from ..errors import ArgumentError
from .engine import Engine

SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM") if hasattr(signal, name)]

LOOK_SECONDS = 0.05
FLUSH_SECONDS = 5
"""How long uvicorn waits for answers to be sent after the last completion has ended."""

LONGEST_HEADERS = 64 * 1024


def check_can_listen(host: str, port: int) -> None:
    """ArgumentError if an address cannot be bound; it is free again afterwards."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as trial:
        trial.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            trial.bind((host, port))
        except OSError as error:
            raise ArgumentError(_cannot_listen(host, port)) from error


def _cannot_listen(host: str, port: int) -> str:
    return f"cannot listen on {host}:{port}: give another --port or --host"


class Server(uvicorn.Server):
    """uvicorn's server with a shutdown that lets running completions end.

    At a signal the server refuses new requests and cuts those that wait. Completions that run may go on for
    ``grace`` seconds; then they end with an error event. A second signal ends them at once.

    Args:
        app: the application.
        engine: its engine.
        host, port: address to listen on; port 0 lets the system choose.
        grace: seconds that running completions have at shutdown.
        ready: called with the port once the server listens.
    """

    def __init__(
        self,
        app: Starlette,
        engine: Engine,
        *,
        host: str,
        port: int,
        grace: float,
        ready: Callable[[int], object] | None = None,
    ) -> None:
        config = uvicorn.Config(
            app,
            host=host,
            port=port,
            log_level="warning",
            lifespan="off",
            timeout_graceful_shutdown=FLUSH_SECONDS,
            h11_max_incomplete_event_size=LONGEST_HEADERS,
        )
        super().__init__(config)
        self._engine, self._grace, self._ready = engine, grace, ready
        self._closing: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def serve_until_stopped(self) -> None:
        """Serve in this thread until :meth:`stop` or a signal.

        Raises:
            ArgumentError: if the address cannot be bound.
        """
        asyncio.run(self._main())

    async def _main(self) -> None:
        self._loop = loop = asyncio.get_running_loop()
        for number in SIGNALS:
            try:
                loop.add_signal_handler(number, self.stop)
            except (NotImplementedError, RuntimeError, ValueError):  # Windows, or not the main thread.
                break
        try:
            listening = self.config.bind_socket()
        except SystemExit:
            raise ArgumentError(_cannot_listen(self.config.host, self.config.port)) from None
        try:
            if self._ready is not None:
                self._ready(listening.getsockname()[1])
            await self.serve([listening])
        finally:
            listening.close()

    def stop(self) -> None:
        """Shut down: cleanly at the first call, at once at the second. Any thread may call it."""
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop)

    def _stop(self) -> None:
        if self._closing is None:
            self._closing = asyncio.get_running_loop().create_task(self._close())
        else:
            self._grace = 0.0

    async def _close(self) -> None:
        self._engine.close()
        waited = 0.0
        while not self._engine.idle and waited < self._grace:
            await asyncio.sleep(LOOK_SECONDS)
            waited += LOOK_SECONDS
        self._engine.cut()
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Replaces uvicorn's handlers: :meth:`serve_until_stopped` has its own."""
        yield
