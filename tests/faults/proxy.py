"""A TCP proxy in front of a test server, which can cut, swallow and delay what passes, and turn to another server."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from types import TracebackType
from typing import Self

from psycopg.conninfo import make_conninfo

from pgworker_client.embedded import EmbeddedServer

_CHUNK = 65536


class Proxy:
    """Listens on a port of this host from the start of a ``with`` block to its end.

    Attributes:
        target: the server that new connections are led to.
        delay: seconds that everything takes, in either direction.
        port: where it listens.
    """

    def __init__(self, target: EmbeddedServer) -> None:
        self.target = target
        self.delay = 0.0
        self.port = 0
        self._swallowing = False
        self._refusing = False
        self._connections: set[_Connection] = set()
        self._loop = asyncio.new_event_loop()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self._ready.wait()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.reset()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    def dsn(self, dbname: str, user: str) -> str:
        """Return a connection string for a client that is to go through the proxy."""
        return make_conninfo(host="127.0.0.1", port=self.port, user=user, dbname=dbname)

    def reset(self) -> None:
        """Cut all connections off with a reset, as a firewall or a host that was switched off and on does."""
        asyncio.run_coroutine_threadsafe(self._reset(), self._loop).result()

    def swallow(self, now: bool) -> None:
        """Be a black hole: take everything and pass nothing on, on the connections of now for ever."""

        async def change() -> None:
            self._swallowing = now
            if now:
                for connection in self._connections:
                    connection.dead = True

        asyncio.run_coroutine_threadsafe(change(), self._loop).result()

    def refuse(self, now: bool) -> None:
        """Close new connections at once."""
        self._refusing = now

    async def _reset(self) -> None:
        for connection in list(self._connections):
            connection.reset()

    def _run(self) -> None:
        asyncio.set_event_loop(self._loop)
        server = self._loop.run_until_complete(asyncio.start_server(self._serve, "127.0.0.1", 0))
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        self._loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(self._loop):
            task.cancel()
        self._loop.run_until_complete(asyncio.sleep(0.05))
        self._loop.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = _Connection(self, writer, dead=self._swallowing)
        self._connections.add(connection)
        try:
            if self._refusing:
                return
            if connection.dead:
                while await reader.read(_CHUNK):
                    pass
                return
            path = f"{self.target.host}/.s.PGSQL.{self.target.port}"
            theirs, ours = await asyncio.open_unix_connection(path)
            connection.server = ours
            await asyncio.gather(connection.pump(reader, ours), connection.pump(theirs, writer))
        except (OSError, asyncio.CancelledError):
            pass
        finally:
            self._connections.discard(connection)
            connection.close()


class _Connection:
    def __init__(self, proxy: Proxy, client: asyncio.StreamWriter, *, dead: bool) -> None:
        self._proxy = proxy
        self.client = client
        self.server: asyncio.StreamWriter | None = None
        self.dead = dead

    async def pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(_CHUNK):
            if self._proxy.delay:
                await asyncio.sleep(self._proxy.delay)
            if not self.dead:
                writer.write(data)
                await writer.drain()
        if not self.dead:  # or neither side hears that the other has gone
            with contextlib.suppress(OSError):
                writer.close()

    def reset(self) -> None:
        raw = self.client.get_extra_info("socket")
        with contextlib.suppress(OSError):
            raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.client.transport.abort()
        self.close()

    def close(self) -> None:
        for writer in (self.client, self.server):
            if writer is not None:
                writer.transport.abort()
