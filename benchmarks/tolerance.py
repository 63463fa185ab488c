"""How far apart one version's answers to one contract lie, by how and where they are asked for.

.venv/bin/python -m benchmarks.tolerance [--json FILE] [--contracts N]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from benchmarks.reporting import Report, run
from smc.learning.network import build_cvnn
from smc.learning.pricer import GbmCVNNPricer, GbmCVNNPricerConfig, TrainingConfig
from smc.models.numerical import Precision
from smc.problem.sobol_sampler import SobolSampler
from smc.simulation.engine import BlackScholesConfig, SimulationParams

Array = npt.NDArray[np.float64]

_ASKED_ELSEWHERE = """
import sys
import numpy as np
import torch
from smc.learning.pricer import GbmCVNNPricer
pricer = GbmCVNNPricer(torch.load(sys.argv[1], weights_only=False))
np.save(sys.argv[3], pricer.predict_price(np.load(sys.argv[2])))
"""


def elsewhere(pricer: GbmCVNNPricer, contracts: Array, **environment: str) -> Array:
    """What another process answers, with other settings of the machine's libraries."""
    with tempfile.TemporaryDirectory() as folder:
        state, asked, answers = (Path(folder) / name for name in ("state.pt", "contracts.npy", "prices.npy"))
        torch.save(pricer.snapshot(), state)
        np.save(asked, contracts)
        command = [sys.executable, "-c", _ASKED_ELSEWHERE, str(state), str(asked), str(answers)]
        subprocess.run(command, check=True, env={**os.environ, **environment})
        return np.asarray(np.load(answers), dtype=np.float64)


def measure(report: Report, options: argparse.Namespace) -> None:
    contracts = SobolSampler({}, seed=3).sample(options.contracts)
    for precision in Precision:
        measure_at(report, precision, contracts)


def measure_at(report: Report, precision: Precision, contracts: Array) -> None:
    params = SimulationParams(timesteps=1, network_size=256, batches_per_mc_run=16, mc_seed=1, dtype=precision)
    pricer = GbmCVNNPricer(
        GbmCVNNPricerConfig(cfg=BlackScholesConfig(sim_params=params), domain_bounds={}, cvnn=build_cvnn(params))
    )
    pricer.train(TrainingConfig(num_batches=200, batch_size=32, learning_rate=1e-2))
    prices = np.asarray(pricer.predict_price(contracts))

    def compare(how: str, others: Array | Tensor) -> None:
        apart = float(np.max(np.abs(np.asarray(others) - prices) / contracts[:, 0]))
        report.add(f"{precision}, all at once and {how}: largest difference", apart, "of spot")

    def in_parts(size: int) -> Array:
        starts = range(0, len(contracts), size)
        return np.concatenate([np.asarray(pricer.predict_price(contracts[start : start + size])) for start in starts])

    compare("again", pricer.predict_price(contracts))
    compare("one by one", in_parts(1))
    compare("13 at a time", in_parts(13))
    compare("by one thread", elsewhere(pricer, contracts, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1"))
    older = elsewhere(pricer, contracts, ATEN_CPU_CAPABILITY="default", MKL_ENABLE_INSTRUCTIONS="SSE4_2")
    compare("without AVX", older)
    if torch.cuda.is_available():
        state = pricer.snapshot()
        there = GbmCVNNPricer(replace(state, cvnn=state.cvnn.cuda(), optimizer_state=None, torch_cuda_rng_states=()))
        compare("on the GPU", there.predict_price(contracts))


if __name__ == "__main__":
    run(
        "One version's prices, network 7-64-64-64-129",
        measure,
        ("--contracts", {"type": int, "default": 2048, "help": "how many are asked for"}),
    )
