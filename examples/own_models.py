"""A model of one's own through everything: a sweep on Ray, a ledger, training resumed, evaluation, serving."""

import asyncio
import sys

from mean_reverting import MeanReverting, RangeOption

from jobs.recipes import make_experiment
from jobs.running import RunOptions
from jobs.sweep import report, run_experiments
from smc.prediction.evaluation import evaluate
from smc.problem.sobol_sampler import SobolSampler
from smc.serving.client import InferenceClient
from smc.storage import AsyncBlockchainModelStore

LEDGER = "s3://my-models/own"
SIMULATION = {
    "process": MeanReverting(),
    "product": RangeOption(dates=4),
    "sim_params": {"timesteps": 4, "network_size": 64},
}


async def train() -> int:
    experiments = [
        make_experiment(name, {"simulation": SIMULATION, "training": {"learning_rate": rate}}, recipe="tiny")
        for name, rate in (("slow", 0.003), ("fast", 0.01))
    ]
    first = report(await run_experiments(experiments, LEDGER))
    # Again: what is done is trained further, from its last version.
    return first or report(await run_experiments(experiments[1:], LEDGER, RunOptions(extend=True)))


async def heads() -> None:
    async with AsyncBlockchainModelStore(LEDGER) as store:
        for name, version in sorted((await store.catalog()).heads.items()):
            print(f"{name}: {version.version_id}, step {version.step}")


def main() -> int:
    status = asyncio.run(train())
    asyncio.run(heads())
    with InferenceClient(LEDGER, "head:fast") as client:
        contract = {"X0": 100, "G": 0.05, "T": 1.0, "r": 0.03, "a": 1.5, "v": 0.3}
        predictor = client.current.predictor
        price = client.predict_price([contract])[0]
        tail = client.predict_distribution([contract]).cvar(0.975)[0]
        by = client.predict_sensitivities([contract])
        print(f"price {price:.1f}, CVaR97.5 {tail:.0f}, dP/da {by.a[0]:.1f}, dP/dv {by.v[0]:.0f}")
        sample = SobolSampler(predictor.domain, seed=1, schema=predictor.problem.schema).sample(32)
        error = evaluate(predictor, sample)["price"]
        print(f"RMSE {error.rmse:.0f} {error.unit} over {error.count} contracts, {error.compared}")
    return status


if __name__ == "__main__":
    sys.exit(main())
