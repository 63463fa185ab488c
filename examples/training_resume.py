"""Example 3, training resume: go on from the newest checkpoint. Run it twice."""

import asyncio

import torch

from smc.cvnn import build_cvnn
from smc.gbm import BlackScholesConfig, SimulationParams
from smc.gbm_trainer import GbmCVNNPricer, GbmCVNNPricerConfig, TrainingConfig
from smc.storage import AsyncBlockchainModelStore, load_snapshot_from_checkpoint

SIM_PARAMS = SimulationParams(timesteps=16, network_size=128, batches_per_mc_run=8, mc_seed=42)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def create_initial_config() -> GbmCVNNPricerConfig:
    model = build_cvnn(SIM_PARAMS).to(DEVICE)
    return GbmCVNNPricerConfig(cfg=BlackScholesConfig(sim_params=SIM_PARAMS), domain_bounds={}, cvnn=model)


async def resume_training() -> None:
    """Resume training from the last checkpoint."""
    async with AsyncBlockchainModelStore("my-models") as store:
        head = await store.get_head()

        if head is None:
            print("No previous checkpoint, starting fresh")
            snapshot = create_initial_config()
        else:
            print(f"Resuming from checkpoint v{head.counter}")
            config_template = create_initial_config()
            snapshot = await load_snapshot_from_checkpoint(store, head, config_template.cvnn, config_template)

        pricer = GbmCVNNPricer(snapshot)
        training_config = TrainingConfig(num_batches=200, batch_size=32, learning_rate=0.001)
        pricer.train(
            training_config,
            blockchain_store=store,
            auto_commit=True,
            commit_interval=100,
            commit_message_template="Resume: step={step}, loss={loss:.4f}",
        )

        new_head = await store.get_head()
        assert new_head is not None
        print(f"✓ Training resumed, now at v{new_head.counter}")


asyncio.run(resume_training())
