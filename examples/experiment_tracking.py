"""Example 2, experiment tracking: several experiments, one ordered ledger.

One after another in one process; `jobs/sweep.py` runs such experiments side by side on a cluster.
"""

import asyncio

import torch

from smc.cvnn import CVNN, build_cvnn
from smc.gbm import BlackScholesConfig, SimulationParams
from smc.gbm_trainer import GbmCVNNPricer, GbmCVNNPricerConfig, TrainingConfig
from smc.storage import AsyncBlockchainModelStore

SIM_PARAMS = SimulationParams(timesteps=16, network_size=128, batches_per_mc_run=8, mc_seed=42)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def make_config(model: CVNN) -> GbmCVNNPricerConfig:
    return GbmCVNNPricerConfig(cfg=BlackScholesConfig(sim_params=SIM_PARAMS), domain_bounds={}, cvnn=model)


async def experiment_tracking() -> None:
    """Track several experiments with version control."""
    experiments = {
        "baseline": {"lr": 0.001, "batch": 32},
        "high_lr": {"lr": 0.01, "batch": 32},
        "large_batch": {"lr": 0.001, "batch": 128},
    }

    async with AsyncBlockchainModelStore("experiments-2025") as store:
        for name, params in experiments.items():
            print(f"\nRunning experiment: {name}")
            pricer = GbmCVNNPricer(make_config(build_cvnn(SIM_PARAMS).to(DEVICE)))
            training_config = TrainingConfig(
                num_batches=200, batch_size=int(params["batch"]), learning_rate=params["lr"]
            )
            pricer.train(
                training_config,
                blockchain_store=store,
                auto_commit=True,
                commit_message_template=f"[{name}] lr={params['lr']}, batch={params['batch']}, loss={{loss:.4f}}",
            )
            head = await store.get_head()
            assert head is not None
            print(f"  ✓ Committed as v{head.counter}")

        print("\nAll experiments:")
        newest = await store.get_head()
        assert newest is not None
        for i in range(newest.counter + 1):
            version = await store.get_version(f"v{i:010d}")
            print(f"  v{i}: {version.commit_message}")


asyncio.run(experiment_tracking())
