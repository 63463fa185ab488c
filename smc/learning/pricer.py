"""The pricer: a network trained on simulated payoff spectra, and asked for prices and distributions."""

from __future__ import annotations

import contextlib
import copy
import gc
import logging
import math
import queue
import sys
import threading
import time
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from smc.checkpoint.file import metadata_of, tensors_of
from smc.checkpoint.state import GbmCVNNPricerConfig
from smc.errors import ConfigError, NumericsError
from smc.learning.guarded import GuardedLogger, Logger, only_training, stopped_by_signals
from smc.learning.labels import Examples, ExampleSource
from smc.learning.modules import check_trainable, training, unwrapped
from smc.learning.network import check_model
from smc.learning.optimizer import OptimizerName, load_optimizer, make_optimizer, optimizer_name, optimizer_state
from smc.learning.plan import PLAN_END, Progress, StepReport, TrainingConfig, TrainingPlan
from smc.learning.replay import ReplayBuffer
from smc.learning.result import TrainingResult
from smc.learning.scale import Scaling, View, input_count
from smc.learning.step import Position, TrainingStep
from smc.numeric_fields import is_whole
from smc.prediction.predictor import LEARNT, Array, Kind, Kinds, Outside, Predictor
from smc.problem.contracts import ContractsLike, question_units, resolve_domain
from smc.problem.oracles.black_scholes import Greeks
from smc.simulation.engine import engine_of
from smc.simulation.levels import PayoffDistribution, bin_weights
from smc.storage.commits import (
    DEFAULT_MESSAGE,
    FLUSH_SECONDS,
    BackgroundCommits,
    CommitOutcome,
    CommitRequest,
    CommitTarget,
    check_entry,
    check_template,
)
from smc.storage.spool import CommitRecord

__all__ = [
    "GbmCVNNPricer",
    "GbmCVNNPricerConfig",
    "Progress",
    "StepReport",
    "TrainingConfig",
    "TrainingResult",
]

logger = logging.getLogger("smc.training")

# Contracts that the output scaling is measured on, the first of the training stream.
_SCALING_CONTRACTS = 512
# Weight of bin 0, the price, against its share of the Wasserstein distance.
_PRICE_WEIGHT = 10.0
# Losses are read back, checked and reported once in this many steps.
_REPORT_EVERY = {"cpu": 1, "cuda": 50}
# Seconds that another thread may keep Python's lock from the one that launches a GPU's work; Python's own are 0.005.
_SWITCH_INTERVAL = 1e-4


Metrics = Callable[["GbmCVNNPricer"], Mapping[str, float]]


