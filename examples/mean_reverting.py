"""A process and a product of one's own: a price that comes back to where it was, and a payoff on its range."""

import math

import torch

from smc.problem.problem import register
from smc.problem.process import Process
from smc.problem.processes.gbm import RATE, SPOT
from smc.problem.product import Product
from smc.problem.schema import Field


@register
class MeanReverting(Process):
    """d ln S = a (ln X0 - ln S) dt + v dW, stepped exactly."""

    kind = "mean_reverting"
    fields = (
        SPOT,
        RATE,
        Field("a", "speed", "per year", 0.5, 3.0, least=0.0, strict=True),
        Field("v", "volatility", "per square root of a year", 0.1, 0.5, least=0.0, certain=True),
    )

    @property
    def exact(self):  # one step of any length has the right law
        return True

    def coefficients(self, c, dt):  # once a contract, in double precision
        decay = math.exp(-c.a * dt)
        return decay, c.v * math.sqrt((1 - decay * decay) / (2 * c.a)), c.X0

    def start(self, c):  # the state: ln(S / X0)
        return (0.0,)

    def step(self, state, normals, k):  # a state, the normals of a step, the coefficients
        return (k[0] * state[0] + k[1] * normals[0],)

    def spot(self, state, k):
        return k[2] * math.exp(state[0])

    # What is known without a simulation, of tensors. It may be left out: learning is then harder.

    def deviation(self, c, t):
        return c.v * torch.sqrt(-torch.expm1(-2 * c.a * t) / (2 * c.a))

    def growth(self, c, t):  # ln(E S / X0)
        return self.deviation(c, t).square() / 2


@register
class RangeOption(Product):
    """Pays the distance of the highest and the lowest price on `dates` dates, as far as it is above G X0."""

    kind = "range_option"
    fields = (Field("G", "range that pays nothing", "a ratio to the spot", 0.0, 0.2, least=0.0),)
    lipschitz = True  # the payoff moves little when a price does: it has derivatives along paths
    dates: int = 12

    def coefficients(self, c):
        return c.G * c.X0, math.exp(-c.r * c.T)

    def begin(self, k):  # what is known of a path: highest, lowest
        return 0.0, math.inf

    def observe(self, seen, spot, date, k):
        return max(seen[0], spot), min(seen[1], spot)

    def payoff(self, seen, spot, k):  # discounted
        return k[1] * max(seen[0] - seen[1] - k[0], 0.0)
