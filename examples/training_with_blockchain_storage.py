"""Quick start: train a model and commit its final checkpoint.

make s3                       # in another terminal: an S3 server on this machine
. .smc/s3/s3.env
.venv/bin/python examples/training_with_blockchain_storage.py
"""

import asyncio

import torch

from smc.cvnn import build_cvnn
from smc.gbm import BlackScholesConfig, SimulationParams
from smc.gbm_trainer import GbmCVNNPricer, GbmCVNNPricerConfig, TrainingConfig
from smc.models.numerical import Precision
from smc.storage import AsyncBlockchainModelStore, load_snapshot_from_checkpoint

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


async def train_with_auto_commit() -> None:
    sim_params = SimulationParams(
        timesteps=16,
        network_size=128,
        batches_per_mc_run=8,
        threads_per_block=256,
        mc_seed=42,
        buffer_size=10000,
        skip=0,
        dtype=Precision.float32,
    )
    bs_config = BlackScholesConfig(
        sim_params=sim_params,
        simulate_log_return=True,
        normalize_forwards=True,
    )
    model = build_cvnn(sim_params).to(DEVICE)
    pricer_config = GbmCVNNPricerConfig(
        cfg=bs_config,
        domain_bounds={},
        cvnn=model,
        optimizer_state=None,
        global_step=0,
        sobol_skip=0,
        torch_cpu_rng_state=torch.get_rng_state().numpy().tobytes(),
        torch_cuda_rng_states=[state.cpu().numpy().tobytes() for state in torch.cuda.get_rng_state_all()]
        if DEVICE == "cuda"
        else [],
    )
    pricer = GbmCVNNPricer(pricer_config)
    training_config = TrainingConfig(num_batches=200, batch_size=32, learning_rate=0.001)

    async with AsyncBlockchainModelStore("my-model-bucket") as store:
        pricer.train(
            training_config,
            blockchain_store=store,
            auto_commit=True,
            commit_message_template="Training complete: step={step}, loss={loss:.4f}",
        )

        head = await store.get_head()
        assert head is not None
        print(f"✓ Committed version {head.counter}: {head.content_hash[:8]}")
        print(f"  Message: {head.commit_message}")

        # Verify what was committed: load it back.
        snapshot = await load_snapshot_from_checkpoint(store, head, model, pricer_config)
        print(f"Global step: {snapshot.global_step}")
        print(f"Optimizer state preserved: {snapshot.optimizer_state is not None}")


asyncio.run(train_with_auto_commit())