class GbmCVNNPricer:
    """Learns the discounted payoff's quantile spectrum over a domain of contracts: of European puts under geometric
    Brownian motion, or of any problem that `config.cfg` names.

    Lives where its model's parameters live. `snapshot`, `stop` and `progress` may be called from other
    threads while `train` runs; everything else belongs to the thread that trains.

    Raises: ConfigError if the model cannot serve, or its device cannot be used.
    """

    def __init__(self, config: GbmCVNNPricerConfig) -> None:
        self._cfg = config.cfg
        self._params = config.cfg.sim_params
        self.problem = config.cfg.problem
        self.domain = resolve_domain(config.domain_bounds, self.problem.schema)
        question_units(self.domain, self.problem.schema)
        View(self.problem, self.domain).check()
        self.model = config.cvnn
        inputs = input_count(self.problem)
        self.device = check_model(self.model, self._params.bins, self._params.dtype.torch, inputs)
        self._engine = engine_of(config.cfg, self.device)
        self._position = Position(config.global_step, config.sobol_skip, self._params.skip)
        self._plan = config.plan
        self._scaling = config.scaling.to(self.device) if config.scaling else None
        self._resumed_from = config.resumed_from
        on_gpu = self.device.type == "cuda"
        self._optimizer = make_optimizer("soap", self.model)
        self._optimizer_offset = -config.global_step  # from the global step to the optimiser's own
        if config.optimizer_state is not None:
            self._optimizer = load_optimizer(unwrapped(self.model), config.optimizer_state)
            self._optimizer_offset += config.optimizer_state.step
        self._cpu_rng = config.torch_cpu_rng_state or _seeded_rng_state("cpu", self._params.mc_seed)
        self._cuda_rng = list(config.torch_cuda_rng_states)
        if not self._cuda_rng and on_gpu:
            devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
            self._cuda_rng = [_seeded_rng_state(device, self._params.mc_seed) for device in devices]
        weights = bin_weights(self._params.network_size)
        weights[0] *= _PRICE_WEIGHT
        self._weights = weights.to(self.device, self._params.dtype.torch)
        self._lock = threading.Lock()
        self._active: int | None = None  # the thread that trains
        self._requests: queue.SimpleQueue[Future[GbmCVNNPricerConfig]] = queue.SimpleQueue()
        self._stop = threading.Event()
        self._stop_within = math.inf
        self._stop_metrics: Mapping[str, float] = {}
        self._settling: _Commits | None = None
        self._progress = Progress(config.global_step, config.global_step, None, training=False)

    # --- training -------------------------------------------------------------------------------------

    def train(
        self,
        config: TrainingConfig,
        *,
        logger: Logger | Sequence[Logger] | None = None,
        blockchain_store: CommitTarget | None = None,
        auto_commit: bool = False,
        commit_interval: int | None = None,
        commit_message_template: str = DEFAULT_MESSAGE,
        experiment: str = "",
        parameters: Mapping[str, Any] | None = None,
        flush_seconds: float = FLUSH_SECONDS,
        metrics: Metrics | None = None,
    ) -> TrainingResult:
        """Train for `config.num_batches` more batches, committing as asked; return when all is settled.

        `auto_commit` commits the final state, `commit_interval=n` every n batches as well. A commit never
        holds up a step and never ends training: one that fails is logged, counted in the result, and
        its snapshot kept in the spool. After the last step commits have `flush_seconds` to reach the ledger; what has
        not goes to the spool. `experiment` and `parameters`, whatever JSON holds, stand in every entry. Works the same
        inside a running event loop, which it blocks.

        `metrics` is called with the pricer at each commit, and the finite numbers that it gives by name stand in the
        entry beside ours: an error on contracts of one's own, say. Training waits for it; one that fails is dropped
        with one line. What it draws of torch's random numbers does not change what is trained.

        `logger`, one or several, is called with each report, in a thread that this one waits for; one that fails, or
        takes longer than 30 s, is dropped with one line, and training goes on. In the main thread SIGINT and SIGTERM,
        unless the program handles them itself, end training after the step it is in, with its final commit, and are
        then delivered again; a second one leaves the commit seconds. One pricer trains at a time in a process.

        Raises: ConfigError (a ValueError) for arguments that do not go together, before training starts;
        NumericsError when the loss is no longer finite, after the commits before it are settled.
        """
        _check_commit_arguments(blockchain_store, auto_commit, commit_interval)
        check_template(commit_message_template)
        check_entry(experiment, parameters or {})
        if not flush_seconds >= 0:
            raise ConfigError(f"flush_seconds must be at least 0, got {flush_seconds}")
        at = self._position
        if any(parameter.is_inference() for parameter in self.model.parameters()):
            raise ConfigError("the model was made inside torch.inference_mode(), where nothing can be trained")
        probe = torch.zeros(2, input_count(self.problem), dtype=self._params.dtype.torch, device=self.device)
        with (
            stopped_by_signals(lambda within: self.stop(within=within)),
            torch.inference_mode(False),
            torch.enable_grad(),
            self._training_thread(),
            only_training(),
            self._own_rng(),
            _short_pauses(self.device),
            contextlib.ExitStack() as stack,
        ):
            stack.enter_context(training(self.model))
            check_trainable(self.model, probe, config.differential > 0)
            plan = self._enter_plan(config)
            first, end, simulated = at.step, at.step + config.num_batches, at.simulated
            train_one_batch = stack.enter_context(self._training_step(config, plan))
            commits = None
            if auto_commit:
                commits = _Commits(
                    self,
                    blockchain_store,
                    plan,
                    commit_message_template,
                    experiment,
                    parameters or {},
                    only_final=commit_interval is None,
                    metrics=metrics,
                )
            given = [logger] if callable(logger) else list(logger or ())
            loggers = [GuardedLogger(each, self._serve_requests, self.device) for each in given]
            for guarded in loggers:
                stack.callback(guarded.close)
            reports = _Reports(self, train_one_batch, plan, config, loggers)
            started = time.perf_counter()
            whole = True  # the state is that of a step, and not of the middle of one
            try:
                last = self._stop.is_set()
                while not last:
                    self._serve_requests()
                    whole = False
                    train_one_batch()
                    whole = True
                    reports.step_done(commits.pending if commits else 0)
                    last = at.step == end or self._stop.is_set()
                    if commits and commit_interval and (at.step - first) % commit_interval == 0 and not last:
                        commits.submit(train_one_batch, at.step - first)
                loss = reports.finish(commits.pending if commits else 0)
                trained, batch = time.perf_counter(), at.step - first
                if commits and batch:
                    commits.submit(train_one_batch, batch, final=True)
            except BaseException as error:  # whatever ends training, its newest state is kept
                if commits and whole and at.step > first and not isinstance(error, NumericsError):
                    commits.submit(train_one_batch, at.step - first, final=True)
                raise
            finally:
                outcomes = self._settled(commits, flush_seconds) if commits else ()
            return TrainingResult(
                batches=at.step - first,
                global_step=at.step,
                loss=loss,
                seconds=trained - started,
                flush_seconds=time.perf_counter() - trained,
                contracts=at.simulated - simulated,
                stopped=at.step < end,
                commits=outcomes,
            )

    def stop(self, *, within: float = math.inf, metrics: Mapping[str, float] | None = None) -> None:
        """Ask `train` to end after the step it is in; it still makes its final commit.

        `within`: seconds that the newest commit then has to reach the ledger, if that is less than it had anyway; older
        ones are replaced by it. `metrics`, finite numbers, stand in the final commit's entry, beside the others: they
        say why. `within` holds for a `train` that waits for its last commits as well. Raises: ConfigError for metrics
        that are not finite, or a time that is none.
        """
        if math.isnan(within):
            raise ConfigError("within must be a number of seconds, got nan")
        if not all(map(math.isfinite, (metrics or {}).values())):
            raise ConfigError(f"metrics must be finite numbers, got {metrics}")
        self._stop_within, self._stop_metrics = within, metrics or {}
        self._stop.set()
        if (commits := self._settling) is not None and within < math.inf:
            commits.hurry(within)

    def _settled(self, commits: _Commits, flush_seconds: float) -> tuple[CommitOutcome, ...]:
        self._settling = commits  # from here on it is `stop` that may shorten the wait
        try:
            if self._stop_within < math.inf:
                commits.hurry(self._stop_within)
            return commits.close(flush_seconds)
        finally:
            self._settling = None

    @property
    def progress(self) -> Progress:
        """Where training is."""
        return self._progress

    def snapshot(self) -> GbmCVNNPricerConfig:
        """The whole state, copied: `GbmCVNNPricer(pricer.snapshot())` goes on exactly from here.

        From another thread during training it is taken between two steps.
        """
        with self._lock:
            if self._active not in (None, threading.get_ident()):
                request: Future[GbmCVNNPricerConfig] = Future()
                self._requests.put(request)
            else:
                return self._copy()
        return request.result()

    # --- prediction -----------------------------------------------------------------------------------

    def predict_price(
        self, contracts: ContractsLike | Tensor, kind: Kinds = LEARNT, *, outside: Outside = "refuse"
    ) -> Array | Tensor:
        """Present values, held within the no-arbitrage bounds. `kind`: of a European put, calls follow by parity.

        Shapes: n contracts, or an (n, fields) array or tensor -> (n,) float64, a tensor on its device if given one.
        What is certain (T = 0, v = 0) is exact, without the network.
        Raises: ConfigError for a contract outside the trained domain, unless outside='warn', and for a `kind` that does
        not follow from what was learnt.
        """
        self._warn_if_untrained()
        return self._predictor.predict_price(contracts, kind, outside=outside)

    def predict_distribution(
        self, contracts: ContractsLike | Tensor, kind: Kinds = LEARNT, *, outside: Outside = "refuse"
    ) -> PayoffDistribution:
        """Distribution of the discounted payoff, its mean the price. Shapes: n contracts -> levels (n, N).

        A put's is what the network learnt. A call's follows from it by reflection, which holds for log-normal prices.
        """
        self._warn_if_untrained()
        return self._predictor.predict_distribution(contracts, kind, outside=outside)

    def predict_greeks(
        self, contracts: ContractsLike | Tensor, kind: Kinds = LEARNT, *, outside: Outside = "refuse"
    ) -> Greeks:
        """Derivatives of the learnt price by automatic differentiation. Shapes: -> five of (n,)."""
        self._warn_if_untrained()
        return self._predictor.predict_greeks(contracts, kind, outside=outside)

    def predict_sensitivities(
        self, contracts: ContractsLike | Tensor, kind: Kind = LEARNT, *, outside: Outside = "refuse"
    ) -> Any:
        """Derivatives of the learnt price by every field of a contract, by name. Shapes: -> (n,) each."""
        self._warn_if_untrained()
        return self._predictor.predict_sensitivities(contracts, kind, outside=outside)

    @property
    def distribution_kinds(self) -> tuple[Kind, ...]:
        """What there are distributions of: what was learnt, first, and the other option where that follows."""
        return self._predictor.distribution_kinds

    def _warn_if_untrained(self) -> None:
        if self._position.step == 0:
            warnings.warn(
                "this pricer has not been trained: what it predicts is its network's random start; call train first",
                stacklevel=3,
            )

    @cached_property
    def _predictor(self) -> Predictor:
        return Predictor(self.model, self._measured_scaling(), self.domain, self._params.network_size, self.problem)

    # --- state ----------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _training_step(self, config: TrainingConfig, plan: TrainingPlan) -> Iterator[TrainingStep]:
        source = ExampleSource(self._engine, self.domain, differential=config.differential > 0)
        self._continue_with(config.optimizer)
        fresh, scaling = self._fresh_per_batch(config), self._measured_scaling()
        with _half_the_threads(self.device) as executor:
            # Within, because sums are rounded by the number of threads: what the buffer held was made like this.
            replay = self._filled_replay(source) if fresh < config.batch_size else None
            yield TrainingStep(
                self.model,
                self._optimizer,
                source,
                scaling,
                self._weights,
                plan.learning_rate,
                self._position,
                fresh=fresh,
                batch_size=config.batch_size,
                replay=replay,
                differential=config.differential,
                executor=executor,
            )

    def _continue_with(self, name: OptimizerName) -> None:
        """The optimiser of this name: the one there is, or a fresh one."""
        if optimizer_name(self._optimizer) != name:
            self._optimizer = make_optimizer(name, self.model)
            self._optimizer_offset = -self._position.step

    def _filled_replay(self, source: ExampleSource) -> ReplayBuffer:
        """What the buffer held is simulated again: it is a function of the counters alone."""
        at, capacity = self._position, self._params.buffer_size
        missing = min(capacity, at.simulated, at.drawn)
        one = self._examples(source, 0, 0, 1)
        replay = ReplayBuffer(capacity, self._params.mc_seed, at.simulated - missing, one)
        for start in range(-missing, 0, 256):
            count = min(256, -start)
            first = torch.tensor(at.simulated + start, device=self.device)
            replay.insert(self._examples(source, at.drawn + start, at.simulated + start, count), first)
        return replay

    def _examples(self, source: ExampleSource, drawn: int, simulated: int, count: int) -> Examples:
        return source.simulate(source.contracts(drawn, count), torch.tensor(simulated, device=self.device))

    def _measured_scaling(self) -> Scaling:
        if self._scaling is None:
            source = ExampleSource(self._engine, self.domain)
            self._scaling = Scaling.of(self._examples(source, 0, 0, _SCALING_CONTRACTS).targets[:, 0])
        return self._scaling

    def _enter_plan(self, config: TrainingConfig) -> TrainingPlan:
        step = self._position.step
        if self._plan is None or not self._plan.covers(step, config):
            self._plan = TrainingPlan(config=config, start=step)
        return self._plan

    def _fresh_per_batch(self, config: TrainingConfig) -> int:
        if config.fresh_per_batch is not None:
            return config.fresh_per_batch
        if self.device.type == "cuda":
            return config.batch_size
        return min(config.batch_size, max(4, config.batch_size // 8))

    def _copy(self) -> GbmCVNNPricerConfig:
        state = self._state()
        moments = state.optimizer_state
        if moments is not None:
            moments = replace(moments, tensors={n: t.detach().clone() for n, t in moments.tensors.items()})
        return replace(state, cvnn=copy.deepcopy(unwrapped(self.model)), optimizer_state=moments)

    def _state(self) -> GbmCVNNPricerConfig:
        """The state by reference: the next step changes what it points to."""
        if self._active is not None:
            self._cpu_rng, self._cuda_rng = torch.get_rng_state().numpy().tobytes(), self._cuda_states()
        at = self._position
        params = self._params.model_copy(update={"skip": at.simulated})
        return GbmCVNNPricerConfig(
            cfg=self._cfg.model_copy(update={"sim_params": params}),
            domain_bounds=self.domain,
            cvnn=self.model,
            optimizer_state=optimizer_state(self._optimizer, unwrapped(self.model), at.step + self._optimizer_offset),
            global_step=at.step,
            sobol_skip=at.drawn,
            torch_cpu_rng_state=self._cpu_rng,
            torch_cuda_rng_states=self._cuda_rng,
            scaling=self._scaling,
            plan=self._plan,
            resumed_from=self._resumed_from,
        )

    def _cuda_states(self) -> list[bytes]:
        return _cuda_rng_states() if self.device.type == "cuda" else self._cuda_rng

    def _serve_requests(self) -> None:
        with contextlib.suppress(queue.Empty):
            while True:
                request = self._requests.get_nowait()
                request.set_result(self._copy())

    @contextlib.contextmanager
    def _training_thread(self) -> Iterator[None]:
        with self._lock:
            if self._active is not None:
                raise ConfigError("this pricer is already training, on another thread")
            self._active = threading.get_ident()
        # A new thread takes torch's number of threads over only at its first parallel operation, and sums
        # are rounded differently before and after: settle it, or a resumed run would not be the same.
        torch.set_num_threads(torch.get_num_threads())
        try:
            yield
        finally:
            with self._lock:
                self._active = None
                self._serve_requests()
            self._stop.clear()
            self._stop_within, self._stop_metrics = math.inf, {}
            self._progress = replace(self._progress, training=False, commits_pending=0)

    @contextlib.contextmanager
    def _own_rng(self) -> Iterator[None]:
        # torch's generators are global; a pricer keeps its own state so that two in a process do not mix.
        outer_cpu = torch.get_rng_state()
        outer_cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        torch.set_rng_state(torch.frombuffer(bytearray(self._cpu_rng), dtype=torch.uint8))
        for index, state in enumerate(self._cuda_rng[: len(outer_cuda)]):
            torch.cuda.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8), index)
        try:
            yield
        finally:
            self._cpu_rng, self._cuda_rng = torch.get_rng_state().numpy().tobytes(), self._cuda_states()
            torch.set_rng_state(outer_cpu)
            if outer_cuda:
                torch.cuda.set_rng_state_all(outer_cuda)


