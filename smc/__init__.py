"""SpectralMC: neural Monte Carlo pricers, trained on payoff spectra, kept in a ledger.

Read in this order: contracts are drawn from a domain (`problem`), paths are simulated and their payoffs sorted into
levels (`simulation`), a network learns the levels' spectrum (`learning`) and is asked (`prediction`), a snapshot of it
(`checkpoint`) is committed beside training as an entry of the ledger (`storage`), from which it is served (`serving`)
and reported (`reporting`). The modules `gbm`, `gbm_trainer`, `cvnn` and `models` are names that users import.
"""

from smc.moved import go_on_working

go_on_working()
