"""Example 1, a production training pipeline: periodic checkpoints, then a look at the last one."""

import asyncio

import torch

from smc.cvnn import CVNN, build_cvnn
from smc.gbm import BlackScholesConfig, SimulationParams
from smc.gbm_trainer import GbmCVNNPricer, GbmCVNNPricerConfig, TrainingConfig
from smc.storage import AsyncBlockchainModelStore, ModelVersion

SIM_PARAMS = SimulationParams(timesteps=16, network_size=128, batches_per_mc_run=8, mc_seed=42)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def create_production_model() -> CVNN:
    return build_cvnn(SIM_PARAMS).to(DEVICE)


def create_production_config(model: CVNN) -> GbmCVNNPricerConfig:
    return GbmCVNNPricerConfig(cfg=BlackScholesConfig(sim_params=SIM_PARAMS), domain_bounds={}, cvnn=model)


async def production_training_pipeline() -> ModelVersion:
    """Production training with automatic checkpoints."""
    async with AsyncBlockchainModelStore("prod-models") as store:
        model = create_production_model()
        pricer = GbmCVNNPricer(create_production_config(model))
        training_config = TrainingConfig(num_batches=400, batch_size=64, learning_rate=0.0005)

        print("Starting training...")
        pricer.train(
            training_config,
            blockchain_store=store,
            auto_commit=True,
            commit_interval=100,
            commit_message_template="[PROD] step={step}, loss={loss:.6f}",
        )

        head = await store.get_head()
        assert head is not None
        print("✓ Training complete")
        print(f"  Final version: {head.counter}")
        print(f"  Total checkpoints: {head.counter + 1}")
        return head


asyncio.run(production_training_pipeline())