class _Reports:
    """Losses read, checked and told to the logger: of every step on a CPU; on a GPU now and then, one report late.

    Late, because to read a loss is to wait for its step: the device would have nothing to do until more is launched.
    """

    def __init__(
        self,
        pricer: GbmCVNNPricer,
        step: TrainingStep,
        plan: TrainingPlan,
        config: TrainingConfig,
        loggers: Sequence[Logger],
    ) -> None:
        self._pricer, self._step, self._plan, self._loggers = pricer, step, plan, loggers
        self._every = _REPORT_EVERY[pricer.device.type]
        self._late = 0 if self._every == 1 else 1
        at = step.position
        self._first, self._end, self._asked = at.step, at.step + config.num_batches, at.step
        self._contracts = at.simulated
        self._due: deque[tuple[int, int]] = deque()  # steps, and the contracts simulated until then
        self._loss, self._started = math.nan, time.perf_counter()

    def step_done(self, commits_pending: int) -> None:
        if (self._step.position.step - self._first) % self._every == 0:
            self._ask()
            self._report(self._late, commits_pending)

    def finish(self, commits_pending: int) -> float:
        """Report what is left; -> the last step's loss."""
        if self._asked < self._step.position.step:
            self._ask()
        self._report(0, commits_pending)
        return self._loss

    def _ask(self) -> None:
        self._step.send_losses()
        self._asked = self._step.position.step
        self._due.append((self._asked, self._step.position.simulated))

    def _report(self, late: int, commits_pending: int) -> None:
        while len(self._due) > late:
            step, contracts = self._due.popleft()
            losses = self._step.losses(step)
            _check_finite(losses, step)
            self._loss = losses[-1]
            seconds = time.perf_counter() - self._started
            per_second = (contracts - self._contracts) / max(seconds, 1e-9)
            self._pricer._progress = Progress(step, self._end, self._loss, True, commits_pending, per_second)
            rate = self._plan.learning_rate(step - 1)
            for logger in self._loggers:
                logger(StepReport(step, step - self._first, self._loss, rate, contracts, seconds))


