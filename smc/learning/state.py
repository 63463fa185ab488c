"""Everything of a pricer that training changes: network, optimiser, position in its streams, random numbers, plan."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from dataclasses import replace

import torch
from torch import Tensor

from smc.checkpoint.state import GbmCVNNPricerConfig
from smc.learning.error_bars import ErrorBars
from smc.learning.exercise import with_policy
from smc.learning.labels import Contracts, Examples, ExampleSource
from smc.learning.modules import unwrapped
from smc.learning.network import check_model
from smc.learning.optimizer import OptimizerName, load_optimizer, make_optimizer, optimizer_name, optimizer_state
from smc.learning.plan import TrainingConfig, TrainingPlan
from smc.learning.replay import ReplayBuffer
from smc.learning.scale import Scaling, View, input_count
from smc.learning.step import Position, TrainingStep
from smc.prediction.predictor import Predictor
from smc.problem.contracts import question_units, resolve_domain
from smc.simulation.config import BlackScholesConfig, ProblemConfig
from smc.simulation.engine import engine_of
from smc.simulation.levels import bin_weights

__all__ = ["TrainingState"]

# Contracts that the output scaling is measured on, the first of the training stream.
_SCALING_CONTRACTS = 512
# Contracts whose payoffs are looked at, path by path, before anything is trained.
_CHECKED_CONTRACTS = 64
# Weight of bin 0, the price, against its share of the Wasserstein distance.
_PRICE_WEIGHT = 10.0
# Of held-back contracts: what their seeds differ by, and how many more paths they have each time. On a GPU so many are
# simulated together.
_HELD_BACK, _FINER, _HELD_BACK_ROWS = 0x48454C44, 4, 64


class TrainingState:
    """A pricer's state, made of a configuration and given back as one. It belongs to one thread at a time.

    Raises: ConfigError if the model cannot serve, or its device cannot be used.
    """

    def __init__(self, config: GbmCVNNPricerConfig) -> None:
        self.params = config.cfg.sim_params
        self.domain = resolve_domain(config.domain_bounds, config.cfg.problem.schema)
        self._cfg = self._ready(config.cfg)
        self.problem = self._cfg.problem
        question_units(self.domain, self.problem.schema)
        View(self.problem, self.domain).check()
        self.model = config.cvnn
        inputs = input_count(self.problem)
        self.device = check_model(self.model, self.params.bins, self.params.dtype.torch, inputs)
        self.probe = torch.zeros(2, inputs, dtype=self.params.dtype.torch, device=self.device)
        self.position = Position(config.global_step, config.sobol_skip, self.params.skip)
        self._engine = engine_of(self._cfg, self.device)
        self._plan = config.plan
        self._scaling = config.scaling.to(self.device) if config.scaling else None
        self.error_bars = config.error_bars.to(self.device) if config.error_bars else None
        self._resumed_from = config.resumed_from
        self._optimizer = make_optimizer("soap", self.model)
        self._optimizer_offset = -config.global_step  # from the global step to the optimiser's own
        if config.optimizer_state is not None:
            self._optimizer = load_optimizer(unwrapped(self.model), config.optimizer_state)
            self._optimizer_offset += config.optimizer_state.step
        self._cpu_rng = config.torch_cpu_rng_state or _seeded_rng_state("cpu", self.params.mc_seed)
        self._cuda_rng = list(config.torch_cuda_rng_states)
        if not self._cuda_rng and self.device.type == "cuda":
            devices = [f"cuda:{index}" for index in range(torch.cuda.device_count())]
            self._cuda_rng = [_seeded_rng_state(device, self.params.mc_seed) for device in devices]
        self._draws = False  # torch's generators are this state's
        weights = bin_weights(self.params.network_size)
        weights[0] *= _PRICE_WEIGHT
        self._weights = weights.to(self.device, self.params.dtype.torch)

    def _ready(self, cfg: BlackScholesConfig | ProblemConfig) -> BlackScholesConfig | ProblemConfig:
        """With a policy of exercise, where one is needed and there is none."""
        if not isinstance(cfg, ProblemConfig):
            return cfg
        problem = with_policy(cfg.problem, self.domain, seed=self.params.mc_seed)
        return cfg if problem is cfg.problem else cfg.with_product(problem.product)

    # --- as a configuration ---------------------------------------------------------------------------

    def by_reference(self) -> GbmCVNNPricerConfig:
        """The state as it is: the next step changes what it points to."""
        if self._draws:
            self._cpu_rng, self._cuda_rng = torch.get_rng_state().numpy().tobytes(), self._cuda_states()
        at = self.position
        params = self.params.model_copy(update={"skip": at.simulated})
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
            error_bars=self.error_bars,
            plan=self._plan,
            resumed_from=self._resumed_from,
        )

    def copied(self) -> GbmCVNNPricerConfig:
        """The state, which nothing that training does later can change."""
        state = self.by_reference()
        moments = state.optimizer_state
        if moments is not None:
            moments = replace(moments, tensors={n: t.detach().clone() for n, t in moments.tensors.items()})
        return replace(state, cvnn=copy.deepcopy(unwrapped(self.model)), optimizer_state=moments)

    def after_a_step(self) -> GbmCVNNPricerConfig:
        """The state by reference, with the optimiser's as it will look after the first step."""
        state = self.by_reference()
        if state.optimizer_state is not None:
            return state
        return replace(state, optimizer_state=optimizer_state(self._optimizer, unwrapped(self.model), 1))

    @property
    def scaling(self) -> Scaling:
        """The scale of the network's output, measured when first asked for."""
        if self._scaling is None:
            source = ExampleSource(self._engine, self.domain)
            source.check_payoffs(_CHECKED_CONTRACTS)
            self._scaling = Scaling.of(self._examples(source, 0, 0, _SCALING_CONTRACTS).targets[:, 0])
        return self._scaling

    # --- training -------------------------------------------------------------------------------------

    def enter_plan(self, config: TrainingConfig) -> TrainingPlan:
        """The plan that a call with this configuration goes on with, or begins."""
        step = self.position.step
        if self._plan is None or not self._plan.covers(step, config):
            self._plan = TrainingPlan(config=config, start=step)
        inputs = self.probe.shape[1]
        self.error_bars = ErrorBars.unknown(inputs, self.device) if config.held_back else None
        return self._plan

    def measure_error_bars(self, count: int) -> None:
        """Simulate so many contracts that training has not seen, and tell from them how far off answers are."""
        params = self.params.model_copy(
            update={
                "mc_seed": self.params.mc_seed ^ _HELD_BACK, "skip": 0,
                "batches_per_mc_run": self.params.batches_per_mc_run * _FINER,
            }
        )  # fmt: skip
        engine = engine_of(self._cfg.model_copy(update={"sim_params": params}), self.device)
        source = ExampleSource(engine, self.domain)
        held = source.contracts(0, count)
        # Each contract is simulated twice, on other random numbers: half of the difference is the noise of the mean.
        one, other = (self._held_back_prices(source, held, start) for start in (0, 1 << 40))
        predictor = Predictor(self.model, self.scaling, self.domain, self.params.network_size, self.problem)
        price = torch.as_tensor(predictor.predict_price(held.table))
        learnt = price / source.view.unit(held.table) - source.view.anchor(held.table)
        self.error_bars = ErrorBars.of(held.inputs[:, 0], (one + other) / 2 - learnt, (one - other) / 2).to(self.device)

    def _held_back_prices(self, source: ExampleSource, held: Contracts, start: int) -> Tensor:
        """Simulated prices as labels have them, in pieces that fit into memory. Shapes: -> (n,) float64."""
        count = len(held.table)
        rows = source.engine.rows_at_once if self.device.type == "cpu" else _HELD_BACK_ROWS

        def simulated(at: int) -> Tensor:
            part = held.select(torch.arange(at, min(at + rows, count), device=self.device))
            return source.simulate(part, torch.tensor(start + at, device=self.device)).targets[:, 0, 0, 0].double()

        with _half_the_threads(self.device) as executor:
            pieces = list(range(0, count, rows))
            beside = {at: executor.submit(simulated, at) for at in pieces[::2]} if executor else {}
            here = {at: simulated(at) for at in pieces if at not in beside}
            return torch.cat([here[at] if at in here else beside[at].result() for at in pieces])

    @contextlib.contextmanager
    def training_step(self, config: TrainingConfig, plan: TrainingPlan) -> Iterator[TrainingStep]:
        """What trains by a batch a call, and moves this state on."""
        source = ExampleSource(self._engine, self.domain, differential=config.differential > 0)
        self._continue_with(config.optimizer)
        fresh, scaling = self._fresh_per_batch(config), self.scaling
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
                self.position,
                fresh=fresh,
                batch_size=config.batch_size,
                replay=replay,
                differential=config.differential,
                executor=executor,
            )

    @contextlib.contextmanager
    def own_random_numbers(self) -> Iterator[None]:
        """Torch's generators, which are global, go on as this state's: two pricers in a process do not mix."""
        outer_cpu = torch.get_rng_state()
        outer_cuda = torch.cuda.get_rng_state_all() if self.device.type == "cuda" else []
        torch.set_rng_state(torch.frombuffer(bytearray(self._cpu_rng), dtype=torch.uint8))
        for index, state in enumerate(self._cuda_rng[: len(outer_cuda)]):
            torch.cuda.set_rng_state(torch.frombuffer(bytearray(state), dtype=torch.uint8), index)
        self._draws = True
        try:
            yield
        finally:
            self._cpu_rng, self._cuda_rng = torch.get_rng_state().numpy().tobytes(), self._cuda_states()
            self._draws = False
            torch.set_rng_state(outer_cpu)
            if outer_cuda:
                torch.cuda.set_rng_state_all(outer_cuda)

    def _continue_with(self, name: OptimizerName) -> None:
        """The optimiser of this name: the one there is, or a fresh one."""
        if optimizer_name(self._optimizer) != name:
            self._optimizer = make_optimizer(name, self.model)
            self._optimizer_offset = -self.position.step

    def _fresh_per_batch(self, config: TrainingConfig) -> int:
        if config.fresh_per_batch is not None:
            return config.fresh_per_batch
        if self.device.type == "cuda":
            return config.batch_size
        return min(config.batch_size, max(4, config.batch_size // 8))

    def _filled_replay(self, source: ExampleSource) -> ReplayBuffer:
        """What the buffer held is simulated again: it is a function of the counters alone."""
        at, capacity = self.position, self.params.buffer_size
        missing = min(capacity, at.simulated, at.drawn)
        one = self._examples(source, 0, 0, 1)
        replay = ReplayBuffer(capacity, self.params.mc_seed, at.simulated - missing, one)
        for start in range(-missing, 0, 256):
            count = min(256, -start)
            first = torch.tensor(at.simulated + start, device=self.device)
            replay.insert(self._examples(source, at.drawn + start, at.simulated + start, count), first)
        return replay

    def _examples(self, source: ExampleSource, drawn: int, simulated: int, count: int) -> Examples:
        return source.simulate(source.contracts(drawn, count), torch.tensor(simulated, device=self.device))

    def _cuda_states(self) -> list[bytes]:
        if self.device.type != "cuda":
            return self._cuda_rng
        return [state.cpu().numpy().tobytes() for state in torch.cuda.get_rng_state_all()]


@contextlib.contextmanager
def _half_the_threads(device: torch.device) -> Iterator[Executor | None]:
    """On a CPU with several threads, half of torch's for the network, as many others to simulate ahead of it."""
    threads = torch.get_num_threads()
    if device.type != "cpu" or threads == 1:
        yield None
        return
    rest = threads - threads // 2
    torch.set_num_threads(rest)
    # Each new thread settles the number for itself, as in `TrainingControl.running`.
    executor = ThreadPoolExecutor(threads // 2, "smc-simulation", torch.set_num_threads, (rest,))
    try:
        yield executor
    finally:
        executor.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


def _seeded_rng_state(device: str, seed: int) -> bytes:
    return torch.Generator(device).manual_seed(seed % 2**63).get_state().cpu().numpy().tobytes()
