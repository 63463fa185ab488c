"""Serving: a client that predicts with a model of a ledger, and follows the ledger in a thread of its own."""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from types import TracebackType

import torch
from torch import nn

from smc.errors import ConfigError, Unavailable
from smc.prediction.predicting import Predicting
from smc.prediction.predictor import Predictor
from smc.problem.contracts import BoundSpec
from smc.serving.follower import ModelFollower, ServedModel, ServingStatus, load_predictor
from smc.storage.store import AsyncBlockchainModelStore

__all__ = ["InferenceClient", "ModelFollower", "ServedModel", "ServingStatus", "load_predictor"]


class InferenceClient(Predicting):
    """Predicts with a model of a ledger, and follows the ledger in a thread of its own.

    ::

        with InferenceClient("s3://my-bucket/desk", "production") as client:
            client.predict_price([[100, 105, 1.0, 0.03, 0.01, 0.25]])

    Arguments as for `ModelFollower`; `store` is a store or a ledger's address. Every thread may predict.
    """

    def __init__(
        self,
        store: AsyncBlockchainModelStore | str,
        reference: str = "head",
        *,
        track: bool | None = None,
        device: torch.device | str = "cpu",
        model_template: nn.Module | None = None,
        memory: Path | None = None,
        poll_seconds: float = 2.0,
        domain: Mapping[str, BoundSpec | Mapping[str, float]] | None = None,
    ) -> None:
        if poll_seconds <= 0:
            raise ConfigError(f"poll_seconds must be above 0, got {poll_seconds}")
        self._store = AsyncBlockchainModelStore(store) if isinstance(store, str) else store.another()
        self._poll_seconds = poll_seconds
        self._follower = ModelFollower(
            self._store,
            reference,
            track=track,
            device=device,
            model_template=model_template,
            memory=memory,
            domain=domain,
        )
        self._lock = threading.Lock()
        self._run: _Run | None = None
        self._pid = os.getpid()

    def __enter__(self) -> InferenceClient:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self, timeout: float = 60.0) -> InferenceClient:
        """Load the first model; return when it is served.

        Raises: ConfigError, NotFound, Corrupt, NumericsError at once; Unavailable after `timeout` seconds.
        """
        with self._lock:
            if self._run is None:
                self._run = _Run(self._follower, self._store, self._poll_seconds)
            run = self._run
        arrived = run.ready.wait(timeout)
        if run.error is not None or not arrived:
            self.close()
            if run.error is not None:
                raise run.error
            raise Unavailable(self.status.problem or f"nothing to serve after {timeout:g} s")
        return self

    def close(self) -> None:
        """End the thread, also in the middle of a request. What it served can still be asked."""
        with self._lock:
            run, self._run = self._run, None
        if run is not None:
            run.end()

    @property
    def current(self) -> ServedModel:
        """The model that is served now: ask it several things, and the answers are of one version.

        Raises: ConfigError before `start`.
        """
        self._follow_in_a_child()
        served = self._follower.served
        if served is None:
            raise ConfigError("nothing is served yet: use `with InferenceClient(...) as client`, or call start()")
        return served

    @property
    def status(self) -> ServingStatus:
        """What is served, and what is in the way."""
        self._follow_in_a_child()
        return self._follower.status

    def _follow_in_a_child(self) -> None:
        """A process that was forked has its parent's model and none of its threads: it starts its own."""
        if self._pid == os.getpid():
            return
        self._pid, self._lock = os.getpid(), threading.Lock()
        if self._run is not None:
            self._store = self._store.another()
            self._follower.go_on_with(self._store)
            self._run = _Run(self._follower, self._store, self._poll_seconds)

    def asked(self) -> Predictor:
        """The predictor of the model that is served now."""
        return self.current.predictor


class _Run:
    """A thread that polls from `start` to `close`; `ready` is set once a model is served, else `error` says why."""

    def __init__(self, follower: ModelFollower, store: AsyncBlockchainModelStore, poll_seconds: float) -> None:
        self._follower, self._store, self._poll_seconds = follower, store, poll_seconds
        self.ready = threading.Event()
        self.error: Exception | None = None
        self._loop = asyncio.new_event_loop()
        self._task = self._loop.create_task(self._serve())
        self._thread = threading.Thread(target=self._work, name="smc-serving", daemon=True)
        self._thread.start()

    def end(self) -> None:
        with suppress(RuntimeError):  # it has ended by itself
            self._loop.call_soon_threadsafe(self._task.cancel)
        self._thread.join()

    def _work(self) -> None:
        try:
            with suppress(asyncio.CancelledError):
                self._loop.run_until_complete(self._task)
        finally:
            self._loop.run_until_complete(self._loop.shutdown_default_executor())
            self._loop.close()
            self.ready.set()

    async def _serve(self) -> None:
        try:
            async with self._store:
                while True:
                    try:
                        await self._follower.poll()
                    except Unavailable:
                        pass
                    except Exception as error:
                        if self._follower.served is None:
                            self.error = error
                            return
                    if self._follower.served is not None:
                        self.ready.set()
                    await asyncio.sleep(self._poll_seconds)
        except Exception as error:  # the store cannot be opened
            self.error = error
            self._follower.note(error)