def _check_finite(losses: list[float], last_step: int) -> None:
    for step, loss in enumerate(losses, last_step - len(losses) + 1):
        if not math.isfinite(loss):
            raise NumericsError(
                f"the loss is {loss} at step {step}: nothing from here on is committed; "
                "lower learning_rate, or resume from the last version"
            )


class _Commits:
    """The commits of one call of `train()`."""

    def __init__(
        self,
        pricer: GbmCVNNPricer,
        target: CommitTarget | None,
        plan: TrainingPlan,
        template: str,
        experiment: str,
        parameters: Mapping[str, Any],
        *,
        only_final: bool,
        metrics: Metrics | None,
    ) -> None:
        assert target is not None
        self._metrics = metrics
        self._pricer, self._plan, self._template = pricer, plan, template
        self._experiment, self._parameters = experiment, parameters
        state = pricer._state()
        if state.optimizer_state is None:  # it will be there after the first step
            state = replace(state, optimizer_state=optimizer_state(pricer._optimizer, unwrapped(pricer.model), 1))
        slots = 1 if only_final else None
        self._background = BackgroundCommits(target, tensors_of(state), metadata_of(state), slots=slots)

    @property
    def pending(self) -> int:
        return self._background.pending

    def submit(self, step: TrainingStep, batch: int, *, final: bool = False) -> None:
        state = self._pricer._state()
        request = CommitRequest(
            step=state.global_step,
            batch=batch,
            template=self._template,
            experiment=self._experiment,
            resumed_from=state.resumed_from,
            metrics={
                **self._measured(),
                "learning_rate": self._plan.learning_rate(state.global_step - 1),
                "contracts": state.cfg.sim_params.skip,
                PLAN_END: self._plan.end,
                **(self._pricer._stop_metrics if final else {}),
            },
            parameters=self._parameters,
            final=final,
        )
        self._background.submit(request, tensors_of(state), metadata_of(state), step.outcome())

    def _measured(self) -> dict[str, float]:
        """What the user's own hook gives."""
        if self._metrics is None:
            return {}
        device = self._pricer.device
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                found = dict(self._metrics(self._pricer))
            CommitRecord.checked(ledger="", message="", step=0, loss=None, metrics=found)
        except Exception as error:  # it may raise anything; a KeyboardInterrupt ends training as elsewhere
            logger.warning("metrics failed, and commits go on without it: %r", error)
            self._metrics = None
            return {}
        return found

    def hurry(self, within: float) -> None:
        self._background.hurry(within)

    def close(self, flush_seconds: float) -> tuple[CommitOutcome, ...]:
        return self._background.close(flush_seconds)


def _check_commit_arguments(target: CommitTarget | None, auto_commit: bool, interval: int | None) -> None:
    if target is None and (auto_commit or interval is not None):
        raise ConfigError("auto_commit or commit_interval requires blockchain_store")
    if interval is not None and not auto_commit:
        raise ConfigError("commit_interval requires auto_commit=True")
    if interval is not None and (not is_whole(interval) or interval < 1):
        raise ConfigError(f"commit_interval must be a whole number of batches, at least 1, got {interval!r}")


@contextlib.contextmanager
def _short_pauses(device: torch.device) -> Iterator[None]:
    """On a GPU: nothing in this process keeps the thread that launches from it for longer than a step or so."""
    if device.type == "cpu":
        yield
        return
    # A full collection of what torch and Ray brought along takes a quarter of a second: do it now, and leave that out.
    gc.collect()
    gc.freeze()
    interval = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_INTERVAL)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.unfreeze()


@contextlib.contextmanager
def _half_the_threads(device: torch.device) -> Iterator[Executor | None]:
    """On a CPU with several threads, half of torch's for the network, as many others to simulate ahead of it."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield None
        return
    rest = threads - threads // 2
    torch.set_num_threads(rest)
    # Each new thread settles the number for itself, as in `_training_thread`.
    executor = ThreadPoolExecutor(threads // 2, "smc-simulation", torch.set_num_threads, (rest,))
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _seeded_rng_state(device: str, seed: int) -> bytes:
    return torch.Generator(device).manual_seed(seed % 2**63).get_state().cpu().numpy().tobytes()


def _cuda_rng_states() -> list[bytes]:
    return [state.cpu().numpy().tobytes() for state in torch.cuda.get_rng_state_all()]
